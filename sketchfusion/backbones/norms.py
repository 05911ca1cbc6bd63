"""Parts of the frozen backbones with fewer passes over memory: resnets, transformers and group norms, channels-last, of
VAE and UNet, and CLIP's MLPs."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPMLP

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


class Transformer(Transformer2DModel):
    """diffusers' transformer at the end of a resnet, whose maps stay channels-last, as its neighbours' are."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        maps = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            maps = self.proj_out(maps)
        return maps + residual


class Resnet(nn.Module):
    """diffusers' `ResnetBlock2D` with fewer passes over memory: each norm with its SiLU, the sum in place.

    Takes the parameters of the block whose place it takes, under their names.
    """

    def __init__(self, block: ResnetBlock2D):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm.of(block.norm1, silu=True), block.conv1
        self.time_emb_proj = block.time_emb_proj  # None where there is no time embedding, or where it is folded
        self.norm2, self.conv2 = GroupNorm.of(block.norm2, silu=True), block.conv2
        self.conv_shortcut = block.conv_shortcut

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        """Map (N, C, H, W), time embedding (N, E) -> (N, C', H, W)."""
        hidden = self.conv1(self.norm1(x))
        if self.time_emb_proj is not None and temb is not None:
            hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(self.norm2(hidden))
        return hidden.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class QuickGELUMLP(nn.Module):
    """transformers' `CLIPMLP` with OpenAI's quick GELU, x σ(1.702 x), which is SiLU(1.702 x) / 1.702.

    The matrix products scale for nothing, so that the activation is one pass, in place, instead of three. Takes the
    parameters of the block whose place it takes, under their names.
    """

    SCALE = 1.702

    def __init__(self, block: CLIPMLP):
        super().__init__()
        self.fc1, self.fc2 = block.fc1, block.fc2

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        hidden = torch.addmm(self.SCALE * self.fc1.bias, x.flatten(0, 1), self.fc1.weight.T, alpha=self.SCALE)
        hidden = F.silu(hidden, inplace=True)
        return torch.addmm(self.fc2.bias, hidden, self.fc2.weight.T, alpha=1 / self.SCALE).view(x.shape)


def fuse(network: nn.Module) -> None:
    """Put the parts of this module in the places of diffusers' and transformers', in a VAE encoder, a UNet or CLIP."""
    for parent in list(network.modules()):
        for name, part in parent.named_children():
            if isinstance(part, ResnetBlock2D) and _is_plain(part):
                setattr(parent, name, Resnet(part))
            elif isinstance(part, CLIPMLP) and isinstance(part.activation_fn, QuickGELUActivation):
                setattr(parent, name, QuickGELUMLP(part))
        if isinstance(parent, Transformer2DModel):
            parent.norm = GroupNorm.of(parent.norm, silu=False)
            parent.__class__ = Transformer
        elif isinstance(parent, Encoder):
            parent.conv_norm_out = GroupNorm.of(parent.conv_norm_out, silu=True)
            parent.conv_act = nn.Identity()  # type: ignore[assignment]


def _is_plain(block: ResnetBlock2D) -> bool:
    """Whether it does what `Resnet` does: no scale by the time embedding, no resampling, nothing divided."""
    resamples = block.upsample is not None or block.downsample is not None
    silu, added = isinstance(block.nonlinearity, nn.SiLU), block.time_embedding_norm == "default"
    return silu and added and not resamples and block.output_scale_factor == 1
