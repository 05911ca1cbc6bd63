"""Injection: one adapter a site turns semantic tokens into what is added to a UNet block's output."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

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

    def forward(self, tokens: Tensor) -> dict[str, Hook]:
        """Token grid (N, token_width, t, t) -> the hook of every site, to be called by the UNet loop."""
        return {site: partial(inject, addition=adapter(tokens)) for site, adapter in self.sites.items()}
