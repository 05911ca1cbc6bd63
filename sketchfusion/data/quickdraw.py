"""Quick, Draw!: 50 million drawings of 345 classes. QuickDraw-Extended adds photos of 110 of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from .layout import Classes, Published, class_names, folders, images, photos_in, respelled
from .records import DataSet, Record

STROKES, BITMAPS = "simplified", "numpy_bitmap"
PHOTOS, DRAWINGS = "QuickDraw_images_final", "QuickDraw_sketches_final"
PUBLISHED = Published(
    name="quickdraw",
    title="Quick, Draw!",
    layout=f"{STROKES}/<class>.ndjson, or {BITMAPS}/<class>.npy, or {DRAWINGS}/<class>/*.png; photos, where wanted, in "
    f"{PHOTOS}/<class>/*.jpg",
    source="https://github.com/googlecreativelab/quickdraw-dataset; the photos and drawings of QuickDraw-Extended from "
    "https://github.com/sounakdey/doodle2search",
    parts=("train", "valid", "test"),
)
# 70,000, 2,500 and 2,500 drawings of each class, by their position in its file.
PARTS = {"train": (0, 70_000), "valid": (70_000, 72_500), "test": (72_500, 75_000)}
# How QuickDraw-Extended calls classes, where it differs in the letters.
SPELLED = {"crocodilian": "crocodile", "motorcycle": "motorbike", "eiffeltower": "theeiffeltower"}


def scan(root: Path, classes: Classes, part: str | None) -> DataSet:
    """Sketches from the first of strokes, bitmaps and PNG files that is there; the labels are spelled as in strokes.

    Drawings that the game did not recognise are kept. Files are read through, as strokes have no index, but no
    drawing is held: a record is where its line begins.
    """
    PUBLISHED.check(root, lambda folder: bool(_drawn(folder)[1]))
    kind, files = _drawn(root)
    chosen, words = PUBLISHED.choose(root, files, classes)
    photos = respelled(folders(root / PHOTOS), (*class_names("quickdraw-all"), *files), SPELLED)
    if part is not None and kind == DRAWINGS:
        raise PUBLISHED.error(root, f"parts are of {STROKES} and {BITMAPS}, which are not there")
    first, last = PARTS[part] if part is not None else (0, None)
    records: list[Record] = []
    for label in chosen:
        path = files[label]
        if label in photos:
            records += photos_in(root / PHOTOS / photos[label], label)
        if kind == DRAWINGS:
            drawn = [Record(f"{path}/{name}", "sketch", label) for name in images(path)]
        else:
            rows = _lines(path) if kind == STROKES else iter(range(_rows(root, path)))
            drawn = [Record(str(path), "sketch", label, row) for row in islice(rows, first, last)]
        if not drawn:
            where = f"no drawing from number {first:,} on" if part else "no drawing"
            raise PUBLISHED.error(root, f"the class {label!r} is empty: {where} in {path}")
        records += drawn
    if any(label in photos for label in chosen):
        words += ", with the extended photos"
    return DataSet("quickdraw", chosen, tuple(records), words + (f", {part} part" if part else ""))


def _drawn(root: Path) -> tuple[str, dict[str, Path]]:
    """Which kind of drawings is there, and where each class's are."""
    for kind, suffix in ((STROKES, ".ndjson"), (BITMAPS, ".npy")):
        files = {path.stem: path for path in (root / kind).glob(f"*{suffix}") if path.name[0] != "."}
        if files:
            return kind, files
    names = folders(root / DRAWINGS)
    spelled = respelled(names, class_names("quickdraw-all") if names else (), SPELLED)
    return DRAWINGS, {label: root / DRAWINGS / name for label, name in spelled.items()}


def _lines(path: Path) -> Iterator[int]:
    """The byte at which each line of a file begins; empty lines do not count."""
    byte = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield byte
            byte += len(line)


def _rows(root: Path, path: Path) -> int:
    """How many drawings a file of bitmaps holds, from its header."""
    try:
        bitmaps = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:  # not an array, one of objects, or cut off
        raise PUBLISHED.error(root, f"{path} is no array of bitmaps: {error}") from None
    if bitmaps.dtype != np.uint8 or bitmaps.shape[1:] not in ((784,), (28, 28)):
        raise PUBLISHED.error(root, f"{path} is no array of bitmaps (N, 784), uint8: {bitmaps.shape}, {bitmaps.dtype}")
    return len(bitmaps)
