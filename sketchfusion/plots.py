"""Figures: what every one of them looks like, and those of the analysis. Needs the extra `plots` (matplotlib)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError, SketchFusionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
# Colours that the colour-blind tell apart (Okabe and Ito). The parts keep theirs in every figure.
COLOURS = {"semantic": "#0072B2", "diffusion": "#D55E00", "fused": "#009E73"}
SHADES = ("#E69F00", "#B8860B", "#8C6D46", "#C9A66B")  # of what belongs to diffusion: its taps
GREY = "#666666"


def require_matplotlib() -> type[Figure]:
    """Matplotlib's figures; a command that draws in the end calls it first, so that nobody waits for the error.

    Raises:
        SketchFusionError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SketchFusionError("drawing needs matplotlib, the extra plots: pip install matplotlib") from None
    return Figure


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """An empty figure of `width` × `height` inches, and its axes (rows, columns). No window and no global state."""
    figure = require_matplotlib()(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return figure, axes


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write the figure, in the format that the file's suffix names.

    Raises:
        SketchFusionError: it cannot be written.
    """
    try:
        figure.savefig(path)
    except OSError as error:
        raise SketchFusionError(f"{path}: the figure cannot be written: {error.strerror or error}") from None


def check_file(path: Path) -> None:
    """What `save` can know before anything is computed.

    Raises:
        SketchFusionError: matplotlib is not installed.
        ConfigError: matplotlib does not write such files, or there is no such folder.
    """
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError("plot", f"{path} has no suffix of a picture", legal=", ".join(sorted(known)))
    if not path.parent.is_dir():
        raise ConfigError("plot", f"there is no folder {path.parent}", legal="a file in a folder that is there")


# ---- the analysis


def spectra(analysis: Mapping[str, Any]) -> Figure:
    """Both views of the spectra, one row a kind of images, with bands of two standard errors.

    Left the paper's: Δ log amplitude against the normalised frequency, 0 to π on every grid. Right the cumulated
    energy against cycles per image, on which the grids are told apart; the bandwidth is where a curve meets 90 %.

    Args:
        analysis: what `sketchfusion.evaluation.analysis.analyze` returns, or `analysis.json`.
    """
    kinds = analysis["kinds"]
    figure, axes = new_figure(len(kinds), 2, 10, 3.6 * len(kinds) + 0.3)
    for (left, right), (kind, found) in zip(axes, kinds.items(), strict=True):
        maps = found["maps"]
        taps = iter(SHADES * len(maps))
        for name, curves in maps.items():
            tap = name not in COLOURS
            style = {"color": next(taps), "lw": 1, "ls": "--"} if tap else {"color": COLOURS[name], "lw": 2}
            label = f"{_title(name)}, {curves['grid']}×{curves['grid']}"
            _curve(left, [w / math.pi for w in curves["omega"]], curves["delta_log_amplitude"], style, label)
            _curve(right, curves["cycles_per_image"], curves["energy_within"], style, label)
        count = f"{found['images']} image{'s' if found['images'] > 1 else ''}"
        left.set_title(f"{kind}, {count}: amplitude", fontsize=9, loc="left")
        left.set_xlabel("normalised frequency ω", fontsize=8)
        left.set_ylabel("Δ log amplitude", fontsize=8)
        left.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "π/4", "π/2", "3π/4", "π"])
        left.set_xlim(0, 1)
        right.set_title(f"{kind}, {count}: energy", fontsize=9, loc="left")
        right.set_xlabel("cycles per image", fontsize=8)
        right.set_ylabel("share of the energy within", fontsize=8)
        right.axhline(0.9, color=GREY, lw=0.8, ls=":", label="90 %, which the bandwidth holds")
        band = analysis["common_band"]
        right.axvspan(band / 2, band, color=GREY, alpha=0.1, lw=0, label="upper half of the common band")
        right.set_xlim(0, max(curves["cycles_per_image"][-1] for curves in maps.values()))
        right.set_ylim(0, 1)
        right.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def _title(name: str) -> str:
    titles = {"semantic": "semantic", "diffusion": "diffusion, taps together", "fused": "fused"}
    return titles.get(name, f"diffusion, {name}")


def _curve(axes: Axes, x: Sequence[float], figures: Mapping[str, Any], style: Mapping[str, Any], label: str) -> None:
    mean = np.array(figures["mean"])
    axes.plot(x, mean, label=label, **style)
    if figures["standard_error"] is not None:
        around = 2 * np.array(figures["standard_error"])
        axes.fill_between(x, mean - around, mean + around, color=style["color"], alpha=0.15, lw=0)


def components(pictures: Mapping[str, Tensor], labels: Sequence[str]) -> Figure:
    """Images and their maps side by side, a row an image.

    Args:
        pictures: name -> (N, side, side, 3) in [0, 1], as from `sketchfusion.evaluation.analysis.pictures`.
        labels: N, what stands beside each row.
    """
    figure, axes = new_figure(len(labels), len(pictures), 1.4 * len(pictures), 1.4 * len(labels) + 0.3)
    for column, (name, images) in enumerate(pictures.items()):
        axes[0, column].set_title(name if name == "image" else _title(name).replace(", ", "\n"), fontsize=8)
        for row, image in enumerate(images):
            one = axes[row, column]
            one.imshow(image.numpy(), interpolation="nearest")
            one.set_xticks([])
            one.set_yticks([])
            one.spines[:].set_visible(False)
    for row, label in enumerate(labels):
        axes[row, 0].set_ylabel(label, fontsize=8)
    return figure


# ---- the benchmark


def throughput(bench: Mapping[str, Any]) -> Figure:
    """Images a second against batch size, a line for every way, a panel for every canvas and ensemble.

    Args:
        bench: what `sketchfusion.evaluation.bench.bench` returns.
    """
    ways = list(dict.fromkeys(row["way"] for row in bench["rows"]))
    own = [row for row in bench["rows"] if row["way"] == ways[0]]  # DIFT's ensemble is its own: it is in every panel
    panels = list(dict.fromkeys((row["size"], row["ensemble"]) for row in own))
    figure, axes = new_figure(1, len(panels), 4.2 * len(panels) + 0.6, 3.4)
    colours = dict(
        zip(ways, (COLOURS["fused"], COLOURS["semantic"], GREY, COLOURS["diffusion"], *SHADES), strict=False)
    )
    for one, (size, ensemble) in zip(axes[0], panels, strict=True):
        for way in ways:
            rows = [row for row in bench["rows"] if row["way"] == way and row["size"] == size]
            rows = [row for row in rows if way == "dift" or row["ensemble"] == ensemble]
            points = dict(sorted((row["batch_size"], row["images_per_second"]) for row in rows))
            one.plot(list(points), list(points.values()), "o-", ms=4, color=colours[way], label=way)
        one.set_title(f"{size} px, {ensemble} noise{'s' if ensemble > 1 else ''}", fontsize=9, loc="left")
        one.set_xlabel("batch size", fontsize=8)
        one.set_ylabel("images a second", fontsize=8)
        one.set_xscale("log", base=2)
        one.set_xticks(sorted({row["batch_size"] for row in bench["rows"]}))
        one.xaxis.set_major_formatter("{x:.0f}")
        one.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def principal_colours(maps: Tensor, on_image: Tensor) -> Tensor:
    """The first three principal components of all cells that lie on an image, as red, green and blue.

    One projection for all images. Each cell is scaled to L2 norm 1 and each image's mean removed first: it says
    sketch or photo, and would take the first component for itself. The colours' range holds 96 % of the cells.

    Args:
        maps: (N, C, g, g), C at least 3.
        on_image: (N, g, g), bool.

    Returns:
        (N, g, g, 3) in [0, 1]; white where there is no image.
    """
    cells = F.normalize(maps, dim=1).permute(0, 2, 3, 1)
    inside = on_image[..., None]
    cells = cells - (cells * inside).sum((1, 2), keepdim=True) / inside.sum((1, 2), keepdim=True)
    chosen = cells[on_image]
    _, directions = torch.linalg.eigh(chosen.T @ chosen)  # ascending
    directions = directions[:, -3:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    projected = cells @ (directions * largest.sign())  # eigenvectors have no sign of their own
    low, high = (projected[on_image].quantile(q, dim=0) for q in (0.02, 0.98))
    spread = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(inside, ((projected - low) / spread).clamp(0, 1), 1.0)
