"""The rows that are compared: the model, its parts, the model with something taken away, and other encoders.

All of them are computed from one trained model: what a row leaves out is left out at test time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones import semantic
from ..backbones.semantic import SemanticBackbone
from ..config import check_count, check_ensemble
from ..data import Record
from ..errors import ConfigError, LoadError, SketchFusionError
from ..features import Features
from ..images import Geometry, ImageInput, Preprocess, collate, read_ahead
from ..loading import MARKERS, Access, find_origin
from ..model import SketchFusion
from ..progress import Progress

ROWS = {  # the built-in ones, in words
    "semantic": "semantic backbone alone: its tokens",
    "diffusion": "diffusion backbone alone: its tapped maps side by side, nothing injected",
    "semantic+diffusion": "both backbones side by side, nothing injected or learned",
    "without-adapters": "nothing injected, learned aggregation",
    "without-aggregation": "injection, its tapped maps side by side",
    "without-mixing": "the model, its taps mixed in equal parts",
    "fused": "the model",
}
INJECTED = {"without-aggregation", "without-mixing", "fused"}  # need the UNet's pass with injection
BARE = {"diffusion", "semantic+diffusion", "without-adapters"}  # and the one without


class Extractor:
    """Features of images by several rows at once, which share the work that they have in common.

    A batch passes once through the VAE and the semantic backbone, and once through the UNet with injection and once
    without, however many rows there are. The model is used, and left as it was.

    Rows with the learned aggregation pool by max, as the model does. To the others nobody taught what a maximum
    means: they pool by the mean of the cells that lie on the image.

    Args:
        model: the trained model.
        rows: names out of `ROWS`, and other encoders: Hub repositories (`owner/name`) or folders in transformers'
            layout, each with the normalisation that it was published with.
        batch_size, ensemble, size, progress: as for `SketchFusion.encode`.
        source: what the model is called in results.

    Raises:
        ConfigError: a row or another argument is unknown or illegal.
        LoadError: an encoder cannot be loaded.
    """

    def __init__(
        self,
        model: SketchFusion,
        rows: Sequence[str] = tuple(ROWS),
        *,
        batch_size: int | None = None,
        ensemble: int | None = None,
        size: int | None = None,
        progress: bool | None = None,
        source: str = "",
    ):
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if ensemble is not None:
            check_ensemble(ensemble)
        if not rows or len(set(rows)) != len(rows):
            raise ConfigError("rows", f"is {', '.join(rows) or 'empty'}", legal="one name or more, each once")
        for row in rows:
            if row not in ROWS and "/" not in row and not Path(row).is_dir():
                legal = f"{', '.join(ROWS)}, and encoders: a Hub repository (owner/name) or a folder"
                raise ConfigError("rows", f"there is no row {row!r}", legal=legal)
        self.model, self.rows, self.source = model, tuple(rows), source
        self.ensemble, self.progress = model.config.ensemble if ensemble is None else ensemble, progress
        self.batch_size = batch_size or model.default_batch_size
        self.preprocess = model.preprocess if size is None else Preprocess(size)
        self._encoders = {row: load_encoder(row, model.device, model.dtype) for row in rows if row not in ROWS}
        self._unmixed = copy.deepcopy(model.aggregator)
        nn.init.zeros_(self._unmixed.mixing_weights)  # equal after the softmax

    def stream(self, images: Sequence[Record | ImageInput]) -> Iterator[tuple[int, str, Features]]:
        """Every row's features of one batch after the other: (position of the batch's first image, row, features).

        The features are on the model's device, float32: pooled (n, D), dense (n, D, g, g), with D and g of the row.
        A row's are computed when they are asked for: let go of dense maps before the next.

        Args:
            images: records of a data set, or anything that `encode` takes.

        Raises:
            ImageError: an image cannot be read; its source is the file.
            SketchFusionError: the features overflowed the compute dtype, or the GPU's memory is too small.
        """
        size = self.batch_size
        with (
            Progress("evaluate", "image", len(images), self.progress) as bar,
            closing(read_ahead(iter(images), self._read, size, listed=True)) as ahead,
        ):
            for start in range(0, len(images), size):
                pixels, geometries = zip(*(read.result() for read in islice(ahead, size)), strict=True)
                batch = torch.stack(pixels)
                for row, features in self.extract(batch, collate(geometries)):
                    yield start, row, features
                bar.advance(len(batch))

    def _read(self, image: Record | ImageInput) -> tuple[Tensor, Geometry]:
        if not isinstance(image, Record):
            return self.preprocess(image)
        with image.named():
            return self.preprocess(image.open())

    @torch.no_grad()
    def extract(self, pixels: Tensor, geometry: Geometry) -> Iterator[tuple[str, Features]]:
        """Every row's features of one batch, in the order of the rows.

        Args:
            pixels: (N, 3, S, S) in [0, 1], from `preprocess`.
            geometry: of the N images, (N,) tensors.
        """
        model, wanted = self.model, set(self.rows)
        try:
            if wanted & (INJECTED | BARE):
                latents, tokens = model.embed(pixels)
            elif "semantic" in wanted:
                tokens = model.semantic(pixels.to(model.device))
            if wanted & INJECTED:
                injected = model.tap(latents, tokens, ensemble=self.ensemble)
            if wanted & BARE:
                bare = model.tap(latents, None, ensemble=self.ensemble)
            for row in self.rows:
                match row:
                    case "semantic":
                        features = mean_pooled(F.normalize(tokens.float(), dim=1), geometry)
                    case "diffusion":
                        features = mean_pooled(self._side_by_side(bare), geometry)
                    case "semantic+diffusion":
                        features = mean_pooled(self._side_by_side(bare, tokens), geometry)
                    case "without-adapters":
                        features = model.aggregate(bare, geometry)
                    case "without-aggregation":
                        features = mean_pooled(self._side_by_side(injected), geometry)
                    case "without-mixing":
                        features = model.aggregate(injected, geometry, aggregator=self._unmixed)
                    case "fused":
                        features = model.aggregate(injected, geometry)
                    case _:
                        found = self._encoders[row](pixels.to(model.device)).float()
                        features = mean_pooled(F.normalize(found, dim=1), geometry)
                if not features.dense.isfinite().all():
                    raise SketchFusionError(
                        f"the features of {row} are not finite: {model.dtype} overflowed; use bfloat16 or float32"
                    )
                yield row, features
        except torch.OutOfMemoryError as error:
            raise SketchFusionError(
                f"out of memory on {model.device} for {len(pixels)} images of {pixels.shape[-1]} px and these rows: "
                "use a smaller batch size, or fewer rows at once"
            ) from error

    def _side_by_side(self, maps: Mapping[str, Tensor], tokens: Tensor | None = None) -> Tensor:
        """Tapped maps on the dense grid, each cell of L2 norm 1, concatenated: (N, sum of widths, g, g).

        With tokens they are one half, and the tokens the other: each cell's halves are of norm 1.
        """
        grid = self.model.config.aggregator_grid
        taps = torch.cat([unit_cells(maps[tap], grid) for tap in self.model.config.taps], 1)
        return taps if tokens is None else torch.cat([unit_cells(tokens, grid), F.normalize(taps, dim=1)], 1)


def unit_cells(maps: Tensor, grid: int) -> Tensor:
    """(N, C, h, w) -> (N, C, grid, grid), float32, every cell scaled to L2 norm 1."""
    resized = F.interpolate(maps.float(), size=(grid, grid), mode="bilinear", align_corners=False)
    return F.normalize(resized, dim=1)


def mean_pooled(dense: Tensor, geometry: Geometry) -> Features:
    """Features of a dense map (N, D, g, g), pooled by the mean of the cells that lie on the image."""
    mask = geometry.mask(dense.shape[-1]).to(dense.device)[:, None]
    pooled = dense.where(mask, 0).sum((2, 3)) / mask.sum((2, 3))
    return Features(pooled, dense, geometry)


def load_encoder(source: str, device: torch.device, dtype: torch.dtype) -> SemanticBackbone:
    """A vision network that transformers knows, seeing what it was published to see, giving what it gives.

    Args:
        source: a folder in transformers' layout, or a Hub repository.

    Raises:
        LoadError: it cannot be loaded, or does not say its normalisation or the size of its images.
    """
    origin = find_origin(source, None, Access(None, None, False), MARKERS["semantic"])
    network = semantic.load(origin, dtype)
    normalisation = semantic.published_normalisation(origin)
    found = semantic.layout(network)
    size = semantic.published_size(network, found, origin)
    if normalisation is None or size is None:
        missing = f"the size of its images in {MARKERS['semantic']} and {semantic.PREPROCESSORS[0]}"
        if normalisation is None:
            missing = f"{semantic.PREPROCESSORS[0]}, which tells its normalisation"
        raise LoadError(f"{source} lacks {missing}: the row would mean nothing")
    mean, std = normalisation
    return SemanticBackbone(network, found, dtype=dtype, image_size=size, mean=mean, std=std, published=True).to(device)
