"""The examples of heads run both ways on drawn shapes, and one of them on real shoes with the bundled model."""

import re
import runpy
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

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
