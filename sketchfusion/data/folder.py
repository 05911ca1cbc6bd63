"""A plain folder of classes, for sets of one's own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..config import check_count
from ..errors import SketchFusionError
from .layout import IMAGES, Classes, Published, folders, images
from .records import DataSet, Record
from .splits import spaced

PUBLISHED = Published(
    name="folder",
    title="Folder",
    layout="<class>/<any name>.png, .jpg, .svg or the like, or photo/<class>/... and sketch/<class>/...",
    source="nowhere: it is your own, and docs/data.md describes the layout",
)

Kind = Literal["photo", "sketch"]
KINDS: tuple[Kind, ...] = ("photo", "sketch")


def scan(root: Path, classes: Classes, part: None) -> DataSet:
    """Where the root holds a folder `photo` or `sketch`, the classes lie in those two, which say what images are.

    Otherwise they lie in the root itself: SVG files are sketches, all others photos. A sketch named `X-<k>` or `X`
    was drawn from the photo named `X` of its class, if there is one.
    """
    places = {kind: root / kind for kind in KINDS if (root / kind).is_dir()}
    labels = {label for place in places.values() or (root,) for label in folders(place)}
    chosen, words = replace(PUBLISHED, title=f"Folder {root.resolve().name}").choose(root, labels, classes)
    records: list[Record] = []
    for label in chosen:
        if places:
            found = [(kind, place / label / name) for kind, place in places.items() for name in images(place / label)]
        else:
            found = sorted((_kind(name), root / label / name) for name in images(root / label))
        if not found:
            raise PUBLISHED.error(root, f"the class {label!r} is empty: it has no image")
        known = {path.stem for kind, path in found if kind == "photo"}
        for kind, path in found:
            stem = path.stem
            if kind == "sketch" and stem not in known:
                stem = stem.rpartition("-")[0]
            photo = f"{label}/{stem}" if stem in known else None
            records.append(Record(str(path), kind, label, photo=photo))
    if not any(record.kind == "sketch" for record in records):
        words += ", all of them photos: drawings belong in sketch/<class>"
    return DataSet("folder", chosen, tuple(records), words)


def _kind(name: str) -> Kind:
    return "sketch" if name.lower().endswith(".svg") else "photo"


def find_images(place: str | os.PathLike, limit: int | None = None) -> list[str]:
    """Every image in a folder and the folders inside it, in the order of their paths; or the one file `place`.

    Files are chosen by their names (PNG, JPEG, WebP, GIF, BMP, TIFF, SVG); hidden ones, and those in hidden folders,
    are left out. Links to folders are followed, into each folder once.

    Args:
        place: the folder.
        limit: take that many, evenly spaced in that order, so that every part of the folder is among them.

    Raises:
        ConfigError: the limit is below 1.
        SketchFusionError: there is nothing of that name, no image in it, or a folder that cannot be read.
    """
    if limit is not None:
        check_count("limit", limit)
    place = Path(place)
    if place.is_file():
        return [str(place)]
    if not place.is_dir():
        raise SketchFusionError(f"{place}: there is no folder and no image of that name")

    def refuse(error: OSError) -> None:
        raise SketchFusionError(f"{error.filename} cannot be read: {error.strerror}") from error

    found: list[Path] = []
    entered = set()
    for folder, inside, names in os.walk(place, followlinks=True, onerror=refuse):
        inside[:] = [name for name in inside if name[0] != "."]
        if (real := os.path.realpath(folder)) in entered:  # a link that leads back
            inside.clear()
            continue
        entered.add(real)
        # A link to nothing is among them: whoever opens it is told.
        found += [Path(folder, name) for name in names if name[0] != "." and Path(name).suffix.lower() in IMAGES]
    found.sort()
    if not found:
        raise SketchFusionError(f"{place}: no images in this folder; looked for {', '.join(IMAGES)}")
    return [str(path) for path in spaced(found, limit or len(found))]
