"""Layers whose float32 parameters are masters: they compute in the dtype of their input.

What is trained stays in float32 while the frozen backbones run in half precision, so that small updates
are not lost to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..kernels.group_norm import group_norm


class Masters(nn.Module):
    """A container whose parameters follow the model to a device, never to another dtype (`.half()`, `.to(dtype)`)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Masters:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return group_norm(x, self.num_groups, weight, bias, self.eps, silu=False)
