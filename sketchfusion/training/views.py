"""Views: the same image looked at in another way, with its key points and its mask."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from ..data import Record
from ..strokes import Strokes

Affine = tuple[float, float, float, float, float, float]
STROKES = (".svg", ".ndjson")  # files of drawings in strokes: a view of one is not as large as the drawing itself


@dataclass(frozen=True)
class View:
    """A way to look at one image.

    Attributes:
        affine: (a, b, c, d, e, f): a pixel (x, y) of the view is (ax + by + c, dx + ey + f) in the image; both in
            shares of the width and height, so that a view fits an image of any size. None: the image as it is.
        contrast, brightness, colour: factors, 1 for none of it; photos only.
        thicker: whether lines grow by a pixel; sketches only.
    """

    affine: Affine | None = None
    contrast: float = 1.0
    brightness: float = 1.0
    colour: float = 1.0
    thicker: bool = False

    def image(self, image: Image.Image | Strokes, side: int) -> Image.Image | Strokes:
        """The view of an image, on white; drawings in strokes are first drawn `side` pixels large."""
        if self.affine is None:
            return image
        if isinstance(image, Strokes):
            scale = side / max(image.size)
            width, height = (max(1, round(scale * edge)) for edge in image.size)
            image = image.render(width, height).convert("RGB")
        seen = _seen(image, self._pixels(*image.size), Image.Resampling.BICUBIC, (255, 255, 255))
        if self.thicker:
            seen = seen.filter(ImageFilter.MinFilter(3))
        for enhance, factor in (
            (ImageEnhance.Color, self.colour),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Brightness, self.brightness),
        ):
            if factor != 1:
                seen = enhance(seen).enhance(factor)
        return seen

    def points(self, record: Record, width: int, height: int) -> dict[str, tuple[float, float]]:
        """The record's key points in pixels of the view, which has that size; those that it still shows.

        Raises:
            DataError: one lies far outside of the image.
        """
        moved: dict[str, Any] = {name: (x, y) for name, x, y in record.points}
        across, down = 1.0, 1.0
        if moved and self.affine is not None and record.path.lower().endswith(STROKES):
            own = record.open().size
            across, down = width / own[0], height / own[1]
        record.check_points(width / across, height / down)
        if self.affine is not None:
            a, b, c, d, e, f = self._pixels(width, height)
            inverse = np.linalg.inv([[a, b], [d, e]])
            moved = {name: inverse @ (across * x - c, down * y - f) for name, (x, y) in moved.items()}
        return {name: (float(x), float(y)) for name, (x, y) in moved.items() if 0 <= x <= width and 0 <= y <= height}

    def mask(self, record: Record, width: int, height: int) -> Tensor | None:
        """The record's mask, bool (H, W), as the view shows it, which has that size."""
        if record.mask is None:
            return None
        mask = record.read_mask()
        if self.affine is not None:
            image = Image.fromarray(mask.astype(np.uint8) * 255)
            image = _seen(image, self._pixels(*image.size), Image.Resampling.NEAREST, 0)
            if record.path.lower().endswith(STROKES):
                image = image.resize((width, height), Image.Resampling.NEAREST)
            mask = np.asarray(image) > 0
        return torch.from_numpy(np.array(mask))

    def _pixels(self, width: int, height: int) -> Affine:
        assert self.affine is not None
        a, b, c, d, e, f = self.affine
        return a, b * width / height, c * width, d * height / width, e, f * height


def _seen(image: Image.Image, affine: Affine, resample: Image.Resampling, paper: int | tuple[int, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, affine, resample=resample, fillcolor=paper)


def draw_view(record: Record, number: int, seed: int) -> View:
    """View `number` of a record: 0 is the image as it is, the others are random, and always the same for a seed.

    Photos are cropped and their colours changed, every fifth to grey, since sketches have none. Sketches are turned,
    scaled and their lines thickened. Odd views are mirrored, so that several images can be looked at alike.
    """
    if number == 0:
        return View()
    identity = f"{seed}/{number}/{record.kind}/{record.label}/{record.row}/{record.path.rpartition('/')[2]}"
    encoded = identity.encode(errors="surrogateescape")  # a file's name can be any bytes
    random = np.random.default_rng(int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest()))
    mirror = -1.0 if number % 2 else 1.0
    if record.kind == "photo":
        side, angle = random.uniform(0.55, 1.0), random.uniform(-0.1, 0.1)
        reach = (1 - side) / 2
    else:
        side, angle = random.uniform(0.85, 1.15), random.uniform(-0.25, 0.25)
        reach = 0.05
    aspect = math.exp(random.uniform(-0.15, 0.15))
    sx, sy, cosine, sine = side * aspect, side / aspect, math.cos(angle), math.sin(angle)
    # The middle of the view lies at (0.5 + right, 0.5 + down) of the image.
    right, down = random.uniform(-reach, reach), random.uniform(-reach, reach)
    a, b, d, e = sx * cosine * mirror, -sy * sine, sx * sine * mirror, sy * cosine
    affine = (a, b, 0.5 + right - (a + b) / 2, d, e, 0.5 + down - (d + e) / 2)
    if record.kind == "sketch":
        return View(affine, thicker=bool(random.random() < 0.25))
    contrast, brightness = random.uniform(0.7, 1.3, size=2)
    colour = 0.0 if random.random() < 0.2 else random.uniform(0.6, 1.4)
    return View(affine, float(contrast), float(brightness), float(colour))
