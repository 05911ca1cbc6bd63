"""Constant folding: what frozen weights, one timestep and one prompt fix is computed once, at load.

Each fold is exact algebra. It is computed in float64 and rounded once to the compute dtype, so in half precision a
folded model is no further from its float32 self than a plain one, and machines that add in another order come to the
same weights, by which caches are found. Parameters are replaced and never written into, see `shared_copy`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetSqueezeExciteLayer

from ..errors import LoadError

Layer = TypeVar("Layer", bound=nn.Module)


@torch.no_grad()
def fold_unet(unet: Any, timestep: int, prompt: Tensor) -> None:
    """Fold the timestep into the resnets and the prompt into the cross attentions of a UNet2DConditionModel, in place.

    Afterwards it takes no time embedding (where `unet.time_embedding` is None) and no prompt.

    Args:
        timestep: the one step of the diffusion process.
        prompt: (L, cross_attention_dim), the one prompt.

    Raises:
        LoadError: a layer is wrapped, by a LoRA for example.
    """
    _fold_timestep(unet, timestep)
    for module in list(unet.modules()):
        for name, child in module.named_children():
            if isinstance(child, Attention) and child.is_cross_attention:
                setattr(module, name, FoldedCrossAttention(child, prompt))


def _fold_timestep(unet: Any, timestep: int) -> None:
    """Time embedding -> SiLU -> `time_emb_proj` -> the bias of `conv1`, behind which the resnet adds it.

    A UNet with resnets that scale by the embedding as well (`time_embedding_norm` other than "default") stays as it is.
    """
    resnets: list[Any] = [module for module in unet.modules() if hasattr(module, "time_embedding_norm")]
    if any(resnet.time_embedding_norm != "default" for resnet in resnets):
        return
    exact = _exact(unet.conv_in.weight)
    steps = torch.tensor([timestep], device=exact.device)
    embedding = copy.deepcopy(unet.time_embedding).to(exact.dtype)(unet.time_proj(steps).to(exact.dtype))[0]
    for resnet in resnets:
        bias = _exact(resnet.conv1.bias) + _linear(resnet.time_emb_proj, resnet.nonlinearity(embedding))
        _replace(_plain(resnet.conv1, nn.Conv2d), bias=bias)
        resnet.time_emb_proj = None
    unet.time_proj = unet.time_embedding = None


class FoldedCrossAttention(nn.Module):
    """Cross attention to one prompt: its keys and values are constants, only queries are computed.

    Takes the place of diffusers' `Attention` in a transformer block, and the parameters it keeps have their old names.

    Args:
        attention: the cross attention to fold.
        prompt: (L, cross_attention_dim).
    """

    key: Tensor
    value: Tensor

    def __init__(self, attention: Any, prompt: Tensor):
        super().__init__()
        self.to_q, self.to_out, self.heads = attention.to_q, attention.to_out, attention.heads
        weight = attention.to_k.weight
        context = prompt.to(_exact(weight))
        for name, layer in (("key", attention.to_k), ("value", attention.to_v)):
            constant = _linear(layer, context).unflatten(1, (self.heads, -1)).transpose(0, 1)
            self.register_buffer(name, constant.to(weight.dtype).contiguous(), persistent=False)

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        """Tokens (N, T, C) -> (N, T, C). What a block passes besides, the prompt and a mask, is folded or None."""
        # All images' tokens are one sequence, since all of them attend to the same prompt.
        query = self.to_q(hidden.flatten(0, 1)).unflatten(1, (self.heads, -1)).transpose(0, 1)
        attended = F.scaled_dot_product_attention(query[None], self.key[None], self.value[None])[0]
        return self.to_out[0](attended.transpose(0, 1).reshape(hidden.shape))


@torch.no_grad()
def fold_vae(vae: Any) -> None:
    """Make the encoder of an `AutoencoderKL` return clean scaled latents, in place.

    Into its last convolution go the quant convolution, a 1×1 that follows it, of which only the half that gives the
    mean is kept, and the scale of the latents.
    """
    last = vae.encoder.conv_out
    weight, bias = _exact(last.weight), _exact(last.bias)
    if vae.quant_conv is not None:
        quant = _exact(vae.quant_conv.weight).flatten(1)
        weight = torch.einsum("oi,ichw->ochw", quant, weight)
        bias = quant @ bias + _exact(vae.quant_conv.bias)
    last.out_channels //= 2
    scale = vae.config.scaling_factor
    _replace(last, weight=weight[: last.out_channels] * scale, bias=bias[: last.out_channels] * scale)
    vae.quant_conv = None


@torch.no_grad()
def fold_convolutional(network: nn.Module, norms: Mapping[str, str]) -> None:
    """Fold batch norms into the convolutions they follow, and leave out gates that are always open, in place.

    In eval mode a batch norm scales and shifts every channel by constants. An EfficientNet without gates, as the Lite
    ones are, is one with gates that are 1 whatever they see.

    Args:
        norms: names of batch norms, and of the convolution of which each takes the output, see `semantic.layout`.
    """
    for name, followed in norms.items():
        norm, conv = network.get_submodule(name), network.get_submodule(followed)
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(conv, nn.Conv2d)
        if norm.running_mean is None or norm.running_var is None:
            continue  # it takes the batch's own statistics
        bias, gain, shift = (None if t is None else _exact(t) for t in (conv.bias, norm.weight, norm.bias))
        mean, variance = _exact(norm.running_mean), _exact(norm.running_var)
        weight, bias = fuse_conv_bn_weights(_exact(conv.weight), bias, mean, variance, norm.eps, gain, shift)
        _replace(conv, weight=weight, bias=bias)
        network.set_submodule(name, nn.Identity())
    for name, gate in list(network.named_modules()):
        if not isinstance(gate, EfficientNetSqueezeExciteLayer) or gate.expand.weight.any():
            continue
        if gate.expand.bias is not None and (gate.expand.bias.sigmoid() == 1).all():
            network.set_submodule(name, nn.Identity())


def _exact(tensor: Tensor) -> Tensor:
    """In the precision that folds are computed in: float64, which only MPS does not have."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in the precision of `x`."""
    plain = _plain(layer, nn.Linear)
    return F.linear(x, plain.weight.to(x.dtype), None if plain.bias is None else plain.bias.to(x.dtype))


def _plain(layer: nn.Module, kind: type[Layer]) -> Layer:
    """The layer itself.

    Raises:
        LoadError: it is one of another library, which does more than its weights say.
    """
    if type(layer) is kind:
        return layer
    raise LoadError(
        f"the UNet has a {type(layer).__module__}.{type(layer).__name__}, whose weights cannot be folded: fuse LoRAs "
        "first (pipe.fuse_lora(), then pipe.unload_lora_weights()), and load it without quantisation"
    )


def _replace(layer: nn.Conv2d, **values: Tensor) -> None:
    """New parameters in the place of the old ones, in the dtype of its weight."""
    dtype = layer.weight.dtype
    for name, value in values.items():
        setattr(layer, name, nn.Parameter(value.to(dtype), requires_grad=False))
