"""Features: what encoding an image, or a batch of them, gives."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from .errors import LoadError, SketchFusionError
from .files import write_tensors
from .images import Geometry

FORMAT = "sketchfusion.features.1"  # the `format` in a saved file's metadata


@dataclass(eq=False, repr=False)
class Features:
    """The features of one image, or of a batch of N.

    A batch has a length and is indexed: an int gives a single image's Features, a slice a smaller batch; both are
    views. A list, array or tensor of rows, or of a bool for each, gives a batch of copies.

    Attributes:
        pooled: (D,), or (N, D) for a batch; a tensor or an array; None where it was not asked for.
        dense: (D, h, w), or (N, D, h, w); the map of the square canvas, its white padding included; or None.
        geometry: where the images lie on the canvas: ints, or (N,) tensors for a batch, whatever the others are.
        paths: where the images came from, N of them (1 for a single image), where all were paths or URLs.
        model: the `SketchFusion.fingerprint` of the model that encoded them; None where that is not known.
    """

    pooled: Any  # Tensor | np.ndarray | None: a union would make every caller narrow it first
    dense: Any
    geometry: Geometry
    paths: list[str] | None = None
    model: str | None = None

    def __len__(self) -> int:
        if isinstance(self.geometry.width, int):
            raise TypeError("the features of a single image have no length; encode a list for a batch")
        return len(self.geometry.width)

    def __getitem__(self, index: int | slice | Sequence | Tensor | np.ndarray) -> Features:
        count = len(self)
        rows: Any
        numbers: Sequence[int]
        if isinstance(index, slice):
            numbers = range(*index.indices(count))
            rows = index if numbers.step > 0 else list(numbers)  # tensors have no negative steps
        elif isinstance(index, Sequence | Tensor | np.ndarray) and np.ndim(index) == 1:
            rows = numbers = self._rows(index)
        else:
            rows = operator.index(index)  # type: ignore[arg-type]
            numbers = [rows]
            if not -count <= rows < count:
                raise IndexError(f"image {rows} of a batch of {count}")
        if isinstance(rows, int):
            geometry = self.geometry.image(rows)
        else:
            geometry = Geometry(*(torch.as_tensor(field)[rows] for field in self.geometry))
        paths = self.paths and [self.paths[number] for number in numbers]
        pooled = None if self.pooled is None else self.pooled[rows]
        dense = None if self.dense is None else self.dense[rows]
        return Features(pooled, dense, geometry, paths, self.model)

    def __iter__(self) -> Iterator[Features]:
        """The single images, as views. A gradient through all of them costs what one through the batch does."""
        parts = (self.pooled, self.dense)
        pooled, dense = ([None] * len(self) if p is None else p.unbind() if isinstance(p, Tensor) else p for p in parts)
        for i in range(len(self)):
            yield Features(pooled[i], dense[i], self.geometry.image(i), self.paths and [self.paths[i]], self.model)

    def _rows(self, index: Sequence | Tensor | np.ndarray) -> list[int]:
        count, chosen = len(self), np.asarray(index.cpu() if isinstance(index, Tensor) else index)
        if chosen.dtype == bool:
            rows, fit = chosen.nonzero()[0].tolist(), len(chosen) == count
        else:
            rows = [operator.index(row) for row in chosen.tolist()]
            fit = all(-count <= row < count for row in rows)
        if not fit:
            raise IndexError(f"{len(chosen)} of {chosen.dtype}: rows of a batch of {count}, or a bool for each")
        return rows

    @classmethod
    def cat(cls, parts: Iterable[Features]) -> Features:
        """One batch of several, in their order; a single image is a batch of one.

        Returns:
            Their `model`, where all are known to be of one, and their `paths`, where all images have one.

        Raises:
            SketchFusionError: there are no parts, or they do not fit together: two models, devices or shapes, or maps
                that some have and others have not.
        """
        parts = list(parts)
        models = {part.model for part in parts}
        paths = [part.paths for part in parts if part]
        if not parts:
            raise SketchFusionError("there are no features to put together")
        known = sorted(model for model in models if model is not None)
        if len(known) > 1:
            raise SketchFusionError(f"features of the models {' and '.join(known)} are no one batch")

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if all(value is None for value in values):
                return None
            if any(value is None for value in values):
                raise SketchFusionError(f"some of these features have {name} ones and others have not")
            lone = [isinstance(part.geometry.width, int) for part in parts]
            rows = [as_tensor(v)[None] if one else as_tensor(v) for v, one in zip(values, lone, strict=True)]
            try:
                whole = torch.cat(rows)
            except RuntimeError as error:
                raise SketchFusionError(f"the {name} features do not fit together: {error}") from None
            return whole.numpy() if all(isinstance(value, np.ndarray) for value in values) else whole

        pooled, dense = joined("pooled"), joined("dense")
        device = next((whole.device for whole in (pooled, dense) if isinstance(whole, Tensor)), "cpu")
        fields = zip(*(part.geometry for part in parts), strict=True)
        places = [torch.cat([torch.as_tensor(value, device=device).reshape(-1) for value in field]) for field in fields]
        return cls(
            pooled,
            dense,
            Geometry(*places),
            None if None in paths else [path for some in paths for path in some or ()],
            models.pop() if len(models) == 1 else None,
        )

    def __bool__(self) -> bool:
        """Whether there is an image: a batch can be empty."""
        return isinstance(self.geometry.width, int) or len(self) > 0

    def __repr__(self) -> str:
        def shown(value: Tensor | np.ndarray | None) -> str:
            if value is None:
                return "None"
            place = f", {value.device}" if isinstance(value, Tensor) else ""
            kind = "tensor" if isinstance(value, Tensor) else "array"
            return f"{kind}{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{place}"

        width, height, canvas = self.geometry.width, self.geometry.height, self.geometry.canvas
        images = (
            f"one image of {width} x {height} on {canvas}" if isinstance(width, int) else f"a batch of {len(width)}"
        )
        return f"Features({images}; pooled: {shown(self.pooled)}; dense: {shown(self.dense)})"

    def to(self, *args: Any, **kwargs: Any) -> Features:
        """The same features on another device or in another dtype: the arguments of `torch.Tensor.to`.

        Arrays become tensors. The geometry follows to the device and stays in integers.
        """
        pooled, dense = (
            None if value is None else as_tensor(value).to(*args, **kwargs) for value in (self.pooled, self.dense)
        )
        moved = pooled if pooled is not None else dense
        geometry = self.geometry
        if moved is not None and isinstance(geometry.width, Tensor):
            geometry = Geometry(*(torch.as_tensor(field).to(moved.device) for field in geometry))
        return replace(self, pooled=pooled, dense=dense, geometry=geometry)

    def numpy(self) -> Features:
        """The same features as arrays in host memory; bfloat16, which numpy does not have, becomes float32."""

        def array(value: Tensor | np.ndarray | None) -> np.ndarray | None:
            if not isinstance(value, Tensor):
                return value
            value = value.detach().cpu()
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()

        geometry = self.geometry
        if isinstance(geometry.width, Tensor):
            geometry = Geometry(*(torch.as_tensor(field).cpu() for field in geometry))
        return replace(self, pooled=array(self.pooled), dense=array(self.dense), geometry=geometry)

    def at(self, points: Tensor | np.ndarray | Sequence) -> Any:
        """The dense features at points of the original image, interpolated bilinearly.

        Between the outermost cells' centres and the canvas's edge the outermost cells' features hold.

        Args:
            points: (P, 2), or for a batch (P, 2), the same points in every image, or (N, P, 2). x then y, in
                continuous original pixels: the centre of the top-left pixel is (0.5, 0.5), and the image reaches
                from (0, 0) to (width, height).

        Returns:
            (P, D), or (N, P, D) for a batch: a tensor through which gradients flow, or an array where the features
            are arrays.

        Raises:
            SketchFusionError: there is no dense map, the points have another shape, or one lies outside its image.
        """
        if self.dense is None:
            raise SketchFusionError("these features have no dense map to sample; encode with dense=True")
        single = isinstance(self.geometry.width, int)
        dense = as_tensor(self.dense)
        try:
            if not isinstance(points, Tensor | np.ndarray):
                points = np.asarray(points, dtype=np.float64)
            places = as_tensor(points).to(dense.device)
        except (TypeError, ValueError) as error:
            raise SketchFusionError(f"points are numbers in an array, a tensor or lists: {error}") from None
        if not places.is_floating_point():
            places = places.double()
        expected = "(P, 2)" if single else f"(P, 2) or ({len(self)}, P, 2)"
        fits = places.ndim == 2 or (not single and places.ndim == 3 and len(places) == len(self))
        if not fits or places.shape[-1] != 2:
            raise SketchFusionError(f"points have the shape {expected}, not {tuple(places.shape)}")
        self._check_inside(places)
        grid = self.geometry.to_canvas(places) * 2 - 1
        if single:
            dense, grid = dense[None], grid[None]
        # Half precision cannot tell neighbouring pixels of a large image apart.
        exact = torch.promote_types(dense.dtype, torch.float32)
        sampled = functional.grid_sample(
            dense.to(exact), grid.to(exact)[:, :, None], padding_mode="border", align_corners=False
        )
        sampled = sampled.squeeze(-1).transpose(1, 2).to(dense.dtype)
        sampled = sampled[0] if single else sampled
        return sampled.numpy() if isinstance(self.dense, np.ndarray) else sampled

    def _check_inside(self, points: Tensor) -> None:
        size = torch.stack([torch.as_tensor(side) for side in self.geometry[:2]], dim=-1).unsqueeze(-2)
        points, size = torch.broadcast_tensors(points, size.to(points.device))  # (P, 2) or (N, P, 2)
        outside = ~((points >= 0) & (points <= size)).all(-1)  # negated, so that nan is outside
        if outside.any():
            *image, p = first = tuple(outside.nonzero()[0].tolist())
            (x, y), (width, height) = points[first].tolist(), size[first].tolist()
            where = f"image {image[0]}" if image else "the image"
            raise SketchFusionError(f"point {p} ({x:g}, {y:g}) is outside {where} of {width} x {height} pixels")

    def save(self, path: str | os.PathLike, paths: Sequence[str] | None = None) -> None:
        """Write a safetensors file with `pooled`, `dense` and `geometry.*`: it appears complete or not at all.

        `paths` are in it as JSON in bytes, and its metadata hold `model`.

        Args:
            path: the file.
            paths: where the images came from, one each, instead of the features' own.

        Raises:
            SketchFusionError: the number of paths is another, or the file cannot be written.
        """
        paths = self.paths if paths is None else [os.fsdecode(image) for image in paths]
        count = 1 if isinstance(self.geometry.width, int) else len(self)
        if paths is not None and len(paths) != count:
            raise SketchFusionError(f"{len(paths)} paths for the features of {count} images")
        tensors = {
            name: as_tensor(value).detach().contiguous()
            for name, value in (("pooled", self.pooled), ("dense", self.dense))
            if value is not None
        }
        for name, field in self.geometry._asdict().items():
            tensors[f"geometry.{name}"] = torch.as_tensor(field).clone()  # safetensors refuses shared memory
        if paths is not None:  # not as metadata: a header holds 100 MB at most
            tensors["paths"] = torch.frombuffer(bytearray(json.dumps(paths), "ascii"), dtype=torch.uint8)
        metadata = {"format": FORMAT} | ({} if self.model is None else {"model": self.model})
        path = Path(path)
        if not path.name:
            raise SketchFusionError(f"{str(path)!r} is no file to write to")
        write_tensors(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, *, dense: bool = True) -> Features:
        """Read what `save` wrote into tensors in host memory, `paths` and `model` included.

        They are mapped from the file: replace it, as `save` does, and never write over it while they are in use.

        Args:
            path: the file.
            dense: read the dense maps too; without them it is quick, and small.

        Raises:
            LoadError: the file is missing, damaged or not one of ours.
        """
        try:
            if os.path.isdir(path):
                raise IsADirectoryError("it is a folder")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = [name for name in file.keys() if dense or name != "dense"]  # noqa: SIM118
                tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{path}: cannot be read: {error}; encode the images again") from None
        try:
            return _restored(tensors, metadata)
        except (KeyError, ValueError) as error:
            raise LoadError(f"{path}: not a file that Features.save wrote: {error}") from None


def check_one_model(first: Any, second: Any, names: str) -> None:
    """Raise a SketchFusionError where two models are known to have made them: their features cannot be compared."""
    models = [part.model if isinstance(part, Features) else None for part in (first, second)]
    if None not in models and models[0] != models[1]:
        raise SketchFusionError(f"the {names} are of the models {models[0]} and {models[1]}: encode both with one")


def _restored(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Features:
    """The contents of a file -> Features; KeyError or ValueError where they do not fit together."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    fields = [tensors.pop(f"geometry.{name}") for name in Geometry._fields]
    pooled, dense = tensors.pop("pooled", None), tensors.pop("dense", None)
    paths = tensors.pop("paths", None)
    if paths is not None:
        paths = json.loads(paths.numpy().tobytes())
    lead = tuple(fields[0].shape)  # () for one image, (N,) for a batch
    batched = len(lead)
    fits = (
        not tensors
        and batched <= 1
        and all(field.shape == lead and field.dtype == torch.int64 for field in fields)
        and (pooled is None or (pooled.ndim == batched + 1 and pooled.shape[:batched] == lead))
        and (dense is None or (dense.ndim == batched + 3 and dense.shape[:batched] == lead))
        and (paths is None or (isinstance(paths, list) and len(paths) == (lead[0] if lead else 1)))
    )
    if not fits:
        raise ValueError("its tensors do not fit together")
    geometry = Geometry(*fields) if batched else Geometry(*(int(field) for field in fields))
    return Features(pooled, dense, geometry, paths, metadata.get("model"))


def as_tensor(value: Tensor | np.ndarray) -> Tensor:
    """A tensor that shares the array's memory where torch can share it."""
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(np.require(value, requirements=["C", "W"]))  # torch warns of read-only arrays
