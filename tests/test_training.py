"""The training loop: what it trains, what it leaves alone, and that a killed run comes to the same losses."""

import copy
import csv
import dataclasses
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from sketchfusion import ConfigError, ImageError, LoadError, SketchFusion, SketchFusionError, cli, progress
from sketchfusion.data import DataSet, Record, load
from sketchfusion.evaluation import protocols
from sketchfusion.images import Preprocess
from sketchfusion.strokes import Strokes
from sketchfusion.tasks import Task
from sketchfusion.tasks.correspondence import Correspondence
from sketchfusion.tasks.recognition import Recognition
from sketchfusion.tasks.retrieval import Retrieval
from sketchfusion.tasks.segmentation import Segmentation
from sketchfusion.training import Settings, cache, train
from sketchfusion.training.cache import Entry, FrozenCache, backbones_key, pixels_of
from sketchfusion.training.checkpoints import HEAD, STATE, State, load_head
from sketchfusion.training.jobs import Apart, make_job, make_jobs
from sketchfusion.training.loop import _Batches, _check_scale, _look_at, identity
from sketchfusion.training.views import View, draw_view

DOT = '<path d="M50 80h0.01" fill="none" stroke="black" stroke-width="6"/>'
SHAPES = {"disc": "ellipse", "block": "rectangle", "wedge": "polygon", "bow": "chord"}


def draw(path: Path, shape: str, random: np.random.Generator, *, filled: bool) -> tuple[int, int, int, int]:
    """A shape on white, filled for a photo and in outline for a sketch; returns its box."""
    image = Image.new("RGB", (48, 40), "white")
    pen = ImageDraw.Draw(image)
    left, top = (int(v) for v in random.integers(2, 14, size=2))
    box = (left, top, left + int(random.integers(16, 30)), top + int(random.integers(14, 24)))
    corners: Any = [(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])]
    colour = tuple(int(v) for v in random.integers(40, 180, size=3))
    looks: dict[str, Any] = {"fill": colour} if filled else {"outline": "black", "width": 2}
    if shape == "bow":
        looks |= {"start": 20, "end": 200}
    getattr(pen, SHAPES[shape])(corners if shape == "wedge" else box, **looks)
    image.save(path)
    return box


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """Four classes of four photos with masks and key points, two sketches each."""
    folder, random = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    records = []
    for label in SHAPES:
        for i in range(4):
            for kind, k in (("photo", 0), ("sketch", 1), ("sketch", 2)):
                path = folder / f"{label}{i}-{k}.png"
                box = draw(path, label, random, filled=kind == "photo")
                points = (("low", float(box[0]), float(box[3])), ("high", float(box[2]), float(box[1])))
                mask = None
                if kind == "photo":
                    mask = str(folder / f"{label}{i}-mask.png")
                    Image.fromarray((np.asarray(Image.open(path)).sum(2) < 765).astype(np.uint8) * 255).save(mask)
                records.append(
                    Record(str(path), kind, label, photo=f"{label}/{i}", mask=mask, points=points)  # type: ignore[arg-type]
                )
    return DataSet("shapes", tuple(SHAPES), tuple(records), "all")


def tasks_of(name: str, data: DataSet, width: int) -> Task:
    torch.manual_seed(0)
    match name:
        case "retrieval":
            return Retrieval(data, classes=3, per_class=2)
        case "recognition":
            return Recognition(data, width, batch_size=8)
        case "correspondence":
            return Correspondence(data, pairs=4)
    return Segmentation(data, data, pairs=4)


def rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


FEW = Settings(steps=4, lr=3e-3, views=2)


@pytest.mark.parametrize("name", ["retrieval", "recognition", "correspondence", "segmentation"])
def test_every_task_trains_adapters_and_aggregator_and_nothing_else(
    name: str, untrained: SketchFusion, shapes: DataSet, tmp_path: Path
) -> None:
    task = tasks_of(name, shapes, untrained.config.aggregator_width)
    frozen = snapshot(untrained.diffusion) | snapshot(untrained.semantic)
    before = {n: p.clone() for n, p in untrained.named_parameters() if p.requires_grad}
    heads = [p.clone() for p in task.parameters()]
    train(untrained, task, tmp_path, FEW, training_data="shapes")
    after = dict(untrained.named_parameters())
    still = [n for n, p in before.items() if torch.equal(p, after[n])]
    assert still == []
    assert all(
        torch.equal(t, frozen[n]) for n, t in (snapshot(untrained.diffusion) | snapshot(untrained.semantic)).items()
    )
    assert not any(torch.equal(a, b) for a, b in zip(heads, task.parameters(), strict=True))
    assert not untrained.training

    loaded = SketchFusion.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert (loaded.config.task, loaded.config.training_data) == (name, "shapes")
    image = shapes.records[0].path
    torch.testing.assert_close(loaded.encode(image).pooled, untrained.encode(image).pooled, rtol=0.02, atol=0.02)
    log = rows(tmp_path / "log.csv")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert {"lr", "loss", "grad_norm", "images_per_second"} < set(log[0])


def test_the_loss_falls(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    task = tasks_of("recognition", shapes, 32)
    train(untrained, task, tmp_path, Settings(steps=150, lr=1e-2, views=1), cache=tmp_path / "cache")
    losses = [row["loss"] for row in rows(tmp_path / "log.csv")]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_several_tasks_share_a_step(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    both = [tasks_of(name, shapes, 32) for name in ("retrieval", "correspondence")]
    train(untrained, both, tmp_path, FEW)
    first = rows(tmp_path / "log.csv")[0]
    weighted = first["correspondence.contrastive"] + 5 * first["correspondence.flow"]
    assert first["loss"] == pytest.approx(first["retrieval.info_nce"] + weighted, rel=1e-4)
    assert SketchFusion.from_pretrained(tmp_path, device="cpu").config.task == "retrieval, correspondence"


def test_activations_can_be_recomputed(
    untrained: SketchFusion, shapes: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, logs, reruns = snapshot(untrained), [], []
    recompute = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: reruns.append(1) or recompute(*a, **k))
    for number, wanted in enumerate((False, True)):
        untrained.load_state_dict(begun)
        settings = dataclasses.replace(FEW, gradient_checkpointing=wanted)
        train(untrained, tasks_of("retrieval", shapes, 32), tmp_path / str(number), settings)
        assert bool(reruns) == wanted
        logs.append([row["loss"] for row in rows(tmp_path / str(number) / "log.csv")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_a_validation_that_fails_costs_nothing(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    def fails(model: SketchFusion) -> dict[str, float]:
        raise SketchFusionError("no photos of horses")

    with pytest.raises(SketchFusionError, match="horses"):
        train(untrained, tasks_of("recognition", shapes, 32), tmp_path, FEW, validate=fails)
    loaded = SketchFusion.from_pretrained(tmp_path, dtype="float32", device="cpu")
    for name, tensor in untrained.adapters.state_dict().items():
        assert torch.equal(loaded.adapters.state_dict()[name], tensor.half().float())
    assert load_head(tmp_path)[1] == tuple(sorted(SHAPES))


def test_validation_begins_anew_with_another_run(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    for key in ("a", "b"):
        settings = dataclasses.replace(FEW, validate_every=2)
        train(
            untrained, tasks_of("retrieval", shapes, 32), tmp_path, settings, validate=lambda model, key=key: {key: 1.0}
        )
        assert (tmp_path / "validation.csv").read_text().splitlines() == [f"step,{key}", "2,1", "4,1"]
        (tmp_path / STATE).unlink()


def test_an_ablation_ends_with_its_run(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    settings = dataclasses.replace(FEW, without=("adapters", "mixing"))
    train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, settings)
    assert not any(parameter.any() for parameter in untrained.adapters.parameters())
    assert all(parameter.requires_grad for parameter in untrained.trainable_parameters())


class Interrupted(torch.nn.Module):
    name = "interrupted"

    def __init__(self, data: DataSet):
        super().__init__()
        self.records = data.records

    def batch(self, random: np.random.Generator) -> list[Record]:
        return list(self.records[:2])

    def loss(self, features: Any, samples: Any) -> Any:
        raise KeyboardInterrupt


class Normed(Interrupted):
    """A head that keeps running means, and drops out."""

    name = "normed"

    def __init__(self, data: DataSet):
        super().__init__(data)
        torch.manual_seed(0)
        self.head = torch.nn.Sequential(torch.nn.BatchNorm1d(32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 1))
        self.modes: list[bool] = []

    def loss(self, features: Any, samples: Any) -> Any:
        self.modes.append(self.training)
        return (self.head(features.pooled) - 1).square().mean(), {}


def test_what_a_task_keeps_besides_parameters_goes_on(
    untrained: SketchFusion, shapes: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, plan, ends = snapshot(untrained), dataclasses.replace(FEW, checkpoint_every=2), []

    def dying(self: State, step: int) -> None:
        save(self, step)
        raise KeyboardInterrupt

    save = State.save
    for out in ("whole", "pieces", "pieces", "pieces"):  # the last is done already
        untrained.load_state_dict(start)
        task = Normed(shapes)
        if out == "pieces" and len(ends) == 1 and not (tmp_path / out).exists():
            with monkeypatch.context() as patch:
                patch.setattr(State, "save", dying)
                with pytest.raises(KeyboardInterrupt):
                    train(untrained, task, tmp_path / out, plan)
            assert task.head[0].num_batches_tracked == 2
            continue
        train(untrained, task, tmp_path / out, plan)
        ends.append(snapshot(task))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=0)
    assert ends[0]["head.0.num_batches_tracked"] == 4


def test_tasks_learn_in_training_mode_and_are_looked_at_in_eval_mode(
    untrained: SketchFusion, shapes: DataSet, tmp_path: Path
) -> None:
    task, seen = Normed(shapes).eval(), []
    validate = dataclasses.replace(FEW, validate_every=2)
    train(untrained, task, tmp_path, validate, validate=lambda _: seen.append(task.head.training) or {"metric": 0.0})
    assert (task.modes, seen, task.training) == ([True] * 4, [False, False], False)


def test_one_run_at_a_time_in_a_folder(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / "log.csv").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SketchFusionError, match="another process is training in this folder"):
            train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, FEW)
    train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, FEW)


@pytest.mark.parametrize(
    ("method", "found", "said"),
    [
        ("batch", lambda task: (record for record in task.records[:2]), "another batch; legal: a list of records"),
        ("batch", lambda task: [record.path for record in task.records[:2]], "another batch; legal: a list of records"),
        ("batch", lambda task: [Record("elsewhere.png", "photo", "x")], "what is not among its records"),
        ("loss", lambda task: torch.zeros((), requires_grad=True), "another loss; legal: .loss, its parts"),
    ],
)
def test_a_task_of_ones_own_that_does_not_fit(
    untrained: SketchFusion, shapes: DataSet, tmp_path: Path, method: str, found: Any, said: str
) -> None:
    task = Normed(shapes)
    setattr(task, method, lambda *_: found(task))
    with pytest.raises(ConfigError, match=f"task normed.*{said}"):
        train(untrained, task, tmp_path, FEW)


def test_a_validation_gives_figures_by_name(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validate.*float.*legal: a dict"):
        train(untrained, Normed(shapes), tmp_path, FEW, validate=lambda _: 0.5)  # type: ignore[arg-type,return-value]
    SketchFusion.from_pretrained(tmp_path, device="cpu")  # what was trained is there


def test_key_points_of_images_that_were_resized_without_them(
    untrained: SketchFusion, shapes: DataSet, tmp_path: Path
) -> None:
    large = [dataclasses.replace(r, points=[(n, 8 * x, 8 * y) for n, x, y in r.points]) for r in shapes.records]  # type: ignore[misc]
    task = Correspondence(dataclasses.replace(shapes, records=tuple(large)), pairs=4)
    with pytest.raises(SketchFusionError, match=r"its key point low \(.*\) lies outside of its 48 x 40 pixels"):
        train(untrained, task, tmp_path, FEW)


@pytest.mark.parametrize("plan", [{"without": ("adapters", "mixing")}, {"finetune": True}])
def test_what_learns_is_as_before_after_a_run_that_was_interrupted(
    untrained: SketchFusion, shapes: DataSet, tmp_path: Path, plan: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(untrained, Interrupted(shapes), tmp_path, dataclasses.replace(FEW, **plan))
    trainable = {id(parameter) for parameter in untrained.trainable_parameters()}
    assert all(parameter.requires_grad == (id(parameter) in trainable) for parameter in untrained.parameters())
    assert not untrained.training


def test_the_card_keeps_what_the_model_had_seen(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    task, once = tasks_of("retrieval", shapes, 32), dataclasses.replace(FEW, steps=1)
    train(untrained, task, tmp_path / "a", once, training_data="shapes")
    assert untrained.config.training_data == "shapes"
    train(untrained, task, tmp_path / "b", once, training_data="more shapes")
    assert untrained.config.training_data == "shapes. Then: more shapes"
    train(untrained, task, tmp_path / "c", once)
    assert untrained.config.training_data == "shapes. Then: more shapes. Then: not stated"


def test_every_validation_is_kept_whatever_its_figures_are_called(
    untrained: SketchFusion, shapes: DataSet, tmp_path: Path
) -> None:
    """And of whatever kind they are."""
    name, settings = "retrieval map_all, shapes, 2 classes held out", dataclasses.replace(FEW, validate_every=1)
    figures = train(
        untrained, tasks_of("retrieval", shapes, 32), tmp_path, settings, validate=lambda _: {name: np.float32(0.5)}
    )
    assert [row["step"] for row in rows(tmp_path / "validation.csv")] == [1, 2, 3, 4]
    assert figures == {name: 0.5}
    assert SketchFusion.from_pretrained(tmp_path, device="cpu").config.metrics == figures


def test_what_was_validated_on_the_way_is_kept(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def validate(model: SketchFusion) -> dict[str, float]:
        seen.append(model.aggregator.mixing_weights.detach().clone())
        return {"metric": float(len(seen))}

    untrained.config = dataclasses.replace(untrained.config, training_data="squares")
    settings = dataclasses.replace(FEW, validate_every=1)
    train(untrained, tasks_of("recognition", shapes, 32), tmp_path, settings, validate=validate, training_data="shapes")
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-1", "step-2", "step-3"]  # the last is `out`
    for step, folder in enumerate([*(tmp_path / f"step-{step}" for step in (1, 2, 3)), tmp_path]):
        loaded = SketchFusion.from_pretrained(folder, dtype="float32", device="cpu")
        assert torch.equal(loaded.aggregator.mixing_weights, seen[step].half().float())
        assert (loaded.config.metrics, loaded.config.task) == ({"metric": step + 1.0}, "recognition")
        assert loaded.config.training_data == "squares. Then: shapes"
        assert load_head(folder)[1] == tuple(sorted(SHAPES))
    assert len({tuple(weights.tolist()) for weights in seen}) == 4


def test_a_class_without_sketches_to_train_on_is_said(
    untrained: SketchFusion, shapes: DataSet, caplog: pytest.LogCaptureFixture
) -> None:
    lone = shapes.classes[0]
    apart = tuple(record for record in shapes.sketches if record.label == lone)
    held_out = dataclasses.replace(shapes, records=(*apart, shapes.sketches[-1]))
    with caplog.at_level("INFO", "sketchfusion"):
        job = make_job("recognition", shapes, untrained, held_out=held_out)
    assert lone not in job.task.classes  # type: ignore[attr-defined]
    assert f"without {lone}" in job.shown
    assert f"without sketches to train on: {lone}" in caplog.text


@pytest.mark.parametrize("task", ["retrieval", "recognition"])
@pytest.mark.parametrize("share", [0.0, 1.0, 1.5])
def test_a_share_is_between_nothing_and_all(task: str, share: float, untrained: SketchFusion, shapes: DataSet) -> None:
    with pytest.raises(ConfigError, match=r"held_out: is .* between 0 and 1"):
        make_job(task, shapes, untrained, held_out=share)


def test_a_run_that_was_killed_while_it_validated_validates_then(
    untrained: SketchFusion, shapes: DataSet, tmp_path: Path
) -> None:
    settings = dataclasses.replace(FEW, validate_every=2, checkpoint_every=2)
    before = {name: tensor.clone() for name, tensor in untrained.state_dict().items()}

    def killed(model: SketchFusion) -> dict[str, float]:
        raise KeyboardInterrupt

    def go(validate: Any) -> None:
        untrained.load_state_dict(before)
        train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, settings, validate=validate)

    with pytest.raises(KeyboardInterrupt):
        go(killed)
    go(lambda model: {"metric": 0.5})
    assert [row["step"] for row in rows(tmp_path / "validation.csv")] == [2, 4]
    assert SketchFusion.from_pretrained(tmp_path / "step-2", device="cpu").config.metrics == {"metric": 0.5}
    go(lambda model: {"metric": 0.25})  # a run that is done: the end alone is looked at again
    assert [row["metric"] for row in rows(tmp_path / "validation.csv")] == [0.5, 0.25]


def test_folders_that_cannot_be(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    task, file = tasks_of("retrieval", shapes, 32), tmp_path / "file"
    file.touch()
    for folders in ({"out": file}, {"out": tmp_path / "out", "cache": file}):
        with pytest.raises(SketchFusionError, match="file cannot be made"):
            train(untrained, task, settings=FEW, **folders)  # type: ignore[arg-type]


def test_one_recognition_head_a_checkpoint(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recognition"):
        train(untrained, [tasks_of("recognition", shapes, 32) for _ in range(2)], tmp_path, FEW)


def test_a_head_comes_back(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    task = Recognition(shapes, 32, hidden=6, batch_size=8)
    train(untrained, task, tmp_path, FEW)
    head, classes = load_head(tmp_path)
    task.eval()
    pooled = torch.randn(3, 32)
    assert classes == task.classes == tuple(sorted(SHAPES))
    assert torch.equal(head(pooled), task.head(pooled))
    other, empty = tmp_path / "other", tmp_path / "empty"
    other.mkdir()
    empty.mkdir()
    save_file({"x": torch.ones(2)}, other / HEAD, metadata={"classes": "[]"})
    for folder in (empty, other, "mini"):
        with pytest.raises(LoadError, match="no head"):
            load_head(folder)


class TestGoingOn:
    def test_the_cache_changes_nothing_but_the_time(
        self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path
    ) -> None:
        start = snapshot(untrained)
        plan = Settings(steps=3, views=1)
        train(untrained, tasks_of("retrieval", shapes, 32), tmp_path / "a", plan)
        untrained.load_state_dict(start)
        train(untrained, tasks_of("retrieval", shapes, 32), tmp_path / "b", plan, cache=tmp_path / "cache")
        ours, theirs = ([row["loss"] for row in rows(tmp_path / name / "log.csv")] for name in "ab")
        assert ours == pytest.approx(theirs, rel=1e-4)

    @pytest.mark.parametrize(("name", "accumulate"), [("retrieval", 1), ("recognition", 1), ("retrieval", 2)])
    def test_a_run_in_two_pieces_is_the_run_in_one(
        self, name: str, accumulate: int, untrained: SketchFusion, shapes: DataSet, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        start = snapshot(untrained)
        plan = Settings(steps=6, checkpoint_every=2, views=3, accumulate=accumulate)

        def piece(out: Path, last: int | None = None) -> None:
            untrained.load_state_dict(start)
            task = tasks_of(name, shapes, 32)
            if last is not None:
                original, count = task.loss, iter(range(1, 100))

                def dying(*arguments: Any) -> Any:
                    if next(count) > last:
                        raise KeyboardInterrupt
                    return original(*arguments)

                monkeypatch.setattr(task, "loss", dying)
                with pytest.raises(KeyboardInterrupt):
                    train(untrained, task, out, plan)
            else:
                train(untrained, task, out, plan)

        piece(tmp_path / "whole")
        piece(tmp_path / "pieces", last=5 * accumulate)  # the state is that after four steps, the log has a fifth
        piece(tmp_path / "pieces")
        whole, pieces = (rows(tmp_path / part / "log.csv") for part in ("whole", "pieces"))
        assert [row["step"] for row in pieces] == [1, 2, 3, 4, 5, 6]
        assert [row["loss"] for row in pieces] == [row["loss"] for row in whole]
        weights = [(tmp_path / part / "model.safetensors").read_bytes() for part in ("whole", "pieces")]
        assert weights[0] == weights[1]

    def test_a_head_that_began_at_random_goes_on(
        self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path
    ) -> None:
        start, heads = snapshot(untrained), []
        for seed in (1, 2):
            untrained.load_state_dict(start)
            torch.manual_seed(seed)  # another process, in which nobody gave a seed
            train(untrained, Recognition(shapes, 32, batch_size=8), tmp_path, FEW)
            heads.append(load_head(tmp_path)[0])
        assert all(torch.equal(a, b) for a, b in zip(*(head.parameters() for head in heads), strict=True))

    def test_nothing_is_left_of_another_run(self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
        train(untrained, tasks_of("recognition", shapes, 32), tmp_path, FEW, validate=lambda _: {"metric": 0.5})
        (tmp_path / STATE).unlink()
        train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, FEW)
        assert not (tmp_path / "validation.csv").exists()
        with pytest.raises(LoadError, match="no head"):
            load_head(tmp_path)

    def test_a_finished_run_is_not_run_again(self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
        plan = Settings(steps=2, views=1)
        seen = []

        def validate(model: SketchFusion) -> dict[str, float]:
            seen.append(model.training)
            return {"metric": 0.5}

        start = snapshot(untrained)
        for _ in range(2):
            untrained.load_state_dict(start)
            found = train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, plan, validate=validate)
            assert found == {"metric": 0.5}
        assert seen == [False, False]
        assert len(rows(tmp_path / "log.csv")) == 2
        assert rows(tmp_path / "validation.csv") == [{"step": 2, "metric": 0.5}]
        assert "metric 0.5" in (tmp_path / "README.md").read_text()

    def test_another_run_in_the_folder_is_refused(
        self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path
    ) -> None:
        start = snapshot(untrained)
        train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, FEW)
        kept = (tmp_path / STATE).read_bytes()
        for plan, data, other in (
            (dataclasses.replace(FEW, lr=1e-2, steps=7), shapes, "steps=4, lr=0.003: name another folder"),
            (FEW, _without_last(shapes), "other tasks or images: name another folder"),
        ):
            untrained.load_state_dict(start)
            with pytest.raises(SketchFusionError, match=f"holds another run, with {other}"):
                train(untrained, tasks_of("retrieval", data, 32), tmp_path, plan)
        untrained.load_state_dict({name: tensor + 1 for name, tensor in start.items()})
        with pytest.raises(SketchFusionError, match="with other backbones, other weights to begin with: name"):
            train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, FEW)
        assert (tmp_path / STATE).read_bytes() == kept

    def test_a_damaged_state_is_named(self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
        (tmp_path / STATE).write_bytes(b"junk")
        with pytest.raises(SketchFusionError, match=f"{STATE} is damaged"):
            train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, FEW)
        save_file({"x": torch.ones(1)}, tmp_path / STATE, metadata={"run": "no object"})
        with pytest.raises(SketchFusionError, match=f"{STATE} is damaged"):
            train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, FEW)

    @pytest.mark.parametrize("change", [{"label": "star"}, {"row": 7}, {"kind": "photo"}, {"photo": "star/1"}])
    def test_as_many_other_records_are_another_run(
        self, change: dict[str, Any], untrained: SketchFusion, shapes: DataSet
    ) -> None:
        """Whichever record differs, and in whatever but its folder."""
        records = [dataclasses.replace(shapes.sketches[0], path=f"/here/{i}.png") for i in range(1500)]

        def run(records: list[Record]) -> dict[str, str]:
            task = tasks_of("recognition", shapes, 32)
            task.records = tuple(records)
            return identity(untrained, [task], FEW, kept=False, processes=1)

        moved = [dataclasses.replace(record, path=record.path.replace("here", "there")) for record in records]
        assert run(moved) == run(records)
        assert run([*records[:-1], dataclasses.replace(records[-1], **change)]) != run(records)

    def test_another_head_or_backbone_is_another_run(self, untrained: SketchFusion, shapes: DataSet) -> None:
        def run(dropout: float = 0.0, *, seed: int = 0, fixed: bool = False) -> dict[str, str]:
            torch.manual_seed(seed)
            task = Recognition(shapes, 32, dropout=dropout)
            task.head.requires_grad_(not fixed)
            return identity(untrained, [task], FEW, kept=False, processes=1)

        first = run()
        assert run(dropout=0.5) != first
        assert run(fixed=True) == run(fixed=True) != first
        assert run(fixed=True, seed=1) != run(fixed=True)
        assert run(seed=1) == first  # its weights come with the state
        key = next(b for name, b in untrained.diffusion.unet.named_buffers() if name.endswith("attn2.key"))  # folded
        for weight in (*(next(n.parameters()) for n in (untrained.diffusion.unet, untrained.semantic.model)), key):
            with torch.no_grad():
                weight.add_(1.0)
            assert run() != first
            first = run()


def _without_last(data: DataSet) -> DataSet:
    return dataclasses.replace(data, records=data.records[:-1])


class TestCache:
    def make(self, model: SketchFusion, data: DataSet, folder: Path, views: int = 3) -> FrozenCache:
        return FrozenCache(model, data.records, views, folder, seed=0)

    def test_it_holds_what_embedding_gives(self, model: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
        cache = self.make(model, shapes, tmp_path)
        entries = [Entry(shapes.records[5], 2), Entry(shapes.records[0], 0)]
        pixels, geometry = pixels_of(entries, model.preprocess, seed=0)
        latents, tokens = model.embed(pixels)
        found = cache.fetch(entries)
        torch.testing.assert_close(found.latents, latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.tokens, tokens, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(found.geometry, geometry, strict=True))

    def test_it_is_found_again_and_made_once(
        self, model: SketchFusion, shapes: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.make(model, shapes, tmp_path, views=2)
        times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert len(times) == 1
        monkeypatch.setattr(model, "embed", None)  # would fail if anything was computed again
        self.make(model, shapes, tmp_path, views=2)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times

    def test_what_it_depends_on_makes_another(self, model: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
        self.make(model, shapes, tmp_path)
        before = set(tmp_path.iterdir())
        key = backbones_key(model)
        with torch.no_grad():
            next(model.semantic.model.parameters()).add_(1.0)
        assert backbones_key(model) != key
        self.make(model, shapes, tmp_path)
        assert len(set(tmp_path.iterdir())) == 2 * len(before)
        path = Path(shapes.records[0].path)
        original = path.read_bytes()
        try:
            draw(path, "disc", np.random.default_rng(9), filled=True)
            self.make(model, shapes, tmp_path)
        finally:
            path.write_bytes(original)
        assert len(set(tmp_path.iterdir())) == 3 * len(before)

    def test_a_kill_leaves_no_half_a_file(
        self, model: SketchFusion, shapes: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sketchfusion.training.cache.SHARD", 20)
        original, calls = model.embed, []

        def dying(pixels: torch.Tensor) -> Any:
            calls.append(len(pixels))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return original(pixels)

        monkeypatch.setattr(model, "embed", dying)
        with pytest.raises(KeyboardInterrupt):
            self.make(model, shapes, tmp_path)
        kept = sum(len(load_file(path)["latents"]) for path in tmp_path.iterdir())
        assert kept
        self.make(model, shapes, tmp_path)
        assert sum(calls[4:]) == len(shapes.records) * 3 - kept

    @pytest.mark.parametrize("change", ["an image less", "a view more"])
    def test_what_changes_little_makes_few_files_anew(
        self, change: str, model: SketchFusion, shapes: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sketchfusion.training.cache.SHARD", 4)
        self.make(model, shapes, tmp_path, views=2)
        before = set(tmp_path.iterdir())
        records, views = (shapes.records[1:], 2) if change == "an image less" else (shapes.records, 3)
        cache = FrozenCache(model, records, views, tmp_path, seed=0)
        made = sum(len(load_file(path)["latents"]) for path in set(tmp_path.iterdir()) - before)
        wanted = 0 if change == "an image less" else len(records)
        assert wanted <= made <= wanted + 4 * 2 * 4  # two files of the largest size behind each gap
        entries = [Entry(record, views - 1) for record in records]
        pixels, _ = pixels_of(entries, model.preprocess, seed=0)
        torch.testing.assert_close(cache.fetch(entries).latents, model.embed(pixels)[0], rtol=1e-4, atol=1e-4)

    def test_a_damaged_file_is_named(self, model: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
        self.make(model, shapes, tmp_path, views=2)
        (path,) = tmp_path.iterdir()
        path.write_bytes(b"junk")
        with pytest.raises(SketchFusionError, match=f"{path.name} is damaged.*delete it"):
            self.make(model, shapes, tmp_path, views=2).fetch([Entry(shapes.records[0], 0)])

    def test_processes_that_start_one_after_the_other_leave_no_gap(
        self, model: SketchFusion, shapes: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sketchfusion.training.cache.SHARD", 1)
        for rank in range(2):
            cache = FrozenCache(model, shapes.records[:5], 1, tmp_path, seed=0, rank=rank, world=2)
        assert len(cache.fetch([Entry(record, 0) for record in shapes.records[:5]]).latents) == 5

    def test_an_image_that_cannot_be_read_is_named(self, model: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"junk")
        records = (Record(str(bad), "photo", "disc"),)
        with pytest.raises(ImageError, match=r"bad\.png"):
            FrozenCache(model, records, 1, tmp_path / "cache", seed=0)
        with pytest.raises(SketchFusionError, match=r"gone\.png cannot be read"):
            FrozenCache(model, (Record(str(tmp_path / "gone.png"), "photo", "disc"),), 1, tmp_path / "cache", seed=0)


class TestViews:
    def test_the_first_is_the_image_itself(self, shapes: DataSet) -> None:
        record = shapes.records[0]
        assert draw_view(record, 0, seed=5) == View()
        assert np.array_equal(np.asarray(View().image(record.open(), 32)), np.asarray(Image.open(record.path)))

    def test_the_others_are_drawn_once_and_for_all(self, shapes: DataSet) -> None:
        record = shapes.records[0]
        assert draw_view(record, 1, seed=0) == draw_view(record, 1, seed=0)
        views = {draw_view(r, k, seed=s) for r in shapes.records[:2] for k in (1, 2) for s in (0, 1)}
        assert len(views) == 8

    @pytest.mark.parametrize(("views", "shown"), [(1, {(0,)}), (2, {(0,), (1,)}), (3, {(0, 2), (1,)})])
    def test_a_batch_is_mirrored_whole_or_not_at_all(
        self, views: int, shown: set[tuple[int, ...]], shapes: DataSet
    ) -> None:
        """And which views are mirrored can be seen in where a view's right lies in the image."""
        records = list(shapes.records[:12])
        random = np.random.default_rng(0)
        batches = [_look_at(records, views, random) for _ in range(20)]
        assert {tuple(sorted({entry.view for entry in batch})) for batch in batches} == shown
        for entry in (entry for batch in batches for entry in batch if entry.view):
            affine = draw_view(entry.record, entry.view, seed=0).affine
            assert affine is not None
            assert (affine[0] < 0) == bool(entry.view % 2)

    @pytest.mark.parametrize("name", ["dot.svg", "DOT.SVG", "dot.png"])
    @pytest.mark.parametrize("number", [0, 1, 2, 3, 4])  # the image as it is, and the odd ones mirrored
    def test_points_move_with_the_ink(self, name: str, number: int, tmp_path: Path) -> None:
        """Of drawings in strokes too, which are drawn larger before they are looked at in another way."""
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="160" height="128">{DOT}</svg>'
        path = tmp_path / name
        if path.suffix == ".png":
            Strokes.from_svg(svg).render(160, 128).save(path)
        else:
            path.write_text(svg)
        record = Record(str(path), "sketch", "dot", points=(("dot", 50.0, 80.0),))
        view = draw_view(record, number, seed=0)
        pixels, geometry = Preprocess(256)(view.image(record.open(), 256))
        ink = 1 - pixels.mean(0)
        places = torch.stack([ink.sum(0), ink.sum(1)]) @ (torch.arange(256) + 0.5) / ink.sum()
        points = view.points(record, int(geometry.width), int(geometry.height))
        assert 256 * geometry.to_canvas(torch.tensor([points["dot"]]))[0] == pytest.approx(places, abs=0.3)

    @pytest.mark.parametrize("kind", ["photo", "sketch"])
    def test_points_and_mask_move_with_the_image(self, kind: Any, tmp_path: Path) -> None:
        """A dot at the key point: where it is in the view is where the view says the point is."""
        image = Image.new("RGB", (200, 120), "white")
        ImageDraw.Draw(image).ellipse((88, 58, 92, 62), fill="black")
        image.save(tmp_path / "dot.png")
        Image.fromarray((np.asarray(image.convert("L")) < 128).astype(np.uint8) * 255).save(tmp_path / "mask.png")
        record = Record(
            str(tmp_path / "dot.png"), kind, "dot", mask=str(tmp_path / "mask.png"), points=(("dot", 90.5, 60.5),)
        )
        for number in range(1, 12):
            view = draw_view(record, number, seed=0)
            seen = np.asarray(dataclasses.replace(view, contrast=1, brightness=1).image(image, 64)).sum(2) < 380
            (x, y) = view.points(record, 200, 120)["dot"]
            rows_, columns = np.nonzero(seen)
            assert (columns.mean() + 0.5, rows_.mean() + 0.5) == pytest.approx((x, y), abs=1.0)
            mask = view.mask(record, 200, 120)
            assert mask is not None
            centre = mask.nonzero().float().mean(0) + 0.5
            assert (centre[1].item(), centre[0].item()) == pytest.approx((x, y), abs=1.0)

    def test_a_mask_is_as_large_as_its_view(self, tmp_path: Path) -> None:
        """A drawing in strokes is not: it is drawn larger."""
        Image.new("L", (100, 80), 255).save(tmp_path / "mask.png")
        for name, size in (("a.png", (100, 80)), ("a.svg", (64, 51))):
            record = Record(str(tmp_path / name), "photo", "a", mask=str(tmp_path / "mask.png"))
            mask = draw_view(record, 1, seed=0).mask(record, *size)
            assert mask is not None
            assert mask.shape == size[::-1]

    def test_a_point_that_leaves_the_picture_is_gone(self) -> None:
        record = Record("x", "photo", "x", points=(("corner", 0.5, 0.5), ("middle", 50.0, 50.0)))
        crop = View((0.5, 0, 0.25, 0, 0.5, 0.25))
        assert crop.points(record, 100, 100) == {"middle": (50.0, 50.0)}
        beside = dataclasses.replace(record, points=(("beside", 100.4, 50.0), ("edge", 100.0, 0.0)))
        assert View().points(beside, 100, 100) == {"edge": (100.0, 0.0)}


class TestSettings:
    def test_the_commands_defaults_are_these(self) -> None:
        of_command = inspect.signature(cli.train).parameters
        for field in dataclasses.fields(Settings):
            if field.name != "without":  # an option that can be repeated
                assert of_command[field.name].default == field.default

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("steps", 0),
            ("steps", 2.5),
            ("views", 0),
            ("lr", 0.0),
            ("lr", float("nan")),
            ("warmup", 2.0),
            ("without", ("taps",)),
        ],
    )
    def test_illegal(self, key: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=key):
            Settings(**{key: value})

    def test_learning_rate(self) -> None:
        plan = Settings(steps=100, lr=1.0, warmup=0.1)
        assert [plan.learning_rate(s) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
        assert plan.learning_rate(55) == pytest.approx(0.5, abs=0.01)
        assert 0.001 <= plan.learning_rate(99) < 0.003

    def test_ablations_stay_as_they_begin(self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
        plan = dataclasses.replace(FEW, without=("adapters", "mixing"))
        train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, plan)
        assert not any(p.any() for p in untrained.adapters.parameters())
        assert not untrained.aggregator.mixing_weights.any()

    def test_mixing_weights_at_a_rate_of_their_own(
        self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path
    ) -> None:
        """AdamW's first step is as long as the learning rate, whatever the gradient."""
        for scale in (1.0, 10.0):
            model = copy.deepcopy(untrained)
            plan = Settings(steps=1, lr=1e-3, warmup=1.0, weight_decay=0, views=1, mixing_lr_scale=scale)
            train(model, tasks_of("retrieval", shapes, 32), tmp_path / str(scale), plan)
            before = {n: p.detach() for n, p in untrained.named_parameters()}
            moved = {n: (p.detach() - before[n]).abs().max() for n, p in model.named_parameters() if p.requires_grad}
            longest = {n: 1e-3 * (scale if n.endswith("mixing_weights") else 1) for n in moved}
            assert {n: float(d) for n, d in moved.items()} == pytest.approx(longest, rel=0.05)

    def test_accumulated_batches_are_one_step(self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
        plan = Settings(steps=1, accumulate=3, clip=1e9, views=1)
        task = tasks_of("recognition", shapes, 32)
        learned = [*untrained.trainable_parameters(), *task.parameters()]
        with _Batches(untrained, [task], plan, None, rank=0, first=0) as batches:
            for (latents, tokens, geometry), (samples,) in itertools.islice(batches, 3):
                loss, _ = task.loss(untrained.fuse(latents, tokens, geometry), samples)
                (loss / 3).backward()
        norms = [parameter.grad.norm() for parameter in learned if parameter.grad is not None]
        untrained.zero_grad()
        task.zero_grad()
        train(untrained, task, tmp_path, plan)
        (line,) = rows(tmp_path / "log.csv")
        assert line["grad_norm"] == pytest.approx(float(torch.stack(norms).norm()), rel=1e-3)

    def test_every_process_draws_batches_of_its_own(self, untrained: SketchFusion, shapes: DataSet) -> None:
        drawn = []
        for rank in (0, 1, 0):
            with _Batches(untrained, [tasks_of("retrieval", shapes, 32)], FEW, None, rank=rank, first=0) as batches:
                _, (samples,) = next(batches)
            drawn.append([sample.record for sample in samples])
        assert drawn[0] == drawn[2] != drawn[1]

    def test_a_gradient_that_is_not_finite_stops_the_run(
        self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = tasks_of("retrieval", shapes, 32)
        monkeypatch.setattr(task, "loss", lambda features, _: ((features.pooled.sum() * 0).sqrt(), {}))
        before = snapshot(untrained)
        with pytest.raises(SketchFusionError, match="gradient is nan at step 1"):
            train(untrained, task, tmp_path, dataclasses.replace(FEW, checkpoint_every=1))
        assert all(torch.equal(tensor, before[name]) for name, tensor in untrained.state_dict().items())
        assert not (tmp_path / STATE).exists()

    def test_too_little_memory_is_said(
        self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        task = tasks_of("retrieval", shapes, 32)
        monkeypatch.setattr(task, "loss", full)
        with pytest.raises(SketchFusionError, match="out of memory on cpu: train on fewer images"):
            train(untrained, task, tmp_path, FEW)

    def test_parts_of_a_loss_that_come_and_go_keep_their_columns(
        self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = tasks_of("retrieval", shapes, 32)
        parts: Any = iter([{"a": 1.0, "b": 2.0}, {"b": 3.0}, {}, {"c": 4.0}])
        monkeypatch.setattr(task, "loss", lambda features, _: (features.pooled.sum(), next(parts)))
        train(untrained, task, tmp_path, FEW)
        with (tmp_path / "log.csv").open() as file:
            lines = [[line[f"retrieval.{name}"] for name in "abc"] for line in csv.DictReader(file)]
        assert lines == [["1", "2", ""], ["", "3", ""], ["", "", ""], ["", "", "4"]]

    def test_a_loss_that_is_not_finite_stops_the_run(
        self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = tasks_of("retrieval", shapes, 32)
        monkeypatch.setattr(task, "loss", lambda features, _: (features.pooled.sum() * float("nan"), {}))
        with pytest.raises(SketchFusionError, match="nan at step 1"):
            train(untrained, task, tmp_path, FEW)
        assert not (tmp_path / "model.safetensors").exists()

    def test_nothing_to_draw(self, untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
        empty = Recognition(shapes, 32, batch_size=0)
        for nothing, said in (([], "legal: one task or more"), ([empty], "legal: a list of records, one or more")):
            with pytest.raises(ConfigError, match=said):
                train(untrained, nothing, tmp_path, FEW)


def test_finetuning_reaches_the_backbones_and_is_saved(
    untrained: SketchFusion, shapes: DataSet, tmp_path: Path
) -> None:
    published = copy.deepcopy(untrained)
    published.unfold()
    before = dict(published.named_parameters())
    plan = dataclasses.replace(FEW, finetune=True)
    train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, plan)
    moved = {n for n, p in untrained.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("diffusion.unet.down_blocks") for n in moved)
    assert any(n.endswith("attn2.to_k.weight") for n in moved)  # not folded away
    assert any(n.endswith("time_emb_proj.weight") for n in moved)
    assert any(n.startswith("semantic.model") for n in moved)
    assert not any(n.startswith("diffusion.vae") for n in moved)
    loaded = SketchFusion.from_pretrained(tmp_path, dtype="float32", device="cpu")
    image = shapes.records[0].path
    torch.testing.assert_close(loaded.encode(image).pooled, untrained.encode(image).pooled, rtol=0.02, atol=0.02)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "log.csv").stat().st_mode}
    untrained.save_pretrained(tmp_path / "again")
    again = SketchFusion.from_pretrained(tmp_path / "again", dtype="float32", device="cpu")
    assert torch.equal(again.encode(image).pooled, loaded.encode(image).pooled)
    with pytest.raises(ConfigError, match="finetune"):
        train(untrained, tasks_of("retrieval", shapes, 32), tmp_path / "b", plan, cache=tmp_path)


def test_finetuning_leaves_the_modules_that_were_passed_in_alone(
    backbones: dict[str, Path], shapes: DataSet, tmp_path: Path
) -> None:
    folder = backbones["diffusion"]
    pipe = SimpleNamespace(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=diffusers.PNDMScheduler.from_pretrained(folder / "scheduler"),
    )
    vision = transformers.CLIPVisionModel.from_pretrained(backbones["semantic"])
    before = snapshot(pipe.unet), snapshot(vision)
    model = SketchFusion.from_backbones(
        pipe, vision, dtype="float32", device="cpu", null_prompt=torch.zeros(4, 24), aggregator_width=32,
        aggregator_grid=12,
        semantic_mean=(0.5, 0.5, 0.5), semantic_std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    train(model, tasks_of("retrieval", shapes, 32), tmp_path, dataclasses.replace(FEW, finetune=True))
    for module, was in zip((pipe.unet, vision), before, strict=True):
        assert all(torch.equal(tensor, was[name]) for name, tensor in module.state_dict().items())
    assert any(not torch.equal(p, before[1][n]) for n, p in model.semantic.model.named_parameters())


def test_two_tasks_of_one_name_are_told_apart_in_the_log(
    untrained: SketchFusion, shapes: DataSet, tmp_path: Path
) -> None:
    tasks = [
        tasks_of("retrieval", shapes, 32),
        tasks_of("correspondence", shapes, 32),
        tasks_of("retrieval", shapes, 32),
    ]
    train(untrained, tasks, tmp_path, FEW)
    names = {name.split(".")[0] for name in rows(tmp_path / "log.csv")[0] if "." in name}
    assert names == {"retrieval1", "correspondence", "retrieval3"}


def test_a_log_that_cannot_be_written_is_known_before_the_cache_is_filled(
    untrained: SketchFusion, shapes: DataSet, tmp_path: Path
) -> None:
    (tmp_path / "out" / "log.csv").mkdir(parents=True)
    with pytest.raises(SketchFusionError, match=r"log\.csv: cannot be written to"):
        train(untrained, tasks_of("retrieval", shapes, 32), tmp_path / "out", FEW, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_a_terminal_lines_say_what_is_left(
    untrained: SketchFusion,
    shapes: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    minutes = itertools.count(0, 100)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(minutes)))
    monkeypatch.setattr(cache, "SHARD", 4)
    with caplog.at_level("INFO"):
        train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, FEW)
    lines = [record.getMessage() for record in caplog.records if " s left" in record.getMessage()]
    assert lines[0].startswith(f"train: step 1 of {FEW.steps}, loss ")
    assert lines[-1].endswith(" 0 s left")
    caplog.clear()
    with caplog.at_level("INFO"):
        FrozenCache(untrained, shapes.records[:12], 1, tmp_path / "cache", seed=0)
    lines = [record.getMessage() for record in caplog.records if " s left" in record.getMessage()]
    assert re.match(r"cache: view \d of 12, ", lines[0])
    assert not lines[0].endswith(" 0 s left")
    assert lines[-1] == "cache: view 12 of 12, 0 s left"
    caplog.clear()
    with caplog.at_level("INFO"):
        untrained.encode(iter([shapes.records[0].path] * 2), batch_size=1)
        untrained.encode([shapes.records[0].path] * 2, batch_size=1, progress=False)
    lines = [record.getMessage() for record in caplog.records if record.name == progress.__name__]
    assert lines == ["encode: image 1", "encode: image 2"]


def test_float16_cannot_be_trained_on_a_cpu(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        train(untrained.half(), tasks_of("retrieval", shapes, 32), tmp_path, FEW)


def test_the_scale_of_float16_gradients_goes_on_and_has_an_end(tmp_path: Path) -> None:
    """It falls with each step that overflows; a run that went on with the first scale would come to other losses."""
    head = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(head.parameters())
    scalers = [torch.amp.GradScaler("cpu") for _ in range(2)]
    for step in range(31):
        scalers[0].scale(head(torch.full((1, 2), torch.inf if step else 1.0)).sum()).backward()
        scalers[0].step(optimizer)
        scalers[0].update()
        if step == 3:
            _check_scale(scalers[0], step)
            State(tmp_path, {}, head, optimizer, scalers[0]).save(step + 1)
            kept = scalers[0].state_dict()
    assert State(tmp_path, {}, head, optimizer, scalers[1]).resume() == 4
    assert kept["scale"] == 2.0**13
    assert scalers[1].state_dict() == kept
    with pytest.raises(SketchFusionError, match="last at step 31"):
        _check_scale(scalers[0], 30)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 is trained on CUDA")
def test_runs_of_two_dtypes_in_one_process(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    """accelerate remembers the precision of the first."""
    untrained.to("cuda")
    half = copy.deepcopy(untrained).half()
    for name, model in (("single", untrained), ("half", half)):
        train(model, tasks_of("retrieval", shapes, 32), tmp_path / name, dataclasses.replace(FEW, steps=1))
        assert len(rows(tmp_path / name / "log.csv")) == 1


def test_half_a_line_of_the_log_is_dropped(untrained: SketchFusion, shapes: DataSet, tmp_path: Path) -> None:
    start = snapshot(untrained)
    train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, FEW)
    with (tmp_path / "log.csv").open("a") as log:
        log.write("\n\x00\x00")
    untrained.load_state_dict(start)
    train(untrained, tasks_of("retrieval", shapes, 32), tmp_path, FEW)
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == [1, 2, 3, 4]


def test_another_number_of_processes_is_another_run(untrained: SketchFusion, shapes: DataSet) -> None:
    plan = untrained, [tasks_of("retrieval", shapes, 32)], FEW
    assert identity(*plan, kept=False, processes=1) != identity(*plan, kept=False, processes=2)


def whole(job: Any) -> DataSet:
    """What a job is trained on, as a set."""
    return DataSet("shapes", (), tuple(job.task.records), "all")


class TestJobs:
    @pytest.mark.parametrize("name", ["retrieval", "recognition", "correspondence", "segmentation"])
    def test_what_is_kept_apart_is_not_trained_on(self, name: str, model: SketchFusion, shapes: DataSet) -> None:
        job = make_job(name, shapes, model, held_out=0.34, sketches=shapes, images=8)
        figures = job.validate(model)
        assert figures
        assert all(0 <= value <= 1 for value in figures.values())
        assert all("held out" in key for key in figures)
        assert job.apart.images
        assert not job.apart.images & Apart.of(whole(job)).images

    def test_retrieval_keeps_whole_classes_apart(self, model: SketchFusion, shapes: DataSet) -> None:
        job = make_job("retrieval", shapes, model, held_out=0.34, images=8)
        assert len({record.label for record in job.task.records}) == 2

    @pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.6, 0.75])
    def test_the_share_of_classes_is_the_one_asked_for(
        self, share: float, model: SketchFusion, shapes: DataSet
    ) -> None:
        names = [f"class {i}" for i in range(10)]
        records = [
            dataclasses.replace(record, label=name, photo=f"{name}/{record.photo}")
            for name in names
            for record in shapes.records[:12]
        ]
        data = dataclasses.replace(shapes, classes=tuple(names), records=tuple(records))
        job = make_job("retrieval", data, model, held_out=share, images=8)
        assert len({record.label for record in job.task.records}) == 10 - max(2, round(share * 10))
        one = make_job("retrieval", data, model, held_out=0.1, images=8, level="fine")
        assert len({record.label for record in one.task.records}) == 9  # whose other photos are wrong

    @pytest.mark.parametrize("count", [1, 2])
    def test_of_few_classes_photos_are_kept_apart_at_the_fine_level(
        self, count: int, model: SketchFusion, shapes: DataSet
    ) -> None:
        """A set of one category, shoes, is made for it."""
        data = shapes.of_classes(shapes.classes[:count], "few")
        job = make_job("retrieval", data, model, held_out=0.4, images=8, level="fine")
        photos = {record.photo for record in job.task.records}
        assert {record.label for record in job.task.records} == set(data.classes)
        assert photos < {record.photo for record in data.photos}
        assert job.validate(model)
        batch = job.task.batch(np.random.default_rng(0))
        assert len({record.photo for record in batch}) == len(batch) // 2 > 1
        gone = [record for record in data.records if record.photo not in photos]
        held_out = dataclasses.replace(data, records=tuple(gone), split="some photos")
        assert {record.photo for record in make_job(
            "retrieval", data, model, held_out=held_out, images=8, level="fine"
        ).task.records} == photos  # fmt: skip

    def test_names_of_digits_are_told_apart(self, model: SketchFusion, shapes: DataSet) -> None:
        names = {name: str(i) for i, name in enumerate(shapes.classes)}
        records = tuple(dataclasses.replace(r, label=names[str(r.label)]) for r in shapes.records)
        data = DataSet("shapes", tuple(sorted(names.values())), records, "numbered")
        plans = [partial(make_job, name, data, model, held_out=0.3, images=8) for name in ("retrieval", "recognition")]
        search, name = make_jobs(plans)
        assert {r.label for r in name.task.records} == {r.label for r in search.task.records}
        assert len(search.apart.classes) == 2

    def test_segmentation_is_validated_with_sketches_it_did_not_see(
        self, model: SketchFusion, shapes: DataSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[DataSet] = []
        real = protocols.segmentation

        def spied(extractor: Any, data: DataSet, sketches: DataSet) -> Any:
            asked.append(sketches)
            return real(extractor, data, sketches)

        monkeypatch.setattr(protocols, "segmentation", spied)
        job = make_job("segmentation", shapes, model, held_out=0.2, sketches=shapes, images=8)
        job.validate(model)
        (queries,) = asked
        assert {record.label for record in queries.records} == set(shapes.classes)
        assert not set(queries.records) & set(job.task.records)
        # In the set's order, whatever the process: it decides which sketch a photo is looked through for.
        assert list(queries.records) == [record for record in shapes.sketches if record in queries.records]
        assert "80%" in job.shown

    def test_what_was_trained_on_is_said_in_words(self, model: SketchFusion, shapes: DataSet) -> None:
        settings = {"held_out": 0.34, "images": 16, "sketches": shapes}
        fine = make_job("retrieval", shapes, model, level="fine", loss="triplet", **settings)
        assert fine.shown.endswith("(fine level, triplet)")
        assert fine.shown.count(shapes.name) == 1  # the sketches are segmentation's
        assert fine.task.per_class == 4  # hard negatives

    @pytest.mark.parametrize("name", ["retrieval", "correspondence", "segmentation"])
    def test_a_set_that_is_held_out_is_not_trained_on(self, name: str, model: SketchFusion, shapes: DataSet) -> None:
        names = ("bow", "disc") if name == "retrieval" else ("disc",)
        part = tuple(record for record in shapes.records if record.label in names)
        held_out = DataSet("shapes", names, part, "some alone")
        job = make_job(name, shapes, model, held_out=held_out, sketches=shapes, images=8)
        kinds = {"photo"} if name == "segmentation" else {"photo", "sketch"}  # its sketches are another set
        assert not {record for record in job.task.records if record.kind in kinds} & set(part)
        assert "without some alone" in job.shown
        assert job.validate(model)

    @pytest.mark.parametrize("name", ["retrieval", "segmentation"])
    def test_classes_with_one_side_only_are_left_out(self, name: str, model: SketchFusion, shapes: DataSet) -> None:
        alone = shapes.sketches if name == "retrieval" else shapes.photos
        more = tuple(dataclasses.replace(record, label="star") for record in alone[:3])
        data = dataclasses.replace(shapes, classes=(*shapes.classes, "star"), records=(*shapes.records, *more))
        job = make_job(name, data, model, held_out=0.34, sketches=shapes, images=8)
        assert job.validate(model)
        assert not any(record.label == "star" for record in job.task.records)

    @pytest.mark.parametrize("images", [4, 5, 6, 7, 8, 64])
    @pytest.mark.parametrize("level", ["category", "fine"])
    def test_a_batch_of_retrieval_has_something_wrong_in_it(
        self, images: int, level: str, model: SketchFusion, shapes: DataSet
    ) -> None:
        task: Any = make_job("retrieval", shapes, model, held_out=0.3, images=images, level=level).task
        batch = task.batch(np.random.default_rng(0))
        assert len(batch) <= images
        what = [record.label if level == "category" else record.photo for record in batch if record.kind == "photo"]
        assert len(set(what)) > 1

    @pytest.mark.parametrize("other", ["recognition", "correspondence", "segmentation"])
    def test_what_one_task_is_validated_on_no_task_is_trained_on(
        self, other: str, model: SketchFusion, shapes: DataSet
    ) -> None:
        names = ("retrieval", other)
        settings = {"held_out": 0.3, "sketches": shapes, "images": 8}
        alone = make_job(other, shapes, model, **settings)
        jobs = make_jobs([partial(make_job, name, shapes, model, **settings) for name in names])
        unseen = jobs[0].apart.classes
        assert len(unseen) == 2
        assert unseen & {record.label for record in alone.task.records}  # which is why
        for job in jobs:
            assert not unseen & {record.label for record in job.task.records}
            assert not any(set(Apart.of(whole(job)).images) & other.apart.images for other in jobs)
            assert job.task.records
        assert "without what others are validated on" in jobs[1].shown

    def test_a_photo_of_sketchy_is_known_in_whatever_copy_it_is(self) -> None:
        ours = [Record(f"tx_000100000000/cat/{i}.jpg", "photo", "cat", photo=f"cat/{i}") for i in range(3)]
        copies = [Record(f"EXTEND_image_sketchy/cat/{i}.jpg", "photo", "cat", photo=f"cat/{i}") for i in range(3)]
        drawn = [Record(f"tx_000000000000/cat/{i}-1.png", "sketch", "cat", photo=f"cat/{i}") for i in range(3)]
        apart = Apart.of(DataSet("psc6k", ("cat",), tuple(ours[:1]), "held out"))
        left = apart.taken_from(DataSet("sketchy", ("cat",), (*copies, *drawn), "all")).records
        assert left == (*copies[1:], *drawn[1:])
        # In another set a name that is the same is another photo's.
        assert len(apart.taken_from(DataSet("folder", ("cat",), (*copies, *drawn), "all")).records) == 6

    def test_an_image_is_known_behind_a_link(self, shapes: DataSet, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(Path(shapes.records[0].path).parent)
        linked = dataclasses.replace(shapes.records[0], path=str(tmp_path / "link" / Path(shapes.records[0].path).name))
        assert linked not in shapes.records
        assert (
            len(Apart.of(dataclasses.replace(shapes, records=(linked,))).taken_from(shapes).records)
            == len(shapes.records) - 1
        )

    def test_an_image_is_known_in_whatever_set_it_is(self, model: SketchFusion, shapes: DataSet) -> None:
        """PSC6K's images are Sketchy's, with key points; TU-Berlin spells classes in another way."""
        bare = dataclasses.replace(
            shapes, records=tuple(dataclasses.replace(record, points=()) for record in shapes.records)
        )
        spelled = [dataclasses.replace(record, label=f"{record.label} (a)") for record in shapes.sketches]
        dashed = [dataclasses.replace(record, label=f"{record.label}-a") for record in shapes.records]
        settings = {"held_out": 0.3, "images": 8}
        plans = [
            partial(make_job, "correspondence", shapes, model, **settings),
            partial(make_job, "retrieval", bare, model, level="fine", **settings),
        ]
        used = [{record.path for record in plan().task.records} for plan in plans]
        apart = [{record.path for record in shapes.records} - paths for paths in used]
        assert used[0] & apart[1]  # which is why
        for job in make_jobs(plans):
            assert not {record.path for record in job.task.records} & (apart[0] | apart[1])

        def named(records: list[Record]) -> DataSet:
            return DataSet("shapes", tuple(sorted({str(r.label) for r in records})), tuple(records), "all")

        search, name = make_jobs([
            partial(make_job, "retrieval", named(dashed), model, **settings),
            partial(make_job, "recognition", named(spelled), model, **settings),
        ])  # fmt: skip
        assert len(search.apart.classes) == 2
        assert not search.apart.classes & {str(record.label).replace(" (a)", "a") for record in name.task.records}
        assert name.task.records

    def test_sketches_that_ask_for_a_held_out_class_are_held_out(self, model: SketchFusion, shapes: DataSet) -> None:
        disc = DataSet("shapes", ("disc",), tuple(r for r in shapes.records if r.label == "disc"), "disc")
        masks, names = make_jobs([
            partial(make_job, "segmentation", shapes, model, held_out=disc, sketches=shapes, images=8),
            partial(make_job, "recognition", shapes, model, held_out=0.3, images=8),
        ])  # fmt: skip
        for job in (masks, names):
            assert not [record for record in job.task.records if record.kind == "sketch" and record.label == "disc"]
        # And no more than are asked for: the sketches of classes without photos are free.
        photos = dataclasses.replace(shapes, classes=("disc", "bow"), records=tuple(
            r for r in shapes.photos if r.label in ("disc", "bow")
        ))  # fmt: skip
        masks = make_job("segmentation", photos, model, held_out=0.3, sketches=shapes, images=8)
        asked = {path for path, _ in masks.apart.images} & {os.path.abspath(r.path) for r in shapes.sketches}
        assert asked
        assert asked <= {os.path.abspath(r.path) for r in shapes.sketches if r.label in ("disc", "bow")}

    def test_what_cannot_be_validated_is_known_before_training(self, model: SketchFusion, shapes: DataSet) -> None:
        lost = dataclasses.replace(shapes.sketches[0], photo=None)
        data = dataclasses.replace(shapes, records=(lost, *shapes.records[1:]))
        parts = [tuple(r for r in data.records if (r.label in names)) for names in (("disc", "bow"), ("block",))]
        apart = DataSet("shapes", ("disc", "bow"), parts[0], "apart")
        assert make_job("retrieval", data, model, held_out=apart, images=8, level="fine").validate(model)
        one = DataSet("shapes", ("block",), parts[1], "one")
        with pytest.raises(SketchFusionError, match="two classes or more"):
            make_job("retrieval", data, model, held_out=one, images=8)
        single = dataclasses.replace(one, records=tuple(r for r in one.records if r.photo == "block/0"))
        with pytest.raises(SketchFusionError, match="two drawn photos"):
            make_job("retrieval", data, model, held_out=single, images=8, level="fine")
        bare = dataclasses.replace(one, records=tuple(dataclasses.replace(r, points=()) for r in one.records))
        with pytest.raises(SketchFusionError, match="no sketch and photo with key points"):
            make_job("correspondence", data, model, held_out=bare, images=8)

    def test_errors(self, model: SketchFusion, shapes: DataSet) -> None:
        with pytest.raises(ConfigError, match="images"):
            make_job("retrieval", shapes, model, images=3)
        for settings in ({"images": 0}, {"hidden": -1}):
            with pytest.raises(ConfigError, match=next(iter(settings))):
                make_job("recognition", shapes, model, **settings)
        stars = dataclasses.replace(shapes, records=(dataclasses.replace(shapes.sketches[0], label="star"),))
        with pytest.raises(SketchFusionError, match="has no sketches of the classes"):
            make_job("recognition", shapes, model, held_out=stars)
        with pytest.raises(ConfigError, match="retrieval, recognition"):
            make_job("detection", shapes, model)
        with pytest.raises(ConfigError, match="sketches"):
            make_job("segmentation", shapes, model)
        for name in ("retrieval", "recognition"):
            with pytest.raises(SketchFusionError, match=r"held out|held_out"):
                make_job(name, shapes, model, held_out=0.0)


@pytest.fixture
def sketchy(shapes: DataSet, tmp_path: Path) -> Path:
    """The shapes in Sketchy's layout."""
    for record in shapes.records:
        stem = str(record.photo).replace("/", "")
        name = f"{stem}.jpg" if record.kind == "photo" else f"{stem}-{Path(record.path).stem[-1]}.png"
        target = tmp_path / "256x256" / record.kind / "tx_000000000000" / str(record.label) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(record.path).save(target)
    return tmp_path


class TestCommandLine:
    def command(self, sketchy: Path, out: Path, *more: str) -> list[str]:
        return [
            sys.executable, "-m", "sketchfusion", "train", "--task", "retrieval", "--data", "sketchy",
            "--root", str(sketchy), "--out", str(out), "--held-out", "0.34", "--images", "8", "--views", "2",
            "--device", "cpu", *more,
        ]  # fmt: skip

    def test_killed_and_started_again(
        self, model: SketchFusion, sketchy: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        start = tmp_path_factory.mktemp("start")
        model.save_pretrained(start)
        cache = str(tmp_path / "cache")
        more = ["--model", str(start), "--steps", "400", "--checkpoint-every", "10", "--cache", cache]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        out = tmp_path / "out"
        run = subprocess.Popen(self.command(sketchy, out, *more), env=environment, **quiet)  # type: ignore[call-overload]
        log = out / "log.csv"
        deadline = time.monotonic() + 240
        while not (log.exists() and log.read_text().count("\n") > 25):
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
        run.wait()
        before = rows(log)
        assert not (out / "model.safetensors").exists()
        finished = subprocess.run(self.command(sketchy, out, *more), env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        after = rows(log)
        assert [row["step"] for row in after] == list(range(1, 401))
        common = min(len(before), 400) - 1  # the killed one's last line may be half a line
        assert [row["loss"] for row in after[:common]] == [row["loss"] for row in before[:common]]
        assert "map_all" in finished.stdout

    def test_two_processes_are_one_run(self, model: SketchFusion, sketchy: Path, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path / "start")
        more = ["--model", str(tmp_path / "start"), "--steps", "3", "--json"]
        alone = self.command(sketchy, tmp_path / "out", *more)
        several = [alone[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *alone[1:]]
        done = subprocess.run(
            several, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["checkpoint"] == str(tmp_path / "out")  # said once
        assert "3 steps of 16 images" in done.stderr  # eight each
        assert [row["step"] for row in rows(tmp_path / "out" / "log.csv")] == [1, 2, 3]
        assert (tmp_path / "out" / "model.safetensors").exists()

    def test_a_few_images_of_each_class(
        self, model: SketchFusion, sketchy: Path, command: Callable[..., Any], tmp_path: Path
    ) -> None:
        model.save_pretrained(tmp_path / "start")
        more = ["--model", str(tmp_path / "start"), "--steps", "1", "--limit", "2"]
        done = command(*self.command(sketchy, tmp_path / "out", *more)[3:])
        assert done.returncode == 0, done.stderr
        assert "2 a class" in json.loads((tmp_path / "out" / "config.json").read_text())["training_data"]

    def test_what_is_held_out_is_named_and_opened_first(
        self, model: SketchFusion, sketchy: Path, command: Callable[..., Any], tmp_path: Path
    ) -> None:
        model.save_pretrained(tmp_path / "start")
        root = shutil.copytree(sketchy, tmp_path / "root")
        more = ["--model", str(tmp_path / "start"), "--steps", "1"]
        done = command(*self.command(root, tmp_path / "out", *more)[3:])
        assert done.returncode == 0, done.stderr
        held_out = load("sketchy", root, classes=tmp_path / "out" / "held-out.txt")
        trained = {*load("sketchy", root).classes} - {*held_out.classes}
        assert len(held_out.classes) == 2
        assert trained
        Path(held_out.sketches[-1].path).write_text("no image")
        done = command(*self.command(root, tmp_path / "other", *more)[3:])
        assert done.returncode == 2
        assert held_out.sketches[-1].path in done.stderr
        assert not (tmp_path / "other").exists()

    def test_every_task_has_its_own_classes(self, sketchy: Path, tmp_path: Path) -> None:
        """All classes for the first; of the second's one class none can be held out."""
        some = tmp_path / "some.txt"
        some.write_text("disc\n")
        with pytest.raises(SketchFusionError, match="of 1 classes"):
            cli.train(
                task=["retrieval", "retrieval"], data=["sketchy"], root=[sketchy], out=tmp_path / "out",
                classes=["all", str(some)], held_out=["0.34"], level=["fine", "category"], steps=1, device="cpu",
            )  # fmt: skip

    @pytest.mark.parametrize(
        ("more", "problem"),
        [
            (["--task", "recognition", "--task", "segmentation", "--data", "shoes"], "--data: is given 2 times"),
            (["--classes", "seen", "--classes", "all"], "--classes: is given 2 times"),
            (["--part", "test"], "part"),
            (["--limit", "0"], "--limit: is 0"),
            (["--part", "all", "--part", "all"], "--part: is given 2 times"),
            (["--task", "detection"], "--task: is 'detection'"),
            (["--level", "finest"], "--level: is 'finest'"),
            (["--loss", "hinge"], "--loss: is 'hinge'"),
            (["--finetune", "--cache", "cache"], "--cache: keeps what"),
            (["--steps=0"], "--steps: is 0"),
            (["--weight-decay", "-1"], "--weight-decay: is -1"),
            (["--seed", "-1"], "seed: is -1"),
            (["--root", "/nowhere/at/all"], "--root"),
            (["--semantic", "somewhere/else"], "--diffusion"),
            (["--task", "segmentation"], "--sketches: is missing"),
        ],
    )
    def test_mistakes(
        self, more: list[str], problem: str, sketchy: Path, command: Callable[..., Any], tmp_path: Path
    ) -> None:
        done = command(*self.command(sketchy, tmp_path / "out")[3:], *more)
        assert done.returncode == 2
        assert problem in done.stderr
