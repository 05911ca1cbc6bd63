"""The paper's analysis: which spatial frequencies the semantic, diffusion and fused maps hold, and how they look.

The published observation is that diffusion features are of high frequency, CLIP's of low, and that the fused ones hold
the wider band. `analyze` measures it on any model and images, and says of each claim whether it holds there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check_count, check_ensemble
from ..errors import SketchFusionError
from ..images import Geometry, ImageInput, collate, read_ahead
from ..model import SketchFusion
from ..plots import principal_colours

DEFINITION = 1  # of everything measured here; counted up whenever a figure changes its meaning
FLOOR = 1e-6  # amplitudes count as this share of their channel's largest at least: a logarithm needs one
BAND = 0.9  # the share of the energy that the bandwidth holds
PICTURES = 4  # images of each kind that are shown


class Claim(NamedTuple):
    """What the paper says, as an inequality: `measure` is greater for the map `greater` than for each of `lesser`."""

    text: str
    measure: str
    greater: str
    lesser: tuple[str, ...]


CLAIMS = (
    Claim("diffusion is of high frequency", "upper_half", "diffusion", ("semantic",)),
    Claim("semantic is of low frequency", "bandwidth", "diffusion", ("semantic",)),
    Claim("fused holds the wider band", "bandwidth", "fused", ("diffusion", "semantic")),
)
MEASURES = {
    "above_half_nyquist": "share of the energy above half of the grid's Nyquist frequency",
    "bandwidth": f"cycles per image within which {BAND:.0%} of the energy lies",
    "upper_half": "of the energy in the band that the semantic and the dense grid share, the share in its upper half",
}


# ---- maps


@torch.no_grad()
def feature_maps(
    model: SketchFusion, pixels: Tensor, geometry: Geometry, ensemble: int | None = None
) -> dict[str, Tensor]:
    """The maps that are compared, each (N, C, g, g) with C and g of its own, float32.

    `semantic`, the tokens; one for each tap of the UNet without injection, named as the tap; `diffusion`, those taps
    together; `fused`, the dense map. Together means what the aggregator is given: resized to the dense grid and side
    by side, each tap scaled to the same variance over the image, so that none drowns the others.

    Args:
        pixels: (N, 3, S, S) in [0, 1], from `preprocess`.
        geometry: of the N images, (N,) tensors.
        ensemble: as for `encode`.

    Raises:
        SketchFusionError: a map is not finite, or the GPU's memory is too small for the batch.
    """
    grid = model.config.aggregator_grid
    try:
        latents, tokens = model.embed(pixels)
        maps = {"semantic": tokens.float()}
        bare = model.tap(latents, None, ensemble=ensemble)
        maps |= {tap: tapped.float() for tap, tapped in bare.items()}
        on_image = geometry.mask(grid).to(latents.device)[:, None]
        scaled = []
        for tap in model.config.taps:
            resized = F.interpolate(maps[tap], size=(grid, grid), mode="bilinear", align_corners=False)
            mean = (resized * on_image).sum((2, 3), keepdim=True) / on_image.sum((2, 3), keepdim=True)
            variation = ((resized - mean) * on_image).flatten(1).norm(dim=1) / on_image.flatten(1).sum(1).sqrt()
            scaled.append(resized / variation.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None, None])
        maps["diffusion"] = torch.cat(scaled, 1)
        maps["fused"] = model.fuse(latents, tokens, geometry, ensemble=ensemble).dense
    except torch.OutOfMemoryError as error:
        raise SketchFusionError(
            f"out of memory on {model.device} for {len(pixels)} images of {pixels.shape[-1]} px: "
            "use a smaller batch size"
        ) from error
    for name, values in maps.items():
        if not values.isfinite().all():
            raise SketchFusionError(
                f"the {name} features are not finite: {model.dtype} overflowed; load with bfloat16 or float32"
            )
    return maps


def cut_out(features: Tensor, mask: Tensor) -> Tensor:
    """The part (C, h, w) of a map (C, g, g) that lies on the image; `mask` (g, g) is a rectangle (`Geometry.mask`)."""
    return features[:, mask.any(1)][:, :, mask.any(0)]


# ---- the spectrum of one map


class Spectrum:
    """The spatial frequencies of one map of one image.

    Let x_c(i, j) be channel c over the h × w cells that lie on the image, cut out of a grid of g × g cells that spans
    the canvas. Padding is no part of it: its edge would be in every frequency. As in the analysis of vision
    transformers that the paper's figure follows (Park and Kim, 2022), no window is applied, so a jump between opposite
    borders adds energy that falls with the square of the frequency, to all maps alike. F_c is the discrete Fourier
    transform of x_c, and a bin (u, v) lies at the radius r = g · |(u/h, v/w)| in cycles per image, more precisely per
    side of the canvas, which is the image's longer side. The same bin is at r/g cycles per cell and at the normalised
    frequency ω = 2π·r/g. A grid carries up to its Nyquist frequency along its axes, g/2 cycles per image or ω = π, and
    √2 times as much along its diagonals.

    Two views, neither of which the scale of the features changes:

    *Δ log amplitude*, the published figure. In each channel log |F_c(u, v)|, averaged over the channels, then over
    the annulus m − ½ ≤ r < m + ½ for every m = 0 … ⌊g/2⌋, minus its value at m = 0, which is that of the channels'
    means. Every channel counts the same, however weak it is; one that is constant on the image (a dead unit) is left
    out, and amplitudes below 1e-6 of the channel's largest count as that. What it is relative to, the features' offset,
    says nothing about frequencies: compare how curves fall.

    *Energy*: E(u, v) = Σ_c |F_c(u, v)|² at every bin but (0, 0), which by Parseval's theorem is the variance of the
    features over the image. Channels count by their variance, as they do in a cosine or a distance. All scalars are
    shares of it; a map that is constant has none, and all its scalars are 0.

    White noise has E the same everywhere: 1 − π/16 = 0.80 of it lies above half of the Nyquist frequency.

    Args:
        features: (C, h, w), float, the cells that lie on the image.
        grid: g, how many cells span the canvas.

    Attributes:
        grid: g.
        log_amplitude: (⌊g/2⌋ + 1,), float64: Δ log amplitude at m = 0, 1, … cycles per image, in nepers.
        radius: (h·w − 1,), float64, ascending: of every bin but the first, in cycles per image.
        energy: (h·w − 1,), float64: the share of each of them; they add up to 1, or are all 0.
    """

    def __init__(self, features: Tensor, grid: int):
        height, width = features.shape[-2:]
        mean = features.mean((1, 2))
        # Without the mean float32 resolves small variations on large offsets; the first bin is put back.
        varying = features - mean[:, None, None]
        constant = varying.abs().amax((1, 2)) <= FLOOR * features.abs().amax((1, 2))
        amplitude = torch.fft.fft2(varying.masked_fill(constant[:, None, None], 0)).abs()
        energy = amplitude.square().sum(0)
        amplitude[:, 0, 0] = mean.abs() * (height * width)
        relative = amplitude[~constant] / amplitude[~constant].amax((1, 2), keepdim=True)
        logs = relative.clamp_min(FLOOR).log().mean(0) if len(relative) else torch.full_like(energy, math.log(FLOOR))

        radius = np.hypot(*np.meshgrid(_cycles(height, grid), _cycles(width, grid), indexing="ij")).ravel()
        annulus = np.floor(radius + 0.5).astype(int)
        count = grid // 2 + 1  # annuli; the corners beyond are in the energy only
        sums = np.bincount(annulus, logs.double().cpu().numpy().ravel(), count)[:count]
        profile = sums / np.bincount(annulus, minlength=count)[:count]
        order = radius.argsort(kind="stable")[1:]
        energies = energy.double().cpu().numpy().ravel()[order]
        self.grid = grid
        self.log_amplitude = profile - (profile[0] if len(relative) else 0)
        self.radius, self.energy = radius[order], energies / (energies.sum() or 1)

    def within(self, cycles: float) -> float:
        """The share of the energy at radii up to `cycles` per image."""
        return float(self.energy[self.radius <= cycles].sum())

    @property
    def above_half_nyquist(self) -> float:
        """The share of the energy above half of the grid's Nyquist frequency, its corners included."""
        return float(self.energy[self.radius > self.grid / 4].sum())

    @property
    def bandwidth(self) -> float:
        """The least radius, in cycles per image, within which 90 % of the energy lies."""
        enough = self.energy.cumsum() >= BAND - 1e-9  # rounding of the sum
        return float(self.radius[enough.argmax()]) if enough.any() else 0.0

    def upper_half(self, band: float) -> float:
        """Of the energy at radii up to `band` cycles per image, the share above half of that.

        With the lowest Nyquist frequency of several grids as the band, maps of different grids can be compared: none
        gains by cells that another does not have.
        """
        whole = self.within(band)
        return (whole - self.within(band / 2)) / whole if whole else 0.0


def _cycles(cells: int, grid: int) -> np.ndarray:
    """(cells,) the frequencies of a discrete Fourier transform in cycles per canvas; whole ones are exact."""
    index = np.arange(cells)
    return np.where(2 * index < cells, index, index - cells) * grid / cells


# ---- over images


class Moments:
    """Mean and standard error of vectors that come one by one; holds none of them (Welford's recurrence)."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, np.zeros(()), np.zeros(())

    def add(self, values: np.ndarray | list[float]) -> None:
        values = np.asarray(values, dtype=np.float64)
        self.count += 1
        change = values - self.mean
        self.mean = self.mean + change / self.count
        self._squares = self._squares + change * (values - self.mean)

    @property
    def standard_error(self) -> np.ndarray | None:
        """Of the mean; None for a single vector."""
        return np.sqrt(self._squares / (self.count - 1) / self.count) if self.count > 1 else None

    def summary(self, part: Any = slice(None)) -> dict[str, Any]:
        """For JSON, of one entry or of a slice."""
        error = self.standard_error
        return {
            "mean": self.mean[part].tolist(),
            "standard_error": None if error is None else error[part].tolist(),
        }


def analyze(
    model: SketchFusion,
    images: Mapping[str, Iterable[ImageInput]],
    *,
    ensemble: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Spectra of the model's maps, averaged over images kind by kind, and whether the paper's claims hold on them.

    Images are drawn and computed batch by batch: memory does not grow with them.

    Args:
        images: a kind of images, for example `sketch` and `photo` -> images of it, as `encode` takes them. A kind
            that turns out to have none is left out.
        ensemble: as for `encode`.
        batch_size: images a forward; by default 32 on CUDA, 8 elsewhere.

    Returns:
        What `analysis.json` holds (docs/analysis.md names every field): figures as mean and standard error over the
        images, None for the error of a single one; and for every kind each of `CLAIMS` with its verdict: `yes` where
        every difference exceeds twice its standard error over the images, `no` where one is that far below zero,
        else `unclear`.

    Raises:
        ImageError: an image cannot be read.
        ConfigError: an argument is illegal.
        SketchFusionError: as for `feature_maps`.

    Warns:
        UserWarning: adapters or aggregator are untrained: the fused map means little.
    """
    model._warn_if_untrained()
    kinds, claims = {}, []
    band = min(model.semantic.grid, model.config.aggregator_grid) / 2
    for kind, stream in images.items():
        moments, differences = _over_images(model, stream, band, ensemble, batch_size)
        if not moments:
            continue
        count = moments["fused"].scalars.count
        kinds[kind] = {"images": count, "maps": {name: _summary(found) for name, found in moments.items()}}
        for claim in CLAIMS:
            paired = {lesser: differences[claim.measure, claim.greater, lesser] for lesser in claim.lesser}
            claims.append(
                {
                    "kind": kind,
                    "claim": claim.text,
                    "verdict": _verdict(list(paired.values())),
                    "measure": claim.measure,
                    "greater": claim.greater,
                    "excess_over": {lesser: excess.summary(0) for lesser, excess in paired.items()},
                }
            )
    return {
        "definition": DEFINITION,
        "fingerprint": model.fingerprint,
        "ensemble": model.config.ensemble if ensemble is None else ensemble,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "common_band": band,
        "measures": MEASURES,
        "kinds": kinds,
        "claims": claims,
    }


@dataclass
class _Running:
    """What is summed up of one map over the images: its curves, (⌊g/2⌋ + 1,), and its scalars."""

    grid: int
    channels: int
    log_amplitude: Moments = field(default_factory=Moments)
    energy_within: Moments = field(default_factory=Moments)
    scalars: Moments = field(default_factory=Moments)


def _over_images(
    model: SketchFusion, images: Iterable[ImageInput], band: float, ensemble: int | None, batch_size: int | None
) -> tuple[dict[str, _Running], dict[tuple[str, str, str], Moments]]:
    """Of every map its moments, and of every (measure, greater, lesser) of a claim those of the paired difference."""
    running: dict[str, _Running] = {}
    differences = {(c.measure, c.greater, lesser): Moments() for c in CLAIMS for lesser in c.lesser}
    for pixels, geometry in _batches(model, images, ensemble, batch_size):
        maps = feature_maps(model, pixels, geometry, ensemble)
        masks = {name: geometry.mask(features.shape[-1]) for name, features in maps.items()}
        for i in range(len(pixels)):
            scalars: dict[str, dict[str, float]] = {}
            for name, features in maps.items():
                grid = features.shape[-1]
                spectrum = Spectrum(cut_out(features[i], masks[name][i].to(features.device)), grid)
                scalars[name] = {
                    "above_half_nyquist": spectrum.above_half_nyquist,
                    "bandwidth": spectrum.bandwidth,
                    "upper_half": spectrum.upper_half(band),
                }
                if name not in running:
                    running[name] = _Running(grid, features.shape[1])
                running[name].log_amplitude.add(spectrum.log_amplitude)
                running[name].energy_within.add([spectrum.within(m) for m in range(grid // 2 + 1)])
                running[name].scalars.add([scalars[name][measure] for measure in MEASURES])
            for (measure, greater, lesser), moments in differences.items():
                moments.add([scalars[greater][measure] - scalars[lesser][measure]])
    return running, differences


def _batches(
    model: SketchFusion, images: Iterable[ImageInput], ensemble: int | None, batch_size: int | None
) -> Iterator[tuple[Tensor, Geometry]]:
    if ensemble is not None:
        check_ensemble(ensemble)
    if batch_size is None:
        batch_size = model.default_batch_size
    check_count("batch_size", batch_size)
    with closing(read_ahead(iter(images), model.preprocess, batch_size)) as ahead:
        while batch := [read.result() for read in islice(ahead, batch_size)]:
            yield torch.stack([pixels for pixels, _ in batch]), collate([geometry for _, geometry in batch])


def _summary(found: _Running) -> dict[str, Any]:
    cycles = range(found.grid // 2 + 1)
    return {
        "grid": found.grid,
        "channels": found.channels,
        "cycles_per_image": list(cycles),
        "cycles_per_cell": [m / found.grid for m in cycles],
        "omega": [2 * math.pi * m / found.grid for m in cycles],
        "delta_log_amplitude": found.log_amplitude.summary(),
        "energy_within": found.energy_within.summary(),
    } | {measure: found.scalars.summary(row) for row, measure in enumerate(MEASURES)}


def _verdict(differences: list[Moments]) -> str:
    """Twice the standard error decides; a single image has none, so it decides nothing."""
    errors = [math.inf if moments.standard_error is None else moments.standard_error[0] for moments in differences]
    means = [moments.mean[0] for moments in differences]
    if all(mean > 2 * error for mean, error in zip(means, errors, strict=True)):
        return "yes"
    return "no" if any(mean < -2 * error for mean, error in zip(means, errors, strict=True)) else "unclear"


def table(result: Mapping[str, Any]) -> str:
    """What `analyze` found, as text for a terminal: a table a kind, and a line a claim."""
    band = result["common_band"]
    lines = [f"{name}: {text}" for name, text in MEASURES.items()]
    lines[-1] += f" ({band / 2:g} to {band:g} cycles)"
    for kind, found in result["kinds"].items():
        title = f"{kind}, {found['images']}"
        lines += ["", f"{title:<14}" + "".join(f"{head:>20}" for head in ("grid", *MEASURES))]
        for name, figures in found["maps"].items():
            cells = [f"{figures['grid']}×{figures['grid']}", *(plus_minus(figures[m]) for m in MEASURES)]
            lines.append(f"{name:<14}" + "".join(f"{cell:>20}" for cell in cells))
        lines.append("")
        for claim in (claim for claim in result["claims"] if claim["kind"] == kind):
            excess = (f"{claim['greater']} − {name} = {plus_minus(by)}" for name, by in claim["excess_over"].items())
            lines.append(f"{claim['claim']}: {claim['verdict']} ({claim['measure']}: {', '.join(excess)})")
    return "\n".join(lines)


def plus_minus(figure: Mapping[str, float | None]) -> str:
    error = figure["standard_error"]
    return f"{figure['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


# ---- pictures


def pictures(
    model: SketchFusion,
    images: Iterable[ImageInput],
    *,
    ensemble: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Tensor]:
    """A few images and their maps as pictures: three principal components of each map as colours.

    For each map one projection, fitted on all the images together. All of them are held in memory.

    Returns:
        Pictures (N, side, side, 3) in [0, 1]: `image`, the canvas, and every map of `feature_maps`; padding is white.
    """
    drawn: list[Tensor] = []
    geometries: list[Geometry] = []
    kept: dict[str, list[Tensor]] = {}
    for pixels, geometry in _batches(model, images, ensemble, batch_size):
        drawn.append(pixels.permute(0, 2, 3, 1))
        geometries += [geometry.image(i) for i in range(len(pixels))]
        for name, features in feature_maps(model, pixels, geometry, ensemble).items():
            kept.setdefault(name, []).append(features.cpu())
    whole = collate(geometries)
    coloured = {name: torch.cat(kept.pop(name)) for name in list(kept)}
    return {"image": torch.cat(drawn)} | {
        name: principal_colours(features, whole.mask(features.shape[-1])) for name, features in coloured.items()
    }
