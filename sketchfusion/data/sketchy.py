"""Sketchy: 125 classes of 100 photos, each with five sketches or more that were drawn from it."""

from __future__ import annotations

from pathlib import Path

from .layout import Classes, Published, folders, images, listed, photos_in
from .records import DataSet, Record

RENDERED = "tx_000000000000"  # of the renderings that are published, the one that the papers use
EXTENDED = "EXTEND_image_sketchy"
PUBLISHED = Published(
    name="sketchy",
    title="Sketchy",
    layout=f"256x256/photo/{RENDERED}/<class>/<photo>.jpg and 256x256/sketch/{RENDERED}/<class>/<photo>-<k>.png",
    source="https://sketchy.eye.gatech.edu (Sketches and Photos, 256x256)",
)


def scan(root: Path, classes: Classes, part: None) -> DataSet:
    """The root holds `256x256` or is it. Where `EXTEND_image_sketchy/<class>` lies beside it, those photos follow.

    The extended photos hold the published ones once more. Both are records, of the same `photo`, since the counts
    in the papers (12,553 photos of the 21 unseen classes) are of both.
    """
    PUBLISHED.check(root, _fits)
    base = _base(root)
    photos, sketches = base / "photo" / RENDERED, base / "sketch" / RENDERED
    extended = base.parent / EXTENDED
    chosen, words = PUBLISHED.choose(root, {*folders(photos), *folders(sketches)}, classes)
    records: list[Record] = []
    lacking = []
    for label in chosen:
        shown = photos_in(photos / label, label)
        drawn = [
            Record(f"{sketches}/{label}/{name}", "sketch", label, photo=f"{label}/{name.rpartition('-')[0]}")
            for name in images(sketches / label)
        ]
        known = {record.photo for record in shown}
        lost = sum(record.photo not in known for record in drawn)
        if lost or not drawn:
            lacking.append(f"{label} ({len(shown)} photos, {len(drawn)} sketches, {lost} of them without their photo)")
        records += [*shown, *photos_in(extended / label, label), *drawn]
    if lacking:
        raise PUBLISHED.error(root, f"incomplete: {listed(lacking, 3)}")
    if any((extended / label).is_dir() for label in chosen):
        words += ", with the extended photos"
    return DataSet("sketchy", chosen, tuple(records), words)


def _base(root: Path) -> Path:
    return root / "256x256" if (root / "256x256").is_dir() else root


def _fits(root: Path) -> bool:
    return all((_base(root) / kind / RENDERED).is_dir() for kind in ("photo", "sketch"))
