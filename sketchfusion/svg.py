"""SVG documents -> strokes.

Every shape becomes path data, and every path becomes chains of cubic curves: (3 k + 1, 2) arrays of points and control
points, which a transform maps like any points.
"""

from __future__ import annotations

import cmath
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from xml.parsers import expat

import numpy as np

from .errors import ImageError
from .strokes import LARGEST, MOST_POINTS, Strokes, framed, points_of, refused

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
    visibility: str | None = None

    def draws(self, sheets: bool) -> bool:
        """Whether a person would see the element on white paper; one that says nothing of paint counts.

        Without a fill, a pen's width or a style sheet, which is not read, hints at a stroke that goes unsaid.
        """
        if self.visibility in ("hidden", "collapse"):
            return False
        if self.stroke is None:
            return self.fill not in (_WHITE if sheets or self.pen else _WHITE | _NO_PAINT)
        return any((paint or "black") not in _NO_PAINT | _WHITE for paint in (self.stroke, self.fill))

    def pen_width(self) -> float:
        """The `stroke-width` in the frame's units; 0 where none was given."""
        number = _length(self.pen) or 0.0
        return number * math.sqrt(abs(float(np.linalg.det(self.matrix[:2, :2]))))


def from_svg(data: str | bytes, source: str) -> Strokes:
    """What `Strokes.from_svg` says; `source` is what the document is called where it is refused."""
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
        raise refused(f"not an SVG document: its first element is <{_tag(root)}>")
    matrix, frame = _viewport(root)
    chains: list[np.ndarray] = []
    pens: list[float] = []
    for element, style in _drawn(root, matrix):
        for chain in _Path(_outline(element)).chains():
            chains.append(chain @ style.matrix[:2, :2].T + style.matrix[:2, 2])
            pens.append(style.pen_width())
    if not chains:
        raise refused("nothing in it can be drawn; Strokes.from_svg lists the supported elements")
    points = points_of(chains, source)
    longer = max(frame) if frame else float(np.ptp(points, axis=0).max()) or 1.0
    strokes = [_flattened(chain, tolerance=longer / 5120) for chain in chains]  # a tenth of a pixel at 512
    given = [pen for pen in pens if pen > 0]
    return framed(strokes, frame, float(np.median(given)) if given else None)


def _parsed(data: str | bytes) -> ElementTree.Element:
    def refuse(name: str, *_: object) -> None:
        raise refused(f"it declares the entity {name!r}; documents with entities are not read")

    try:
        gate = expat.ParserCreate()
        gate.EntityDeclHandler = refuse  # before any is expanded: a few can expand to gigabytes
        gate.Parse(data, True)
        return ElementTree.fromstring(data)
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise refused(f"malformed XML: {error}") from None


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _drawn(root: ElementTree.Element, matrix: np.ndarray) -> Iterator[tuple[ElementTree.Element, _Style]]:
    """The shapes to draw, in document order; by a stack, as documents may nest deeper than Python calls."""
    sheets = any(element.get("class") or _tag(element) == "style" for element in root.iter())
    waiting = [(root, _Style(matrix))]
    while waiting:
        element, inherited = waiting.pop()
        own = _properties(element)
        if _tag(element) in _NEVER_DRAWN or own.get("display") == "none" or _length(own.get("opacity")) == 0:
            continue
        style = _Style(
            inherited.matrix @ _transform(element.get("transform", "")),
            own.get("stroke", inherited.stroke),
            own.get("fill", inherited.fill),
            own.get("stroke-width", inherited.pen),
            own.get("visibility", inherited.visibility),
        )
        if _tag(element) in _SHAPES and style.draws(sheets):
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
        raise refused(f"the number {text} is too large")
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
            raise refused(f"malformed transform {text!r}")
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
            raise refused(f"malformed transform {text!r}")
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
        return refused(f"malformed path data at character {self.at}: {self.data[self.at : self.at + 20]!r}")


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
        raise refused(f"more than {MOST_POINTS:,} curves")
    bend = np.abs(np.diff(curves, n=2, axis=1)).sum(2).max(1)  # bounds the second derivative
    counts = np.ceil(np.sqrt(0.75 * bend / tolerance)).clip(1, 1024).astype(int)
    if counts.sum() > MOST_POINTS:
        raise refused(f"more than {MOST_POINTS:,} points")
    owner = np.repeat(np.arange(len(curves)), counts)
    position = np.arange(1, len(owner) + 1) - np.repeat(counts.cumsum() - counts, counts)
    t = (position / counts[owner])[:, None]
    a, b, c, d = (curves[owner, i] for i in range(4))
    points = (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d
    return np.concatenate([chain[:1], points])
