"""The two frozen networks: diffusion (VAE and UNet) and semantic (a vision transformer or a convolutional network)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

_moves = itertools.count()  # of all networks: another one in the place of this has moved too

Module = TypeVar("Module", bound=nn.Module)
Triple = tuple[float, float, float]


class Frozen(nn.Module):
    """A network that stays as it was published: no gradients, never in training mode, pixels as it was trained on.

    Args:
        mean, std: pixels in [0, 1] become (pixels - mean) / std.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Triple, std: Triple):
        super().__init__()
        self.moves = next(_moves)  # another number wherever the weights are put
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def thaw(self, network: nn.Module) -> None:
        """Let a part of it learn, in memory of its own: what was passed in loaded shares its weights' memory."""
        self._apply(torch.clone)
        network.requires_grad_(True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.moves = next(_moves)
        mean, std = self.mean, self.std
        super()._apply(fn, recurse)
        # Pixels come in float32, and are rounded when they are normalised: another dtype is the network's alone.
        self.mean, self.std = mean.to(self.mean.device), std.to(self.std.device)
        return self

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, S, S) in [0, 1] as the network saw them in its training, in the pixels' dtype."""
        return (pixels - self.mean) / self.std


def shared_copy(module: Module) -> Module:
    """A copy with a structure of its own that shares the weights' memory with `module`.

    What is done to a frozen backbone (freezing, casting, dropping blocks) replaces parameters and never writes
    into them, so the caller's module stays as it was; to be trained it is given memory of its own (`Frozen.thaw`).
    """
    memo = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) if isinstance(p, nn.Parameter) else p.detach()
        for p in (*module.parameters(), *module.buffers())
    }
    return copy.deepcopy(module, memo)
