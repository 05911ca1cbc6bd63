"""Segmentation: a sketch says what to find, and the photo's cells that resemble it are the mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import DataError, DataSet, Record
from ..errors import SketchFusionError
from ..features import Features, check_one_model
from ..images import Geometry
from . import Sample

THRESHOLD = 0.47  # the paper's, on the cosine

# ---- loss


class Segmentation(nn.Module):
    """BCE between masks and the soft-thresholded cosine map of the pooled sketch against the dense photo (section 4.4).

    Trains the features themselves; there is no head. A batch is photos with masks and a sketch of the class for
    each. A sketch of a class that a photo does not show finds nothing in it: without such pairs the map would be of
    anything salient.

    Args:
        photos: a set of photos with masks.
        sketches: a set with sketches of the same classes.
        pairs: photos a step.
        softness: of the threshold: cosines this far above it count as sure to 73 %.
        others: weight of the pairs in which there is nothing to find.

    Raises:
        SketchFusionError: no class has both photos with masks and sketches; in training, a mask does not fit its photo.
    """

    name = "segmentation"

    def __init__(
        self, photos: DataSet, sketches: DataSet, *, pairs: int = 16, softness: float = 0.05, others: float = 0.5
    ):
        super().__init__()
        self._sketches: dict[str, list[Record]] = {}
        for sketch in sketches.sketches:
            self._sketches.setdefault(str(sketch.label), []).append(sketch)
        self._photos = [photo for photo in photos.photos if photo.mask and photo.label in self._sketches]
        if not self._photos:
            raise SketchFusionError(
                f"no class of {photos.name} ({photos.split}) has photos with masks, and sketches in {sketches.name} "
                f"({sketches.split}): segmentation needs both, under the same name"
            )
        shown = sorted({str(photo.label) for photo in self._photos})
        self._shows: dict[str, set[str]] = {}  # a photo of several things is several records
        for photo in photos.photos:
            self._shows.setdefault(photo.path, set()).add(str(photo.label))
        self.pairs, self.softness, self.others = pairs, softness, others
        self.records = (*self._photos, *(sketch for name in shown for sketch in self._sketches[name]))

    def batch(self, generator: np.random.Generator) -> list[Record]:
        photos = [self._photos[row] for row in generator.permutation(len(self._photos))[: self.pairs]]
        groups = [self._sketches[str(photo.label)] for photo in photos]
        return photos + [group[generator.integers(len(group))] for group in groups]

    def loss(self, features: Features, samples: list[Sample]) -> tuple[Tensor, dict[str, float]]:
        half = len(samples) // 2
        photos, drawn = [s.record for s in samples[:half]], [str(s.record.label) for s in samples[half:]]
        cells = F.normalize(features.dense[:half], dim=1)
        queries = F.normalize(features.pooled[half:], dim=1)
        logits = (torch.einsum("pdhw,qd->pqhw", cells, queries) - THRESHOLD) / self.softness
        grid = cells.shape[-1]
        truths, insides = [], []
        for i, sample in enumerate(samples[:half]):
            assert sample.mask is not None  # `records` has only photos with masks
            geometry = features.geometry.image(i)
            check_mask(sample.record, sample.mask, geometry)
            truths.append(on_canvas(sample.mask.float(), geometry, grid))
            insides.append(geometry.mask(grid))
        truth, inside = torch.stack(truths).to(logits.device), torch.stack(insides).to(logits.device)
        shows = [self._shows[photo.path] for photo in photos]
        absent = torch.tensor([[name not in names for name in drawn] for names in shows], device=logits.device)
        wanted = truth[:, None] * ~absent[:, :, None, None]
        costs = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        costs = (costs * inside[:, None]).sum((2, 3)) / inside.sum((1, 2))[:, None]
        # Each photo with the sketch that was drawn for it; and with those of what it does not show.
        own = costs.diagonal().mean()
        other = costs[absent].mean() if absent.any() else costs.new_zeros(())
        return own + self.others * other, {"mask": own.item(), "others": other.item()}


def check_mask(record: Record, mask: Tensor, geometry: Geometry) -> None:
    """Raise a DataError unless the mask (H, W) of a photo is as large as the photo."""
    height, width = mask.shape
    if (width, height) != (geometry.width, geometry.height):
        raise DataError(
            f"the mask {record.mask} is {width} x {height} and its photo {record.path} "
            f"{geometry.width} x {geometry.height}"
        )


def on_canvas(mask: Tensor, geometry: Geometry, grid: int) -> Tensor:
    """A mask (H, W) of an image, 0 to 1 -> the share of it in each cell of the canvas's grid × grid, 0 on padding."""
    canvas = mask.new_zeros(int(geometry.canvas), int(geometry.canvas))
    left, top = int(geometry.left), int(geometry.top)
    inner = (int(geometry.inner_height), int(geometry.inner_width))
    placed = F.interpolate(mask[None, None], size=inner, mode="bilinear", antialias=True)[0, 0]
    canvas[top : top + inner[0], left : left + inner[1]] = placed
    return F.adaptive_avg_pool2d(canvas[None], grid)[0]


# ---- prediction


@torch.no_grad()
def similarity(query: Features | Tensor, photo: Features) -> Tensor:
    """Cosine of a pooled sketch with every pixel of a photo.

    Args:
        query: the sketch's features, of which the pooled vector counts, or that vector (D,).
        photo: dense features of one image, as a tensor.

    Returns:
        (H, W) of the original image: the cells' cosines, interpolated bilinearly.

    Raises:
        SketchFusionError: the sketch has no pooled vector or the photo no dense map, of one image, as tensors; or two
            models made them.
    """
    check_one_model(query, photo, "sketch and the photo")
    pooled = query.pooled if isinstance(query, Features) else query
    if not (isinstance(photo.dense, Tensor) and photo.dense.ndim == 3):
        raise SketchFusionError(
            "the photo needs a dense map of torch, of one image: encode with dense=True, index the batch"
        )
    if not (isinstance(pooled, Tensor) and pooled.ndim == 1):
        raise SketchFusionError("the sketch needs a pooled vector of torch, of one image: index the batch")
    cosines = F.cosine_similarity(photo.dense.float(), pooled.float()[:, None, None], dim=0)
    width, height = int(photo.geometry.width), int(photo.geometry.height)
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), 2).view(-1, 2)
    sampled: Tensor = replace(photo, dense=cosines[None]).at(pixels)
    return sampled.view(height, width)


def predict(cosines: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """The mask, bool: cosines above the threshold."""
    return cosines > threshold


# ---- metric


def mask_iou(predicted: Tensor, truth: Tensor) -> float:
    """Intersection over union of two bool masks (H, W); 1 where both are empty. mIoU is its mean over images.

    Raises:
        SketchFusionError: they have two shapes.
    """
    _check_alike(predicted, truth)
    union = (predicted | truth).sum().item()
    return (predicted & truth).sum().item() / union if union else 1.0


def pixel_accuracy(predicted: Tensor, truth: Tensor) -> float:
    """pAcc: the share of pixels on which two bool masks (H, W) agree.

    Raises:
        SketchFusionError: they have two shapes.
    """
    _check_alike(predicted, truth)
    return (predicted == truth).double().mean().item()


def _check_alike(predicted: Tensor, truth: Tensor) -> None:
    if predicted.shape != truth.shape:
        raise SketchFusionError(f"masks of the shapes {tuple(predicted.shape)} and {tuple(truth.shape)}")
