"""How others run Stable Diffusion for features, on a model's own weights: what `bench` compares it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.diffusion import block_widths, drop_behind
from ..backbones.semantic import SemanticBackbone
from ..loading import Networks
from ..model import SketchFusion

DIFT_ENSEMBLE = 8  # DIFT's default


class PlainLoop:
    """The model as one would write it with diffusers: whole networks, hooks in Python, nothing folded or fused.

    The VAE makes the whole posterior, every call computes the time embedding and the prompt's keys and values anew, a
    hook projects and resizes the tokens for its site, every tap is resized before its bottleneck.

    Args:
        model: whose weights and configuration are used; its published backbones are loaded again.
        dtype: compute dtype.
        alone: for DIFT: without CLIP and adapters, and the UNet ends behind the last tap.
    """

    def __init__(self, model: SketchFusion, dtype: torch.dtype, *, alone: bool = False):
        self.model, self.dtype = model, dtype
        networks = Networks.load(model._origins, dtype, model._variant)
        config, device = model.config, model.device
        self.vae, self.unet = networks.vae.to(device).eval(), networks.unet.to(device).eval()
        self.prompt = model._null_prompt.to(device, dtype)
        self.semantic: nn.Module = nn.Identity()
        self.adapters = nn.ModuleDict()
        if not alone:
            sees = config.semantic
            vision = SemanticBackbone(
                networks.vision, networks.layout, dtype=dtype,
                image_size=sees.image_size, mean=sees.mean, std=sees.std, fold=False,
            )  # fmt: skip
            self.semantic = vision.to(device)
            self.adapters.update({site: _plain(conv, dtype) for site, conv in model.adapters.sites.items()})
        self._tokens: Tensor | None = None
        self._tapped: dict[str, Tensor] = {}
        blocks = [*self.unet.down_blocks, *filter(None, [self.unet.mid_block]), *self.unet.up_blocks]
        names = [name for name in block_widths(self.unet) if name != "mid" or self.unet.mid_block is not None]
        for name, block in zip(names, blocks, strict=True):
            block.register_forward_hook(self._hook(name))
        if alone:
            drop_behind(self.unet, config.taps)
            self.unet.conv_out = nn.Identity()  # diffusers' forward calls it

    @property
    def parts(self) -> list[nn.Module]:
        """What holds its weights."""
        aggregator = [self.model.aggregator] if len(self.adapters) else []
        return [self.vae, self.unet, self.semantic, self.adapters, *aggregator]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        config = self.model.config

        def hook(block: nn.Module, inputs: Any, output: Any) -> Any:
            hidden, skips = output if name.startswith("down") else (output, None)
            if self._tokens is not None and name in self.adapters:
                size = hidden.shape[-2:]
                hidden = hidden + F.interpolate(self.adapters[name](self._tokens), size=size, mode="bilinear")
            if name in config.taps:
                self._tapped[name] = hidden
            if skips is None:
                return hidden
            return hidden, ((*skips[:-1], hidden) if config.inject_skips else skips)

        return hook

    def latents(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] -> (N, 4, S/8, S/8)."""
        inputs = self.model.diffusion.normalized(pixels.to(self.model.device)).to(self.dtype)
        latents: Tensor = self.vae.encode(inputs).latent_dist.mode() * self.vae.config.scaling_factor
        return latents

    def tokens(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] -> (N, width, t, t)."""
        tokens: Tensor = self.semantic(pixels.to(self.model.device))
        return tokens

    def tap(self, noised: Tensor, tokens: Tensor | None) -> dict[str, Tensor]:
        """Noised latents -> the map at every tap, (N, C_tap, h_tap, w_tap)."""
        self._tokens = tokens
        self.unet(noised, self.model.config.timestep, encoder_hidden_states=self.prompt.expand(len(noised), -1, -1))
        tapped, self._tapped = self._tapped, {}
        return tapped

    def aggregate(self, maps: dict[str, Tensor]) -> Tensor:
        """Tapped maps -> dense map (N, D, g, g), float32."""
        aggregator = self.model.aggregator
        mixing = aggregator.mixing_weights.softmax(0)
        side = aggregator.grid
        terms = [_bottleneck(aggregator.taps[tap], maps[tap], side) for tap in self.model.config.taps]
        return sum((weight * term.float() for weight, term in zip(mixing, terms, strict=True)), start=torch.zeros(()))

    @torch.no_grad()
    def __call__(self, pixels: Tensor, ensemble: int) -> Tensor:
        """A batch through it, one noise after the other: dense maps (N, D, g, g), float32."""
        tokens, latents = self.tokens(pixels), self.latents(pixels)
        totals: dict[str, Tensor] = {}
        for member in range(ensemble):
            for tap, found in self.tap(self.model.diffusion.add_noise(latents, member), tokens).items():
                totals[tap] = totals.get(tap, 0) + found.float() / ensemble
        return self.aggregate({tap: total.to(self.dtype) for tap, total in totals.items()})

    @torch.no_grad()
    def released(self, pixels: Tensor, ensemble: int) -> Tensor:
        """The released script's way: one image at a time, and its copies, one a noise, all through the VAE."""
        return torch.cat(
            [self.aggregate(self._copies(image, ensemble, self.tokens(image))) for image in pixels[:, None]]
        )

    @torch.no_grad()
    def dift(self, pixels: Tensor, ensemble: int = DIFT_ENSEMBLE) -> dict[str, Tensor]:
        """DIFT's way: the same without CLIP and aggregation. Returns the tapped maps."""
        maps = [self._copies(image, ensemble, None) for image in pixels[:, None]]
        return {tap: torch.cat([one[tap] for one in maps]) for tap in maps[0]}

    def _copies(self, image: Tensor, ensemble: int, tokens: Tensor | None) -> dict[str, Tensor]:
        latents = self.latents(image.expand(ensemble, -1, -1, -1))
        noised = [self.model.diffusion.add_noise(one[None], member) for member, one in enumerate(latents)]
        repeated = None if tokens is None else tokens.expand(ensemble, -1, -1, -1)
        return {tap: maps.mean(0, keepdim=True) for tap, maps in self.tap(torch.cat(noised), repeated).items()}


def _plain(adapter: Any, dtype: torch.dtype) -> nn.Conv2d:
    conv = nn.Conv2d(adapter.in_channels, adapter.out_channels, 1, device=adapter.weight.device, dtype=dtype)
    conv.load_state_dict(adapter.state_dict())
    return conv


def _bottleneck(block: Any, x: Tensor, side: int) -> Tensor:
    def normed(norm: Any, x: Tensor) -> Tensor:
        if not isinstance(norm, nn.GroupNorm):  # where the width stays the shortcut is the map itself
            return x
        return F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

    x = F.interpolate(x, size=(side, side), mode="bilinear")
    project, norm = block.shortcut
    hidden = F.relu(normed(block.norm1, block.conv1(x)))
    hidden = F.relu(normed(block.norm2, block.conv2(hidden)))
    return F.relu(normed(block.norm3, block.conv3(hidden)) + normed(norm, project(x)))
