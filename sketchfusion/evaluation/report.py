"""Our rows beside the paper's: as text for a terminal, and as a folder with Markdown, figures and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import plots
from ..errors import ConfigError
from ..files import staged
from ..images import Preprocess
from .analysis import plus_minus
from .protocols import OTHER_CLASS, SAME_IN_INK, SAME_POSITION, WHOLE_PHOTO, Example, Result
from .rows import ROWS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "map_all": "mAP@all", "map_200": "mAP@200", "p_200": "P@200", "p_100": "P@100", "acc_1": "Acc@1", "acc_5": "Acc@5",
    "pck_5": "PCK@5", "pck_10": "PCK@10", "miou": "mIoU", "pacc": "pAcc", "miou_best": "upper bound of mIoU",
    "threshold_best": "(at threshold)",
}  # fmt: skip
METRICS = {  # of each protocol, as a table shows them
    "zs-sbir": ("map_all", "map_200", "p_200", "p_100", "acc_1", "acc_5"),
    "fg-sbir": ("acc_1", "acc_5", "map_all"),
    "recognition": ("acc_1",),
    "correspondence": ("pck_5", "pck_10"),
    "segmentation": ("miou", "pacc", "miou_best", "threshold_best"),
}
THUMBNAIL = 96  # pixels


class Paper(NamedTuple):
    """A table of the paper, whose rows are of Stable Diffusion 2.1 and CLIP ViT-L/14."""

    data: str
    metrics: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]  # shares, 0 to 1; of the ablations the first metric only


# Koley et al., CVPR 2025, arXiv 2503.14129. For each protocol the data by our name; the first where ours is none of it.
# fmt: off
PAPER: dict[str, dict[str, Paper]] = {
    "zs-sbir": {
        "sketchy": Paper("Sketchy 104/21", ("map_200", "p_200"), {
            "B-CLIP": (0.250, 0.261), "B-DINO": (0.493, 0.481), "B-DINOv2": (0.527, 0.533), "B-SD": (0.558, 0.571),
            "B-SD+CLIP": (0.588, 0.592), "B-Finetuning": (0.120, 0.172), "SD-PL": (0.746, 0.747),
            "w/o 1D convolutions": (0.602,), "w/o aggregation": (0.587,), "w/o mixing weights": (0.726,),
            "SketchFusion": (0.761, 0.763),
        }),
        "tuberlin": Paper("TU-Berlin 220/30", ("map_all", "p_100"), {
            "B-CLIP": (0.228, 0.257), "B-DINO": (0.450, 0.492), "B-DINOv2": (0.481, 0.532), "B-SD": (0.510, 0.561),
            "B-SD+CLIP": (0.537, 0.589), "B-Finetuning": (0.011, 0.010), "SD-PL": (0.680, 0.744),
            "SketchFusion": (0.695, 0.753),
        }),
        "quickdraw": Paper("Quick, Draw! 80/30", ("map_all", "p_200"), {
            "B-CLIP": (0.080, 0.141), "B-DINO": (0.167, 0.249), "B-DINOv2": (0.170, 0.268), "B-SD": (0.179, 0.287),
            "B-SD+CLIP": (0.179, 0.311), "B-Finetuning": (0.003, 0.006), "SD-PL": (0.231, 0.397),
            "SketchFusion": (0.242, 0.399),
        }),
    },
    "fg-sbir": {"sketchy": Paper("Sketchy", ("acc_1", "acc_5"), {
        "B-CLIP": (0.1184, 0.2166), "B-SD": (0.2398, 0.4942), "B-SD+CLIP": (0.2416, 0.5201),
        "SketchFusion": (0.3301, 0.6792),
    })},
    "recognition": {
        "tuberlin": Paper("TU-Berlin", ("acc_1",), {
            "B-CLIP": (0.3009,), "B-SD": (0.6137,), "B-SD+CLIP": (0.6547,), "SketchFusion": (0.8496,),
        }),
        "quickdraw": Paper("Quick, Draw!", ("acc_1",), {
            "B-CLIP": (0.3087,), "B-SD": (0.6357,), "B-SD+CLIP": (0.6778,), "SketchFusion": (0.8702,),
        }),
    },
    "correspondence": {"psc6k": Paper("PSC6K", ("pck_5", "pck_10"), {
        "B-CLIP": (0.2229, 0.3041), "B-SD": (0.4142, 0.5871), "B-SD+CLIP": (0.4490, 0.6202),
        "w/o 1D convolutions": (0.5597,), "w/o aggregation": (0.5465,), "w/o mixing weights": (0.6875,),
        "SketchFusion": (0.7031, 0.8986),
    })},
    "segmentation": {"": Paper("its own set, masks refined by a CRF", ("miou", "pacc"), {
        "B-CLIP": (0.2063, 0.2682), "B-SD": (0.3902, 0.4903), "B-SD+CLIP": (0.4187, 0.5191),
        "w/o 1D convolutions": (0.4724,), "w/o aggregation": (0.4752,), "w/o mixing weights": (0.5813,),
        "SketchFusion": (0.6012, 0.7491),
    })},
}
# fmt: on
COUNTERPARTS = {  # the paper's names of our rows
    "semantic": "B-CLIP",
    "diffusion": "B-SD",
    "semantic+diffusion": "B-SD+CLIP",
    "without-adapters": "w/o 1D convolutions",
    "without-aggregation": "w/o aggregation",
    "without-mixing": "w/o mixing weights",
    "fused": "SketchFusion",
}
CAUTION = "Stable Diffusion 2.1 and CLIP ViT-L/14: with other data or another model, compare their order only"


def text(results: Sequence[Result]) -> str:
    """Header, rows, and beneath them the paper's rows, in columns for a terminal."""
    paper = paper_of(results[0])
    parts = ["\n".join(header(results[0])), columns(table(results))]
    if lead := ahead(results):
        parts.append(f"{lead_title(results[0])}\n" + columns(lead))
    if classes := by_class(results):
        parts.append("mIoU by class\n" + columns(classes))
    cells = [["row", *(TITLES[name] for name in paper.metrics)]]
    cells += [[name, *map(shown, values)] for name, values in paper.rows.items()]
    parts.append(f"The paper's rows, on {paper.data}, {CAUTION}\n" + columns(cells))
    return "\n\n".join(parts)


def write(results: Sequence[Result], directory: str | os.PathLike) -> None:
    """Write `report.md`, `results.json`, `rows.png` and, of a retrieval, `examples.png` into a folder.

    They are written beside their places first, so that none is half there.

    Raises:
        SketchFusionError: matplotlib is not installed, or the folder cannot be written to.
        ImageError: an image of the examples cannot be read any more.
    """
    directory = Path(directory)
    check_directory(directory)
    featured = next((result for result in results if result.row == "fused"), results[-1])
    with staged(directory) as stage:
        plots.save(bars(results), stage / "rows.png")
        if featured.examples:
            plots.save(strips(featured.examples), stage / "examples.png")
        (stage / "results.json").write_text(as_json(results) + "\n", encoding="utf-8")
        (stage / "report.md").write_text(markdown(results, featured), encoding="utf-8")
    if not featured.examples:
        with suppress(OSError):
            (directory / "examples.png").unlink()  # of a report that was here before


def check_directory(directory: Path) -> None:
    """What `write` can know before anything is computed; it raises the same."""
    plots.require_matplotlib()
    nearest = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError("report", f"nothing can be written to {nearest}", legal="a folder that can be written to")


def as_json(results: Sequence[Result]) -> str:
    return json.dumps([result.to_dict() for result in results], indent=2)


def markdown(results: Sequence[Result], featured: Result) -> str:
    """The text of the report; `featured` is the row whose examples are shown."""
    first, paper = results[0], paper_of(results[0])
    meanings = ROWS | {
        SAME_POSITION: "the same relative position in the photo, looking at nothing",
        SAME_IN_INK: "the same relative position in the box around the ink",
        OTHER_CLASS: "the model, asked by a sketch of another class",
        WHOLE_PHOTO: "everything is the mask, looking at nothing",
    }
    title, *rules = header(first)
    parts = [
        f"# {title}",
        "  \n".join(rules),
        pipes(table(results)),
        "\n".join(f"- `{one.row}`: {meanings.get(one.row, 'another encoder, its tokens')}" for one in results),
        "Rows that lack something lack it at test time: there is one trained model.",
    ]
    if lead := ahead(results):
        parts += [f"{lead_title(first)}:", pipes(lead)]
    if classes := by_class(results):
        parts += ["mIoU by class:", pipes(classes)]
    parts += [
        "## Beside the paper",
        f"Ours: {first.split}; model {first.model} ({first.fingerprint}). The paper's: {paper.data}; {CAUTION}.",
        pipes(beside(results, paper)),
        "![The rows, ours and the paper's](rows.png)",
    ]
    if featured.examples:
        parts += [
            "## What is found",
            f"Sketches, evenly spaced over the set, each with the first photos that `{featured.row}` finds. A solid "
            "green frame: relevant; a dashed orange one: not.",
            "![Sketches and the first photos](examples.png)",
        ]
    return "\n\n".join(parts) + "\n"


# ---- tables


def header(result: Result) -> list[str]:
    """What was measured on what, and by which rules."""
    figures = result.figures
    counts = [f"{value:,} {name}" for name, value in figures.items() if isinstance(value, int)]
    noises = f"{result.ensemble} noise{'s' if result.ensemble > 1 else ''}"
    how = f"model {result.model} ({result.fingerprint}), {result.dtype}, {noises}, {result.size} px"
    lines = [f"{result.task} on {result.data}, {how}", result.split, ", ".join(counts)]
    if figures.get("gallery_of") == "class":
        lines[-1] += ", of which each query sees those of its own class"
    if result.ties is not None:
        lines.append(f"convention {figures['convention']}; {result.ties}")
    if "threshold" in figures:
        lines.append(f"threshold {figures['threshold']}; the upper bound is at each row's best one in hindsight")
    return lines


def table(results: Sequence[Result]) -> list[list[str]]:
    """A line for each row, beneath the titles of the protocol's metrics."""
    names = METRICS[results[0].task]
    return [["row", *(TITLES[name] for name in names)]] + [
        [result.row, *(shown(result.figures[name]) for name in names)] for result in results
    ]


def ahead(results: Sequence[Result]) -> list[list[str]]:
    """How far `fused` is ahead of each other row; nothing where it is not among them, or alone."""
    found = {result.row: result.figures["fused_ahead"] for result in results if "fused_ahead" in result.figures}
    names = [name for name in METRICS[results[0].task] if all(name in figures for figures in found.values())]
    lines = [[row, *(plus_minus(figures[name]) for name in names)] for row, figures in found.items()]
    return [["row", *(TITLES[name] for name in names)], *lines] if lines else []


def lead_title(result: Result) -> str:
    one = "class" if result.task == "zs-sbir" else "photo"
    return (
        f"How far fused is ahead, ± standard error, for which what belongs to one {one} counts as one "
        f"({result.figures['independent']} in all)"
    )


def by_class(results: Sequence[Result]) -> list[list[str]]:
    """The mIoU of each class, a line for each row; nothing where there is none."""
    if "miou_by_class" not in results[0].figures:
        return []
    lines = [[result.row, *map(shown, result.figures["miou_by_class"].values())] for result in results]
    return [["row", *results[0].figures["miou_by_class"]], *lines]


def beside(results: Sequence[Result], paper: Paper) -> list[list[str]]:
    """Our rows and the paper's of the same kind on one line, by the paper's metrics; then what only the paper has."""
    names = paper.metrics
    titles = [TITLES[name] for name in names]
    lines = [["ours", *titles, "the paper's", *(f"{title}, paper" for title in titles)]]
    for result in results:
        theirs = COUNTERPARTS.get(result.row, "")
        values = [shown(value) for value in paper.rows.get(theirs, ())]
        ours = [shown(result.figures[name]) for name in names]
        lines.append([result.row, *ours, theirs if values else "", *values, *[""] * (len(names) - len(values))])
    answered = {COUNTERPARTS.get(result.row) for result in results}
    for name, rest in paper.rows.items():
        if name not in answered:
            lines.append(["", *[""] * len(names), name, *map(shown, rest), *[""] * (len(names) - len(rest))])
    return lines


def paper_of(result: Result) -> Paper:
    """The paper's table of the same data, or where it has none of the same protocol."""
    tables = PAPER[result.task]
    return tables.get(result.data) or next(iter(tables.values()))


def shown(value: float) -> str:
    return f"{value:.3f}"


def columns(cells: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first flush left, the others flush right; lines may lack their last cells."""
    widths = [max(len(line[i]) for line in cells if i < len(line)) for i in range(len(cells[0]))]
    flush = [[cell.rjust(width) for cell, width in zip(line, widths, strict=False)] for line in cells]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *rest[1:]]) for line, rest in zip(cells, flush, strict=True))


def pipes(cells: Sequence[Sequence[str]]) -> str:
    """The same in Markdown."""
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])


# ---- figures


def bars(results: Sequence[Result]) -> Figure:
    """A bar for each row and metric, and a mark where the paper's is."""
    paper = paper_of(results[0])
    names = list(dict.fromkeys([METRICS[results[0].task][0], *paper.metrics]))
    figure, (axes,) = plots.new_figure(1, len(names), 3.2 * len(names) + 1.5, 0.34 * len(results) + 1.2)
    rows = [result.row for result in results]
    for one, name in zip(axes, names, strict=True):
        values = [result.figures[name] for result in results]
        one.barh(rows, values, color=[plots.COLOURS.get(row, plots.GREY) for row in rows], height=0.7)
        if name in paper.metrics:
            place = paper.metrics.index(name)
            theirs = {row: paper.rows.get(COUNTERPARTS.get(row, ""), ()) for row in rows}
            marks = [(values[place], row) for row, values in theirs.items() if place < len(values)]
            if marks:
                one.plot(*zip(*marks, strict=True), "kD", ms=4, mfc="none", label=f"the paper's, {paper.data}")
                one.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.08))
        one.set_title(TITLES[name], fontsize=9, loc="left")
        one.invert_yaxis()
        one.set_xlim(left=0)
        one.locator_params(axis="x", nbins=5)
        if one is not axes[0]:
            one.set_yticklabels([])
    return figure


def strips(examples: Sequence[Example]) -> Figure:
    """A line for each query: the sketch, then the photos it found, framed by whether they are relevant."""
    width = 1 + max(len(example.found) for example in examples)
    figure, axes = plots.new_figure(len(examples), width, 0.9 * width, 0.95 * len(examples))
    for line in axes.flat:
        line.axis("off")
    right, wrong = (plots.COLOURS[name] for name in ("fused", "diffusion"))
    for line, (query, found) in zip(axes, examples, strict=True):
        for one, record in zip(line, (query, *(photo for photo, _ in found)), strict=False):
            pixels, _ = Preprocess(THUMBNAIL)(record.open())
            one.axis("on")
            one.imshow(pixels.permute(1, 2, 0).numpy())
            one.set(xticks=[], yticks=[])
            one.spines[:].set_visible(True)
        for one, (_, relevant) in zip(line[1:], found, strict=False):
            one.spines[:].set(color=right if relevant else wrong, linewidth=2, linestyle="-" if relevant else "--")
        line[0].set_ylabel((query.label or "")[:14], fontsize=6)
    return figure
