"""The benchmark: its peers compute what the model computes, and its figures are of what they say."""

import gc
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Done
from torch.utils.flop_counter import FlopCounterMode

from sketchfusion import ConfigError, SketchFusion, SketchFusionError
from sketchfusion.evaluation import bench as benchmark
from sketchfusion.evaluation.bench import OURS, bench
from sketchfusion.evaluation.peers import DIFT_ENSEMBLE, PlainLoop
from sketchfusion.images import Geometry

ROW = {
    "way", "dtype", "size", "batch_size", "ensemble", "seconds_per_image", "images_per_second", "tflop_per_image",
    "tflops", "of_peak", "peak_memory_gib", "ratio", "cosine",
}  # fmt: skip


@pytest.fixture
def batch(model: SketchFusion) -> tuple[torch.Tensor, Geometry]:
    return benchmark._pictures(model.preprocess, 3)


@pytest.mark.parametrize("ensemble", [1, 4])
def test_peers_compute_what_the_model_computes(
    model: SketchFusion, batch: tuple[torch.Tensor, Geometry], ensemble: int
) -> None:
    expected = model(*batch, ensemble=ensemble).dense.detach()
    loop = PlainLoop(model, torch.float32)
    for found in (loop(batch[0], ensemble), loop.released(batch[0], ensemble)):
        assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    "settings", [{"inject_skips": False}, {"sites": ["down1", "mid", "up1"], "taps": ["down3", "up2"]}]
)
def test_peers_follow_the_configuration(backbones: dict[str, Path], settings: dict) -> None:
    torch.manual_seed(0)
    sizes = {"aggregator_width": 32, "aggregator_grid": 12}
    model = SketchFusion.from_backbones(**backbones, dtype="float32", device="cpu", **sizes, **settings)
    for parameter in model.adapters.parameters():
        torch.nn.init.normal_(parameter)
    pixels, geometry = benchmark._pictures(model.preprocess, 1)
    expected = model(pixels, geometry).dense.detach()
    found = PlainLoop(model, torch.float32)(pixels, 1)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@torch.no_grad()
def test_dift_runs_stable_diffusion_alone(model: SketchFusion, batch: tuple[torch.Tensor, Geometry]) -> None:
    latents, _ = model.embed(batch[0])
    expected = model.tap(latents, None, ensemble=DIFT_ENSEMBLE)
    loop = PlainLoop(model, torch.float32, alone=True)
    assert len(loop.unet.up_blocks) == 3
    assert sum(len(list(part.parameters())) for part in loop.parts) == len(
        [*loop.vae.parameters(), *loop.unet.parameters()]
    )
    found = loop.dift(batch[0])
    for tap, maps in expected.items():
        assert (found[tap] - maps).norm() < 1e-5 * maps.norm()


def test_every_combination_has_a_row_for_every_way(model: SketchFusion) -> None:
    result = bench(model, batch_sizes=(1, 2), ensembles=(1, 2), sizes=(64, 72), runs=2, progress=False)
    ways = [OURS, "plain", "released", "dift"]  # in float32 the two plain ones are the same
    assert [row["way"] for row in result["rows"]] == ways * 8
    plans = {(row["size"], row["batch_size"], row["ensemble"]) for row in result["rows"] if row["way"] == OURS}
    assert plans == {(size, count, k) for size in (64, 72) for count in (1, 2) for k in (1, 2)}
    for i, row in enumerate(result["rows"]):
        assert row.keys() - {"parts"} == ROW
        assert row["seconds_per_image"] * row["images_per_second"] == pytest.approx(1)
        assert row["tflops"] == pytest.approx(row["tflop_per_image"] * row["images_per_second"])
        same = row["dtype"] == result["dtype"]
        assert row["of_peak"] == (pytest.approx(row["tflops"] / result["peak_tflops"]) if same else None)
        assert row["peak_memory_gib"] is None or row["peak_memory_gib"] > 0
        ours = result["rows"][i - i % len(ways)]  # of the same combination
        assert row["ratio"] == pytest.approx(row["seconds_per_image"] / ours["seconds_per_image"])
        assert (row["cosine"] is None) == (row["way"] in (OURS, "dift"))
        assert row["cosine"] is None or 1 - 1e-5 < row["cosine"]["least"] <= row["cosine"]["mean"] < 1 + 1e-9
        assert ("parts" in row) == (row["way"] == OURS)
    assert set(result["rows"][0]["parts"]) == {"vae", "semantic", "unet", "aggregator"}
    assert result["peak_tflops"] > 0
    assert result["kernels"] == "torch"
    assert OURS in benchmark.table(result)


def test_work_is_counted_where_it_is_done(model: SketchFusion) -> None:
    """Attention on a CPU too; an ensemble repeats the VAE for the released script only."""
    with FlopCounterMode(display=False, custom_mapping=benchmark._ATTENTION_ON_CPU) as counter:
        F.scaled_dot_product_attention(*torch.rand(3, 2, 4, 5, 8))
    assert counter.get_total_flops() == 2 * 4 * (2 * 5 * 5 * 8) * 2
    rows = bench(model, ensembles=(1, 2), peers=("plain", "released"), runs=1, progress=False)["rows"]
    work = {(row["way"], row["ensemble"]): row["tflop_per_image"] for row in rows}
    assert work[OURS, 1] < work["plain", 1] == pytest.approx(work["released", 1])
    assert work[OURS, 2] < work["plain", 2] < work["released", 2]


def test_a_profile_names_what_takes_the_time(model: SketchFusion) -> None:
    result = bench(model, peers=(), runs=1, profile=True, progress=False)
    operators = result["rows"][0]["operators"]
    shares = [operator["share"] for operator in operators]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1
    convolution = next(operator for operator in operators if "conv" in operator["name"])
    assert convolution["calls"] > 10
    assert convolution["name"] in benchmark.table(result)


def test_the_model_is_left_as_it_was(model: SketchFusion, batch: tuple[torch.Tensor, Geometry]) -> None:
    before = model(*batch).dense
    bench(model, runs=1, progress=False)
    assert torch.equal(model(*batch).dense, before)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"peers": ["dfit"]}, "dfit"),
        ({"batch_sizes": [0]}, "batch_sizes"),
        ({"batch_sizes": []}, "batch_sizes"),
        ({"ensembles": [3]}, "ensemble"),
        ({"ensembles": []}, "ensembles"),
        ({"sizes": [60]}, "size"),
        ({"runs": 0}, "runs"),
        ({"compile": True}, "compile"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_illegal_arguments(model: SketchFusion, arguments: dict, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        bench(model, **arguments, progress=False)


def test_too_little_memory_names_what_to_change(model: SketchFusion, monkeypatch: pytest.MonkeyPatch) -> None:
    def cramped(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(model, "forward", cramped)
    with pytest.raises(SketchFusionError, match=r"out of memory on cpu at 4 images of 64 px.*fewer peers"):
        bench(model, batch_sizes=[4], peers=[], progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak can be set back on Linux only")
def test_memory_is_what_a_run_adds() -> None:
    gc.collect()  # what other tests left would be given back meanwhile
    with benchmark._watched(torch.device("cpu")) as added:
        torch.ones(2**26)  # 256 MiB, given back at once
    assert not added or 200 < added[0] / 2**20 < 300


def test_on_the_command_line(model: SketchFusion, command: Callable[..., Done], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model.save_pretrained(tmp_path / "model", include_backbones=True)
    options = ["--model", str(tmp_path / "model"), "--dtype", "float32", "--device", "cpu", "--runs", "1"]
    done = command("bench", *options, "--peers", "plain", "--batch-size", "1,2", "--json")
    assert done.returncode == 0
    rows = json.loads(done.stdout)["rows"]
    assert [(row["way"], row["batch_size"]) for row in rows] == [(OURS, 1), ("plain", 1), (OURS, 2), ("plain", 2)]
    assert all(math.isfinite(row["images_per_second"]) for row in rows)
    done = command("bench", *options, "--peers", "none", "--plot", str(tmp_path / "bench.png"))
    assert done.returncode == 0
    assert OURS in done.stdout
    assert (tmp_path / "bench.png").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch-size", "one"),
        ("--size", "250"),
        ("--peers", "nobody"),
        ("--ensemble", "3"),
        ("--plot", "bench.txt"),
        ("--plot", "nowhere/bench.png"),
    ],
)
def test_mistakes_on_the_command_line(command: Callable[..., Done], arguments: tuple[str, str]) -> None:
    done = command("bench", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert arguments[0].removeprefix("--")[:4] in done.stderr
