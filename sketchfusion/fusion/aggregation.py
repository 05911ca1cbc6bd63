"""Aggregation: the tapped maps of the UNet become one dense map, and the dense map one pooled vector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masters import Conv2d, GroupNorm, Masters


class Bottleneck(nn.Module):
    """Resize, then a ResNet bottleneck, `in_width` -> `width`: 1×1, 3×3, 1×1, group norm after each, ReLU, residual
    sum, ReLU.

    The first 1×1 convolutions have no bias and commute with the bilinear resize: the smaller map is projected.
    """

    def __init__(self, in_width: int, width: int, groups: int):
        super().__init__()
        inner = width // 4
        self.conv1, self.norm1 = Conv2d(in_width, inner, 1, bias=False), GroupNorm(groups, inner)
        self.conv2, self.norm2 = Conv2d(inner, inner, 3, padding=1, bias=False), GroupNorm(groups, inner)
        self.conv3, self.norm3 = Conv2d(inner, width, 1, bias=False), GroupNorm(groups, width)
        self.shortcut = (
            nn.Sequential(nn.Identity(), nn.Identity())
            if in_width == width
            else nn.Sequential(Conv2d(in_width, width, 1, bias=False), GroupNorm(groups, width))
        )

    def forward(self, x: Tensor, side: int) -> Tensor:
        """Any map (N, in_width, h, w) -> (N, width, side, side)."""
        project, norm = self.shortcut
        if x.shape[-2] * x.shape[-1] < side**2:
            h, short = _resize(self.conv1(x), side), _resize(project(x), side)
        else:
            resized = _resize(x, side)
            h, short = self.conv1(resized), project(resized)
        h = F.relu(self.norm1(h))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(self.norm3(self.conv3(h)) + norm(short))


def _resize(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


class Aggregator(Masters):
    """Resize every tap to the grid, pass it through its bottleneck, and sum by learned weights (section 4.3).

    Args:
        widths: channels of the map at each tap.
        width: D, channels of the dense map.
        grid: the dense map is grid × grid cells.
        groups: groups of every group norm.
    """

    def __init__(self, widths: Mapping[str, int], width: int, grid: int, groups: int):
        super().__init__()
        self.grid = grid
        self.taps = nn.ModuleDict({tap: Bottleneck(w, width, groups) for tap, w in widths.items()})
        self.mixing_weights = nn.Parameter(torch.zeros(len(widths)))  # one a tap, before the softmax

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Tapped maps (N, C_tap, h_tap, w_tap) -> dense map (N, D, grid, grid), every value 0 or above."""
        mixing = self.mixing_weights.softmax(0)
        dense = None
        for weight, (tap, bottleneck) in zip(mixing, self.taps.items(), strict=True):
            term = weight.to(maps[tap].dtype) * bottleneck(maps[tap], self.grid)
            dense = term if dense is None else dense + term
        assert dense is not None  # the configuration has at least one tap
        return dense


def max_pool(dense: Tensor, mask: Tensor) -> Tensor:
    """Global max over the cells that lie on the image.

    Args:
        dense: (N, D, g, g).
        mask: (N, g, g), True where the cell's centre lies on the image; at least one an image.

    Returns:
        (N, D).
    """
    return dense.masked_fill(~mask[:, None], -torch.inf).amax(dim=(-2, -1))
