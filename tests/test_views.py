"""Views of drawings in strokes, which are drawn larger before they are looked at in another way."""

from pathlib import Path

import pytest
import torch

from sketchfusion.data import Record
from sketchfusion.images import Preprocess
from sketchfusion.strokes import Strokes
from sketchfusion.training.views import draw_view, look

DOT = '<path d="M50 80h0.01" fill="none" stroke="black" stroke-width="6"/>'


@pytest.mark.parametrize("name", ["dot.svg", "DOT.SVG", "dot.png"])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])  # the image as it is, and the odd ones mirrored
def test_points_move_with_the_ink(name: str, number: int, tmp_path: Path) -> None:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="160" height="128">{DOT}</svg>'
    path = tmp_path / name
    if path.suffix == ".png":
        Strokes.from_svg(svg).render(160, 128).save(path)
    else:
        path.write_text(svg)
    record = Record(str(path), "sketch", "dot", points=(("dot", 50.0, 80.0),))
    view = draw_view(record, number, seed=0)
    pixels, geometry = Preprocess(256)(look(record, view, 256))
    ink = 1 - pixels.mean(0)
    places = torch.stack([ink.sum(0), ink.sum(1)]) @ (torch.arange(256) + 0.5) / ink.sum()
    points = view.points(record, int(geometry.width), int(geometry.height))
    assert 256 * geometry.to_canvas(torch.tensor([points["dot"]]))[0] == pytest.approx(places, abs=0.3)
