"""Vector sketches -> image: pen strokes from Quick, Draw! or SVG, drawn at the size the network sees."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image

from .errors import ImageError

PEN = 1 / 96  # default pen width as a part of the longer side; Sketchy's sketches are drawn at about 1/100
MARGIN = 1 / 24  # paper left around a drawing that does not say how large its paper is, likewise
SMALL = 64  # frames smaller than this are enlarged where rounding up to whole units would distort them
MOST_POINTS = 1_000_000  # of a drawing; a person's has some hundreds
MOST_INK = 2e9  # pixels that the pieces of a drawing may be measured against: some ten seconds
LARGEST = 1e9  # no coordinate of a drawing is larger than this


@dataclass(frozen=True, eq=False)
class Strokes:
    """A drawing made of pen strokes, in its own units: x to the right, y down, the frame's corner at (0, 0).

    One unit is one original pixel, here and in `Features.at`; the frame is rounded up to whole pixels
    (`size`).

    Attributes:
        strokes: one (P, 2) float64 array of x, y for each stroke; a stroke of a single point is a dot.
        width, height: the frame, in drawing units; what lies outside is not drawn.
        line_width: the pen's width in drawing units; None takes 1/96 of the frame's longer side.

    Raises:
        ImageError: there is no point at all, a shape is wrong, a number is not finite, or the frame is empty.
    """

    strokes: tuple[np.ndarray, ...]
    width: float
    height: float
    line_width: float | None = None

    def __post_init__(self) -> None:
        try:
            strokes = tuple(np.asarray(stroke, dtype=np.float64) for stroke in self.strokes)
            width, height = float(self.width), float(self.height)
            pen = float(self.pen)
        except (TypeError, ValueError, OverflowError) as error:
            raise refused(f"strokes are (P, 2) arrays of numbers: {error}") from None
        strokes = tuple(stroke for stroke in strokes if stroke.size)
        for stroke in strokes:
            if stroke.ndim != 2 or stroke.shape[1] != 2:
                raise refused(f"a stroke is an array of shape (P, 2), not {stroke.shape}")
        points_of(strokes, "Strokes")
        for name, value in (("width", width), ("height", height), ("line_width", pen)):
            if not 0 < value <= LARGEST:
                raise refused(f"{name} must be positive and finite, not {value}")
        object.__setattr__(self, "strokes", strokes)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the frame in whole units, rounded up: the drawing's size in original pixels."""
        return math.ceil(self.width), math.ceil(self.height)

    @property
    def pen(self) -> float:
        """The width that the lines are drawn with, in drawing units."""
        return PEN * max(self.width, self.height) if self.line_width is None else self.line_width

    def __repr__(self) -> str:
        points = sum(map(len, self.strokes))
        return f"Strokes({len(self.strokes)} strokes, {points} points, {self.width:g} x {self.height:g})"

    @classmethod
    def from_quickdraw(cls, drawing: str | bytes | Mapping) -> Strokes:
        """A Quick, Draw! drawing: one line of an ndjson file, or that line parsed.

        The simplified format (`[xs, ys]` a stroke, in 0..255) keeps its coordinates, in a frame of 256 x 256.
        The raw format (`[xs, ys, ts]`, any range) is moved so that its bounding box and a small margin are
        the frame.

        Raises:
            ImageError: malformed JSON, a missing `drawing`, an empty one, lengths that differ, other numbers.
        """
        if isinstance(drawing, str | bytes):
            try:
                drawing = json.loads(drawing)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                raise refused(f"not a line of Quick, Draw! JSON: {error}", QUICKDRAW) from None
        if not isinstance(drawing, Mapping) or "drawing" not in drawing:
            raise refused("not a Quick, Draw! drawing: it has no key 'drawing'", QUICKDRAW)
        strokes = [_quickdraw_stroke(axes) for axes in _sequence(drawing["drawing"])]
        strokes = [stroke for stroke in strokes if len(stroke)]
        points = points_of(strokes, QUICKDRAW)
        simplified = all(len(axes) == 2 for axes in drawing["drawing"])
        if simplified and points.min() >= 0 and points.max() <= 255:
            return cls(tuple(strokes), 256, 256)
        return framed(strokes)

    @classmethod
    def from_svg(cls, svg: str | os.PathLike | bytes) -> Strokes:
        """The lines of an SVG file; `svg` is its path, or the document: bytes, or text that begins with `<`.

        Drawn: `path` (every command), `line`, `polyline`, `polygon`, `rect`, `circle`, `ellipse`, within any
        nesting of groups with `transform`. Outlines only: fills are not painted. Left out: `defs`,
        `clipPath`, `symbol`, `mask`, `pattern`, `marker`, what is hidden (`display`, `visibility`, `opacity: 0`), and
        what would be invisible on white paper (neither a stroke nor a fill, or white ones, as a background's).
        Not supported, and ignored: `use`, text, images, style sheets; where one, or a `stroke-width`, hints at a
        stroke, a shape without a fill is drawn.

        The frame is the viewport: `width` and `height` (their numbers, units ignored), onto which the
        `viewBox` is fitted; without them the `viewBox`; without that the bounding box and a small margin. The
        pen's width is the median of the `stroke-width`s given, scaled as their elements are.

        Raises:
            ImageError: an unreadable file, malformed XML, declared entities, malformed path data, nothing to draw.
        """
        from .svg import from_svg  # only drawings in SVG need it

        if isinstance(svg, bytes):
            return from_svg(svg, "SVG text")
        if isinstance(svg, str) and svg.lstrip("\ufeff \t\r\n").startswith("<"):
            return from_svg(svg.lstrip("\ufeff \t\r\n"), "SVG text")
        if not isinstance(svg, str | os.PathLike):
            raise refused(f"an SVG is a path, text or bytes, not {type(svg).__name__}", "SVG")
        path = os.fsdecode(svg)
        with open_regular(path) as file:
            return from_svg(file.read(), path)

    def render(self, width: int, height: int) -> Image.Image:
        """The drawing as a grey image (mode "L") of `width` x `height` pixels, which the frame fills.

        Black on white, antialiased, drawn with a round pen that is never thinner than a pixel, so that lines
        do not vanish at small sizes.

        Raises:
            ImageError: too many lines with too thick a pen, which would take minutes.
        """
        scale = np.array([width, height]) / np.array(self.size)
        pen = max(self.pen * math.sqrt(scale[0] * scale[1]), 1.0)
        pen = min(pen, width + height)  # which blackens everything already
        reach = pen / 2 + 0.5  # ink fades out over the pixel that the pen's edge crosses
        segments = np.concatenate([_segments(stroke * scale) for stroke in self.strokes])
        ink = np.zeros((height, width), dtype=np.float32)
        length = max(8.0, pen)
        batch = max(1, int(2**20 / (length + 2 * reach + 2) ** 2))  # pixels computed together: some megabytes
        seen = _clipped(segments, width, height, reach)
        if (len(seen) + np.hypot(*(seen[:, 1] - seen[:, 0]).T).sum() / length) * (length + 2 * reach) ** 2 > MOST_INK:
            raise refused("too many lines with too thick a pen to draw")
        for pieces in _pieces(seen, length, batch):
            _draw(ink, pieces, reach)
        return Image.fromarray(np.rint(255 * (1 - ink)).astype(np.uint8))


@contextmanager
def open_regular(path: str) -> Iterator[BinaryIO]:
    """A file to read from; an ImageError where it cannot be, or where reading it could block (pipes, devices)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageError("a directory, not a file" if os.path.isdir(path) else "not a regular file", source=path)
        with open(path, "rb") as file:
            yield file
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        problem = getattr(error, "strerror", None) or error
        raise ImageError(f"cannot be read: {problem}", source=path) from None


def refused(problem: str, source: str = "Strokes") -> ImageError:
    return ImageError(problem, source=source)


def points_of(strokes: Sequence[np.ndarray], source: str) -> np.ndarray:
    """(P, 2), the points of all the strokes; ImageError where there are none, or any that cannot be drawn."""
    if not strokes:
        raise refused("the drawing is empty", source)
    points = np.concatenate(strokes)
    if not (np.abs(points) <= LARGEST).all():
        raise refused(f"a coordinate is not finite, or larger than {LARGEST:g}", source)
    return points


# Quick, Draw!

QUICKDRAW = "Quick, Draw! drawing"


def _sequence(value: object) -> list | tuple:
    if not isinstance(value, list | tuple):
        raise refused(f"a list was expected, not {type(value).__name__}", QUICKDRAW)
    return value


def _quickdraw_stroke(axes: object) -> np.ndarray:
    """`[xs, ys]` or `[xs, ys, ts]` -> (P, 2)."""
    axes = _sequence(axes)
    if len(axes) not in (2, 3):
        raise refused(f"a stroke is [xs, ys] or [xs, ys, ts], not {len(axes)} lists", QUICKDRAW)
    try:
        x, y = (np.asarray(axis, dtype=np.float64) for axis in axes[:2])
    except (TypeError, ValueError, OverflowError) as error:
        raise refused(f"a stroke's coordinates are not numbers: {error}", QUICKDRAW) from None
    if x.ndim != 1 or x.shape != y.shape:
        raise refused(f"a stroke's xs and ys differ in length: {x.shape} and {y.shape}", QUICKDRAW)
    return np.stack([x, y], axis=-1)


# The frame


def framed(strokes: list[np.ndarray], frame: tuple[float, float] | None = None, pen: float | None = None) -> Strokes:
    """Strokes in a frame; without one, moved into their bounding box and a margin.

    A small frame whose sides are not whole numbers is enlarged to 256: a unit is a pixel, and a frame of 1 x
    0.5 cannot be rounded up to whole pixels without a loss.
    """
    corner = np.zeros(2)
    if frame is None:
        points = np.concatenate(strokes)
        low, extent = points.min(0), np.ptp(points, axis=0)
        margin = MARGIN * (float(extent.max()) or 1.0)  # a single dot has no extent
        corner = low - margin
        width, height = (extent + 2 * margin).tolist()
    else:
        width, height = frame
    whole = float(width).is_integer() and float(height).is_integer()
    factor = 1.0 if whole or max(width, height) >= SMALL else 256 / max(width, height)
    placed = tuple((stroke - corner) * factor for stroke in strokes)
    return Strokes(placed, width * factor, height * factor, None if pen is None else pen * factor)


# Drawing: the pen's ink on a pixel is a function of the distance from the pixel's centre to the stroke, which
# gives antialiasing, round caps, round joints and dots at once. Segments are cut into short pieces, so that
# the pixels that each can reach fit into one small window, and all windows are computed together.


def _segments(stroke: np.ndarray) -> np.ndarray:
    """(P, 2) points -> (P - 1, 2, 2) segments; a single point -> one segment without length."""
    if len(stroke) == 1:
        return stroke[None].repeat(2, axis=1)
    return np.stack([stroke[:-1], stroke[1:]], axis=1)


def _clipped(segments: np.ndarray, width: int, height: int, reach: float) -> np.ndarray:
    """The parts of (M, 2, 2) segments from which the pen can reach the canvas (Liang and Barsky)."""
    start, step = segments[:, 0], segments[:, 1] - segments[:, 0]
    low, high = np.array([-reach, -reach]), np.array([width + reach, height + reach])
    with np.errstate(all="ignore"):
        crossings = np.stack([(low - start) / step, (high - start) / step])  # (2, M, 2)
    still = step == 0
    inside = (low <= start) & (start <= high)
    enter = np.where(still, np.where(inside, 0.0, np.inf), crossings.min(0)).max(1).clip(min=0)
    leave = np.where(still, 1.0, crossings.max(0)).min(1).clip(max=1)
    seen = enter <= leave
    ends = np.stack([enter, leave], axis=1)[seen, :, None]
    return start[seen, None] + ends * step[seen, None]


def _pieces(segments: np.ndarray, length: float, batch: int) -> Iterator[np.ndarray]:
    """(M, 2, 2) segments -> batches of (B, 2, 2) pieces, none longer than `length`."""
    counts = np.ceil(np.hypot(*(segments[:, 1] - segments[:, 0]).T) / length).clip(min=1).astype(int)
    owner = np.repeat(np.arange(len(segments)), counts)
    position = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
    ends = (position[:, None] + [0, 1]) / counts[owner, None]
    for first in range(0, len(owner), batch):
        rows = slice(first, first + batch)
        start, stop = segments[owner[rows], 0], segments[owner[rows], 1]
        yield start[:, None] + ends[rows, :, None] * (stop - start)[:, None]


def _draw(ink: np.ndarray, pieces: np.ndarray, reach: float) -> None:
    """Adds (B, 2, 2) pieces to the (H, W) ink, in 0..1: each pixel keeps the most that any piece gives it."""
    height, width = ink.shape
    corner = np.floor(pieces.min(1) - reach).astype(int)  # (B, 2), the window's first column and row
    side = int(np.ceil((pieces.max(1) - pieces.min(1)).max() + 2 * reach)) + 1
    window = corner[:, None] + np.arange(side)[:, None]  # (B, side, 2) columns and rows
    step = (pieces[:, 1] - pieces[:, 0]).astype(np.float32)
    offset = (window + 0.5 - pieces[:, :1]).astype(np.float32)  # from each piece's start to the pixels
    x, y = offset[:, None, :, 0], offset[:, :, None, 1]  # (B, 1, side), (B, side, 1)
    dx, dy = step[:, 0, None, None], step[:, 1, None, None]
    square = np.maximum(dx * dx + dy * dy, np.finfo(np.float32).tiny)
    along = ((x * dx + y * dy) / square).clip(0, 1)  # the nearest point of the piece, from 0 to 1
    distance = np.hypot(x - along * dx, y - along * dy)
    amount = (reach - distance).clip(0, 1)
    columns, rows = window[:, None, :, 0], window[:, :, None, 1]
    touched = (amount > 0) & (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    flat = (rows * width + columns)[touched]
    np.maximum.at(ink.reshape(-1), flat, amount[touched])
