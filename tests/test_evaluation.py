"""Evaluation: rows are what they claim to be, protocols compare what they should, and the command runs on every set."""

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from sketchfusion import ConfigError, Features, ImageError, LoadError, SketchFusion, SketchFusionError
from sketchfusion.data import DataError, DataSet, Record, limited
from sketchfusion.evaluation import PROTOCOLS, ROWS, Extractor, evaluate
from sketchfusion.evaluation.protocols import (
    THRESHOLDS,
    Result,
    _averaged,
    _ious,
    correspondence,
    fg_sbir,
    recognition,
    segmentation,
    zs_sbir,
)
from sketchfusion.evaluation.report import METRICS, PAPER, TITLES, bars, text
from sketchfusion.images import Preprocess, collate, letterbox
from sketchfusion.tasks.segmentation import mask_iou
from sketchfusion.training.cache import Entry, pixels_of
from sketchfusion.training.jobs import make_job

# ---- rows


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """A wide, a tall and a square one: the cells that lie on the image differ."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, size, dtype=np.uint8) for size in ((40, 64, 3), (64, 24, 3), (64, 64, 3))]


def by_row(extractor: Extractor, images: Sequence[Any]) -> dict[str, Features]:
    """Each row's features of all images, whatever the batches."""
    parts: dict[str, list[Features]] = {}
    for start, row, features in extractor.stream(images):
        assert start == sum(len(part) for part in parts.get(row, []))
        parts.setdefault(row, []).append(features)
    return {
        row: Features(
            torch.cat([part.pooled for part in found]),
            torch.cat([part.dense for part in found]),
            collate([part.geometry.image(i) for part in found for i in range(len(part))]),
        )
        for row, found in parts.items()
    }


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= 1e-5 * b.norm())


def same(a: Features, b: Features) -> bool:
    return close(a.pooled, b.pooled) and close(a.dense, b.dense)


@pytest.mark.filterwarnings("ignore:UNTRAINED adapters")
@pytest.mark.parametrize("ensemble", [None, 2])
def test_rows_with_learned_aggregation_are_the_model_with_a_part_set_to_nothing(
    model: SketchFusion, images: list[np.ndarray], ensemble: int | None
) -> None:
    rows = by_row(Extractor(model, ensemble=ensemble, batch_size=2), images)
    assert list(rows) == list(ROWS)
    unadapted, unmixed = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in unadapted.adapters.parameters():
            parameter.zero_()
        unmixed.aggregator.mixing_weights.zero_()
    for row, expected in {"fused": model, "without-adapters": unadapted, "without-mixing": unmixed}.items():
        assert same(rows[row], expected.encode(images, ensemble=ensemble)), row
    assert not close(rows["fused"].dense, rows["without-adapters"].dense)
    assert not close(rows["fused"].dense, rows["without-mixing"].dense)


def test_untrained_rows_are_tokens_and_taps(model: SketchFusion, images: list[np.ndarray]) -> None:
    rows = by_row(Extractor(model, batch_size=3), images)
    pixels, geometries = zip(*(model.preprocess(image) for image in images), strict=True)
    latents, tokens = model.embed(torch.stack(pixels))
    assert close(rows["semantic"].dense, tokens / tokens.norm(dim=1, keepdim=True))

    def taps(hooks: dict) -> torch.Tensor:
        maps = model.diffusion(model.diffusion.add_noise(latents, 0), hooks, inject_skips=model.config.inject_skips)
        grids = [F.interpolate(maps[tap], size=(12, 12), mode="bilinear", align_corners=False) for tap in maps]
        return torch.cat([grid / grid.norm(dim=1, keepdim=True) for grid in grids], 1).detach()

    bare, injected = taps({}), taps(model.adapters(tokens))
    assert close(rows["diffusion"].dense, bare)
    assert close(rows["without-aggregation"].dense, injected)
    both = rows["semantic+diffusion"].dense
    resized = F.interpolate(tokens, size=(12, 12), mode="bilinear", align_corners=False)
    assert close(both[:, :16], resized / resized.norm(dim=1, keepdim=True))
    assert close(both[:, 16:], bare / 3**0.5)  # three taps, each of norm 1
    for row in ("semantic", "diffusion", "semantic+diffusion", "without-aggregation"):
        for i, geometry in enumerate(geometries):  # the mean of the cells on the image, and of no others
            dense = rows[row].dense[i]
            assert torch.allclose(rows[row].pooled[i], dense[:, geometry.mask(dense.shape[-1])].mean(1), atol=1e-6)


def test_rows_share_the_work_and_leave_the_model_as_it_was(model: SketchFusion, images: list[np.ndarray]) -> None:
    runs = {"vae": 0, "unet": 0, "semantic": 0}
    parts = {"vae": model.diffusion.vae.encoder, "unet": model.diffusion.unet.conv_in, "semantic": model.semantic}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            runs[name] += 1

        return hook

    handles = [part.register_forward_hook(count(name)) for name, part in parts.items()]
    before = copy.deepcopy(model.state_dict())

    def ran(*rows: str) -> tuple[int, int, int]:
        runs.update(dict.fromkeys(runs, 0))
        by_row(Extractor(model, rows or tuple(ROWS)), images)
        return runs["vae"], runs["unet"], runs["semantic"]

    assert ran() == (1, 2, 1)
    assert ran("fused") == ran("without-mixing", "fused") == (1, 1, 1)
    assert ran("diffusion", "without-adapters") == (1, 1, 1)
    assert ran("semantic") == (0, 0, 1)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_drawing_that_cannot_be_drawn_is_named(model: SketchFusion, tmp_path: Path, undrawable: str) -> None:
    (tmp_path / "a.svg").write_text(undrawable)
    record = Record(str(tmp_path / "a.svg"), "sketch", "a")
    for encode in (
        lambda: list(Extractor(model, ["semantic"], size=256).stream([record])),
        lambda: pixels_of([Entry(record, 0)], Preprocess(256), seed=0),
    ):
        with pytest.raises(ImageError, match="too many lines") as caught:
            encode()
        assert caught.value.source == record.path


def test_batches_do_not_matter(model: SketchFusion, images: list[np.ndarray]) -> None:
    together, single = (by_row(Extractor(model, batch_size=size), images) for size in (3, 1))
    assert all(same(together[row], single[row]) for row in ROWS)
    assert list(Extractor(model).stream([])) == []


def test_other_encoders_see_their_own_normalisation(
    model: SketchFusion, images: list[np.ndarray], backbones: dict[str, Path], tmp_path: Path
) -> None:
    same_one = str(backbones["semantic"])
    rows = by_row(Extractor(model, ["semantic", same_one]), images)
    assert same(rows[same_one], rows["semantic"])

    other = tmp_path / "encoder"
    other.mkdir()
    for file in backbones["semantic"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    normalisation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (other / "preprocessor_config.json").write_text(json.dumps(normalisation))
    rows = by_row(Extractor(model, ["semantic", str(other)]), images)
    assert not close(rows[str(other)].dense, rows["semantic"].dense)


def test_other_encoders_give_what_their_publishers_take(
    model: SketchFusion, images: list[np.ndarray], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    network = Dinov2Model(Dinov2Config(**sizes)).eval()
    nn.init.normal_(network.layernorm.weight)
    network.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="normalisation"):
        Extractor(model, [str(tmp_path)])
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    found = by_row(Extractor(model, [str(tmp_path)]), images)[str(tmp_path)].dense
    pixels = torch.stack([model.preprocess(image)[0] for image in images])
    seen = F.interpolate(pixels, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        tokens = network(seen).last_hidden_state[:, 1:]  # after its norm, without CLS
    assert close(found.flatten(2).transpose(1, 2), F.normalize(tokens, dim=2))


def test_a_convolutional_encoder_is_a_row(model: SketchFusion, images: list[np.ndarray], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ).eval()
    network.save_pretrained(tmp_path)
    row = str(tmp_path)
    for written in ({}, {"crop_size": {"height": 48, "width": 48}, "size": {"shortest_edge": 64}}, {"size": 48}):
        preprocessor = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], **written}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        if not written:
            with pytest.raises(LoadError, match="the size of its images"):
                Extractor(model, [row])
            continue
        found = by_row(Extractor(model, [row]), images)[row].dense
        pixels = torch.stack([model.preprocess(image)[0] for image in images])
        seen = F.interpolate(pixels, size=(48, 48), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            assert close(found, F.normalize(network(seen).last_hidden_state, dim=1))


def test_an_encoder_whose_patches_leave_a_rest_sees_whole_patches(
    model: SketchFusion, images: list[np.ndarray], backbones: dict[str, Path], tmp_path: Path
) -> None:
    for file in backbones["semantic"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"image_size": 35}))  # four patches of 8, and 3 pixels
    rows = by_row(Extractor(model, [str(tmp_path), "semantic"]), images)
    assert same(rows[str(tmp_path)], rows["semantic"])


@pytest.mark.parametrize("rows", [["fusedd"], [], ["fused", "fused"], ["no-such-folder"]])
def test_rows_that_there_are_not(model: SketchFusion, rows: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Extractor(model, rows)
    assert caught.value.key == "rows"


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"ensemble": 3}, {"size": 100}])
def test_settings_are_checked_before_anything_is_encoded(model: SketchFusion, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        Extractor(model, **wrong)
    assert caught.value.key == next(iter(wrong))


def test_features_that_overflowed_are_an_error_and_no_figure(model: SketchFusion, images: list[np.ndarray]) -> None:
    with torch.no_grad():
        next(model.adapters.parameters()).fill_(float("inf"))
    with pytest.raises(SketchFusionError, match="fused are not finite"):
        by_row(Extractor(model, ["diffusion", "fused"]), images)


# ---- protocols, on features made by hand


class Made:
    """An extractor of one row that gives every record the features that a function makes for it."""

    rows = ("made",)
    source = "by hand"
    ensemble = 1
    preprocess = Preprocess(8)

    class model:
        device, dtype, fingerprint = torch.device("cpu"), torch.float32, 16 * "0"

    def __init__(
        self, features: Callable[[Record], tuple[list[float], torch.Tensor]], photo_side: int = 8, batch: int = 3
    ):
        self.features, self.photo_side, self.batch, self.seen = features, photo_side, batch, []

    def stream(self, records: Sequence[Record]) -> Iterator[tuple[int, str, Features]]:
        for start in range(0, len(records), self.batch):
            some = records[start : start + self.batch]
            self.seen += some
            pooled, dense = zip(*(self.features(record) for record in some), strict=True)
            sides = [self.photo_side if record.kind == "photo" else 8 for record in some]
            geometry = collate([letterbox(side, side, 8) for side in sides])
            yield start, "made", Features(torch.tensor(pooled), torch.stack(dense), geometry)


def angle(degrees: float) -> tuple[list[float], torch.Tensor]:
    radians = np.deg2rad(degrees)
    return [float(np.cos(radians)), float(np.sin(radians))], torch.zeros(1, 1, 1)


def record(name: str, label: str, photo: str | None = None, **more: Any) -> Record:
    return Record(name, "sketch" if name.startswith("s") else "photo", label, photo=photo, **more)


def collection(*records: Record, name: str = "folder") -> DataSet:
    return DataSet(name, tuple(sorted({str(one.label) for one in records})), records, "made by hand")


RETRIEVED = collection(
    record("p1", "a", "a/1"), record("p2", "a", "a/2"), record("p3", "b", "b/1"), record("p4", "b", "b/2"),
    record("s1", "a", "a/1"), record("s2", "b", "b/2"), record("s3", "b", "b/1"),
)  # fmt: skip
ANGLES = {"p1": 0, "p2": 20, "p3": 10, "p4": 90, "s1": 1, "s2": 91, "s3": 18}


def test_category_retrieval_by_hand() -> None:
    (result,) = zs_sbir(Made(lambda r: angle(ANGLES[r.path])), RETRIEVED)  # type: ignore[arg-type]
    # s1 finds p1 p3 p2 p4, s2 finds p4 p2 p3 p1, s3 finds p2 p3 p1 p4
    average_precisions = [(1 + 2 / 3) / 2, (1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2]
    assert result.figures["map_all"] == pytest.approx(np.mean(average_precisions))
    assert result.figures["acc_1"] == pytest.approx(2 / 3)
    assert (result.figures["queries"], result.figures["gallery"]) == (3, 4)
    row = result.to_dict()
    assert {"row", "task", "data", "split", "model", "fingerprint", "dtype", "ensemble", "size", "queries", "gallery",
            "map_all", "map_200", "p_200", "p_100", "acc_1", "acc_5", "convention", "ties", "independent",
            } == row.keys()  # fmt: skip
    assert (row["convention"], row["model"], row["split"]) == ("zse", "by hand", "made by hand")
    assert (row["dtype"], row["ensemble"], row["size"]) == ("float32", 1, 8)
    found = {example.query.path: [(photo.path, right) for photo, right in example.found] for example in result.examples}
    assert found["s3"] == [("p2", False), ("p3", True), ("p1", False), ("p4", True)]


def test_photos_may_come_from_another_set() -> None:
    drawn = collection(*RETRIEVED.sketches)
    others = collection(*RETRIEVED.photos, name="other")
    extractor: Any = Made(lambda r: angle(ANGLES[r.path]))
    (apart,), (together,) = zs_sbir(extractor, drawn, photos=others), zs_sbir(extractor, RETRIEVED)
    assert apart.figures == together.figures
    assert "photos from" in apart.split


@pytest.mark.parametrize(("gallery", "hits"), [("all", [1, 1, 0]), ("class", [1, 1, 1])])
@pytest.mark.parametrize("convention", ["zse", "sake"])
def test_fine_grained_retrieval_by_hand(gallery: str, hits: list[int], convention: str) -> None:
    extractor: Any = Made(lambda r: angle(ANGLES[r.path]))
    (result,) = fg_sbir(extractor, RETRIEVED, gallery=gallery, convention=convention)
    assert result.figures["acc_1"] == pytest.approx(np.mean(hits))
    assert result.figures["acc_5"] == 1
    assert (result.figures["queries"], result.figures["gallery"]) == (3, 4)
    assert result.figures["convention"] == convention
    for example in result.examples:  # what is shown was looked for where the figures are from
        assert len(example.found) == (4 if gallery == "all" else 2)
        assert gallery == "all" or {photo.label for photo, _ in example.found} == {example.query.label}


def test_within_classes_means_are_over_what_the_convention_says() -> None:
    # Of photo a/1 there are three sketches that find it, of b/2 there is one that does not, of b/1 one that does.
    drawn = [record(f"s{i}", "a", "a/1") for i in range(3)] + [record("s7", "b", "b/2"), record("s8", "b", "b/1")]
    data = collection(*RETRIEVED.photos, *drawn)
    angles = ANGLES | {"s0": 0, "s1": 0, "s2": 0, "s7": 10, "s8": 10}
    extractor: Any = Made(lambda r: angle(angles[r.path]))
    over_queries, over_photos = (
        fg_sbir(extractor, data, gallery="class", convention=convention)[0].figures for convention in ("zse", "sake")
    )
    assert over_queries["acc_1"] == pytest.approx(4 / 5)
    assert over_photos["acc_1"] == pytest.approx(2 / 3)


def test_standard_errors_take_what_belongs_together_as_one() -> None:
    random = np.random.default_rng(0)
    fused, other = torch.from_numpy(random.random((2, 12, 1)))
    by_itself = [str(i) for i in range(12)]
    rows = _averaged({"other": other, "fused": fused}, ["acc_1"], by_itself)
    difference = (fused - other)[:, 0].numpy()
    assert rows["fused"].keys() == {"acc_1", "independent"}
    assert rows["other"]["fused_ahead"]["acc_1"] == {
        "mean": pytest.approx(rows["fused"]["acc_1"] - rows["other"]["acc_1"]),
        "standard_error": pytest.approx(difference.std(ddof=1) / 12**0.5),
    }

    def error(weights: list[float], groups: list[str]) -> tuple[float, int]:
        found = _averaged(
            {"other": other, "fused": fused}, ["acc_1"], groups, torch.tensor(weights, dtype=torch.float64)
        )["other"]
        return found["fused_ahead"]["acc_1"]["standard_error"], found["independent"]

    of_three = difference.reshape(4, 3).mean(1)  # groups of one size: as if only their means were there
    found, count = error([1.0] * 12, [str(i // 3) for i in range(12)])
    assert (found, count) == (pytest.approx(of_three.std(ddof=1) / 4**0.5), 4)
    # Groups of 1, 2, 3 and 6, each of which counts as much as another.
    sizes = [1, 2, 3, 6]
    groups = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    means = np.array([part.mean() for part in np.split(difference, np.cumsum(sizes)[:-1])])
    found, count = error([1 / size for size in sizes for _ in range(size)], groups)
    assert (found, count) == (pytest.approx(means.std(ddof=1) / 4**0.5), 4)
    assert error([1.0] * 12, ["one"] * 12) == (None, 1)
    assert "fused_ahead" not in _averaged({"other": other}, ["acc_1"], by_itself)["other"]


@pytest.mark.parametrize("convention", ["zse", "sake"])
def test_what_looks_for_the_same_photos_counts_as_one(convention: str) -> None:
    again = record("s4", "b", "b/1")  # like s3
    data = collection(*RETRIEVED.records, again)
    extractor: Any = Made(lambda r: angle(ANGLES.get(r.path, 18)))
    (by_class,), (by_photo,) = (run(extractor, data, convention=convention) for run in (zs_sbir, fg_sbir))
    assert (by_class.figures["queries"], by_class.figures["independent"]) == (4, 2)
    assert (by_photo.figures["queries"], by_photo.figures["independent"]) == (4, 3)


def test_drawings_in_one_file_are_several() -> None:
    records = [Record(f"{label}.ndjson", "sketch", label, row=i) for label in "ab" for i in range(30)]
    extractor: Any = Made(lambda r: angle(90.0 * "ab".index(str(r.label))))
    (result,) = recognition(extractor, collection(*records), held_out=0.3)
    assert result.figures["independent"] == result.figures["test"] > 5


def test_a_fine_grained_gallery_has_each_photo_once() -> None:
    """The extended set of Sketchy holds the published photos again, and others."""
    extended = [
        Record("Sketchy/EXTEND_image_sketchy/a/1.jpg", "photo", "a", photo="a/1"),
        Record("Sketchy/EXTEND_image_sketchy/a/9.jpg", "photo", "a", photo="a/9"),
    ]
    extractor: Any = Made(lambda r: angle(ANGLES.get(r.path, 0)))
    (alone,), (with_them,) = (
        fg_sbir(extractor, collection(*RETRIEVED.records, *more), gallery="all") for more in ([], extended)
    )
    assert with_them.figures == alone.figures
    unnamed = [Record(f"p{i}", "photo", "a") for i in (8, 9)]
    (with_others,) = fg_sbir(extractor, collection(*RETRIEVED.records, *unnamed))
    assert with_others.figures["gallery"] == 6


def test_recognition_fits_to_one_side_and_tests_on_the_other() -> None:
    records = [record(f"s{i}", "ab"[i % 2]) for i in range(60)]
    side = {"a": 0.0, "b": 90.0}
    extractor: Any = Made(lambda r: angle(side[str(r.label)]))
    (result,) = recognition(extractor, collection(*records), held_out=0.3)
    assert result.figures["train"] + result.figures["test"] == 60
    assert 5 < result.figures["test"] < 35
    assert (result.figures["classes"], result.figures["acc_1"]) == (2, 1.0)
    # Sketches whose labels are swapped are all wrong, many as they are: what is tested on was not fitted to.
    swapped = [record(f"s{i}", "ba"[i % 2]) for i in range(300)]
    extractor = Made(lambda r: angle(side["ab"[int(r.path[1:]) % 2]]))
    (result,) = recognition(extractor, collection(*records), test=collection(*swapped))
    assert (result.figures["train"], result.figures["test"], result.figures["acc_1"]) == (60, 300, 0.0)
    assert result.ties is None
    assert "ties" not in result.to_dict()
    # Of two sketches a class both can fall on the side that is tested on.
    few = [record(f"s{label}{i}", label) for label in "abcdefghijklmnopqrst" for i in range(2)]
    extractor = Made(lambda r: angle(ord(str(r.label))))
    (result,) = recognition(extractor, collection(*few), held_out=0.5)
    assert result.figures["classes"] < 20
    assert result.figures["test"] > 0


def one_hot(record: Record) -> tuple[list[float], torch.Tensor]:
    """An 8 × 8 map in which each key point's cell has a channel of its own, by the point's name."""
    dense = torch.full((4, 8, 8), 0.0)
    dense[3] = 1
    for name, x, y in record.points:
        dense[:, int(y), int(x)] = 0
        dense[int(name), int(y), int(x)] = 1
    return [0.0], dense


@pytest.fixture
def paired() -> DataSet:
    """Two photos of 8 × 8, one with two sketches: five points in all, in the middle of cells."""
    first, second = ("0", 1.5, 2.5), ("1", 6.5, 6.5)
    return collection(
        record("p1", "x", "1", points=(("0", 2.5, 2.5), ("1", 6.5, 5.5))),
        record("p2", "x", "2", points=(("0", 5.5, 5.5), ("2", 0.5, 0.5))),
        record("s1", "x", "1", points=(first, second)),
        record("s2", "x", "1", points=(first, second)),
        record("s3", "x", "2", points=(first, second)),  # its second point the photo does not have
        record("s4", "x", "3", points=(first,)),  # its photo is not there
    )


def test_correspondence_by_hand(paired: DataSet) -> None:
    extractor: Any = Made(one_hot, batch=2)
    found, lazy = correspondence(extractor, paired)
    assert (found.row, lazy.row) == ("made", "same-position")
    assert {**found.figures} == {"pairs": 3, "points": 5, "pck_5": 1.0, "pck_10": 1.0, "independent": 2}
    # A tenth of 8 pixels is 0.8, and the points are a pixel apart or more.
    assert (lazy.figures["pck_5"], lazy.figures["pck_10"]) == (0.0, 0.0)
    assert [one.path for one in extractor.seen] == ["p1", "s1", "s2", "p2", "s3"]  # one photo after the other


def test_the_same_position_in_the_ink(tmp_path: Path) -> None:
    """Of a shoe on white: no model, a threshold and a scale."""
    records = []
    for name, kind, box, point in (("p", "photo", (1, 1, 6, 6), 2.5), ("s", "sketch", (2, 2, 5, 5), 3.0)):
        image = Image.new("RGB", (8, 8), "white")
        ImageDraw.Draw(image).rectangle(box, fill="black")
        image.save(tmp_path / f"{name}.png")
        path: Any = tmp_path / f"{name}.png"
        records.append(Record(path, kind, "shoe", photo="1", points=(("0", point, point),)))  # type: ignore[arg-type]
    extractor: Any = Made(one_hot)
    _, position, in_ink = correspondence(extractor, collection(*records, name="shoes"))
    assert (position.row, in_ink.row) == ("same-position", "same-position-in-ink")
    assert (position.figures["pck_5"], in_ink.figures["pck_5"]) == (0, 1)


def test_psc6k_measures_by_256_pixels(paired: DataSet) -> None:
    extractor: Any = Made(one_hot)
    _, lazy = correspondence(extractor, DataSet("psc6k", paired.classes, paired.records, "made by hand"))
    assert lazy.figures["pck_10"] == 1.0  # of 256: within 25.6 pixels is everything


def test_the_same_position_is_relative_to_each_image() -> None:
    extractor: Any = Made(lambda r: ([0.0], torch.ones(1, 8, 8)), photo_side=16)
    photo = record("p1", "x", "1", points=(("0", 3.0, 5.0),))
    _, lazy = correspondence(extractor, collection(photo, record("s1", "x", "1", points=(("0", 1.5, 2.5),))))
    assert lazy.figures["pck_5"] == 1.0


def test_a_key_point_outside_its_image_names_the_file(paired: DataSet) -> None:
    records = (*paired.records, record("s9", "x", "2", points=(("0", 99.0, 1.0),)))
    extractor: Any = Made(one_hot)
    extractor.features = lambda r: one_hot(record("s", "x")) if r.path == "s9" else one_hot(r)
    with pytest.raises(DataError, match="s9: its key points do not fit"):
        correspondence(extractor, DataSet("folder", paired.classes, records, "made by hand"))


def test_points_of_a_photo_that_was_resized_without_them(paired: DataSet) -> None:
    large = [dataclasses.replace(r, points=tuple((n, 9 * x, 9 * y) for n, x, y in r.points)) if r.kind == "photo" else r
             for r in paired.records]  # fmt: skip
    extractor: Any = Made(one_hot)
    extractor.features = lambda r: one_hot(next(one for one in paired.records if one.path == r.path))
    with pytest.raises(DataError, match=r"p\d: its key point . \(.*\) lies outside of its 8 x 8 pixels"):
        correspondence(extractor, DataSet("folder", paired.classes, tuple(large), "made by hand"))


def mask_file(folder: Path, name: str, mask: np.ndarray) -> str:
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / name)
    return str(folder / name)


def test_segmentation_by_hand(tmp_path: Path) -> None:
    left, low = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    left[:, :4], low[4:] = True, True
    photos = collection(
        record("p1", "a", mask=mask_file(tmp_path, "1.png", left)),
        record("p2", "b", mask=mask_file(tmp_path, "2.png", low)),
        record("p3", "b", mask=mask_file(tmp_path, "3.png", low)),
        record("p4", "c"),  # without a mask: it does not count
    )
    sketches = collection(*(record(f"s{i}", label) for i, label in enumerate("abbbd")))

    def features(one: Record) -> tuple[list[float], torch.Tensor]:
        """A query along x; in p1 the left half resembles it by 0.6 and the rest by 0, in p2 and p3 all of it does."""
        dense = torch.zeros(2, 8, 8)
        dense[1] = 1
        where = torch.from_numpy(left) if one.path == "p1" else torch.ones(8, 8, dtype=torch.bool)
        dense[0, where], dense[1, where] = 0.6, 0.8
        return [1.0, 0.0], dense

    extractor: Any = Made(features)
    result, everything = segmentation(extractor, photos, sketches)
    figures = result.figures
    assert (result.row, everything.row) == ("made", "whole-photo")
    assert [everything.figures[name] for name in ("miou", "pacc", "miou_best")] == pytest.approx([0.5] * 3)
    assert (figures["photos"], figures["sketches"], figures["queries"]) == (3, 3, 3)
    assert figures["miou_by_class"] == {"a": pytest.approx(1, abs=0.1), "b": pytest.approx(0.5)}
    assert figures["pacc"] == pytest.approx((1 + 0.5 + 0.5) / 3, abs=0.05)
    assert figures["miou_best"] >= figures["miou"]
    assert figures["threshold"] == 0.47
    used = [one.path for one in extractor.seen if one.kind == "sketch"]
    assert used == ["s0", "s1", "s2"]  # a class's sketches take turns
    twice, _ = segmentation(extractor, photos, sketches, queries=2)
    assert (twice.figures["queries"], twice.figures["sketches"]) == (6, 4)


def test_what_is_found_whatever_is_asked(tmp_path: Path) -> None:
    left = np.zeros((8, 8), bool)
    left[:, :4] = True
    files = {"a": mask_file(tmp_path, "a.png", left), "b": mask_file(tmp_path, "b.png", ~left)}
    photos = collection(*(record(f"p{label}", label, mask=files[label]) for label in "ab"))
    sketches = collection(*(record(f"s{label}{i}", label) for label in "ab" for i in range(2)))

    def features(one: Record) -> tuple[list[float], torch.Tensor]:
        shown = torch.from_numpy(left).float()
        return [float(one.label == "a"), float(one.label == "b")], torch.stack([shown, 1 - shown])

    extractor: Any = Made(features)
    extractor.rows, stream = ("fused",), extractor.stream
    extractor.stream = lambda records: ((start, "fused", batch) for start, _, batch in stream(records))
    fused, other, _ = segmentation(extractor, photos, sketches)
    assert (fused.row, other.row) == ("fused", "fused-other-class")
    assert (fused.figures["miou"], other.figures["miou"]) == pytest.approx((1, 0), abs=0.1)
    assert other.figures["fused_ahead"]["miou"]["mean"] == pytest.approx(1, abs=0.1)
    alone = [
        result.row for result in segmentation(extractor, *(one.of_classes(["a"], "a") for one in (photos, sketches)))
    ]
    assert alone == ["fused", "whole-photo"]


def test_what_a_training_held_out_is_found_again(model: SketchFusion, tmp_path: Path) -> None:
    points = (("0", 2.5, 2.5), ("1", 6.5, 5.5))
    mask = mask_file(tmp_path, "mask.png", np.eye(8, dtype=bool))
    photos = [record(f"p{i}", "ab"[i % 2], str(i), points=points, mask=mask) for i in range(20)]
    drawn = [record(f"s{i}", "ab"[i % 2], str(i), points=points) for i in range(20)]
    paired, masked, sketches = collection(*photos, *drawn), collection(*photos), collection(*drawn)
    extractor: Any = Made(one_hot)

    job = make_job("correspondence", paired, model, held_out=0.3)
    correspondence(extractor, paired, held_out=0.3)
    assert 0 < len(job.held_out.records) < 40
    assert set(extractor.seen) == set(job.held_out.records)
    assert not set(extractor.seen) & set(job.task.records)

    extractor.seen.clear()
    extractor.features = lambda one: ([1.0], torch.ones(1, 8, 8))
    job = make_job("segmentation", masked, model, held_out=0.3, sketches=sketches)
    segmentation(extractor, masked, sketches, held_out=0.3)
    assert {one.kind for one in extractor.seen} == {"photo", "sketch"}
    assert set(extractor.seen) <= set(job.held_out.records)
    assert not set(extractor.seen) & set(job.task.records)
    with pytest.raises(ConfigError, match="held_out"):
        correspondence(extractor, paired, held_out=1.0)
    with pytest.raises(ConfigError, match="held_out"):
        segmentation(extractor, masked, sketches, held_out=0.0)


def test_the_iou_at_every_threshold_is_that_of_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(9, 7, generator=generator) * 1.2 - 0.6
    cosines[0, :3] = torch.tensor([0.47, -1.0, 1.0])  # at a threshold is not above it
    truth = torch.rand(9, 7, generator=generator) > 0.6
    curve = _ious(cosines, truth)
    assert len(curve) == len(THRESHOLDS) == 2001
    for at in range(0, 2001, 50):
        assert curve[at] == pytest.approx(mask_iou(cosines > THRESHOLDS[at], truth))
    nothing = torch.zeros_like(truth)
    assert _ious(cosines, nothing)[-1] == 1.0  # nothing above 1, and nothing to find
    assert float(THRESHOLDS[1470]) == float(torch.tensor(0.47))


def test_a_limit_keeps_the_photos_that_were_drawn() -> None:
    photos = [record(f"p{i}", "a", f"a/{i}") for i in range(9)]
    drawn = [record(f"s{i}-{k}", "a", f"a/{i}") for i in (3, 8) for k in range(4)]
    other = [record(f"s{i}", "b") for i in range(2)]
    data = limited(collection(*photos, *drawn, *other), 3)
    assert [one.path for one in data.photos] == ["p0", "p3", "p8"]
    assert [one.path for one in data.sketches] == ["s3-0", "s3-2", "s8-1", "s0", "s1"]
    assert "at most 3" in data.split
    with pytest.raises(ConfigError):
        limited(data, 0)


MADE: Any = Made(lambda r: angle(0))


@pytest.mark.parametrize(
    ("run", "named"),
    [
        (
            lambda: zs_sbir(MADE, collection(record("p1", "a"), record("s1", "a"), record("p2", "b"))),
            "no sketches of b",
        ),
        (lambda: zs_sbir(MADE, collection(record("p1", "a"), record("s1", "a"), record("s2", "b"))), "no photos of b"),
        (lambda: zs_sbir(MADE, collection(record("s1", "a"))), "no photos"),
        (lambda: zs_sbir(MADE, collection(record("p1", "a"), record("s1", "a"))), "every photo is right"),
        (lambda: zs_sbir(MADE, DataSet("folder", (), (), "empty")), "no sketches"),
        (lambda: fg_sbir(MADE, collection(record("p1", "a", "a/1"), record("s1", "a"))), "s1"),
        (lambda: fg_sbir(MADE, collection(record("p1", "a", "a/1"), record("s1", "a", "a/2"))), "s1"),
        (lambda: fg_sbir(MADE, DataSet("folder", (), (), "empty")), "no sketches"),
        (lambda: recognition(MADE, collection(record("s1", "a"), record("s2", "a"))), "two classes"),
        (lambda: recognition(MADE, RETRIEVED, test=collection(record("s1", "c"))), "only there: c"),
        (lambda: recognition(MADE, RETRIEVED, test=DataSet("folder", (), (), "empty")), "0 to test"),
        (lambda: correspondence(MADE, RETRIEVED), "key point in common"),
        (lambda: segmentation(MADE, RETRIEVED, RETRIEVED), "no photos with masks"),
        (
            lambda: segmentation(MADE, collection(record("p", "a", mask="m")), collection(record("s1", "b"))),
            "no sketches",
        ),
    ],
)
def test_sets_that_lack_what_a_protocol_needs(run: Callable[[], Any], named: str) -> None:
    with pytest.raises(DataError, match=named):
        run()
    assert MADE.seen == []  # said before anything is encoded


@pytest.mark.parametrize(
    ("run", "key"),
    [
        (lambda: zs_sbir(MADE, RETRIEVED, convention="mine"), "convention"),
        (lambda: fg_sbir(MADE, RETRIEVED, gallery="some"), "gallery"),
        (lambda: recognition(MADE, RETRIEVED, held_out=1.0), "held_out"),
        (lambda: segmentation(MADE, RETRIEVED, RETRIEVED, queries=0), "queries"),
        (lambda: evaluate("painting", "folder", "."), "task"),
        (lambda: evaluate("zs-sbir", "folder", ".", gallery="all"), "gallery"),
        (lambda: evaluate("correspondence", "folder", ".", convention="zse"), "convention"),
        (lambda: evaluate("segmentation", "folder", "."), "sketches"),
        (lambda: evaluate("recognition", "folder", ".", test=".", held_out=0.3), "held_out"),
        (lambda: evaluate("recognition", "quickdraw", ".", part="test", held_out=0.3), "held_out"),
    ],
)
def test_settings_that_there_are_not(run: Callable[[], Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run()
    assert caught.value.key == key
    assert MADE.seen == []


# ---- the command, on small trees in the published layouts


def draw(path: Path, seed: int, size: tuple[int, int] = (40, 32)) -> Path:
    """A drawing of a few lines, or for a .jpg the same in colour on grey."""
    random = np.random.default_rng(seed)
    photo = path.suffix == ".jpg"
    image = Image.new("RGB", size, "grey" if photo else "white")
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        ends = [tuple(float(v) for v in random.integers(0, size)) for _ in range(2)]
        pen.line(ends, fill=tuple(int(v) for v in random.integers(0, 256, 3)) if photo else "black", width=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sketchy, TU-Berlin twice, shoes and VOC, a few drawings each."""
    root = tmp_path_factory.mktemp("trees")
    seed = 0
    for label in ("cat", "dog", "sheep"):
        for i in range(2):
            draw(root / f"sketchy/256x256/photo/tx_000000000000/{label}/n{i}.jpg", seed := seed + 1)
            draw(root / f"sketchy/256x256/sketch/tx_000000000000/{label}/n{i}-1.png", seed := seed + 1)
        for i in range(12):
            draw(root / f"tuberlin/png/{label}/{i}.png", seed := seed + 1)
        draw(root / f"test/png/{label}/99.png", seed := seed + 1)
    boxes = {"heel": [0.1, 0.1, 0.2, 0.2], "toe": [0.6, 0.5, 0.3, 0.3]}
    for i in range(3):
        draw(root / f"shoes/photo/{i:03}.jpg", seed := seed + 1)
        draw(root / f"shoes/sketch/{i:03}-1.png", seed := seed + 1, size=(30, 44))
    parts = {name: boxes for i in range(3) for name in (f"{i:03}", f"{i:03}-1")}
    (root / "shoes/parts.json").write_text(json.dumps({"parts": parts}))
    items = []
    for value, label in enumerate(("cat", "dog", "bird"), 1):  # of which nobody has drawn the last
        draw(root / f"voc/images/{label}.jpg", seed := seed + 1)
        mask = np.zeros((32, 40), np.uint8)
        mask[8:20, 5:30] = value
        (root / "voc/masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / f"voc/masks/{label}.png")
        instance = {"bbox": [5, 8, 25, 12], "keypoints": [[6, 9, 1]]}
        items.append(
            {
                "file": f"{label}.jpg",
                "cls": label,
                "voc_id": value,
                "scale": 1,
                "orig": [40, 32],
                "instances": [instance],
            }
        )
    (root / "voc/meta.json").write_text(json.dumps({"keypoint_names": ["nose"], "items": items}))
    return root


@pytest.fixture(scope="module")
def checkpoint(built: SketchFusion, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small model, trained in appearance, in a folder."""
    trained = copy.deepcopy(built)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("checkpoint")
    trained.save_pretrained(folder, include_backbones=True)
    return str(folder)


@pytest.fixture
def run(
    trees: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> Callable[..., Any]:
    """`run("zs-sbir", "--data", …)` in this process, with the small model and the trees' folder as the current one."""
    monkeypatch.chdir(trees)

    def call(*arguments: str) -> Any:
        return command("evaluate", *arguments, "--model", checkpoint, "--device", "cpu", "--dtype", "float32")

    return call


COMMANDS = {
    "zs-sbir": ["--data", "sketchy", "--root", "sketchy"],
    "fg-sbir": ["--data", "sketchy", "--root", "sketchy", "--gallery", "class"],
    "recognition": ["--data", "tuberlin", "--root", "tuberlin", "--test-root", "test"],
    "correspondence": ["--data", "shoes", "--root", "shoes"],
    "segmentation": ["--data", "voc", "--root", "voc", "--sketches", "sketchy", "--sketches-root", "sketchy"],
}
COUNTS = {
    "zs-sbir": {"queries": 6, "gallery": 6},
    "fg-sbir": {"queries": 6, "gallery": 6},
    "recognition": {"train": 36, "test": 3, "classes": 3},
    "correspondence": {"pairs": 3, "points": 6},
    "segmentation": {"photos": 2, "sketches": 2, "queries": 2},
}
PROMISED = {
    "zs-sbir": "map_all map_200 p_200 p_100 acc_1 acc_5 convention ties",
    "fg-sbir": "map_all map_200 p_200 p_100 acc_1 acc_5 convention ties",
    "recognition": "acc_1",
    "correspondence": "pck_5 pck_10",
    "segmentation": "miou pacc miou_best miou_by_class",
}


@pytest.mark.parametrize("task", COMMANDS)
def test_every_protocol_prints_json_and_a_report(
    run: Callable[..., Any], checkpoint: str, tmp_path: Path, task: str
) -> None:
    done = run(task, *COMMANDS[task], "--json", "--report", str(tmp_path / "report"))
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads(done.stdout)
    blind = {
        "correspondence": ["same-position", "same-position-in-ink"],
        "segmentation": ["fused-other-class", "whole-photo"],
    }.get(task, [])
    assert [row["row"] for row in rows] == [*ROWS, *blind]
    for row in rows:
        assert (row["task"], row["data"], row["model"]) == (task, COMMANDS[task][1], checkpoint)
        assert set(PROMISED[task].split()) <= row.keys()
        assert all(0 <= row[name] <= 1 for name in METRICS[task] if name != "threshold_best")
        assert row.items() >= COUNTS[task].items()
        if row["row"] != "fused":
            for name, ahead in row["fused_ahead"].items():
                assert ahead["mean"] == pytest.approx(rows[-1 - len(blind)][name] - row[name])
                assert ahead["standard_error"] >= 0
    report = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert f"counts as one ({rows[0]['independent']} in all)" in report
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == rows
    figures = {"rows.png", "examples.png"} if task.endswith("sbir") else {"rows.png"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.md", "results.json"} | figures
    for name in figures:
        assert f"({name})" in report
        with Image.open(tmp_path / "report" / name) as figure:
            assert min(figure.size) > 100
    assert rows[0]["split"] in report
    (paper, *_) = PAPER[task].values()
    assert all(f"| {name} |" in report for name in paper.rows)


def test_the_command_in_a_process_of_its_own_shows_a_table(trees: Path, checkpoint: str) -> None:
    arguments = ["evaluate", "zs-sbir", "--data", "sketchy", "--root", "sketchy", "--rows", "semantic,fused"]
    arguments += ["--classes", "all", "--limit", "1", "--model", checkpoint, "--convention", "sake"]
    arguments += ["--ensemble", "2", "--size", "96", "--dtype", "float32"]
    command = [sys.executable, "-m", "sketchfusion", *arguments]
    done = subprocess.run(command, cwd=trees, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    ours, theirs = done.stdout.split("The paper's rows, on Sketchy 104/21")
    for said in (
        "zs-sbir on sketchy",
        "float32, 2 noises, 96 px",
        "3 queries, 3 gallery",
        "convention sake",
        "keep the gallery's order",
        "mAP@all",
    ):
        assert said in ours
    rows, lead = ours.split(
        "How far fused is ahead, ± standard error, for which what belongs to one class counts as one"
    )
    assert [line.split()[0] for line in rows.splitlines()[4:] if line] == ["row", "semantic", "fused"]
    title, line = (line.split() for line in lead.splitlines()[1:] if line)
    assert title == ["row", "mAP@all", "mAP@200", "P@200", "P@100", "Acc@1", "Acc@5"]
    assert (line[0], line.count("±")) == ("semantic", 6)
    assert "B-SD+CLIP" in theirs


def test_python_and_the_command_agree(run: Callable[..., Any], trees: Path, checkpoint: str) -> None:
    done = run("recognition", "--data", "tuberlin", "--root", "tuberlin", "--rows", "fused", "--json")
    model = SketchFusion.from_pretrained(checkpoint, device="cpu", dtype="float32")
    (result,) = evaluate("recognition", "tuberlin", trees / "tuberlin", model=model, rows=["fused"])
    (row,) = json.loads(done.stdout)
    assert row == result.to_dict() | {"model": checkpoint}
    assert (result.ensemble, result.size) == (model.config.ensemble, model.preprocess.size)
    assert (result.model, row["train"] + row["test"]) == ("in memory", 36)


def test_of_two_sets_the_classes_that_both_have_are_taken(trees: Path, checkpoint: str) -> None:
    model = SketchFusion.from_pretrained(checkpoint, device="cpu", dtype="float32")
    here = {"model": model, "rows": ["fused"], "sketches": ("sketchy", trees / "sketchy")}
    result = evaluate("segmentation", "voc", trees / "voc", **here)[0]
    assert result.figures["miou_by_class"].keys() == {"cat", "dog"}
    assert "2 of its 3 classes, sketches from" in result.split
    assert result.split.endswith("Sketchy, 2 of 3 classes")
    with pytest.raises(DataError, match="no class has the name of one of bird"):
        evaluate("segmentation", "voc", trees / "voc", classes=["bird"], **here)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["painting", "--data", "sketchy", "--root", "sketchy"], "segmentation"),
        (["zs-sbir", "--data", "sketchi", "--root", "sketchy"], "sketchy"),
        (["zs-sbir", "--data", "sketchy", "--root", "nowhere"], "nowhere"),
        (["zs-sbir", "--data", "tuberlin", "--root", "tuberlin"], "no photos"),
        (["zs-sbir", "--data", "sketchy", "--root", "sketchy", "--rows", "semantik"], "semantic"),
        (["zs-sbir", "--data", "sketchy", "--root", "sketchy", "--convention", "mine"], "sem-pcyc"),
        (["zs-sbir", "--data", "sketchy", "--root", "sketchy", "--limit", "0"], "limit"),
        (["zs-sbir", "--data", "sketchy", "--root", "sketchy", "--photos", "folder"], "--photos-root"),
        (["zs-sbir", "--data", "sketchy", "--root", "sketchy", "--report", "voc/meta.json"], "report"),
        (["zs-sbir", "--data", "sketchy", "--root", "sketchy", "--report", "voc/meta.json/report"], "report"),
        (["segmentation", "--data", "voc", "--root", "voc"], "sketches"),
        (["correspondence", "--data", "sketchy", "--root", "sketchy"], "key point"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(run: Callable[..., Any], arguments: list[str], named: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr


@pytest.mark.parametrize("broken", ["photo/tx_000000000000/cat/n1.jpg", "sketch/tx_000000000000/dog/n0-1.png"])
def test_a_corrupt_image_is_named_and_nothing_is_written(
    run: Callable[..., Any], trees: Path, tmp_path: Path, broken: str
) -> None:
    for file in (trees / "sketchy").rglob("*.*"):
        copied = tmp_path / file.relative_to(trees)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
    damaged = tmp_path / "sketchy/256x256" / broken
    damaged.write_bytes(damaged.read_bytes()[:60])
    report = tmp_path / "report"
    done = run("zs-sbir", "--data", "sketchy", "--root", str(tmp_path / "sketchy"), "--report", str(report))
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert str(damaged) in done.stderr
    assert not report.exists()


def test_a_report_without_matplotlib_says_what_to_install(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("zs-sbir", *COMMANDS["zs-sbir"], "--report", str(tmp_path / "report"))
    assert done.returncode == 2
    assert "pip install matplotlib" in done.stderr
    assert not (tmp_path / "report").exists()


def test_a_figure_without_rows_of_the_papers_has_no_marks() -> None:
    pytest.importorskip("matplotlib")
    figures = dict.fromkeys(METRICS["zs-sbir"], 0.5) | {"convention": "zse"}
    result = Result("zs-sbir", "./dino", "Sketchy", "all", "mini", "0" * 16, "float32", 1, 256, figures)
    assert [len(axes.lines) for axes in bars([result]).axes] == [0] * len(bars([result]).axes)


def test_the_papers_tables_fit_the_protocols() -> None:
    assert PAPER.keys() == METRICS.keys() == PROTOCOLS.keys()
    for task, tables in PAPER.items():
        for paper in tables.values():
            assert set(paper.metrics) <= set(METRICS[task]) <= TITLES.keys()
            assert len(paper.rows["SketchFusion"]) == len(paper.metrics)
            assert all(0 < value < 1 for values in paper.rows.values() for value in values)
            first = {name: values[0] for name, values in paper.rows.items()}
            assert max(first, key=first.__getitem__) == "SketchFusion"


def test_a_table_of_another_set_is_labelled_by_the_papers() -> None:
    extractor: Any = Made(lambda r: angle(ANGLES[r.path]))
    shown = text(zs_sbir(extractor, RETRIEVED))
    assert "zs-sbir on folder, model by hand (0000000000000000)" in shown
    assert "on Sketchy 104/21" in shown
