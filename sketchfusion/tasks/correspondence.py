"""Correspondence: a point of a sketch finds its place in a photo of the same thing, by the dense features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import DataSet, Record
from ..errors import SketchFusionError
from ..features import Features, check_one_model
from . import Sample
from .retrieval import info_nce

# ---- loss


class Correspondence(nn.Module):
    """Contrastive loss between descriptors at key points + end-point error of a soft-argmax flow (section 4.4).

    Trains the dense features themselves; there is no head. A batch is pairs of a sketch and its photo.

    Args:
        data: a set with pairs: sketches that name their photo, with key points of common names.
        pairs: pairs a step.
        temperature: of the contrastive loss, over all points of the batch, both ways.
        sharpness: cosines are multiplied by it before the softmax over the photo's cells.
        flow: weight of the end-point error, which is measured in sides of the canvas.

    Raises:
        SketchFusionError: the set has no pairs.
    """

    name = "correspondence"

    def __init__(
        self, data: DataSet, *, pairs: int = 16, temperature: float = 0.07, sharpness: float = 20.0, flow: float = 5.0
    ):
        super().__init__()
        self._pairs = data.pairs()
        if not self._pairs:
            raise SketchFusionError(
                f"{data.name} ({data.split}): no sketch shares a key point with the photo it was drawn from"
            )
        self.pairs, self.temperature, self.sharpness, self.flow = pairs, temperature, sharpness, flow
        # A photo belongs to several sketches, and is listed once.
        self.records = tuple(dict.fromkeys(record for sketch, photo, _ in self._pairs for record in (sketch, photo)))

    def batch(self, generator: np.random.Generator) -> list[Record]:
        rows = generator.permutation(len(self._pairs))[: self.pairs]
        return [record for row in rows for record in self._pairs[row][:2]]

    def loss(self, features: Features, samples: list[Sample]) -> tuple[Tensor, dict[str, float]]:
        sources, targets, errors = [], [], []
        images = zip(samples, features, strict=True)
        for (sample, sketch), (other, photo) in zip(images, images, strict=True):
            ours, theirs = sample.points, other.points
            names = [name for name in ours if name in theirs]
            if not names:  # augmentation moved them out of the picture
                continue
            source = F.normalize(sketch.at(torch.tensor([ours[name] for name in names])), dim=1)
            truth = torch.tensor([theirs[name] for name in names], device=source.device)
            sources.append(source)
            targets.append(photo.at(truth))
            cosines, places = _cosines(source, photo)
            found = (cosines * self.sharpness).softmax(1) @ places
            errors.append((found - photo.geometry.to_canvas(truth)).norm(dim=1))
        if not sources:
            zero = features.dense.sum() * 0
            return zero, {"contrastive": 0.0, "flow": 0.0}
        source, target = torch.cat(sources), torch.cat(targets)
        same = torch.eye(len(source), dtype=torch.bool, device=source.device)
        contrastive = info_nce(source, target, same, self.temperature)
        flow = torch.cat(errors).mean()
        return contrastive + self.flow * flow, {"contrastive": contrastive.item(), "flow": flow.item()}


def _cosines(descriptors: Tensor, photo: Features) -> tuple[Tensor, Tensor]:
    """Unit descriptors (P, D) -> cosines with the M cells that lie on the photo (P, M), and their centres (M, 2) on
    the canvas."""
    grid = photo.dense.shape[-1]
    on_image = photo.geometry.mask(grid).to(photo.dense.device)
    rows, columns = on_image.nonzero().unbind(1)
    cells = F.normalize(photo.dense[:, rows, columns].float(), dim=0)
    return descriptors @ cells, (torch.stack([columns, rows], 1) + 0.5) / grid


# ---- prediction

WINDOW, SHARPNESS = 1.5, 30.0  # cells; and what cosines are multiplied by before the softmax within the window


@torch.no_grad()
def match(source: Features, target: Features, points: Any) -> Tensor:
    """Where points of one image lie in another: the most similar cell, refined by a soft-argmax around it.

    Args:
        source, target: dense features of one image each, as tensors.
        points: (P, 2) in original pixels of the source, x then y.

    Returns:
        (P, 2) in original pixels of the target, inside it.

    Raises:
        SketchFusionError: a point lies outside the source; there is no dense map, or one of numpy, or of a batch; two
            models made the features.
    """
    check_one_model(source, target, "two images")
    if not all(isinstance(image.geometry.width, int) for image in (source, target)):
        raise SketchFusionError("points are matched between one image and one other: index the batch")
    if not (isinstance(source.dense, Tensor) and isinstance(target.dense, Tensor)):
        raise SketchFusionError("both images need a dense map of torch: encode with dense=True and to='torch'")
    descriptors = F.normalize(source.at(points).float(), dim=1)
    cosines, places = _cosines(descriptors, target)
    best = places[cosines.argmax(1)]
    near = (places[None] - best[:, None]).abs().amax(2) <= WINDOW / target.dense.shape[-1]
    weights = (cosines * SHARPNESS).masked_fill(~near, -torch.inf).softmax(1)
    found = target.geometry.to_original(weights @ places)
    size = torch.tensor([target.geometry.width, target.geometry.height], device=found.device)
    return torch.minimum(found.clamp(min=0), size)


# ---- metric


def pck(predicted: Tensor, truth: Tensor, side: float, alpha: float) -> Tensor:
    """Which points (P, 2) lie within alpha × side of the truth (P, 2): bool (P,); their mean is PCK@alpha.

    Args:
        side: of the image, in the points' pixels: 256 in PSC6K, else the longer side of the target.
        alpha: 0.05 for PCK@5, 0.10 for PCK@10.

    Raises:
        SketchFusionError: there are not as many points of both.
    """
    if predicted.shape != truth.shape:
        raise SketchFusionError(f"points of shape {tuple(predicted.shape)} and truth of {tuple(truth.shape)}")
    return (predicted - truth).norm(dim=1) <= alpha * side
