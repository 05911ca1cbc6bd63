"""The two frozen networks: diffusion (VAE and UNet) and semantic (a vision transformer)."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def shared_copy(module: Module) -> Module:
    """A copy with a structure of its own that shares the weights' memory with `module`.

    What is done to a frozen backbone (freezing, casting, dropping blocks) replaces parameters and never writes
    into them, so the caller's module stays as it was.
    """
    memo = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) if isinstance(p, nn.Parameter) else p.detach()
        for p in (*module.parameters(), *module.buffers())
    }
    return copy.deepcopy(module, memo)
