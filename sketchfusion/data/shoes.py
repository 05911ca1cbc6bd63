"""Shoes with part boxes: photos and sketches of one category, the centres of the parts for key points."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ..images import open_image
from ..strokes import Strokes
from .layout import Classes, Published, images
from .records import DataSet, Record

LABEL = "shoe"
PAPER = 240  # the box that parts are relative to is tight around pixels darker than this grey
OUTLYING = 3.5  # in robust standard deviations
LEAST = 0.02  # a robust standard deviation is not taken for less than this part of the box
PUBLISHED = Published(
    name="shoes",
    title="Shoes",
    layout="photo/<id>.jpg, sketch/<id>-<k>.png and parts.json (boxes of named parts)",
    source="the authors of Li et al., Fine-Grained Sketch-Based Image Retrieval: The Role of Part-Aware Attributes, "
    "WACV 2016",
)

Box = Sequence[float]  # x, y, width, height, as parts of the tight box


def scan(root: Path, classes: Classes, part: None) -> DataSet:
    """Key points are the parts' names and their boxes' centres. The images are looked at, to place the boxes.

    Some boxes are off, and left out: those whose centre or size lies, along any axis, more than 3.5 robust standard
    deviations (1.4826 times the median distance from the median, 0.02 at least) from the median over all boxes of
    that part, in photos and in sketches apart.

    Raises:
        ImageError: an image cannot be read; the source is the file.
    """
    PUBLISHED.check(root, lambda folder: all((folder / name).exists() for name in ("photo", "sketch", "parts.json")))
    try:
        parts = json.loads((root / "parts.json").read_text())["parts"]
        parts = _plausible({stem: parts[stem] for stem in parts if "-" not in stem}) | _plausible(
            {stem: parts[stem] for stem in parts if "-" in stem}
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PUBLISHED.error(root, f"parts.json cannot be read: {type(error).__name__}: {error}") from None
    photos, sketches = images(root / "photo"), images(root / "sketch")
    known = {Path(name).stem for name in photos}
    if orphans := [name for name in sketches if Path(name).stem.rpartition("-")[0] not in known]:
        raise PUBLISHED.error(
            root, f"incomplete: {len(orphans)} of {len(sketches)} sketches, such as {orphans[0]}, lack their photo"
        )
    there = known | {Path(name).stem for name in sketches}
    if lost := [stem for stem in parts if stem not in there]:
        raise PUBLISHED.error(
            root, f"incomplete: {len(lost)} of the {len(parts)} images in parts.json are not there, such as {lost[0]}"
        )
    chosen, words = PUBLISHED.choose(root, [LABEL] if photos and sketches else [], classes)
    records = [_record(root, "photo", name, Path(name).stem, parts) for name in photos]
    records += [_record(root, "sketch", name, Path(name).stem.rpartition("-")[0], parts) for name in sketches]
    return DataSet("shoes", chosen, tuple(records), words)


def _plausible(parts: Mapping[str, Mapping[str, Box]]) -> dict[str, dict[str, tuple[float, float]]]:
    """{image: {part: box}} -> {image: {part: its centre}}, without the outlying boxes."""
    kept: dict[str, dict[str, tuple[float, float]]] = {stem: {} for stem in parts}
    for name in dict.fromkeys(name for boxes in parts.values() for name in boxes):
        stems = [stem for stem in parts if name in parts[stem]]
        boxes = np.array([parts[stem][name] for stem in stems], dtype=np.float64).reshape(-1, 4)
        boxes[:, :2] += boxes[:, 2:] / 2
        distances = np.abs(boxes - np.median(boxes, axis=0))
        deviations = np.maximum(1.4826 * np.median(distances, axis=0), LEAST)
        for i in np.flatnonzero((distances <= OUTLYING * deviations).all(axis=1)):
            kept[stems[i]][name] = (float(boxes[i, 0]), float(boxes[i, 1]))
    return kept


def _record(
    root: Path,
    kind: Literal["photo", "sketch"],
    name: str,
    photo: str,
    parts: Mapping[str, Mapping[str, tuple[float, float]]],
) -> Record:
    path = f"{root}/{kind}/{name}"
    left, top, width, height = ink_box(path)
    centres = parts.get(Path(name).stem, {}) if width else {}
    points = tuple((part, left + x * width, top + y * height) for part, (x, y) in centres.items())
    return Record(path, kind, LABEL, photo=photo, points=points)


def ink_box(path: str) -> tuple[int, int, int, int]:
    """Left, top, width and height of the tight box around an image's ink; zeros where there is none."""
    opened = open_image(path)
    if isinstance(opened, Strokes):
        opened = opened.render(*opened.size)
    box = opened.convert("L").point(lambda grey: 255 * (grey < PAPER)).getbbox()
    return (0, 0, 0, 0) if box is None else (box[0], box[1], box[2] - box[0], box[3] - box[1])
