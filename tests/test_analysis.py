"""The analysis: spectra of maps whose spectrum is known, the maps themselves, and the command."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sketchfusion import ConfigError, SketchFusion, SketchFusionError
from sketchfusion.evaluation import analysis
from sketchfusion.evaluation.analysis import Moments, Spectrum
from sketchfusion.images import collate
from sketchfusion.plots import principal_colours


def wave(height: int, width: int, rows: int, columns: int, channels: int = 3) -> Tensor:
    """(channels, height, width): whole cycles over the map, each channel with another phase, amplitude and offset."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    phase = 2 * math.pi * (rows * y / height + columns * x / width)
    return torch.stack([(c + 1) * torch.cos(phase + c) + 2 * c + 1 for c in range(channels)])


# ---- the spectrum of one map


@pytest.mark.parametrize(
    ("shape", "cycles", "grid", "radius"),
    [
        ((32, 32), (0, 7), 32, 7),
        ((32, 32), (3, 4), 32, 5),
        ((15, 15), (2, 0), 15, 2),
        ((32, 16), (0, 3), 32, 6),  # three cycles over half of the canvas
        ((12, 32), (3, 0), 32, 8),
        ((8, 8), (4, 0), 8, 4),  # at the Nyquist frequency
    ],
)
def test_a_sinusoid_is_at_its_frequency(
    shape: tuple[int, int], cycles: tuple[int, int], grid: int, radius: int
) -> None:
    spectrum = Spectrum(wave(*shape, *cycles), grid)
    assert len(spectrum.log_amplitude) == grid // 2 + 1
    assert spectrum.log_amplitude[1:].argmax() + 1 == radius
    assert spectrum.log_amplitude[0] == 0
    assert spectrum.bandwidth == radius
    assert spectrum.within(radius) == pytest.approx(1)
    assert spectrum.within(radius - 0.01) == pytest.approx(0, abs=1e-9)
    assert spectrum.above_half_nyquist == pytest.approx(float(radius > grid / 4), abs=1e-9)


def test_white_noise_is_flat() -> None:
    features = torch.randn(400, 24, 24, generator=torch.Generator().manual_seed(0))
    spectrum = Spectrum(features, 24)
    # log |F| of a complex Gaussian has the standard deviation π/√24; an annulus has 2πm bins, half of them mirrored.
    error = math.pi / math.sqrt(24 * 400 * math.pi)
    flat = spectrum.log_amplitude[1:]
    assert np.abs(flat - flat.mean()).max() < 5 * error
    assert spectrum.energy * len(spectrum.energy) == pytest.approx(1, abs=0.35)
    for r in (3, 6, 9, 12):
        assert spectrum.within(r) == pytest.approx((spectrum.radius <= r).mean(), abs=0.01)
    assert spectrum.above_half_nyquist == pytest.approx(1 - math.pi / 16, abs=0.02)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 1e-12, 0.1, 1 / 3])  # of the last two the mean is rounded
def test_a_constant_map_has_no_energy(value: float) -> None:
    spectrum = Spectrum(torch.full((4, 11, 13), value), 13)
    assert not spectrum.energy.any()
    assert spectrum.above_half_nyquist == spectrum.bandwidth == spectrum.upper_half(6) == spectrum.within(6) == 0
    assert np.isfinite(spectrum.log_amplitude).all()


def test_the_scale_of_the_features_changes_nothing() -> None:
    features = torch.randn(5, 16, 16) + torch.arange(5.0)[:, None, None]
    plain, scaled = Spectrum(features, 16), Spectrum(features * 1e4, 16)
    assert scaled.energy == pytest.approx(plain.energy)
    assert scaled.log_amplitude == pytest.approx(plain.log_amplitude)
    uneven = Spectrum(features * torch.tensor([1e-3, 1, 1e3, 1, 5])[:, None, None], 16)
    assert uneven.log_amplitude == pytest.approx(plain.log_amplitude)
    assert uneven.energy != pytest.approx(plain.energy)


def test_an_offset_is_no_frequency() -> None:
    features = torch.randn(5, 16, 16)
    moved = Spectrum(features + 1e3, 16)
    assert moved.energy == pytest.approx(Spectrum(features, 16).energy, rel=1e-2)
    assert (moved.log_amplitude[1:] < -5).all()


def test_dead_channels_do_not_count() -> None:
    features = torch.randn(5, 16, 16)
    more = torch.cat([features, torch.zeros(3, 16, 16), torch.full((2, 16, 16), 7.0)])
    assert Spectrum(more, 16).log_amplitude == pytest.approx(Spectrum(features, 16).log_amplitude)
    assert Spectrum(more, 16).energy == pytest.approx(Spectrum(features, 16).energy)


def test_the_definition_written_out() -> None:
    channels, height, width, grid = 3, 6, 9, 9
    features = torch.randn(channels, height, width, dtype=torch.float64) + 1
    logs: dict[int, list[float]] = {}
    energy: list[tuple[float, float]] = []
    for u in range(-3, 3):
        for v in range(-4, 5):
            turns = [[u * i / height + v * j / width for j in range(width)] for i in range(height)]
            transform = (features * torch.exp(-2j * math.pi * torch.tensor(turns, dtype=torch.float64))).sum((1, 2))
            r = math.hypot(u * grid / height, v * grid / width)
            logs.setdefault(math.floor(r + 0.5), []).append(transform.abs().log().mean().item())
            energy += [(r, transform.abs().square().sum().item())] if (u, v) != (0, 0) else []
    spectrum = Spectrum(features, grid)
    means = [np.mean(logs[m]) - logs[0][0] for m in range(grid // 2 + 1)]
    assert spectrum.log_amplitude == pytest.approx(means)
    total = sum(e for _, e in energy)
    for r in (1, 2, 3.7, 4.5, 9):
        assert spectrum.within(r) == pytest.approx(sum(e for s, e in energy if s <= r) / total)
    assert spectrum.above_half_nyquist == pytest.approx(sum(e for s, e in energy if s > grid / 4) / total)
    low, whole = (sum(e for s, e in energy if s <= r) for r in (2, 4))
    assert spectrum.upper_half(4) == pytest.approx((whole - low) / whole)
    assert spectrum.within(spectrum.bandwidth) >= 0.9 > spectrum.within(spectrum.bandwidth - 1e-6)


def test_grids_are_compared_in_cycles_per_image() -> None:
    def sampled(grid: int) -> Spectrum:
        return Spectrum(torch.cat([wave(grid, grid, 0, 2), wave(grid, grid, 5, 0)]), grid)

    coarse, fine = sampled(14), sampled(32)
    assert coarse.bandwidth == fine.bandwidth == 5
    assert coarse.upper_half(7) == pytest.approx(fine.upper_half(7)) == pytest.approx(0.5)
    assert coarse.above_half_nyquist == pytest.approx(0.5)
    assert fine.above_half_nyquist == pytest.approx(0, abs=1e-9)


# ---- over images


def test_moments_are_those_of_all_the_vectors() -> None:
    values = np.random.default_rng(0).normal(1e3, 1, (50, 3))
    moments = Moments()
    moments.add(values[0])
    assert moments.standard_error is None
    for row in values[1:]:
        moments.add(row)
    assert moments.mean == pytest.approx(values.mean(0))
    assert moments.standard_error == pytest.approx(values.std(0, ddof=1) / math.sqrt(50))


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([[1.0, 1.1, 0.9]], "yes"),
        ([[-1.0, -1.1, -0.9]], "no"),
        ([[1.0, -1.1, 0.3]], "unclear"),
        ([[1.0]], "unclear"),
        ([[-1.0]], "unclear"),
        ([[1.0, 1.1, 0.9], [2.0, 2.1, 1.9]], "yes"),
        ([[1.0, 1.1, 0.9], [-2.0, -2.1, -1.9]], "no"),
        ([[1.0, 1.1, 0.9], [1.0, -1.1, 0.3]], "unclear"),
        ([[-1.0, -1.1, -0.9], [1.0, -1.1, 0.3]], "no"),
        ([[0.0, 0.0, 0.0]], "unclear"),
    ],
)
def test_a_claim_holds_if_every_difference_exceeds_its_error(differences: list[list[float]], verdict: str) -> None:
    moments = [Moments() for _ in differences]
    for one, values in zip(moments, differences, strict=True):
        for value in values:
            one.add([value])
    assert analysis._verdict(moments) == verdict


def drawing(seed: int, size: tuple[int, int]) -> Image.Image:
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    points = [tuple(map(float, point)) for point in random.uniform(0, 1, (6, 2)) * size]
    ImageDraw.Draw(image).line(points, fill="black", width=3)
    return image


def painting(seed: int, size: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


SIZES = [(64, 64), (80, 50), (40, 90), (64, 64), (30, 64)]


@pytest.fixture
def drawings() -> list[Image.Image]:
    return [drawing(i, size) for i, size in enumerate(SIZES)]


def spectra_of(model: SketchFusion, image: Image.Image) -> dict[str, Spectrum]:
    pixels, geometry = model.preprocess(image)
    maps = analysis.feature_maps(model, pixels[None], collate([geometry]))
    return {
        name: Spectrum(analysis.cut_out(features[0], geometry.mask(features.shape[-1])), features.shape[-1])
        for name, features in maps.items()
    }


def test_maps_are_the_models_own(model: SketchFusion, drawings: list[Image.Image]) -> None:
    items = [model.preprocess(image) for image in drawings]
    pixels, geometry = torch.stack([p for p, _ in items]), collate([g for _, g in items])
    maps = analysis.feature_maps(model, pixels, geometry, ensemble=2)
    taps = model.config.taps
    assert list(maps) == ["semantic", *taps, "diffusion", "fused"]
    assert torch.equal(maps["semantic"], model.semantic(pixels))
    assert torch.allclose(maps["fused"], model.encode(drawings, ensemble=2).dense, atol=1e-5)

    seen: list[dict[str, Tensor]] = []
    model.aggregator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(pixels, geometry, ensemble=2)
    assert not any(torch.allclose(maps[tap], seen[0][tap], atol=1e-3) for tap in taps)  # injected into
    for parameter in model.adapters.parameters():
        parameter.data.zero_()
    model(pixels, geometry, ensemble=2)
    assert all(torch.allclose(maps[tap], seen[1][tap], atol=1e-5) for tap in taps)


def test_no_tap_drowns_the_others(model: SketchFusion, drawings: list[Image.Image]) -> None:
    pixels, geometry = model.preprocess(drawings[1])
    maps = analysis.feature_maps(model, pixels[None], collate([geometry]))
    grid = model.config.aggregator_grid
    parts = maps["diffusion"][0].split([maps[tap].shape[1] for tap in model.config.taps])
    inside = [analysis.cut_out(part, geometry.mask(grid)) for part in parts]
    variances = [(part - part.mean((1, 2), keepdim=True)).square().mean((1, 2)).sum().item() for part in inside]
    assert variances == pytest.approx([1.0] * len(parts), rel=1e-4)
    resized = torch.nn.functional.interpolate(maps["up1"], size=(grid, grid), mode="bilinear")[0]
    assert (parts[1] / resized).std() < 1e-4 * (parts[1] / resized).mean()


def test_padding_is_no_part_of_a_map(model: SketchFusion) -> None:
    _, geometry = model.preprocess(drawing(0, (80, 40)))
    mask = geometry.mask(12)
    features = torch.randn(4, 12, 12)
    inside = analysis.cut_out(features, mask)
    assert inside.shape == (4, 6, 12)
    features[:, ~mask] = torch.nan
    assert torch.equal(analysis.cut_out(features, mask), inside)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_figures_are_means_over_images(model: SketchFusion, drawings: list[Image.Image], batch_size: int) -> None:
    result = analysis.analyze(model, {"sketch": drawings, "photo": []}, batch_size=batch_size)
    assert list(result["kinds"]) == ["sketch"]
    found, each = result["kinds"]["sketch"], [spectra_of(model, image) for image in drawings]
    assert found["images"] == len(drawings)
    assert found["maps"].keys() == each[0].keys()
    band = result["common_band"]
    assert band == 2  # of a 4 × 4 grid of tokens
    for name, figures in found["maps"].items():
        grid = figures["grid"]
        assert figures["omega"][-1] == pytest.approx(math.pi)
        assert figures["cycles_per_cell"][-1] == 0.5
        assert figures["cycles_per_image"] == list(range(grid // 2 + 1))
        bandwidths = np.array([one[name].bandwidth for one in each])
        assert figures["bandwidth"]["mean"] == pytest.approx(bandwidths.mean(), rel=1e-3)
        assert figures["bandwidth"]["standard_error"] == pytest.approx(bandwidths.std(ddof=1) / 5**0.5, rel=1e-2)
        for key, values in {
            "above_half_nyquist": [one[name].above_half_nyquist for one in each],
            "upper_half": [one[name].upper_half(band) for one in each],
            "delta_log_amplitude": [one[name].log_amplitude for one in each],
            "energy_within": [[one[name].within(m) for m in range(grid // 2 + 1)] for one in each],
        }.items():
            assert figures[key]["mean"] == pytest.approx(np.mean(values, axis=0), rel=1e-3, abs=1e-3)
    for claim in result["claims"]:
        for lesser, excess in claim["excess_over"].items():
            maps, measure = found["maps"], claim["measure"]
            expected = maps[claim["greater"]][measure]["mean"] - maps[lesser][measure]["mean"]
            assert excess["mean"] == pytest.approx(expected)
        assert claim["verdict"] in ("yes", "no", "unclear")
    json.dumps(result, allow_nan=False)


def test_images_are_drawn_batch_by_batch(
    model: SketchFusion, drawings: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, computed = 0, 0
    original = analysis.feature_maps

    def counted(model: SketchFusion, pixels: Tensor, *rest: Any) -> dict[str, Tensor]:
        nonlocal computed
        computed += len(pixels)
        assert len(pixels) <= 2
        assert drawn == computed
        return original(model, pixels, *rest)

    def images() -> Iterator[Image.Image]:
        nonlocal drawn
        for image in drawings:
            drawn += 1
            yield image

    monkeypatch.setattr(analysis, "feature_maps", counted)
    analysis.analyze(model, {"photo": images()}, batch_size=2)
    assert computed == 5


def test_overflow_is_an_error_and_no_figure(model: SketchFusion, drawings: list[Image.Image]) -> None:
    model.aggregator.taps["up1"].conv3.weight.data.fill_(torch.inf)
    with pytest.raises(SketchFusionError, match="fused features are not finite"):
        analysis.analyze(model, {"photo": drawings})


@pytest.mark.parametrize("options", [{"ensemble": 3}, {"batch_size": 0}])
def test_illegal_arguments(model: SketchFusion, drawings: list[Image.Image], options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        analysis.analyze(model, {"photo": drawings}, **options)


# ---- pictures


def test_colours_are_one_projection_for_all_images() -> None:
    on_image = torch.ones(3, 8, 8, dtype=torch.bool)
    on_image[2, :3] = False
    shape = torch.randn(6, 8, 8)
    maps = torch.stack([shape, shape, shape])
    maps[2, :, :3] = 1e6  # padding
    colours = principal_colours(maps, on_image)
    assert colours.shape == (3, 8, 8, 3)
    assert torch.equal(colours[0], colours[1])
    assert (colours[2, :3] == 1).all()
    assert colours.min() == 0
    assert colours[:2].flatten(0, 2).std(0).min() > 0.1  # every colour is in use
    cells = torch.rand(3, 1, 8, 8) + 0.1  # their lengths do not count
    assert torch.allclose(principal_colours(cells * maps, on_image), colours, atol=1e-3)
    maps[2, :, :3] = torch.randn(6, 3, 8)
    assert torch.equal(principal_colours(maps, on_image), colours)


def test_the_first_component_is_red() -> None:
    ramp = torch.linspace(-1, 1, 10)
    maps = torch.stack([10 + 0 * ramp, ramp, 0.01 * ramp.flip(0) ** 2, 0.001 * torch.randn(10)])[None, :, None]
    red = principal_colours(maps.expand(1, 4, 10, 10), torch.ones(1, 10, 10, dtype=torch.bool))[0, 0, :, 0]
    assert (red.diff() >= 0).all() or (red.diff() <= 0).all()
    assert (red.min(), red.max()) == (0, 1)


def test_pictures_show_every_map(model: SketchFusion, drawings: list[Image.Image]) -> None:
    pictures = analysis.pictures(model, drawings, batch_size=2)
    assert list(pictures) == ["image", "semantic", *model.config.taps, "diffusion", "fused"]
    assert torch.equal(pictures["image"][1], model.preprocess(drawings[1])[0].permute(1, 2, 0))
    for picture in pictures.values():
        assert picture.shape == (len(drawings), picture.shape[1], picture.shape[1], 3)
        assert ((picture >= 0) & (picture <= 1)).all()
    assert (pictures["fused"][1, 0] == 1).all()  # padding


# ---- the command


Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Run) -> Run:
    monkeypatch.chdir(tmp_path)
    return command


@pytest.fixture
def tree(tmp_path: Path, model: SketchFusion) -> Path:
    """Folders of drawings and of paintings, other files among them, and a model."""
    for kind, make in {"sketches": drawing, "photos": painting}.items():
        for i, size in enumerate(SIZES):
            path = tmp_path / kind / f"class {i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            make(i, size).save(path)
    (tmp_path / "sketches" / "notes.txt").write_text("not an image, and does not claim to be")
    (tmp_path / "sketches" / ".hidden.png").write_text("left by a file manager")
    model.save_pretrained(tmp_path / "model")
    return tmp_path


def test_analyze_writes_figures_and_numbers(run: Run, tree: Path) -> None:
    done = run(
        "analyze", "sketches", "--photos", "photos", "--out", "a/b", "--model", "model", "--json", "--device", "cpu"
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result == json.loads((tree / "a" / "b" / "analysis.json").read_text())
    assert (result["definition"], result["model"]) == (1, "model")
    for kind, folder in {"sketch": "sketches", "photo": "photos"}.items():
        found = result["kinds"][kind]
        assert (found["images"], found["skipped"], found["folder"]) == (5, 0, folder)
    assert len(result["claims"]) == 6
    for name in ("spectrum.png", "components.png"):
        with Image.open(tree / "a" / "b" / name) as figure:
            assert min(figure.size) > 300
            assert len(np.unique(np.asarray(figure.convert("L")))) > 50
    extractor = SketchFusion.from_pretrained(tree / "model", device="cpu")
    images = [tree / "photos" / f"class {i % 2}" / f"{i}.png" for i in (0, 2, 4, 1, 3)]
    for name, expected in analysis.analyze(extractor, {"photo": images})["kinds"]["photo"]["maps"].items():
        figures = result["kinds"]["photo"]["maps"][name]
        for key in ("bandwidth", "upper_half", "delta_log_amplitude"):
            assert figures[key]["mean"] == pytest.approx(expected[key]["mean"], rel=1e-4)


def test_the_table_says_what_the_json_says(run: Run, tree: Path) -> None:
    done = run("analyze", "--photos", "photos", "--out", "out", "--model", "model", "--limit", "3", "--ensemble", "2")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads((tree / "out" / "analysis.json").read_text())
    assert result["ensemble"] == 2
    assert list(result["kinds"]) == ["photo"]
    assert result["kinds"]["photo"]["images"] == 3
    lines = done.stdout.splitlines()
    for name, figures in result["kinds"]["photo"]["maps"].items():
        (line,) = [line for line in lines if line.startswith(name + " ") and "×" in line]
        assert f"{figures['bandwidth']['mean']:.3f} ± {figures['bandwidth']['standard_error']:.3f}" in line
    for claim in result["claims"]:
        (line,) = [line for line in lines if line.startswith(claim["claim"])]
        assert f": {claim['verdict']} (" in line


def test_a_single_image_has_no_error_and_decides_nothing(run: Run, tree: Path) -> None:
    done = run("analyze", "sketches/class 0/0.png", "--out", "out", "--model", "model")
    assert (done.returncode, done.stderr) == (0, "")
    assert "±" not in done.stdout
    result = json.loads((tree / "out" / "analysis.json").read_text())
    assert {claim["verdict"] for claim in result["claims"]} == {"unclear"}
    assert result["kinds"]["sketch"]["maps"]["fused"]["bandwidth"]["standard_error"] is None


def test_bad_images_are_named_and_left_out(run: Run, tree: Path) -> None:
    (tree / "sketches" / "class 0" / "0.png").write_text("no image")
    (tree / "sketches" / "truncated.PNG").write_bytes((tree / "photos" / "class 0" / "0.png").read_bytes()[:200])
    done = run("analyze", "sketches", "--photos", "photos", "--out", "out", "--model", "model", "--json")
    assert done.returncode == 2
    assert all(name in line for name, line in zip(["0.png", "truncated.PNG"], done.stderr.splitlines(), strict=True))
    result = json.loads(done.stdout)
    assert (result["kinds"]["sketch"]["images"], result["kinds"]["sketch"]["skipped"]) == (4, 2)
    assert (result["kinds"]["photo"]["images"], result["kinds"]["photo"]["skipped"]) == (5, 0)
    assert (tree / "out" / "components.png").is_file()


def test_nothing_but_bad_images(run: Run, tree: Path) -> None:
    (tree / "bad").mkdir()
    (tree / "bad" / "a.png").write_text("no image")
    done = run("analyze", "bad", "--photos", "photos", "--out", "out", "--model", "model")
    assert (done.returncode, done.stdout) == (2, "")
    assert "a.png" in done.stderr.splitlines()[0]
    assert "bad: not one of its 1 images" in done.stderr.splitlines()[1]
    assert not list((tree / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sketches"], "--out"),
        (["--out", "out"], "--photos"),
        (["gone", "--out", "out"], "gone"),
        (["empty", "--out", "out"], ".png"),
        (["sketches", "--photos", "gone", "--out", "out"], "gone"),
        (["sketches", "--out", "file"], "file cannot be made"),
        (["sketches", "--out", "sketches/figures"], "lies in sketches"),
        (["sketches", "--out", "out", "--limit", "0"], "limit"),
        (["sketches", "--out", "out", "--model", "model", "--ensemble", "5"], "even"),
        (["sketches", "--out", "out", "--model", "model", "--batch-size", "0"], "--batch-size"),
        (["sketches", "--out", "out", "--model", "nothing"], "mini"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(run: Run, tree: Path, arguments: list[str], named: str) -> None:
    (tree / "empty").mkdir()
    (tree / "empty" / "notes.txt").write_text("no image")
    (tree / "file").write_text("a file")
    done = run("analyze", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr


def test_without_matplotlib_one_line_names_the_extra(run: Run, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("analyze", "sketches", "--out", "out", "--model", "model")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "sketchfusion: drawing needs matplotlib, the extra plots: pip install matplotlib"
    ]
    assert not (tree / "out").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(run: Run, tree: Path) -> None:
    (tree / "out").mkdir(mode=0o500)
    done = run("analyze", "sketches", "--out", "out", "--model", "model")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_untrained_features_are_announced(untrained: SketchFusion, drawings: list[Image.Image]) -> None:
    with pytest.warns(UserWarning, match="UNTRAINED"):
        analysis.analyze(untrained, {"sketch": drawings[:1]})
