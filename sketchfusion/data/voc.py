"""Photos with masks: Pascal VOC 2012, and smaller sets that list theirs in a `meta.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .layout import Classes, Published
from .records import DataSet, Record

# In the order of their values in the masks, from 1.
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
LISTS = {None: "trainval", "train": "train", "valid": "val"}
PUBLISHED = Published(
    name="voc",
    title="VOC",
    layout="JPEGImages, Annotations, ImageSets/Segmentation and SegmentationClass or SegmentationObject; or images, "
    "masks and meta.json",
    source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012 (VOCtrainval_11-May-2012.tar)",
    parts=("train", "valid"),
)


def scan(root: Path, classes: Classes, part: str | None) -> DataSet:
    """One record for each photo and class that it shows; `row` is the class's value in the mask.

    Of `SegmentationObject` alone one for each object, whose number `row` is.
    """
    PUBLISHED.check(root, lambda folder: _small(folder) or _published(folder) is not None)
    if _small(root):
        if part is not None:
            raise PUBLISHED.error(root, f"meta.json knows no parts, and {part!r} is asked for")
        records = _listed(root)
    else:
        records = _annotated(root, part)
    chosen, words = PUBLISHED.choose(root, {str(record.label) for record in records}, classes)
    kept = sorted(
        (record for record in records if record.label in chosen), key=lambda record: (record.label, record.path)
    )
    return DataSet("voc", chosen, tuple(kept), words + (f", {part} part" if part else ""))


def _small(root: Path) -> bool:
    return all((root / name).exists() for name in ("images", "masks", "meta.json"))


def _published(root: Path) -> Path | None:
    """The folder of masks of the published layout."""
    if all((root / name).is_dir() for name in ("JPEGImages", "Annotations", "ImageSets/Segmentation")):
        return next(
            (root / kind for kind in ("SegmentationClass", "SegmentationObject") if (root / kind).is_dir()), None
        )
    return None


def _complete(root: Path, names: Mapping[str, Collection[str]]) -> None:
    """Raise a DataError unless the folders have the files that they should have."""
    lost = []
    for folder, files in names.items():
        there = {*os.listdir(root / folder)}
        lost += [f"{folder}/{name}" for name in files if name not in there]
    if lost:
        raise PUBLISHED.error(root, f"incomplete: {len(lost)} files are not there, such as {lost[0]}")


def _listed(root: Path) -> list[Record]:
    """The images of `meta.json`.

    Its key points, in the original image's pixels, are scaled to the image's own; of several things in a photo those
    of the largest are taken.
    """
    try:
        meta = json.loads((root / "meta.json").read_text())
        records = [_item(root, item, meta["keypoint_names"]) for item in meta["items"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PUBLISHED.error(root, f"meta.json cannot be read: {type(error).__name__}: {error}") from None
    files = {Path(record.path).name: f"{record.photo}.png" for record in records}
    _complete(root, {"images": files, "masks": files.values()})
    return records


def _item(root: Path, item: dict[str, Any], names: list[str]) -> Record:
    stem, scale = Path(item["file"]).stem, item["scale"]
    width, height = (side * scale for side in item["orig"])
    largest = max(item["instances"], key=lambda one: one["bbox"][2] * one["bbox"][3])
    points = [
        (name, x * scale, y * scale) for name, (x, y, seen) in zip(names, largest["keypoints"], strict=True) if seen
    ]
    inside = tuple(point for point in points if 0 <= point[1] <= width and 0 <= point[2] <= height)
    path, mask = f"{root}/images/{item['file']}", f"{root}/masks/{stem}.png"
    return Record(path, "photo", item["cls"], item["voc_id"], photo=stem, mask=mask, points=inside)


def _annotated(root: Path, part: str | None) -> list[Record]:
    """The images of the published lists; which classes each shows is in its annotation."""
    masks = _published(root)
    assert masks is not None  # it was checked
    stems = (root / "ImageSets" / "Segmentation" / f"{LISTS[part]}.txt").read_text().split()
    kinds = (("JPEGImages", "jpg"), ("Annotations", "xml"), (masks.name, "png"))
    _complete(root, {folder: [f"{stem}.{kind}" for stem in stems] for folder, kind in kinds})
    records = []
    for stem in stems:
        try:
            objects = ElementTree.parse(root / "Annotations" / f"{stem}.xml").findall("object")
        except ElementTree.ParseError as error:
            raise PUBLISHED.error(root, f"Annotations/{stem}.xml cannot be read: {error}") from None
        values = [
            (i if masks.name == "SegmentationObject" else CLASSES.index(thing.findtext("name", "")) + 1, thing)
            for i, thing in enumerate(objects, 1)
            if thing.findtext("name") in CLASSES and thing.findtext("difficult") != "1"
        ]
        path, mask = f"{root}/JPEGImages/{stem}.jpg", f"{masks}/{stem}.png"
        shown = {value: thing.findtext("name") for value, thing in values}
        records += [Record(path, "photo", label, value, photo=stem, mask=mask) for value, label in shown.items()]
    return records
