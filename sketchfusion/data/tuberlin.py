"""TU-Berlin: 250 classes of 80 sketches. The extended set adds photos of the same classes."""

from __future__ import annotations

from pathlib import Path

from .layout import Classes, Published, class_names, folders, images, photos_in, respelled
from .records import DataSet, Record

EXTENDED = "ImageResized"
PUBLISHED = Published(
    name="tuberlin",
    title="TU-Berlin",
    layout=f"png/<class>/<n>.png; the extended set's photos, where wanted, in {EXTENDED}/<class>/*.JPEG",
    source="http://cybertron.cg.tu-berlin.de/eitz/projects/classifysketch (sketches_png.zip); the photos are those of "
    "Zhang et al., SketchNet, CVPR 2016",
)
# How the extended photos' folders spell classes, where they differ in their letters.
SPELLED = {
    "chandeler": "chandelier",
    "diamod": "diamond",
    "griaffe": "giraffe",
    "mouse": "mouseanimal",
    "pipe": "pipeforsmoking",
    "spacesshuttle": "spaceshuttle",
    "spidar": "spider",
    "tromobone": "trombone",
    "wristwatching": "wristwatch",
}


def scan(root: Path, classes: Classes, part: None) -> DataSet:
    """Labels are the folders of `png`; the photos' folders, spelled otherwise, are matched with them."""
    PUBLISHED.check(root, lambda folder: bool(folders(folder / "png")))
    labels = folders(root / "png")
    chosen, words = PUBLISHED.choose(root, labels, classes)
    photos = respelled(folders(root / EXTENDED), (*class_names("tuberlin-all"), *labels), SPELLED)
    records: list[Record] = []
    for label in chosen:
        if label in photos:
            records += photos_in(root / EXTENDED / photos[label], label)
        drawn = images(root / "png" / label)
        if not drawn:
            raise PUBLISHED.error(root, f"the class {label!r} is empty: no image in {root / 'png' / label}")
        records += [Record(f"{root}/png/{label}/{name}", "sketch", label) for name in drawn]
    if any(label in photos for label in chosen):
        words += ", with the extended photos"
    return DataSet("tuberlin", chosen, tuple(records), words)
