"""Vector sketches -> image: pen strokes from Quick, Draw! or SVG, drawn at the size the network sees."""

from __future__ import annotations

import cmath
import json
import math
import os
import re
import stat
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO
from xml.parsers import expat

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
            raise _refused(f"strokes are (P, 2) arrays of numbers: {error}") from None
        strokes = tuple(stroke for stroke in strokes if stroke.size)
        for stroke in strokes:
            if stroke.ndim != 2 or stroke.shape[1] != 2:
                raise _refused(f"a stroke is an array of shape (P, 2), not {stroke.shape}")
        _points_of(strokes, "Strokes")
        for name, value in (("width", width), ("height", height), ("line_width", pen)):
            if not 0 < value <= LARGEST:
                raise _refused(f"{name} must be positive and finite, not {value}")
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
                raise _refused(f"not a line of Quick, Draw! JSON: {error}", QUICKDRAW) from None
        if not isinstance(drawing, Mapping) or "drawing" not in drawing:
            raise _refused("not a Quick, Draw! drawing: it has no key 'drawing'", QUICKDRAW)
        strokes = [_quickdraw_stroke(axes) for axes in _sequence(drawing["drawing"])]
        strokes = [stroke for stroke in strokes if len(stroke)]
        points = _points_of(strokes, QUICKDRAW)
        simplified = all(len(axes) == 2 for axes in drawing["drawing"])
        if simplified and points.min() >= 0 and points.max() <= 255:
            return cls(tuple(strokes), 256, 256)
        return _framed(strokes)

    @classmethod
    def from_svg(cls, svg: str | os.PathLike | bytes) -> Strokes:
        """The lines of an SVG file; `svg` is its path, or the document: bytes, or text that begins with `<`.

        Drawn: `path` (every command), `line`, `polyline`, `polygon`, `rect`, `circle`, `ellipse`, within any
        nesting of groups with `transform`. Outlines only: fills are not painted. Left out: `defs`,
        `clipPath`, `symbol`, `mask`, `pattern`, `marker`, what has `display: none`, and what would be
        invisible on white paper (neither a stroke nor a fill, or white ones, as a background's). Not
        supported, and ignored: `use`, text, images, style sheets.

        The frame is the viewport: `width` and `height` (their numbers, units ignored), onto which the
        `viewBox` is fitted; without them the `viewBox`; without that the bounding box and a small margin. The
        pen's width is the median of the `stroke-width`s given, scaled as their elements are.

        Raises:
            ImageError: an unreadable file, malformed XML, declared entities, malformed path data, nothing to draw.
        """
        if isinstance(svg, bytes):
            return _from_svg(svg, "SVG text")
        if isinstance(svg, str) and svg.lstrip("\ufeff \t\r\n").startswith("<"):
            return _from_svg(svg.lstrip("\ufeff \t\r\n"), "SVG text")
        if not isinstance(svg, str | os.PathLike):
            raise _refused(f"an SVG is a path, text or bytes, not {type(svg).__name__}", "SVG")
        path = os.fsdecode(svg)
        with open_regular(path) as file:
            return _from_svg(file.read(), path)

    def render(self, width: int, height: int) -> Image.Image:
        """The drawing as a grey image (mode "L") of `width` x `height` pixels, which the frame fills.

        Black on white, antialiased, drawn with a round pen that is never thinner than a pixel, so that lines
        do not vanish at small sizes.
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
            raise _refused("too many lines with too thick a pen to draw")
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


def _refused(problem: str, source: str = "Strokes") -> ImageError:
    return ImageError(problem, source=source)


def _points_of(strokes: Sequence[np.ndarray], source: str) -> np.ndarray:
    """(P, 2), the points of all the strokes; ImageError where there are none, or any that cannot be drawn."""
    if not strokes:
        raise _refused("the drawing is empty", source)
    points = np.concatenate(strokes)
    if not (np.abs(points) <= LARGEST).all():
        raise _refused(f"a coordinate is not finite, or larger than {LARGEST:g}", source)
    return points


# Quick, Draw!

QUICKDRAW = "Quick, Draw! drawing"


def _sequence(value: object) -> list | tuple:
    if not isinstance(value, list | tuple):
        raise _refused(f"a list was expected, not {type(value).__name__}", QUICKDRAW)
    return value


def _quickdraw_stroke(axes: object) -> np.ndarray:
    """`[xs, ys]` or `[xs, ys, ts]` -> (P, 2)."""
    axes = _sequence(axes)
    if len(axes) not in (2, 3):
        raise _refused(f"a stroke is [xs, ys] or [xs, ys, ts], not {len(axes)} lists", QUICKDRAW)
    try:
        x, y = (np.asarray(axis, dtype=np.float64) for axis in axes[:2])
    except (TypeError, ValueError, OverflowError) as error:
        raise _refused(f"a stroke's coordinates are not numbers: {error}", QUICKDRAW) from None
    if x.ndim != 1 or x.shape != y.shape:
        raise _refused(f"a stroke's xs and ys differ in length: {x.shape} and {y.shape}", QUICKDRAW)
    return np.stack([x, y], axis=-1)


# The frame


def _framed(strokes: list[np.ndarray], frame: tuple[float, float] | None = None, pen: float | None = None) -> Strokes:
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


# SVG. Every shape becomes path data, and every path becomes chains of cubic curves: (3 k + 1, 2) arrays of
# points and control points, which a transform maps like any points.

_SHAPES = {"path", "line", "polyline", "polygon", "rect", "circle", "ellipse"}
_NEVER_DRAWN = {"defs", "clipPath", "symbol", "mask", "pattern", "marker"}
_NO_PAINT = {"none", "transparent"}
_WHITE = {"white", "#fff", "#ffffff", "rgb(255,255,255)", "rgb(255, 255, 255)"}
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_SHARE = {"Min": 0.0, "Mid": 0.5, "Max": 1.0}  # of the free space, before the drawing: preserveAspectRatio
_BETWEEN = re.compile(r"[\s,]*")
_FUNCTION = re.compile(r"[\s,]*([A-Za-z]+)\s*\(([^()]*)\)[\s,]*")


@dataclass(frozen=True)
class _Style:
    """What an element hands down to its children."""

    matrix: np.ndarray  # (3, 3), from the element's coordinates to the frame's
    stroke: str | None = None
    fill: str | None = None
    pen: str | None = None

    def draws(self) -> bool:
        """Whether a person would see the element on white paper; one that says nothing of paint counts."""
        if self.stroke is None:
            return self.fill not in _WHITE
        return any((paint or "black") not in _NO_PAINT | _WHITE for paint in (self.stroke, self.fill))

    def pen_width(self) -> float:
        """The `stroke-width` in the frame's units; 0 where none was given."""
        number = _length(self.pen) or 0.0
        return number * math.sqrt(abs(float(np.linalg.det(self.matrix[:2, :2]))))


def _from_svg(data: str | bytes, source: str) -> Strokes:
    try:
        with np.errstate(all="ignore"):  # numbers that overflow are refused where the points are checked
            return _read_svg(data, source)
    except ImageError as error:
        raise ImageError(error.problem, source=source) from None
    except (ArithmeticError, ValueError):
        raise ImageError("its numbers are too large or too small to be drawn", source=source) from None


def _read_svg(data: str | bytes, source: str) -> Strokes:
    root = _parsed(data)
    if _tag(root) != "svg":
        raise _refused(f"not an SVG document: its first element is <{_tag(root)}>")
    matrix, frame = _viewport(root)
    chains: list[np.ndarray] = []
    pens: list[float] = []
    for element, style in _drawn(root, matrix):
        for chain in _Path(_outline(element)).chains():
            chains.append(chain @ style.matrix[:2, :2].T + style.matrix[:2, 2])
            pens.append(style.pen_width())
    if not chains:
        raise _refused("nothing in it can be drawn; Strokes.from_svg lists the supported elements")
    points = _points_of(chains, source)
    longer = max(frame) if frame else float(np.ptp(points, axis=0).max()) or 1.0
    strokes = [_flattened(chain, tolerance=longer / 5120) for chain in chains]  # a tenth of a pixel at 512
    given = [pen for pen in pens if pen > 0]
    return _framed(strokes, frame, float(np.median(given)) if given else None)


def _parsed(data: str | bytes) -> ElementTree.Element:
    def refuse(name: str, *_: object) -> None:
        raise _refused(f"it declares the entity {name!r}; documents with entities are not read")

    try:
        gate = expat.ParserCreate()
        gate.EntityDeclHandler = refuse  # before any is expanded: a few can expand to gigabytes
        gate.Parse(data, True)
        return ElementTree.fromstring(data)
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise _refused(f"malformed XML: {error}") from None


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _drawn(root: ElementTree.Element, matrix: np.ndarray) -> Iterator[tuple[ElementTree.Element, _Style]]:
    """The shapes to draw, in document order; by a stack, as documents may nest deeper than Python calls."""
    waiting = [(root, _Style(matrix))]
    while waiting:
        element, inherited = waiting.pop()
        own = _properties(element)
        if _tag(element) in _NEVER_DRAWN or own.get("display") == "none":
            continue
        style = _Style(
            inherited.matrix @ _transform(element.get("transform", "")),
            own.get("stroke", inherited.stroke),
            own.get("fill", inherited.fill),
            own.get("stroke-width", inherited.pen),
        )
        if _tag(element) in _SHAPES and style.draws():
            yield element, style
        waiting.extend((child, style) for child in reversed(element))


def _properties(element: ElementTree.Element) -> dict[str, str]:
    """Presentation attributes, overridden by the `style` attribute."""
    declared = (part.partition(":") for part in element.get("style", "").split(";"))
    styled = {name.strip(): value for name, _, value in declared}
    own = {name: value.strip().lower() for name, value in (element.attrib | styled).items()}
    return {name: value for name, value in own.items() if value != "inherit"}


def _length(text: str | None) -> float | None:
    """The number that a length begins with; None for a percentage, and where there is none."""
    found = _NUMBER.match(text.strip()) if text and "%" not in text else None
    return float(found[0]) if found else None


def _float(text: str) -> float:
    number = float(text)
    if not abs(number) <= LARGEST:
        raise _refused(f"the number {text} is too large")
    return number


def _viewport(root: ElementTree.Element) -> tuple[np.ndarray, tuple[float, float] | None]:
    """The (3, 3) matrix from the document's coordinates to the frame's; the frame, None if not declared."""
    sides = (_length(root.get("width")), _length(root.get("height")))
    width, height = (side if side and side > 0 else None for side in sides)
    box = [float(number) for number in _NUMBER.findall(root.get("viewBox", ""))]
    if len(box) != 4 or box[2] <= 0 or box[3] <= 0:
        return np.eye(3), (width, height) if width and height else None
    if not width and not height:
        width, height = box[2:]
    width = width or (height or 0) * box[2] / box[3]
    height = height or width * box[3] / box[2]
    scale = np.array([width, height]) / box[2:]
    align = (root.get("preserveAspectRatio", "").split() or [""])[0]
    if align != "none":
        scale[:] = scale.min()
    free = np.array([width, height]) - scale * box[2:]
    share = np.array([_SHARE.get(align[1:4], 0.5), _SHARE.get(align[5:8], 0.5)])
    matrix = np.diag([*scale, 1.0])
    matrix[:2, 2] = free * share - scale * box[:2]
    return matrix, (width, height)


def _transform(text: str) -> np.ndarray:
    """A `transform` attribute -> (3, 3) matrix."""
    matrix, at = np.eye(3), 0
    while at < len(text.strip()):
        found = _FUNCTION.match(text.strip(), at)
        if not found:
            raise _refused(f"malformed transform {text!r}")
        matrix = matrix @ _function(found[1], [_float(n) for n in _NUMBER.findall(found[2])], text)
        at = found.end()
    return matrix


def _function(name: str, numbers: list[float], text: str) -> np.ndarray:
    """One function of a `transform` -> (3, 3) matrix."""
    match name, numbers:
        case "matrix", [a, b, c, d, e, f]:
            rows = [[a, c, e], [b, d, f]]
        case "translate", [x, *y] if len(y) < 2:
            rows = [[1, 0, x], [0, 1, y[0] if y else 0]]
        case "scale", [x, *y] if len(y) < 2:
            rows = [[x, 0, 0], [0, y[0] if y else x, 0]]
        case "rotate", [angle, *centre] if len(centre) in (0, 2):
            cx, cy = centre or (0.0, 0.0)
            c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            rows = [[c, -s, cx - c * cx + s * cy], [s, c, cy - s * cx - c * cy]]
        case "skewX", [angle]:
            rows = [[1, math.tan(math.radians(angle)), 0], [0, 1, 0]]
        case "skewY", [angle]:
            rows = [[1, 0, 0], [math.tan(math.radians(angle)), 1, 0]]
        case _:
            raise _refused(f"malformed transform {text!r}")
    return np.array([*rows, [0, 0, 1]], dtype=np.float64)


def _outline(element: ElementTree.Element) -> str:
    """A shape as path data; empty where the shape has no extent, which SVG does not draw."""

    def number(name: str) -> float:
        return _length(element.get(name)) or 0.0

    match _tag(element):
        case "path":
            data = element.get("d", "").strip()
            return "" if data == "none" else data
        case "line":
            return f"M{number('x1')},{number('y1')}L{number('x2')},{number('y2')}"
        case "polyline" | "polygon" as tag:
            points = element.get("points", "").strip()
            return points and f"M{points}{'z' if tag == 'polygon' else ''}"
        case "rect":
            x, y, width, height = map(number, ("x", "y", "width", "height"))
            if width <= 0 or height <= 0:
                return ""
            rx, ry = (abs(number(a) or number(b)) for a, b in (("rx", "ry"), ("ry", "rx")))
            rx, ry = min(rx, width / 2), min(ry, height / 2)
            h, v, arc = width - 2 * rx, height - 2 * ry, f"a{rx},{ry} 0 0 1 "
            right = f"h{h}{arc}{rx},{ry}v{v}{arc}{-rx},{ry}"
            left = f"h{-h}{arc}{-rx},{-ry}v{-v}{arc}{rx},{-ry}"
            return f"M{x + rx},{y}{right}{left}z"
        case _:  # circle, ellipse
            rx, ry = number("rx") or number("r"), number("ry") or number("r")
            if rx <= 0 or ry <= 0:
                return ""
            half = f"a{rx},{ry} 0 0 1 "
            return f"M{number('cx') - rx},{number('cy')}{half}{2 * rx},0{half}{-2 * rx},0z"


class _Path:
    """Reads path data. Points are complex numbers here: x + iy."""

    def __init__(self, data: str):
        self.data, self.at = data, 0

    def chains(self) -> Iterator[np.ndarray]:
        """One (3 k + 1, 2) chain of cubic curves for each subpath that draws something."""
        chain: list[complex] = []
        here = start = control = 0j
        command = previous = ""
        while self._skip():
            command = self._command(command)
            origin = here if command.islower() else 0j
            kind = command.upper()
            if kind == "M":
                if len(chain) > 1:
                    yield _points(chain)
                here = start = origin + self._point()
                chain = [here]
                previous = kind
                continue
            chain = chain or [here]  # after Z the next subpath begins where the last one did
            match kind:
                case "Z":
                    curves = _line(here, start) if here != start or len(chain) == 1 else []
                case "L":
                    curves = _line(here, origin + self._point())
                case "H":
                    curves = _line(here, complex(origin.real + self._number(), here.imag))
                case "V":
                    curves = _line(here, complex(here.real, origin.imag + self._number()))
                case "C":
                    curves = [origin + self._point() for _ in range(3)]
                case "S":
                    first = 2 * here - control if previous in ("C", "S") else here
                    curves = [first, origin + self._point(), origin + self._point()]
                case "Q" | "T":
                    if kind == "Q":
                        control = origin + self._point()
                    else:
                        control = 2 * here - control if previous in ("Q", "T") else here
                    end = origin + self._point()
                    curves = [here + (control - here) * 2 / 3, end + (control - end) * 2 / 3, end]
                case _:  # A
                    radii = complex(abs(self._number()), abs(self._number()))
                    tilt, large, sweep = math.radians(self._number()), self._flag(), self._flag()
                    curves = _arc(here, origin + self._point(), radii, tilt, large, sweep)
            chain += curves
            here = chain[-1]
            if kind in ("C", "S"):
                control = curves[1]
            if kind == "Z":
                yield _points(chain)
                chain = []
            previous = kind
        if len(chain) > 1:
            yield _points(chain)

    def _command(self, last: str) -> str:
        """The letter that comes next, or the last one's repetition: a moveto's is a lineto."""
        letter = self.data[self.at]
        if letter in "MmZzLlHhVvCcSsQqTtAa" and (last or letter in "Mm"):
            self.at += 1
            return letter
        if letter.isalpha() or last in ("", "Z", "z"):
            raise self._malformed()
        return {"M": "L", "m": "l"}.get(last, last)

    def _skip(self) -> bool:
        """Moves on to what comes next; whether there is any."""
        found = _BETWEEN.match(self.data, self.at)
        self.at = found.end() if found else self.at
        return self.at < len(self.data)

    def _number(self) -> float:
        self._skip()
        found = _NUMBER.match(self.data, self.at)
        if not found:
            raise self._malformed()
        self.at = found.end()
        return _float(found[0])

    def _point(self) -> complex:
        return complex(self._number(), self._number())

    def _flag(self) -> bool:
        """A single digit, which may stand glued to what follows."""
        self._skip()
        flag = self.data[self.at : self.at + 1]
        if flag not in ("0", "1"):
            raise self._malformed()
        self.at += 1
        return flag == "1"

    def _malformed(self) -> ImageError:
        return _refused(f"malformed path data at character {self.at}: {self.data[self.at : self.at + 20]!r}")


def _points(chain: list[complex]) -> np.ndarray:
    return np.array([(point.real, point.imag) for point in chain])


def _line(start: complex, end: complex) -> list[complex]:
    return [start + (end - start) / 3, end - (end - start) / 3, end]


def _arc(start: complex, end: complex, radii: complex, tilt: float, large: bool, sweep: bool) -> list[complex]:
    """An elliptic arc as cubic curves of a quarter turn at most: [control, control, end, ...]."""
    if start == end:
        return []
    if not radii.real or not radii.imag:
        return _line(start, end)
    turn = cmath.rect(1, tilt)

    def to_circle(z: complex) -> complex:
        z /= turn
        return complex(z.real / radii.real, z.imag / radii.imag)

    def to_ellipse(z: complex) -> complex:
        return complex(z.real * radii.real, z.imag * radii.imag) * turn

    # The ellipse becomes the unit circle; where it is too small to reach both ends, SVG enlarges it.
    middle, half = to_circle((start + end) / 2), to_circle((end - start) / 2)
    grown = max(abs(half), 1.0)
    middle, half, radii = middle / grown, half / grown, radii * grown
    side = 1j if large != sweep else -1j
    to_centre = side * half / abs(half) * math.sqrt(max(1 - abs(half) ** 2, 0.0))
    angle = cmath.phase((half - to_centre) / (-half - to_centre))
    if sweep and angle < 0:
        angle += 2 * math.pi
    elif not sweep and angle > 0:
        angle -= 2 * math.pi
    count = max(1, math.ceil(abs(angle) / (math.pi / 2) - 1e-9))
    pull = 4 / 3 * math.tan(angle / count / 4)
    centre, spoke, step = middle + to_centre, -half - to_centre, cmath.rect(1, angle / count)
    curves: list[complex] = []
    for _ in range(count):
        following = spoke * step
        controls = (spoke * (1 + 1j * pull), following * (1 - 1j * pull), following)
        curves += [to_ellipse(centre + point) for point in controls]
        spoke = following
    return [*curves[:-1], end]


def _flattened(chain: np.ndarray, tolerance: float) -> np.ndarray:
    """(3 k + 1, 2) cubic curves -> (P, 2) points of a polyline nowhere further off than the tolerance."""
    curves = np.stack([chain[:-1:3], chain[1::3], chain[2::3], chain[3::3]], axis=1)  # (k, 4, 2)
    if len(curves) > MOST_POINTS:
        raise _refused(f"more than {MOST_POINTS:,} curves")
    bend = np.abs(np.diff(curves, n=2, axis=1)).sum(2).max(1)  # bounds the second derivative
    counts = np.ceil(np.sqrt(0.75 * bend / tolerance)).clip(1, 1024).astype(int)
    if counts.sum() > MOST_POINTS:
        raise _refused(f"more than {MOST_POINTS:,} points")
    owner = np.repeat(np.arange(len(curves)), counts)
    position = np.arange(1, len(owner) + 1) - np.repeat(counts.cumsum() - counts, counts)
    t = (position / counts[owner])[:, None]
    a, b, c, d = (curves[owner, i] for i in range(4))
    points = (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d
    return np.concatenate([chain[:1], points])
