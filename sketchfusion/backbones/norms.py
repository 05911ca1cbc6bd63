"""The group norms of the frozen VAE and UNet, each with the SiLU behind it, as what one fused kernel computes."""

from __future__ import annotations

from typing import Self

from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ..kernels.group_norm import group_norm


class GroupNorm(nn.GroupNorm):
    """A group norm on maps (N, C, H, W), and the SiLU behind it if `silu`."""

    silu: bool

    @classmethod
    def of(cls, norm: nn.GroupNorm, *, silu: bool) -> Self:
        """The same norm, with the same parameters."""
        made = cls(norm.num_groups, norm.num_channels, norm.eps)
        made.weight, made.bias, made.silu = norm.weight, norm.bias, silu
        return made

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)


class TimeSiLU(nn.SiLU):
    """The SiLU of a resnet whose norms have their own: left to it is the time embedding (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim == 2 else x


def fuse(network: nn.Module) -> None:
    """Put `GroupNorm` in the place of every group norm that maps go through, in diffusers' VAE encoder or UNet."""
    for part in network.modules():
        if isinstance(part, ResnetBlock2D) and _is_plain(part):
            part.norm1 = GroupNorm.of(part.norm1, silu=True)
            part.norm2 = GroupNorm.of(part.norm2, silu=True)
            part.nonlinearity = TimeSiLU()
        elif isinstance(part, Transformer2DModel):
            part.norm = GroupNorm.of(part.norm, silu=False)
        elif isinstance(part, Encoder):
            part.conv_norm_out = GroupNorm.of(part.conv_norm_out, silu=True)
            part.conv_act = nn.Identity()  # type: ignore[assignment]


def _is_plain(resnet: ResnetBlock2D) -> bool:
    """Whether both norms are followed by a SiLU, with no scale and shift by the time embedding in between."""
    return isinstance(resnet.nonlinearity, nn.SiLU) and resnet.time_embedding_norm == "default"
