"""The examples of heads run both ways on drawn shapes, and one of them on real shoes with the bundled model."""

import json
import re
import runpy
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sketchfusion import SketchFusion
from sketchfusion.loading import BUNDLED

EXAMPLES = Path(__file__).parents[1] / "examples"
METRICS = {
    "recognition_head": ["Acc@1"],
    "retrieval_head": ["mAP@all"],
    "correspondence": ["PCK@10"],
    "segmentation": ["mIoU", "pAcc"],
}
LINES = 60  # a user reads them to the end


@pytest.fixture(scope="module")
def checkpoint(built: SketchFusion, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small untrained model in a folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    built.save_pretrained(folder, include_backbones=True)
    return str(folder)


def figures(output: str) -> dict[tuple[str, str], float]:
    """What a script printed -> {(metric, when): value}."""
    found = re.findall(r"^(\S+) (before|on frozen features|through the adapters): (\S+) \(\d+ .+\)$", output, re.M)
    assert len(found) == len(output.splitlines())
    return {(metric, when): float(value) for metric, when, value in found}


@pytest.mark.filterwarnings("ignore:UNTRAINED")
@pytest.mark.parametrize("adapters", [False, True], ids=["frozen", "adapters"])
@pytest.mark.parametrize("name", METRICS)
def test_runs_on_drawn_shapes(
    name: str,
    adapters: bool,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "trained"
    options = ["--model", checkpoint, "--per-class", "4", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [name, *options, *["--adapters"] * adapters])
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    shown = figures(capsys.readouterr().out)
    after = "through the adapters" if adapters else "on frozen features"
    assert {(metric, when) for metric in METRICS[name] for when in ("before", after)} <= shown.keys()
    assert all(0 <= value <= 1 for value in shown.values())
    assert (out / "model.safetensors").is_file() == adapters


def test_more_noises_come_closer(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        Image.effect_noise((40, 40), 40 + 40 * seed).save(tmp_path / f"{seed}.png")
    options = ["--model", checkpoint, "--trials", "2", "--plot", str(tmp_path / "noises.pdf")]
    monkeypatch.setattr(sys, "argv", ["noise_study", str(tmp_path), *options])
    runpy.run_path(str(EXAMPLES / "noise_study.py"), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    errors = {(way, int(k)): float(dense) for way, k, _, dense, *_ in lines}
    assert errors["random", 1] > errors["random", 4] > errors["random", 16]
    assert errors["antithetic", 2] < errors["random", 2]
    assert (tmp_path / "noises.pdf").stat().st_size > 0


@pytest.mark.parametrize("name", METRICS)
def test_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < LINES


@pytest.mark.skipif(not (BUNDLED / "mini").is_dir(), reason="the bundled model is not in this tree")
def test_runs_on_shoes_as_a_user_would_run_it(data: Callable[[str], Path], tmp_path: Path) -> None:
    with tarfile.open(data("shoes")) as tar:
        tar.extractall(tmp_path, filter="data")
    (root,) = (path.parent for path in tmp_path.rglob("parts.json"))
    command = [sys.executable, str(EXAMPLES / "correspondence.py"), "--data", "shoes", "--root", str(root)]
    options = ["--per-class", "6", "--steps", "1", "--adapters", "--out", str(tmp_path / "trained")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(0 <= value <= 1 for value in figures(done.stdout).values())
    assert (tmp_path / "trained" / "model.safetensors").is_file()


def picture(path: Path, side: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), "white").save(path)


def test_the_recipe_takes_its_part_of_the_published_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = tmp_path / "sets"
    for label, count in (("cat", 27), ("airplane", 2), ("bat", 1)):  # taught, held out, of the papers' unseen
        for i in range(count):
            picture(sets / f"sketchy/256x256/photo/tx_000000000000/{label}/n0_{i}.jpg")
            picture(sets / f"sketchy/256x256/sketch/tx_000000000000/{label}/n0_{i}-1.png")
    for label in ("cat", "race car", "car (sedan)", "palm tree"):
        picture(sets / f"tuberlin/png/{label}/1.png")
    line = '{"word": "", "recognized": true, "drawing": [[[0, 255], [0, 9]]]}\n'
    for label in ("cat", "police car", "mouse"):
        (sets / "quickdraw/simplified").mkdir(parents=True, exist_ok=True)
        (sets / f"quickdraw/simplified/{label}.ndjson").write_text(30 * line)
    animals = sets / "voc_animals"
    shown = {"cat": ["cat", "dog"], "horse": ["horse"], "sheep": ["sheep"], "bus": ["bus"]}
    for stem, things in shown.items():
        picture(animals / f"JPEGImages/{stem}.jpg")
        picture(animals / f"SegmentationClass/{stem}.png")
        (animals / "Annotations").mkdir(exist_ok=True)
        found = "".join(f"<object><name>{name}</name></object>" for name in things)
        (animals / f"Annotations/{stem}.xml").write_text(f"<annotation>{found}</annotation>")
    (animals / "ImageSets/Segmentation").mkdir(parents=True)
    (animals / "ImageSets/Segmentation/trainval.txt").write_text("\n".join(shown))
    picture(sets / "imagenet_sample/images/n01440764_tench.jpg")
    picture(tmp_path / "packed/train/n01443537/images/n01443537_0.JPEG", 64)
    with tarfile.open(sets / "tiny_imagenet.tar", "w") as tar:
        tar.add(tmp_path / "packed", ".")

    def prepare() -> None:
        runpy.run_path(str(EXAMPLES / "train_mini.py"), run_name="__main__")

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # which the recipe sets
    monkeypatch.setattr(sys, "argv", ["train_mini", "prepare", "--data", str(sets), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"neither a folder shoes nor shoes\.tar"):
        prepare()
    (sets / "shoes").mkdir()  # no image of them becomes an array
    (sets / "tuberlin/png").rename(sets / "tuberlin/deep")
    with pytest.raises(SystemExit, match="tuberlin is not tuberlin"):
        prepare()
    (sets / "tuberlin/deep").rename(sets / "tuberlin/png")
    prepare()
    work = tmp_path / "out/work"
    arrays = {path.stem: np.load(path) for path in work.glob("*.npy")}
    assert arrays["photos"].shape == (25 + 1 + 3, 256, 256, 3)
    assert arrays["photos_labels"].tolist() == 25 * [0] + 4 * [-1]
    assert arrays["sketches"].shape == (25 + 1 + 25, 256, 256)
    assert arrays["sketches"][-1].min() == 0  # the line is drawn
    assert {*arrays["sketches_labels"].tolist()} == {0}
    assert arrays["tiny"].shape == (1, 64, 64, 3)
    assert [len(arrays[name]) for name in ("unseen_photos", "unseen_sketches")] == [2, 2]
    assert json.loads((work / "classes.json").read_text()) == ["cat"]
