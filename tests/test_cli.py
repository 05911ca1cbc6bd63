"""The command line as a user meets it: its output and its exit code, once in a process of its own."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sketchfusion import Features, SketchFusion, __version__, cli

IMAGES = Path(__file__).parents[1] / "examples" / "images"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good images and two bad ones, in a folder that is not the repository."""
    root = tmp_path_factory.mktemp("cli")
    for name in ("cat.jpg", "cat.svg"):
        shutil.copy(IMAGES / name, root)
    (root / "broken.png").write_bytes((root / "cat.jpg").read_bytes()[:2000])
    (root / "text.png").write_text("no image")
    (root / "empty").mkdir()
    return root


Run = Callable[..., Any]
TRAIN = ["train", "--task", "retrieval", "--data", "folder", "--root", ".", "--out", "out"]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, command: Run) -> Run:
    """`run("encode", "a.png")` in the folder."""
    monkeypatch.chdir(folder)
    return command


def test_encode_writes_what_the_library_computes(folder: Path) -> None:
    arguments = ["encode", "cat.svg", "cat.jpg", "--out", "f.safetensors", "--json", "--dtype", "float32"]
    command = [sys.executable, "-m", "sketchfusion", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads(done.stdout)
    features = Features.load(folder / "f.safetensors")
    expected = SketchFusion.from_pretrained(dtype="float32").encode([folder / "cat.svg", folder / "cat.jpg"])
    assert features.paths == ["cat.svg", "cat.jpg"]
    for row, path, one, reference in zip(rows, features.paths, features, expected, strict=True):
        assert row["path"] == path
        assert row["pooled"] == list(one.pooled.shape)
        assert row["dense"] == list(one.dense.shape)
        assert row["norm"] == pytest.approx(float(one.pooled.norm()))
        assert (one.dense - reference.dense).norm() < 1e-4 * reference.dense.norm()


def test_good_images_are_written_and_each_bad_one_gets_a_line(run: Run, folder: Path) -> None:
    done = run("encode", "broken.png", "cat.jpg", "text.png", "gone.png", "--out", "g.safetensors", "--json")
    assert done.returncode == 2
    assert [row["path"] for row in json.loads(done.stdout)] == ["cat.jpg"]
    assert Features.load(folder / "g.safetensors").paths == ["cat.jpg"]
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(name in line for name, line in zip(["broken.png", "text.png", "gone.png"], lines, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_a_file_name_can_be_any_bytes(tmp_path: Path) -> None:
    shutil.copy(IMAGES / "cat.jpg", os.fsencode(tmp_path) + b"/\xff.jpg")
    code = "from sketchfusion.cli import main; main()"
    arguments = [sys.executable, "-c", code, "encode", b"\xff.jpg", "--no-dense", "--out", "g.safetensors"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("\\udcff.jpg: pooled [256]")
    assert Features.load(tmp_path / "g.safetensors").paths == ["\udcff.jpg"]


def test_all_images_of_a_folder_are_encoded(run: Run, folder: Path) -> None:
    (folder / "inner" / "deeper").mkdir(parents=True)
    shutil.copy(folder / "cat.svg", folder / "inner" / "deeper" / "b.svg")
    shutil.copy(folder / "cat.jpg", folder / "inner" / "a.jpg")
    (folder / "inner" / "notes.txt").write_text("no image")
    done = run("encode", "cat.jpg", "inner", "--no-dense", "--json")
    assert done.returncode == 0
    assert [row["path"] for row in json.loads(done.stdout)] == ["cat.jpg", "inner/a.jpg", "inner/deeper/b.svg"]


def test_a_drawing_that_cannot_be_drawn_costs_no_other_image(run: Run, folder: Path, undrawable: str) -> None:
    (folder / "dense.svg").write_text(undrawable)
    done = run("encode", "dense.svg", "cat.svg", "--out", "d.safetensors", "--json")
    assert done.returncode == 2
    assert [row["path"] for row in json.loads(done.stdout)] == ["cat.svg"]
    (line,) = done.stderr.splitlines()
    assert "dense.svg" in line
    assert "too many lines" in line


def test_nothing_good_writes_nothing(run: Run, folder: Path) -> None:
    done = run("encode", "text.png", "--out", "nothing.safetensors", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout) == []
    assert not (folder / "nothing.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["encode", "cat.jpg", "--out", "nowhere/f.safetensors"], "nowhere"),
        (["encode", "cat.jpg", "--out", "."], "--out"),
        (["encode", "cat.jpg", "empty"], "no images in this folder"),
        (["encode", "cat.jpg", "--size", "100"], "multiple of 8"),
        (["encode", "cat.jpg", "--ensemble", "3"], "even"),
        (["encode", "cat.jpg", "--dtype", "int8"], "float32"),
        (["encode", "cat.jpg", "--device", "abacus"], "device"),
        (["encode", "cat.jpg", "--model", "no-such-model"], "mini"),
        (["info", "no-such-model"], "mini"),
        ([*TRAIN, "--sketches-root", "."], "and --sketches-root go together"),
        ([*TRAIN, "--sketches", "folder", "--sketches-root", "."], "--task segmentation"),
        ([*TRAIN, "--hidden", "8"], "--task recognition"),
        (["train", "--task", "recognition", *TRAIN[3:], "--level", "fine"], "--task retrieval"),
        ([*TRAIN, "--diffusion", "a", "--semantic", "b", "--model", "mini"], "--diffusion"),
        ([*TRAIN, "--finetune", "--dtype", "bfloat16"], "--dtype"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(run: Run, arguments: list[str], named: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr


@pytest.mark.parametrize("arguments", [["encode"], ["paint"], ["encode", "cat.jpg", "--size", "large"], ["info", "-x"]])
def test_usage_errors_are_one_line_and_exit_code_2(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "--help" in done.stderr


def test_a_folder_that_cannot_be_written_to_is_known_before_the_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    done = run("encode", "nothing.png", "--out", "f.safetensors")
    assert done.returncode == 2
    assert "--out" in done.stderr
    assert "cannot be written to" in done.stderr


def test_the_readmes_command_encodes_images_that_are_there() -> None:
    makefile = (IMAGES.parents[1] / "Makefile").read_text()
    named = re.findall(r"examples/images/\S+", makefile)
    assert len(named) == 2
    assert all((IMAGES.parents[1] / name).is_file() for name in named)


@pytest.mark.parametrize("model", ["mini", "no-such-model"])
def test_garbage_is_collected_again_once_a_command_has_started(run: Run, model: str) -> None:
    run("encode", "cat.jpg", "--model", model)
    assert gc.isenabled()


def test_info(run: Run) -> None:
    summary = json.loads(run("info", "--json").stdout)
    model = SketchFusion.from_pretrained()
    assert summary["config"] == json.loads(model.config.to_json())
    assert summary["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert summary["parameters"].keys() == {"vae", "unet", "semantic", "adapters", "aggregator", "total"}
    assert summary["bytes"]["aggregator"] == 4 * summary["parameters"]["aggregator"]
    assert summary["device"] in ("cpu", "cuda", "mps", "cuda:0", "mps:0")
    assert "unet" in run("info").stdout


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout.strip() == __version__
    assert "encode" in run("--help").stdout
    assert "[default: 0.2]" in run("evaluate", "--help").stdout


@pytest.mark.parametrize("code", ["import sketchfusion", "import sketchfusion.cli"])
def test_importing_loads_no_heavy_library(code: str) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'PIL'}"
    check = f"import sys; {code}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_blanks_between_names_do_not_matter() -> None:
    assert cli.split_commas("semantic, fused ,,x/y") == ["semantic", "fused", "x/y"]
