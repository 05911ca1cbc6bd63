"""Injection: one adapter a site turns semantic tokens into what is added to a UNet block's output."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.diffusion import Hook
from ..kernels.injection import inject
from .masters import Conv2d, Masters


class Adapters(Masters):
    """A 1×1 convolution for each injection site, from the token width to the block's (section 4.2: "1D conv").

    Adapters start at zero, so an untrained model begins as plain diffusion features.

    Args:
        token_width: channels of the semantic token grid.
        widths: channels of the UNet block at each site.
    """

    def __init__(self, token_width: int, widths: Mapping[str, int]):
        super().__init__()
        self.sites = nn.ModuleDict({site: Conv2d(token_width, width, 1) for site, width in widths.items()})
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, copies: int = 1) -> dict[str, Hook]:
        """Token grid (N, token_width, t, t) -> the hook of every site, to be called by the UNet loop.

        All adapters are one matrix product, projecting the tokens before any resize.

        Args:
            copies: the maps that will be injected into are those of the N images, so many times over.
        """
        adapters: list[Any] = list(self.sites.values())
        if not adapters:
            return {}
        weight = torch.cat([adapter.weight.flatten(1).to(tokens.dtype) for adapter in adapters])
        bias = torch.cat([adapter.bias.to(tokens.dtype) for adapter in adapters])
        projected = F.linear(tokens.permute(0, 2, 3, 1), weight, bias)
        if copies > 1:
            projected = projected.repeat(copies, 1, 1, 1)
        additions = projected.permute(0, 3, 1, 2).split([adapter.out_channels for adapter in adapters], dim=1)
        return {site: partial(inject, addition=addition) for site, addition in zip(self.sites, additions, strict=True)}
