"""What the examples of heads share: their options, and drawn shapes to run on where no data set is named."""

import argparse
import atexit
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sketchfusion.data import DataSet, Record

SIZE = (160, 128)  # of a picture, pixels


def options(description: str, *, data: str, per_class: int, steps: int, **others: str) -> argparse.Namespace:
    """What the command line says; the values are those where it says nothing, `others` are options of one example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=data, help="which set, see docs/data.md (%(default)s)")
    parser.add_argument("--root", help="its folder; without one, images are drawn")
    for name, default in others.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=default and "(%(default)s)")
    parser.add_argument("--per-class", type=int, default=per_class, help="images of each kind, at most (%(default)s)")
    parser.add_argument("--model", default="mini", help="as for SketchFusion.from_pretrained (%(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help="of the optimiser (%(default)s)")
    parser.add_argument("--adapters", action="store_true", help="train through the adapters")
    parser.add_argument("--out", default=f"runs/{Path(parser.prog).stem}", help="for the checkpoint (%(default)s)")
    return parser.parse_args()


def draw_shapes(classes: int = 16, images: int = 10) -> DataSet:
    """Every class is an irregular polygon: filled in its photos, with masks, and a wobbly outline in its sketches.

    Key points are the corners. The files last as long as the program.
    """
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    names = tuple(f"shape-{number:02}" for number in range(classes))
    records = []
    for number, name in enumerate(names):
        random = np.random.default_rng(number)
        turns = np.linspace(0, 2 * np.pi, random.integers(4, 9), endpoint=False)
        polygon = random.uniform(0.3, 1, (len(turns), 1)) * np.stack([np.cos(turns), np.sin(turns)], 1)
        polygon /= np.linalg.norm(polygon, axis=1).max()
        for i in range(images):
            photo, mask, sketch = (Path(folder.name, f"{name}-{i}{end}") for end in (".png", ".mask.png", ".svg"))
            corners = _placed(polygon, random)
            drawn = Image.new("1", SIZE)
            ImageDraw.Draw(drawn).polygon([*map(tuple, corners)], fill=1)
            drawn.save(mask)
            thing, ground = random.integers(((0,), (128,)), ((128,), (256,)), size=(2, 3))  # dark on light
            colours = np.where(np.array(drawn)[..., None], thing, ground) + random.normal(0, 12, (*SIZE[::-1], 3))
            Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(photo)
            records.append(Record(str(photo), "photo", name, None, f"{name}/{i}", str(mask), _named(corners)))
            corners = _placed(polygon, random) + random.normal(0, 2, polygon.shape)
            outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
            sketch.write_text(
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIZE[0]}" height="{SIZE[1]}">'
                f'<polygon points="{outline}" fill="none" stroke="black"/></svg>'
            )
            records.append(Record(str(sketch), "sketch", name, None, f"{name}/{i}", None, _named(corners)))
    return DataSet("shapes", names, tuple(records), f"{classes} drawn shapes")


def _placed(polygon: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Corners within the unit circle (P, 2) -> a little turned, somewhere in the picture, in pixels."""
    angle = random.uniform(-0.3, 0.3)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return polygon @ turn * random.uniform(30, 48) + np.array(SIZE) / 2 + random.uniform(-8, 8, 2)


def _named(corners: np.ndarray) -> tuple[tuple[str, float, float], ...]:
    return tuple((f"corner {i}", float(x), float(y)) for i, (x, y) in enumerate(corners))
