"""Records: what every loader gives and every task takes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from ..errors import ImageError, SketchFusionError
from ..images import open_image
from ..strokes import Strokes, open_regular


class DataError(SketchFusionError):
    """A folder is not the data set that it should be, or lacks what was asked of it.

    The message says what was expected, what was found, and where the set is obtained.
    """


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a data set: where it lies and what is known of it.

    Attributes:
        path: the file.
        kind: whether a camera or a hand made it.
        label: its class, spelled as in the set; None where the set has none.
        row: the byte at which its line begins in an ndjson file, or its row of an npy array; with a mask that shows
            several things, the value which this one has there.
        photo: which photo of the set this is, or was drawn from; no two photos share a name, files of one photo do.
        mask: the file of its mask.
        points: named key points: name, x and y, in continuous original pixels as in `Features.at`.

    Raises:
        DataError: `kind` is neither of the two.
    """

    path: str
    kind: Literal["photo", "sketch"]
    label: str | None
    row: int | None = None
    photo: str | None = None
    mask: str | None = None
    points: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("photo", "sketch"):
            raise DataError(f"{self.path}: its kind is {self.kind!r}; it has to be 'photo' or 'sketch'")
        # A Path and a list will do, and become what can be compared and hashed.
        object.__setattr__(self, "path", os.fspath(self.path))
        object.__setattr__(self, "mask", self.mask and os.fspath(self.mask))
        object.__setattr__(self, "points", tuple(map(tuple, self.points)))

    def check_points(self, width: float, height: float) -> None:
        """Compare the key points with the image's size. (A little outside some lie in published sets.)

        Raises:
            DataError: one lies far outside, as where the image was resized and its points were not.
        """
        for name, x, y in self.points:
            if not (-0.1 <= x / width <= 1.1 and -0.1 <= y / height <= 1.1):
                point, size = f"{name} ({x:g}, {y:g})", f"{width:g} x {height:g} pixels"
                raise DataError(f"{self.path}: its key point {point} lies outside of its {size}")

    def open(self) -> Image.Image | Strokes:
        """The image, black on white if it is a sketch; what `encode` takes.

        Raises:
            ImageError: it cannot be read; the source is the file.
        """
        kind = os.path.splitext(self.path)[1]
        if self.row is not None and kind == ".ndjson":
            return self._open_line(self.row)
        if self.row is not None and kind == ".npy":
            return self._open_bitmap(self.row)
        return open_image(self.path)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Inside, an ImageError over what was opened names the file, as one over a file does."""
        try:
            yield
        except ImageError as error:
            if error.source == self.path:
                raise
            line = f"the line at byte {self.row}: " if self.path.endswith(".ndjson") else ""
            raise ImageError(f"{line}{error.problem}", source=self.path) from None

    def _open_line(self, byte: int) -> Strokes:
        with open_regular(self.path) as file:
            file.seek(byte)
            line = file.readline()
        with self.named():
            return Strokes.from_quickdraw(line)

    def _open_bitmap(self, row: int) -> Image.Image | Strokes:
        try:
            bitmap = np.load(self.path, mmap_mode="r")[row].reshape(28, 28)
        except (OSError, ValueError, EOFError, IndexError) as error:  # not such an array, or cut off
            raise ImageError(f"row {row}: {error}", source=self.path) from None
        return open_image(255 - bitmap)  # published as white ink on black

    def read_mask(self) -> np.ndarray:
        """Where the thing is: bool (H, W), the pixels that have the value `row`, or any but 0 where that is None.

        Raises:
            ImageError: it has no mask, or that cannot be read; the source is the mask's file.
        """
        if self.mask is None:
            raise ImageError("it has no mask", source=self.path)
        with open_regular(self.mask) as file:
            try:
                with Image.open(file) as image:
                    values = np.asarray(image.convert("L") if len(image.getbands()) > 1 else image)
            except Exception as error:  # decoders raise anything over a damaged file
                problem = f"the mask cannot be decoded: {type(error).__name__}"
                raise ImageError(problem, source=self.mask) from None
        return values != 0 if self.row is None else values == self.row


@dataclass(frozen=True)
class DataSet:
    """The records of a data set, those of the chosen classes. Picklable; holds no image.

    Attributes:
        name: which set, of `sketchfusion.data.NAMES`.
        classes: the chosen classes that are there, sorted.
        records: ordered by class, then photos before sketches, then by name.
        split: which part of which set, in words: "Sketchy 104/21, unseen (3 of 21 classes found)".
    """

    name: str
    classes: tuple[str, ...]
    records: tuple[Record, ...]
    split: str

    @property
    def photos(self) -> tuple[Record, ...]:
        """Its records of photos, in their order."""
        return tuple(record for record in self.records if record.kind == "photo")

    @property
    def sketches(self) -> tuple[Record, ...]:
        """Its records of sketches, in their order."""
        return tuple(record for record in self.records if record.kind == "sketch")

    def of_classes(self, classes: Collection[str], words: str) -> DataSet:
        """The part with these classes, which `words` adds to the split."""
        chosen = set(classes)
        records = tuple(record for record in self.records if record.label in chosen)
        return DataSet(self.name, tuple(classes), records, f"{self.split}, {words}")

    def pairs(self) -> list[tuple[Record, Record, tuple[str, ...]]]:
        """Every sketch with its photo and the names of the key points that both have, where there are any."""
        photos = defaultdict(list)
        for record in self.photos:
            photos[record.photo].append(record)
        found = []
        for sketch in self.sketches:
            for photo in photos[sketch.photo] if sketch.photo is not None else ():
                there = {name for name, _, _ in photo.points}
                names = tuple(name for name, _, _ in sketch.points if name in there)
                if names:
                    found.append((sketch, photo, names))
        return found
