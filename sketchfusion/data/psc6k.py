"""PSC6K: eight key points on each of 6,250 pairs, 1,250 photos of Sketchy with five sketches each."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path, PurePosixPath

from .layout import Classes, Published
from .records import DataSet, Record

TABLE = "test_pairs_ps.csv"  # the annotated pairs; test_pairs_st.csv has each in both directions
PUBLISHED = Published(
    name="psc6k",
    title="PSC6K",
    layout=f"{TABLE}, in it or in PSC6K, and Sketchy's 256x256, in it, in Sketchy or in rendered_256x256",
    source="https://photo-sketch-correspondence.github.io (PSC6K.zip, key points only), the images from "
    "https://sketchy.eye.gatech.edu",
    parts=("train", "test"),
)

Points = tuple[tuple[str, float, float], ...]


def scan(root: Path, classes: Classes, part: str | None) -> DataSet:
    """Labels are Sketchy's. A photo's key points differ from pair to pair: they are called `<k of the sketch>.<i>`.

    The parts are the paper's 60:40 as its script draws them: in each class the first three fifths of the photos, by
    path, are the training part.
    """
    PUBLISHED.check(root, lambda folder: _table(folder) is not None)
    table = _table(root)
    assert table is not None  # it was checked
    pairs = _pairs(root, table)
    chosen, words = PUBLISHED.choose(root, pairs, classes)
    base = _base(root, table, next(iter(pairs[chosen[0]])))
    records: list[Record] = []
    for label in chosen:
        photos = sorted(pairs[label])
        cut = (6 * len(photos) + 5) // 10
        for photo in {None: photos, "train": photos[:cut], "test": photos[cut:]}[part]:
            identity = f"{label}/{PurePosixPath(photo).stem}"
            ours: Points = sum((points for _, points, _ in pairs[label][photo]), ())
            records.append(Record(f"{base}/{photo}", "photo", label, photo=identity, points=ours))
            records += [
                Record(f"{base}/{sketch}", "sketch", label, photo=identity, points=points)
                for sketch, _, points in pairs[label][photo]
            ]
    if not records:
        raise PUBLISHED.error(root, f"the part {part!r} is empty: {table.name} has too few photos a class")
    records.sort(key=lambda record: (record.label, record.kind))
    if lost := [record.path for record in records if not Path(record.path).is_file()]:
        raise PUBLISHED.error(root, f"incomplete: {len(lost)} of {len(records)} images are not there, first {lost[0]}")
    return DataSet("psc6k", chosen, tuple(records), words + (f", {part} part of 60:40" if part else ""))


def _table(root: Path) -> Path | None:
    return next((path for path in (root / TABLE, root / "PSC6K" / TABLE) if path.is_file()), None)


def _pairs(root: Path, table: Path) -> dict[str, dict[str, list[tuple[str, Points, Points]]]]:
    """{class: {photo: [(sketch, points on the photo, points on the sketch)]}}; paths from `photo` or `sketch` on."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise PUBLISHED.error(root, f"{table} is no table: {error}") from None
    pairs: dict[str, dict[str, list[tuple[str, Points, Points]]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(rows, 2):
        try:
            photo, sketch = ("/".join(PurePosixPath(row[name]).parts[-4:]) for name in ("photo", "sketch"))
            k = PurePosixPath(sketch).stem.rpartition("-")[2]
            xa, ya, xb, yb = ([float(value) for value in row[name].split(";")] for name in ("XA", "YA", "XB", "YB"))
            names = [f"{k}.{i}" for i in range(1, len(xa) + 1)]
            ours, theirs = zip(names, xa, ya, strict=True), zip(names, xb, yb, strict=True)
            pairs[photo.split("/")[-2]][photo].append((sketch, tuple(ours), tuple(theirs)))
        except KeyError as error:
            raise PUBLISHED.error(root, f"{table} lacks the column {error}") from None
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise PUBLISHED.error(root, f"{table}, line {number}: {error}") from None
    return pairs


def _base(root: Path, table: Path, photo: str) -> Path:
    """The `256x256` that has the photo."""
    folders = [folder / name for folder in (root, root.parent) for name in ("", "Sketchy", "sketchy")]
    tails = ("256x256", "rendered_256x256/256x256", "")
    for base in (folder / tail for folder in folders for tail in tails):
        if (base / photo).is_file():
            return base
    raise PUBLISHED.error(root, f"found {table.name}, but not the images of Sketchy, such as 256x256/{photo}")
