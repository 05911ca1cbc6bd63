"""Semantic backbone: CLIP's vision tower, or any other vision transformer that transformers knows -> token grid."""

from __future__ import annotations

import inspect
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ..config import CLIP_MEAN, CLIP_STD
from ..errors import ConfigError, LoadError
from ..hub import Location, MissingFile, undisturbed
from . import Frozen, Triple, shared_copy

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second since transformers 5


class SemanticBackbone(Frozen):
    """Frozen vision transformer: image -> the patch tokens of its last layer.

    Args:
        model: a transformers vision model.
        image_size: side of the canvas it sees, pixels; patches of the model's `patch_size` tile it.
        mean, std: pixels in [0, 1] become (pixels - mean) / std.
        published: the tokens are `last_hidden_state`, as who published the model takes them, which DINOv2 and SigLIP
            give after a last norm; otherwise `hidden_states[-1]`, before it. For CLIP both are the same.

    Raises:
        ConfigError: `image_size` is no multiple of the patch size.
    """

    def __init__(self, model: Any, *, image_size: int, mean: Triple, std: Triple, published: bool = False):
        super().__init__(mean, std)
        patch = model.config.patch_size
        if image_size % patch:
            raise ConfigError("semantic.image_size", f"is {image_size}", legal=f"a multiple of the patch size {patch}")
        self.model, self.image_size, self.grid, self.published = model, image_size, image_size // patch, published
        # Models that do not adapt their positions to the canvas by themselves take a keyword for it.
        adapts = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        native = getattr(model.config, "image_size", image_size) == image_size
        self._arguments = {"interpolate_pos_encoding": True} if adapts and not native else {}
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return next(self.model.parameters()).dtype

    @property
    def width(self) -> int:
        """Channels of a token."""
        return int(self.model.config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, S, S) in [0, 1], any S -> token grid (N, width, t, t), t = image_size / patch size."""
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        inputs = self.normalized(pixels).to(self.dtype)
        outputs = self.model(inputs, output_hidden_states=True, **self._arguments)
        hidden = outputs.last_hidden_state if self.published else outputs.hidden_states[-1]
        if hidden.shape[1] < self.grid**2:
            raise LoadError(
                f"{type(self.model).__name__} returns {hidden.shape[1]} tokens for {self.grid}×{self.grid} patches: "
                "the semantic backbone has to be a plain vision transformer"
            )
        # Special tokens (CLS, registers, distillation) come first, whatever their number.
        patches = hidden[:, -(self.grid**2) :]
        return patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))


def load(origin: Location | Any, dtype: torch.dtype) -> Any:
    """The vision model from a location in transformers' layout, or from a loaded module (copied, not touched).

    Of a model with a text tower, only the vision tower is built.

    Raises:
        LoadError: not a model transformers knows; something is missing, not safetensors or corrupt.
    """
    if isinstance(origin, Location):
        path = origin.file("config.json")
        with origin.explained(f"reading {path}"):
            config = AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        # DINO and ImageNet classifiers are published without the pooler that AutoModel gives them.
        model = origin.load(AutoModel, "model", spare="pooler", config=config, dtype=dtype, trust_remote_code=False)
    elif isinstance(origin, nn.Module) and hasattr(origin, "config"):
        copied: Any = shared_copy(origin)
        model = (copied.vision_model if hasattr(copied.config, "vision_config") else copied).to(dtype)
    else:
        raise LoadError(
            f"{type(origin).__name__} is no transformers model: the semantic backbone is a vision transformer, loaded, "
            "in a folder in transformers' layout or on the Hub"
        )
    if not isinstance(getattr(model.config, "patch_size", None), int):
        raise LoadError(f"{type(model).__name__} has no patch_size: the semantic backbone is a vision transformer")
    return model


def published_normalisation(origin: Location | Any) -> tuple[Triple, Triple] | None:
    """Mean and standard deviation from the preprocessor's file; CLIP's for a CLIP without one; else None.

    Raises:
        LoadError: the file cannot be read, or asks for pixels that are not in [0, 1].
    """
    if not isinstance(origin, Location):
        return (CLIP_MEAN, CLIP_STD) if origin.config.model_type.startswith("clip") else None
    for name in PREPROCESSORS:
        with suppress(MissingFile):
            path = origin.file(name)
            break
    else:
        config = origin.file("config.json")
        with origin.explained(f"reading {config}"):
            clip = json.loads(config.read_text(encoding="utf-8")).get("model_type", "").startswith("clip")
        return (CLIP_MEAN, CLIP_STD) if clip else None
    with origin.explained(f"reading {path}"):
        values = json.loads(path.read_text(encoding="utf-8"))
        values = values.get("image_processor", values)
        if not values.get("do_rescale", True):
            raise LoadError(f"{path} does not rescale pixels to [0, 1], which this backbone does: pass another")
        if not values.get("do_normalize", True):
            return (0.0,) * 3, (1.0,) * 3
        mean, std = (values.get(key) for key in ("image_mean", "image_std"))
        if mean is None or std is None:
            return None
        mean, std = (np.broadcast_to(np.asarray(value, float), 3).tolist() for value in (mean, std))
        return tuple(mean), tuple(std)


def save_complete(origin: Location | Any, target: Path) -> None:
    """Write the model in transformers' layout into `target`."""
    if not isinstance(origin, Location):
        with undisturbed():
            origin.save_pretrained(target)
        return
    origin.copy_model(target, "model")
    for name in PREPROCESSORS:
        with suppress(LoadError):  # not needed, and nice to have for who loads the folder with transformers
            shutil.copyfile(origin.file(name), target / name)
