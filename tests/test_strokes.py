"""Vector sketches -> image."""

import itertools
import json
import math
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from sketchfusion.errors import ImageError
from sketchfusion.images import open_image
from sketchfusion.strokes import Strokes

pytestmark = pytest.mark.filterwarnings("error")


def svg(body: str, attributes: str = 'viewBox="0 0 100 100"') -> Strokes:
    return Strokes.from_svg(f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>{body}</svg>')


def path(data: str) -> list[np.ndarray]:
    return list(svg(f'<path d="{data}"/>').strokes)


def ink(strokes: Strokes, width: int, height: int) -> np.ndarray:
    return 1 - np.asarray(strokes.render(width, height), dtype=np.float64) / 255


def distance(points: np.ndarray, polyline: np.ndarray) -> float:
    """The largest distance from any of the points to the polyline."""
    start, step = polyline[:-1], np.diff(polyline, axis=0)
    square = np.maximum((step**2).sum(1), 1e-30)
    along = (((points[:, None] - start) * step).sum(2) / square).clip(0, 1)
    nearest = start + along[:, :, None] * step
    return float(np.hypot(*(points[:, None] - nearest).transpose(2, 0, 1)).min(1).max())


# Strokes


def test_strokes_are_converted_and_kept() -> None:
    strokes = Strokes(([[1, 2], [3, 4]], np.zeros((0, 2)), [[5, 6]]), 10.2, 7)  # type: ignore[arg-type]
    assert [s.tolist() for s in strokes.strokes] == [[[1, 2], [3, 4]], [[5, 6]]]
    assert all(s.dtype == np.float64 for s in strokes.strokes)
    assert strokes.size == (11, 7)
    assert strokes.pen == pytest.approx(10.2 / 96)
    assert "2 strokes, 3 points" in repr(strokes)
    copy = pickle.loads(pickle.dumps(strokes))
    assert np.array_equal(copy.strokes[0], strokes.strokes[0])
    with pytest.raises(AttributeError):
        strokes.width = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "arguments",
    [
        ((), 4, 4),
        (([],), 4, 4),
        (([[1, 2, 3]],), 4, 4),
        (([1, 2],), 4, 4),
        (([["a", "b"]],), 4, 4),
        (([[1, math.nan]],), 4, 4),
        (([[1, 1e300]],), 4, 4),
        (([[1, 2]],), 0, 4),
        (([[1, 2]],), 4, -1),
        (([[1, 2]],), math.inf, 4),
        (([[1, 2]],), "wide", 4),
        (([[1, 2]],), 4, 4, 0),
        (([[1, 2]],), 4, 4, math.nan),
        (5, 4, 4),
    ],
    ids=repr,
)
def test_strokes_that_are_none(arguments: Any) -> None:
    with pytest.raises(ImageError) as caught:
        Strokes(*arguments)
    assert caught.value.source == "Strokes"


# Drawing


def test_a_line_is_as_wide_as_the_pen_and_ends_round() -> None:
    line = Strokes((np.array([[20.0, 50.0], [80.0, 50.0]]),), 100, 100, line_width=10)
    seen = ink(line, 200, 200)
    assert seen[:, 100].sum() == pytest.approx(20, abs=0.05)
    assert seen.sum() == pytest.approx(120 * 20 + math.pi * 10**2, rel=0.005)  # a rectangle and two half discs
    assert (seen[80:120, 20:180].sum(), seen[:79].sum()) == (pytest.approx(seen.sum()), 0)


def test_a_dot_is_a_disc() -> None:
    for stroke in ([[30.3, 40.6]], [[30.3, 40.6]] * 2):
        seen = ink(Strokes((np.array(stroke),), 64, 64, line_width=9), 128, 128)
        assert seen.sum() == pytest.approx(math.pi * 9**2, rel=0.01)
        rows, columns = np.mgrid[:128, :128] + 0.5
        assert (seen * columns).sum() / seen.sum() == pytest.approx(60.6, abs=0.02)
        assert (seen * rows).sum() / seen.sum() == pytest.approx(81.2, abs=0.02)


def test_lines_are_antialiased_and_do_not_vanish() -> None:
    line = Strokes((np.array([[0.0, 0.0], [1000.0, 637.0]]),), 1000, 1000, line_width=0.001)
    seen = ink(line, 64, 64)
    across = seen[:, 4:60].sum(0)
    assert across == pytest.approx(np.full(56, math.hypot(1, 0.637)), abs=0.15)  # one pixel, measured upright
    assert ((seen > 0.1) & (seen < 0.9)).any()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(-60, 160), st.integers(-60, 160)), min_size=2, max_size=6), st.integers(3, 12))
def test_drawings_agree_with_pillow(points: list[tuple[int, int]], pen: int) -> None:
    """Pillow's thick lines at eight times the size, with discs at the joints: drawn by another principle."""
    strokes = Strokes((np.array(points, dtype=float),), 100, 80, line_width=pen)
    large = Image.new("L", (800, 640))
    draw = ImageDraw.Draw(large)
    scaled = [(8 * x, 8 * y) for x, y in points]
    draw.line(scaled, fill=255, width=8 * pen)
    for x, y in scaled:
        draw.circle((x, y), 4 * pen, fill=255)
    expected = np.asarray(large.reduce(8)) / 255
    assert np.abs(ink(strokes, 100, 80) - expected).mean() < 0.012


def test_the_frame_fills_the_image_and_clips() -> None:
    corners = np.array([[-1e8, -1e8], [1e8, 1e8]])
    seen = ink(Strokes((corners, np.array([[5e8, 0.0], [5e8, 10.0]])), 20, 10, line_width=1), 200, 100)
    assert seen[50, 45:55].max() == 1
    assert seen[:, 110:].sum() == 0
    far = np.array([[5.0, 5.0], [5e8, 6.0]])  # leaves at the right, long before it would at the bottom
    assert (ink(Strokes((far,), 20, 10, line_width=1), 200, 100)[50, 50:] == 1).all()


def test_a_pen_wider_than_the_paper_blackens_it() -> None:
    assert ink(Strokes((np.array([[5.0, 5.0], [6.0, 5.0]]),), 10, 10, line_width=1e6), 64, 64).min() == 1


# Quick, Draw!


def test_simplified_drawings_keep_their_coordinates() -> None:
    drawing = {"word": "cat", "drawing": [[[0, 255], [10, 20]], [[7], [8]]]}
    for given_ in (drawing, json.dumps(drawing), json.dumps(drawing).encode(), json.dumps(drawing) + "\n"):
        strokes = Strokes.from_quickdraw(given_)
        assert [s.tolist() for s in strokes.strokes] == [[[0, 10], [255, 20]], [[7, 8]]]
        assert (strokes.width, strokes.height) == (256, 256)


def test_raw_drawings_are_framed_by_their_bounding_box() -> None:
    strokes = Strokes.from_quickdraw({"drawing": [[[-100, 500.5], [40, 340], [0, 16]], [[10], [100], [20]]]})
    points = np.concatenate(strokes.strokes)
    assert points.min(0) == pytest.approx([600.5 / 24] * 2)
    assert points.max(0) == pytest.approx([600.5 * 25 / 24, 300 + 600.5 / 24])
    assert (strokes.width, strokes.height) == pytest.approx((600.5 * 26 / 24, 300 + 600.5 / 12))
    assert np.diff(strokes.strokes[0], axis=0).tolist() == [[600.5, 300]]  # moved, not scaled


def test_tiny_units_are_enlarged() -> None:
    """A frame of one unit cannot be rounded up to whole pixels."""
    strokes = Strokes.from_quickdraw({"drawing": [[[0.0, 1.0], [0.0, 0.4], [0, 1]]]})
    assert max(strokes.size) == 256
    assert strokes.size[1] == pytest.approx(256 * (0.4 + 1 / 12) / (1 + 1 / 12), abs=1)


@pytest.mark.parametrize(
    ("drawing", "message"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        (b"\xff\xfe", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[1, 2]", "no key 'drawing'"),
        ("{}", "no key 'drawing'"),
        (None, "no key 'drawing'"),
        ({"drawing": []}, "empty"),
        ({"drawing": [[[], []]]}, "empty"),
        ({"drawing": None}, "a list was expected"),
        ({"drawing": [3]}, "a list was expected"),
        ({"drawing": [[[1]]]}, "not 1 lists"),
        ({"drawing": [[[1, 2], [1]]]}, "differ in length"),
        ({"drawing": [[["a"], ["b"]]]}, "not numbers"),
        ({"drawing": [[[None], [1]]]}, "not numbers|finite"),
        ({"drawing": [[[1, [2]], [1, 2]]]}, "not numbers"),
        ({"drawing": [[1, 2]]}, "differ in length"),
        ('{"drawing": [[[NaN], [1]]]}', "not finite"),
        ('{"drawing": [[[1e999], [1]]]}', "not finite"),
        ({"drawing": [[[10**400], [1]]]}, "not numbers"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_lines_that_are_no_drawings(drawing: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        Strokes.from_quickdraw(drawing)
    assert caught.value.source == "Quick, Draw! drawing"


def test_published_drawings(data: Any) -> None:
    with tarfile.open(data("quickdraw")) as tar:
        for name in ("simplified/cat.ndjson", "simplified/The Eiffel Tower.ndjson"):
            file = tar.extractfile(name)
            assert file is not None
            for line in file.read().splitlines():
                strokes = Strokes.from_quickdraw(line)
                assert len(strokes.strokes) == len(json.loads(line)["drawing"])
                seen = ink(strokes, 128, 128)
                assert 0.005 < seen.mean() < 0.35
                for x, y in np.concatenate(strokes.strokes):  # every point that was drawn is dark
                    assert seen[int(y / 2), int(x / 2)] > 0.2


# SVG: path data


@pytest.mark.parametrize(
    "data",
    [
        "M10 20L30 40L30 60L70 60",
        "M 10,20 L 30,40 30,60 70,60",
        "M10 20 30 40V60H70",
        "m10 20 20 20v20h40",
        "m10,20l20,20l0,20l40,0",
        "M10 20l20 20v20H70",
        "\n M 1e1 2E+1 \t L.3e2 4.e1 , 30 , 60 70 60 ",
        "M+10+20l20+20+0+20 40-0",
    ],
)
def test_lines_in_every_spelling(data: str) -> None:
    (stroke,) = path(data)
    assert stroke == pytest.approx(np.array([[10, 20], [30, 40], [30, 60], [70, 60]]))


def test_compact_numbers_and_glued_flags() -> None:
    (stroke,) = path("M1-2.5.5e1-3")
    assert stroke == pytest.approx(np.array([[1, -2.5], [5, -3]]))
    spaced, glued = path("M10 10a5 5 0 0 1 10 0a5 5 0 1 0 10.5 0"), path("M10 10a5 5 0 0110 0a5 5 0 1010.5 0")
    assert np.array_equal(spaced[0], glued[0])


def test_subpaths() -> None:
    first, second, third = path("M10 10 20 10 20 20z l5 5 M50 50 60 60 Mx".replace(" Mx", " M1 1"))
    assert first[-1].tolist() == [10, 10]
    assert second.tolist() == [[10, 10], [15, 15]]
    assert third.tolist() == [[50, 50], [60, 60]]
    (dot,) = path("M30 40h0")
    assert dot.tolist() == [[30, 40]] * 2
    first, second = path("m10 10 h5 z m20 20 h5")  # after z, relative to where the subpath began
    assert second.tolist() == [[30, 30], [35, 30]]


def bezier(points: list[complex], count: int = 400) -> np.ndarray:
    """De Casteljau's construction."""
    t = np.linspace(0, 1, count)
    levels = [np.full(count, p, dtype=complex) for p in points]
    while len(levels) > 1:
        levels = [(1 - t) * a + t * b for a, b in itertools.pairwise(levels)]
    return np.stack([levels[0].real, levels[0].imag], axis=1)


def agrees(stroke: np.ndarray, curve: np.ndarray, tolerance: float = 0.03) -> None:
    """A hundredth of the frame is five pixels at 512, so this is a sixth of a pixel."""
    assert distance(curve, stroke) < tolerance
    assert distance(stroke, curve) < tolerance
    assert stroke[0] == pytest.approx(curve[0])
    assert stroke[-1] == pytest.approx(curve[-1])
    assert len(stroke) < 200


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        ("M0 0C10 90 60 90 90 10", [[0, 10 + 90j, 60 + 90j, 90 + 10j]]),
        ("M5 5c10 90 60 90 80 10", [[5 + 5j, 15 + 95j, 65 + 95j, 85 + 15j]]),
        ("M0 0C0 40 20 40 40 40S90 30 90 10", [[0, 40j, 20 + 40j, 40 + 40j], [40 + 40j, 60 + 40j, 90 + 30j, 90 + 10j]]),
        ("M0 0s40 0 40 40", [[0, 0, 40, 40 + 40j]]),
        ("M0 0Q50 90 90 0", [[0, 50 + 90j, 90]]),
        ("M10 10q20 40 40 0t40 0", [[10 + 10j, 30 + 50j, 50 + 10j], [50 + 10j, 70 - 30j, 90 + 10j]]),
        ("M0 0T40 40 80 0", [[0, 0, 40 + 40j], [40 + 40j, 80 + 80j, 80]]),
        ("M0 0C0 40 20 40 40 40T90 40", [[0, 40j, 20 + 40j, 40 + 40j], [40 + 40j, 40 + 40j, 90 + 40j]]),
    ],
)
def test_curves(data: str, pieces: list[list[complex]]) -> None:
    (stroke,) = path(data)
    agrees(stroke, np.concatenate([bezier(piece) for piece in pieces]))


@pytest.mark.parametrize("tilt", [0, 30, -70])
@pytest.mark.parametrize("large", [0, 1])
@pytest.mark.parametrize("sweep", [0, 1])
def test_arcs(tilt: int, large: int, sweep: int) -> None:
    """Checked by the arc's definition: all points on an ellipse of these radii, turning the right way round."""
    rx, ry, start, end = 40.0, 25.0, np.array([30.0, 40.0]), np.array([60.0, 55.0])
    (stroke,) = path(f"M30 40A40 25 {tilt} {large} {sweep} 60 55")
    assert stroke[0] == pytest.approx(start)
    assert stroke[-1] == pytest.approx(end)
    c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    unit = stroke @ np.array([[c, -s], [s, c]]) / [rx, ry]
    # The circle through three of the points has to be the unit circle, and all the others have to lie on it.
    a, b, d = unit[0], unit[len(unit) // 2], unit[-1]
    rows = 2 * np.array([b - a, d - a])
    centre = np.linalg.solve(rows, [b @ b - a @ a, d @ d - a @ a])
    assert np.hypot(*(unit - centre).T) == pytest.approx(np.ones(len(unit)), abs=1e-3)
    angles = np.unwrap(np.arctan2(*(unit - centre).T[::-1]))
    assert (np.diff(angles) > 0).all() if sweep else (np.diff(angles) < 0).all()
    assert (abs(angles[-1] - angles[0]) > math.pi) == bool(large)


def test_arcs_without_an_ellipse() -> None:
    assert path("M10 10A0 5 0 0 1 30 10")[0].tolist() == [[10, 10], [30, 10]]
    (grown,) = path("M10 50A1 1 0 0 1 90 50")  # too small to reach: enlarged to a half circle
    assert np.hypot(*(grown - [50, 50]).T) == pytest.approx(np.full(len(grown), 40), abs=0.02)
    assert grown[:, 1].min() == pytest.approx(10, abs=0.05)
    with pytest.raises(ImageError, match="nothing"):
        path("M10 10A5 5 0 0 1 10 10")


@pytest.mark.parametrize(
    "data",
    [
        *("10 10", "L10 10", "M10", "M10 10L", "M10 10L5", "M10 10X", "M10 10L5 5 #", "M1 1C1 1 2 2"),
        *("M1 1A5 5 0 2 1 9 9", "M1 1Z5 5", "M1 1L1e99 0"),
    ],
)
def test_malformed_path_data(data: str) -> None:
    with pytest.raises(ImageError, match=r"malformed path data|too large") as caught:
        path(data)
    assert caught.value.source == "SVG text"


@settings(max_examples=200, deadline=None)
@given(st.text("MmZzLlHhVvCcSsQqTtAa0123456789.-+e, ", max_size=40), st.sampled_from(["", "M5 5", "M0 0A9 9 0 0 1"]))
def test_any_path_data_is_drawn_or_refused(data: str, start: str) -> None:
    try:
        strokes = svg(f'<path d="{start}{data}"/>')
    except ImageError:
        return
    assert np.asarray(strokes.render(16, 16)).shape == (16, 16)


# SVG: shapes, groups, frames


def test_shapes() -> None:
    assert svg('<line x1="1" y1="2" x2="3px" y2="4"/>').strokes[0].tolist() == [[1, 2], [3, 4]]
    assert svg('<polyline points="1,2 3,4 5 6"/>').strokes[0].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert svg('<polygon points="1,2 3,4 5 6"/>').strokes[0].tolist() == [[1, 2], [3, 4], [5, 6], [1, 2]]
    assert svg('<rect x="10" y="20" width="30" height="40"/>').strokes[0].tolist() == [
        [10, 20], [40, 20], [40, 60], [10, 60], [10, 20],
    ]  # fmt: skip
    (circle,) = svg('<circle cx="50" cy="40" r="30"/>').strokes
    assert np.hypot(*(circle - [50, 40]).T) == pytest.approx(np.full(len(circle), 30), abs=0.02)
    (ellipse,) = svg('<ellipse cx="50" cy="40" rx="30" ry="10"/>').strokes
    assert np.hypot(*((ellipse - [50, 40]) / [30, 10]).T) == pytest.approx(np.ones(len(ellipse)), abs=1e-3)
    (rounded,) = svg('<rect x="10" y="20" width="60" height="40" rx="10"/>').strokes
    assert (rounded.min(0).tolist(), rounded.max(0).tolist()) == (pytest.approx([10, 20]), pytest.approx([70, 60]))
    assert distance(np.array([[10 + 10 - 10 / math.sqrt(2), 20 + 10 - 10 / math.sqrt(2)]]), rounded) < 0.02


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ("translate(5)", (15, 20)),
        ("translate(5, -6)", (15, 14)),
        ("scale(2)", (20, 40)),
        ("scale(2 3)", (20, 60)),
        ("rotate(90)", (-20, 10)),
        ("rotate(90, 10, 0)", (-10, 0)),
        ("skewX(45)", (30, 20)),
        ("skewY(45)", (10, 30)),
        ("matrix(1 2 3 4 5 6)", (75, 106)),
        ("translate(1,2) scale(0.5)", (6, 12)),
        (" scale(.5),translate(1 2) ", (5.5, 11)),
        ("", (10, 20)),
    ],
)
def test_transforms(transform: str, expected: tuple[float, float]) -> None:
    body = f'<path transform="{transform}" d="M10 20h0"/>'
    assert svg(body).strokes[0][0] == pytest.approx(np.array(expected))
    nested = f'<g transform="translate(7 0)"><g transform="{transform}"><path d="M10 20h0"/></g></g>'
    assert svg(nested).strokes[0][0] == pytest.approx(np.add(expected, [7, 0]))


def test_a_sketch_as_published() -> None:
    """The layout of TU-Berlin's and Sketchy's files."""
    text = (
        '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" '
        '"http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">\n'
        '<svg viewBox="0 0 800 800" preserveAspectRatio="xMinYMin meet" xmlns="http://www.w3.org/2000/svg">'
        '<g fill="none" stroke="black" stroke-linecap="round" stroke-width="8">'
        '<g transform="translate(1,2) scale(0.5)"><path id="0" d="M100 100 L200 300"/></g></g></svg>'
    )
    for kind in (text, text.encode(), "\ufeff \n" + text):
        sketch = Strokes.from_svg(kind)
        assert sketch.strokes[0].tolist() == [[51, 52], [101, 152]]
        assert (sketch.width, sketch.height, sketch.line_width) == (800, 800, 4)


@pytest.mark.parametrize(
    ("attributes", "frame", "point"),
    [
        ('viewBox="0 0 100 50"', (100, 50), (10, 20)),
        ('viewBox="-10,-20,100,50"', (100, 50), (20, 40)),
        ('width="200" height="100" viewBox="0 0 100 50"', (200, 100), (20, 40)),
        ('width="200mm" viewBox="0 0 100 50"', (200, 100), (20, 40)),
        ('width="100%" height="100%" viewBox="0 0 100 50"', (100, 50), (10, 20)),
        ('width="300" height="100" viewBox="0 0 100 50"', (300, 100), (70, 40)),
        ('width="300" height="100" viewBox="0 0 100 50" preserveAspectRatio="xMinYMin"', (300, 100), (20, 40)),
        ('width="300" height="100" viewBox="0 0 100 50" preserveAspectRatio="none"', (300, 100), (30, 40)),
        ('width="64px" height="48px"', (64, 48), (10, 20)),
        ('viewBox="0 0 20 40"', (20, 40), (10, 20)),
    ],
)
def test_frames(attributes: str, frame: tuple[float, float], point: tuple[float, float]) -> None:
    strokes = svg('<path d="M10 20h5"/>', attributes)
    assert (strokes.width, strokes.height) == frame
    assert strokes.strokes[0][0] == pytest.approx(np.array(point))


def test_without_a_frame_the_bounding_box_is_one() -> None:
    strokes = svg('<path d="M1000 1000h240v120" stroke-width="5"/>', "")
    assert (strokes.width, strokes.height) == (260, 140)
    assert strokes.strokes[0].tolist() == [[10, 10], [250, 10], [250, 130]]
    assert strokes.line_width == 5
    enlarged = svg('<path d="M0 0h.24v.12" stroke-width=".005"/>', "")
    assert enlarged.width == pytest.approx(256)
    assert enlarged.line_width == pytest.approx(0.005 * 256 / 0.26)
    (dot,) = svg('<path d="M3 3h0"/>', "").strokes
    assert dot[0] == pytest.approx(dot[1])


def test_the_pen() -> None:
    line = '<path d="M0 0h9" {}/>'
    assert svg(line.format("")).line_width is None
    assert svg(line.format('stroke-width="3px"')).line_width == 3
    assert svg(line.format('style="fill:none; stroke-width: 7"')).line_width == 7
    assert svg(f'<g stroke-width="4" transform="scale(2 .5)">{line.format("")}</g>').line_width == 4
    assert svg(f'<g stroke-width="4" transform="scale(3)">{line.format("")}</g>').line_width == pytest.approx(12)
    assert svg("".join(line.format(f'stroke-width="{w}"') for w in (1, 2, 50))).line_width == 2


def test_what_is_not_seen_is_not_drawn() -> None:
    seen = '<path d="M1 1h9"/>'
    hidden = [
        f"<defs>{seen}</defs>",
        f"<clipPath>{seen}</clipPath>",
        f'<g display="none">{seen}</g>',
        f'<g style="display: none">{seen}</g>',
        '<rect width="100" height="100" fill="white"/>',
        '<rect width="100" height="100" style="fill:#FFFFFF;stroke:none"/>',
        f'<g visibility="hidden">{seen}</g>',
        f'<g opacity="0">{seen}</g>',
        '<path d="M0 0h24v24H0V0z" fill="none"/>',
        '<path d="M1 1h9" fill="none" stroke="none"/>',
        '<path d="M1 1h9" fill="none" stroke="white"/>',
        '<path d=""/>',
        '<path d="none"/>',
        '<polyline points=""/>',
        '<circle r="0"/>',
        '<rect width="5"/>',
        "<text>cat</text>",
    ]
    for body in hidden:
        with pytest.raises(ImageError, match="nothing in it can be drawn"):
            svg(body)
        assert len(svg(body + seen).strokes) == 1, body
    for paint in ('fill="none" stroke="black"', 'stroke="none"', 'stroke="red" fill="white"', ""):
        assert len(svg(f'<path d="M1 1h9" {paint}/>').strokes) == 1, paint
    assert len(svg('<style>path { stroke: black }</style><path d="M1 1h9" fill="none"/>').strokes) == 1
    assert len(svg('<path class="ink" d="M1 1h9" fill="none"/>').strokes) == 1
    shown = '<path visibility="visible" d="M1 1h9"/>'
    assert len(svg(f'<g visibility="hidden">{shown}{seen}</g>').strokes) == 1


BILLION_LAUGHS = '<!DOCTYPE svg [<!ENTITY a "ha">{}]><svg>&z;</svg>'.format(
    "".join(f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in zip("abcdefghij", "bcdefghijz", strict=True))
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<svg>", "malformed XML"),
        ("<svg viewBox='0 0 9 9'><path d='M1 1h5'></svg>", "malformed XML"),
        ("<?xml version='1.0' encoding='nonsense'?><svg/>", "malformed XML|nothing"),
        (b"", "malformed XML"),
        (b"\x89PNG", "malformed XML"),
        ("<html/>", "not an SVG"),
        ("<svg/>", "nothing in it"),
        (BILLION_LAUGHS, "entity"),
        ("<!DOCTYPE svg [<!ENTITY x SYSTEM 'file:///etc/hostname'>]><svg>&x;</svg>", "entity"),
        ("<svg viewBox='0 0 9 9'><path d='M0 0" + "c1e8 0 0 1e8 9 9" * 2000 + "'/></svg>", "points"),
        ("<svg viewBox='0 0 9 9'><path d='M0 0" + "h1" * 1_000_001 + "'/></svg>", "curves"),
        ("<svg width='1e999' height='9'><path d='M1 1h5'/></svg>", "width|finite"),
        ("<svg viewBox='0 0 1e999 9'><path d='M1 1h5'/></svg>", "width|finite"),
        ("<svg><g transform='turn(3)'><path d='M1 1h5'/></g></svg>", "malformed transform"),
        ("<svg><g transform='matrix(1 2 3)'><path d='M1 1h5'/></g></svg>", "malformed transform"),
        ("<svg><g transform='scale(2'><path d='M1 1h5'/></g></svg>", "malformed transform"),
        ("<svg><g transform='rotate(1e999)'><path d='M1 1h5'/></g></svg>", "too large"),
        ("<svg>" + "<g transform='scale(1e9)'>" * 40 + "<path d='M1 1h5'/>" + "</g>" * 40 + "</svg>", "finite"),
        ("<svg><circle r='1e999'/></svg>", "malformed|large|finite"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_documents_that_cannot_be_drawn(text: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        Strokes.from_svg(text)
    assert caught.value.source == "SVG text"


def test_deep_nesting_is_no_matter() -> None:
    assert len(svg("<g>" * 5000 + '<path d="M1 1h5"/>' + "</g>" * 5000).strokes) == 1


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "drawing.svg"
    file.write_text('<svg viewBox="0 0 9 9"><path d="M1 1h5"/></svg>')
    assert Strokes.from_svg(file).size == Strokes.from_svg(str(file)).size == (9, 9)
    file.write_text("<svg>")
    for name, message in ((file, "malformed XML"), (tmp_path / "none.svg", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ImageError, match=message) as caught:
            Strokes.from_svg(name)
        assert caught.value.source == str(name)


@pytest.mark.parametrize("frame", ["width='-5' height='9'", "width='-5' height='-9' viewBox='0 0 9 9'"])
def test_a_negative_frame_counts_as_none(frame: str) -> None:
    strokes = Strokes.from_svg(f"<svg {frame}><path d='M1 1c2 0 2 2 5 5'/></svg>")
    assert min(strokes.size) > 0


def test_a_drawing_that_would_take_minutes_is_refused() -> None:
    zigzag = np.array([[0, 512 * (i % 2)] for i in range(5000)], dtype=float)
    with pytest.raises(ImageError, match="too thick a pen"):
        Strokes((zigzag,), 512, 512, line_width=200).render(512, 512)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["pipe.svg", "pipe.png"])
def test_a_pipe_is_refused_and_never_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(tmp_path / name)
