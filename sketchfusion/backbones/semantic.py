"""Semantic backbone: CLIP's vision tower, or another vision network that transformers knows -> token grid."""

from __future__ import annotations

import inspect
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ..config import CLIP_MEAN, CLIP_STD
from ..errors import ConfigError, LoadError
from ..hub import Location, MissingFile, one_line, undisturbed
from . import Frozen, Triple, shared_copy
from .folding import fold_convolutional

PLAIN = "the semantic backbone is a plain vision transformer, or a convolutional network that gives a map"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second since transformers 5


class SemanticBackbone(Frozen):
    """Frozen vision transformer: image -> the patch tokens of its last layer; or convolutional network: its last map.

    Args:
        model: a transformers vision model.
        found: its `layout`.
        dtype: it is cast to this, once it is folded.
        image_size: side of the canvas it sees, pixels; patches of a transformer's `patch_size` tile it.
        mean, std: pixels in [0, 1] become (pixels - mean) / std.
        published: the tokens are `last_hidden_state`, as who published the model takes them, which DINOv2 and SigLIP
            give after a last norm; otherwise `hidden_states[-1]`, before it. For CLIP both are the same, and a map is
            `last_hidden_state` always.
        fold: fold a convolutional network's batch norms into its convolutions, in place.

    Raises:
        ConfigError: `image_size` is no multiple of the patch size.
    """

    def __init__(
        self,
        model: Any,
        found: Layout,
        *,
        dtype: torch.dtype,
        image_size: int,
        mean: Triple,
        std: Triple,
        published: bool = False,
        fold: bool = True,
    ):
        super().__init__(mean, std)
        self.width, patch, self.convolutional, norms = found
        if image_size % patch:
            raise ConfigError("semantic.image_size", f"is {image_size}", legal=f"a multiple of the patch size {patch}")
        self.model, self.image_size, self.grid, self.published = model, image_size, image_size // patch, published
        self.folded = fold and self.convolutional
        if self.folded:
            fold_convolutional(model, norms)
        model.to(dtype)
        if self.convolutional:
            model.to(memory_format=torch.channels_last)
        # Models that do not adapt their positions to the canvas by themselves take a keyword for it.
        adapts = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        native = getattr(model.config, "image_size", image_size) == image_size
        self._arguments = {"interpolate_pos_encoding": True} if adapts and not native else {}
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return next(self.model.parameters()).dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, S, S) in [0, 1], any S -> token grid (N, width, t, t), t = `grid`."""
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        inputs = self.normalized(pixels).to(self.dtype)
        if self.convolutional:
            found: Tensor = self.model(inputs).last_hidden_state
            return found
        outputs = self.model(inputs, output_hidden_states=True, **self._arguments)
        hidden = outputs.last_hidden_state if self.published else outputs.hidden_states[-1]
        if hidden.ndim != 3 or hidden.shape[1] < self.grid**2:
            what = f"{type(self.model).__name__} returns {tuple(hidden.shape)} for {self.grid}×{self.grid} patches"
            raise LoadError(f"{what}: {PLAIN}")
        # Special tokens (CLS, registers, distillation) come first, whatever their number.
        patches = hidden[:, -(self.grid**2) :]
        return patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))


class Layout(NamedTuple):
    """How a model cuts its canvas into tokens."""

    width: int  # channels of a token
    patch: int  # its side in pixels, which divides that of the canvas; of a map the stride
    convolutional: bool
    norms: Mapping[str, str] = {}  # batch norms by name, and the convolution whose output each of them takes


def layout(model: Any) -> Layout:
    """A transformer's configuration tells; a convolutional network's map is looked at, on torch's meta device.

    Raises:
        LoadError: the model is neither.
    """
    if tokens_of := _transformer(model.config):
        return Layout(*tokens_of, False)
    name, side = type(model).__name__, 256  # of which every stride is a divisor
    calls: list[tuple[nn.Module, Any]] = []
    with torch.inference_mode(False), torch.enable_grad():
        looked_at = shared_copy(model).eval().to("meta")
        plain = nn.Conv2d.forward, nn.BatchNorm2d.forward  # what a subclass does besides is not known here
        names = {m: name for name, m in looked_at.named_modules() if type(m).forward in plain}
        for module in names:
            module.register_forward_hook(lambda module, _, output: calls.append((module, output.grad_fn)))
        dtype = next(model.parameters()).dtype
        pixels = torch.empty(1, 3, side, side, dtype=dtype, device="meta", requires_grad=True)
        try:
            tokens = looked_at(pixels).last_hidden_state
        except Exception as error:  # whatever another kind of model says to pixels
            raise LoadError(f"{name} does not take images ({one_line(error)}): {PLAIN}") from error
    shape = tokens.shape
    if len(shape) != 4 or shape[2] != shape[3] or side % shape[2]:
        raise LoadError(f"{name} gives {tuple(shape)} for {side}×{side} pixels, which is no map: {PLAIN}")
    norms = {names[norm]: names[conv] for norm, conv in _followed(tokens, calls)}
    return Layout(shape[1], side // shape[2], True, norms)


def _transformer(config: Any) -> tuple[int, int] | None:
    """Width and patch size of a transformer, by its configuration."""
    width, patch = (getattr(config, key, None) for key in ("hidden_size", "patch_size"))
    return (width, patch) if isinstance(width, int) and isinstance(patch, int) else None


def _followed(tokens: Tensor, calls: list[tuple[nn.Module, Any]]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Batch norms, each with the convolution whose output it and nothing else takes.

    What autograd would go back through from the tokens tells.

    Args:
        calls: convolutions and norms as they were run, and autograd's node of what each gave.
    """
    takers: dict[Any, list[Any]] = {}
    reached: list[Any] = [tokens.grad_fn]
    for node in reached:
        for taken, _ in node.next_functions:
            if taken not in takers and taken is not None:
                reached.append(taken)
            takers.setdefault(taken, []).append(node)
    runs = Counter(module for module, _ in calls)
    once = {node: module for module, node in calls if runs[module] == 1}
    for node, conv in once.items():
        norm = once.get(takers[node][0]) if len(takers.get(node, ())) == 1 else None
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            yield norm, conv


def load(origin: Location | Any, dtype: torch.dtype) -> Any:
    """The vision model from a location in transformers' layout, or from a loaded module (copied, not touched).

    Of a model with a text tower, only the vision tower is built. A convolutional network comes in float32 at least.

    Raises:
        LoadError: not a model transformers knows; something is missing, not safetensors or corrupt.
    """
    if isinstance(origin, Location):
        path = origin.file("config.json")
        with origin.explained(f"reading {path}"):
            config = AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        dtype = _held_in(config, dtype)
        # DINO and ImageNet classifiers are published without the pooler that AutoModel gives them.
        model = origin.load(AutoModel, "model", spare="pooler", config=config, dtype=dtype, trust_remote_code=False)
    elif isinstance(origin, nn.Module) and hasattr(origin, "config"):
        copied: Any = shared_copy(origin)
        model = getattr(copied, "vision_model", None) if hasattr(copied.config, "vision_config") else copied
        if model is None:  # SAM has an encoder, which gives no tokens either
            raise LoadError(f"{type(origin).__name__} has no vision_model: {PLAIN}")
        model = model.to(_held_in(model.config, dtype))
    else:
        raise LoadError(
            f"{type(origin).__name__} is no transformers model: the semantic backbone is a vision transformer or "
            "a convolutional network, loaded, in a folder in transformers' layout or on the Hub"
        )
    return model


def _held_in(config: Any, dtype: torch.dtype) -> torch.dtype:
    """What is rounded before its batch norms are folded would be rounded twice."""
    return dtype if _transformer(config) else torch.promote_types(dtype, torch.float32)


def published_normalisation(origin: Location | Any) -> tuple[Triple, Triple] | None:
    """Mean and standard deviation from the preprocessor's file; CLIP's for a CLIP without one; else None.

    Raises:
        LoadError: the file cannot be read, or asks for pixels that are not in [0, 1].
    """
    if not isinstance(origin, Location):
        return (CLIP_MEAN, CLIP_STD) if origin.config.model_type.startswith("clip") else None
    preprocessor = _preprocessor(origin)
    if preprocessor is None:
        config = origin.file("config.json")
        with origin.explained(f"reading {config}"):
            clip = json.loads(config.read_text(encoding="utf-8")).get("model_type", "").startswith("clip")
        return (CLIP_MEAN, CLIP_STD) if clip else None
    path, values = preprocessor
    with origin.explained(f"reading {path}"):
        if not values.get("do_rescale", True) or values.get("rescale_offset"):
            raise LoadError(f"{path} does not rescale pixels to [0, 1], which this backbone does: pass another")
        if values.get("do_flip_channel_order"):
            raise LoadError(f"{path} asks for blue before red, which is not done here: pass another backbone")
        if not values.get("do_normalize", True):
            return (0.0,) * 3, (1.0,) * 3
        mean, std = (values.get(key) for key in ("image_mean", "image_std"))
        if mean is None or std is None:
            return None
        mean, std = (np.broadcast_to(np.asarray(value, float), 3).tolist() for value in (mean, std))
        if str(values.get("image_processor_type")).startswith("EfficientNet") and values.get("include_top", True):
            std = [value**2 for value in std]  # that class divides by it twice
        return tuple(mean), tuple(std)


def published_size(model: Any, found: Layout, origin: Location | Any) -> int | None:
    """Side of the images it was published to see, in whole patches of pixels, where that is written.

    Raises:
        LoadError: the preprocessor's file cannot be read.
    """
    side = _side(getattr(model.config, "image_size", None))
    # A convolutional network has no use for the size in its configuration, which may be any.
    if (
        (found.convolutional or side is None)
        and isinstance(origin, Location)
        and (preprocessor := _preprocessor(origin))
    ):
        values = preprocessor[1]
        cropped = values.get("crop_size") if values.get("do_center_crop", True) else None
        side = _side(cropped or values.get("size")) or side
    return None if side is None else side // found.patch * found.patch  # some have a rest that no patch covers


def _side(size: Any) -> int | None:
    """224 of 224, [224, 224], {"height": 224, "width": 224} and {"shortest_edge": 224}; None of what is no square."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", [size.get("height"), size.get("width")])
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None


def _preprocessor(origin: Location) -> tuple[Path, dict[str, Any]] | None:
    """The preprocessor's file, and what it says of images."""
    for name in PREPROCESSORS:
        with suppress(MissingFile):
            path = origin.file(name)
            break
    else:
        return None
    with origin.explained(f"reading {path}"):
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        inner: dict[str, Any] = values.get("image_processor", values)
        return path, dict(inner)


def save_complete(origin: Location | Any, target: Path) -> None:
    """Write the model in transformers' layout into `target`."""
    if not isinstance(origin, Location):
        with undisturbed():
            origin.save_pretrained(target)
        return
    origin.copy_model(target, "model")
    for name in (*PREPROCESSORS, "LICENSE"):
        with suppress(LoadError):  # not needed, and nice to have for who loads the folder with transformers
            shutil.copyfile(origin.file(name), target / name)
