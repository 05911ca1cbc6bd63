"""Diffusion backbone: the VAE's encoder, and our short loop over the UNet's own blocks at one fixed timestep."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from ..errors import LoadError
from ..hub import Location, MissingFile, undisturbed
from . import Frozen, Triple, shared_copy
from .folding import fold_unet, fold_vae
from .norms import fuse

Hook = Callable[[Tensor], Tensor]  # a block's output -> what goes on in its place
WEIGHTS = "diffusion_pytorch_model"  # how diffusers calls its weights
SCHEDULER = "scheduler/scheduler_config.json"

# What a UNet may be conditioned on besides the timestep and the prompt: nothing that we could give it.
_FOREIGN_CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")


class DiffusionBackbone(Frozen):
    """Frozen Stable Diffusion 1.x or 2.x: image -> latents -> noised latents -> maps at the tapped blocks.

    The UNet runs once, at `timestep`, under the null prompt, and stops after the last tap. The decoder and the
    blocks behind the last tap are not there, and what timestep and prompt make constant is folded (`folding.py`).
    Nothing here ever gets a gradient or enters training mode.

    Args:
        vae: diffusers' `AutoencoderKL`.
        unet: diffusers' `UNet2DConditionModel`.
        alpha_bar: ᾱ at the timestep, from the scheduler's configuration.
        null_prompt: (L, cross_attention_dim), the text encoder's output for the empty prompt.
        taps: blocks whose output is returned.
        timestep: the one step of the diffusion process.
        noise_seed: noise n_j is drawn from seed `noise_seed` + j.
        mean, std: pixels in [0, 1] become (pixels - mean) / std before the VAE.
        fold: False leaves every weight of the UNet as it was published, for who trains the UNet itself.
    """

    null_prompt: Tensor

    def __init__(
        self,
        vae: Any,
        unet: Any,
        *,
        alpha_bar: float,
        null_prompt: Tensor,
        taps: Collection[str],
        timestep: int = 195,
        noise_seed: int = 0,
        mean: Triple = (0.5, 0.5, 0.5),
        std: Triple = (0.5, 0.5, 0.5),
        fold: bool = True,
    ):
        super().__init__(mean, std)
        if null_prompt.ndim != 2:
            raise LoadError(f"the null prompt has shape {tuple(null_prompt.shape)}, not (L, cross_attention_dim)")
        if null_prompt.shape[-1] != unet.config.cross_attention_dim:
            raise LoadError(
                f"the null prompt is {null_prompt.shape[-1]} wide and this UNet attends to "
                f"{unet.config.cross_attention_dim}: the checkpoint was built for another Stable Diffusion"
            )
        self.vae, self.unet = vae, unet
        self.alpha_bar, self.timestep, self.noise_seed = alpha_bar, timestep, noise_seed
        self.taps, self.folded = tuple(taps), fold
        self._noises: dict[tuple[int, torch.Size, torch.device], Tensor] = {}
        self.register_buffer("null_prompt", null_prompt.to(unet.dtype), persistent=False)
        drop_decoder(vae)
        drop_behind(unet, taps)
        fold_vae(vae)
        if fold:
            fold_unet(unet, timestep, null_prompt)
        for network in (vae, unet):
            fuse(network)
            network.to(memory_format=torch.channels_last)  # what convolutions are fastest in
        self.freeze()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._noises.clear()  # they are drawn anew where the weights are
        return super()._apply(fn, recurse)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.unet.conv_in.weight.dtype

    def blocks(self) -> list[nn.Module]:
        """The UNet's blocks that run, in order of execution."""
        unet = self.unet
        return [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks]

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, S, S) in [0, 1] -> clean scaled latents (N, 4, S/8, S/8): the posterior's mode."""
        latents: Tensor = self.vae.encoder(self.normalized(pixels).to(self.dtype))
        return latents

    def add_noise(self, latents: Tensor, member: int) -> Tensor:
        """Noise clean latents (N, 4, h, w) to the timestep with ensemble member 2j or 2j+1: +n_j or -n_j.

        The noise is drawn in float32 on the CPU: the same for every image, batch size and device. √ᾱ is applied
        here and not folded into the VAE with the scale: latents that are kept are clean, whatever the timestep, and
        four channels cost nothing.
        """
        noise = self._noise(self.noise_seed + member // 2, latents.shape[1:], latents.device)
        return self.mix(latents, noise if member % 2 == 0 else -noise)

    @torch.inference_mode(False)  # a caller's inference mode would make a tensor that nothing can be trained on
    def _noise(self, seed: int, shape: torch.Size, device: torch.device) -> Tensor:
        """Drawn once, and kept (64 KB for 512 px): a CUDA graph can wait for nothing from the CPU."""
        key = (seed, shape, device)
        if key not in self._noises:
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
            self._noises.setdefault(key, drawn.to(device))  # another thread may read the first
        return self._noises[key]

    def mix(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Noise clean latents (N, 4, h, w) to the timestep with `noise` (4, h, w), float32."""
        noised = self.alpha_bar**0.5 * latents.float() + (1 - self.alpha_bar) ** 0.5 * noise
        return noised.to(latents.dtype)

    def forward(
        self,
        noised: Tensor,
        hooks: Mapping[str, Hook],
        *,
        inject_skips: bool,
    ) -> dict[str, Tensor]:
        """Run the UNet's blocks up to the last tap, calling the hook of each site on the block's output.

        Args:
            noised: (N, 4, h, w), noised latents.
            hooks: a function for each site; what it returns goes on in place of the block's output.
            inject_skips: whether the last skip of a down block, which is the block's output, goes through the
                hook as well. The released script adds in place, so there it does.

        Returns:
            The map (N, C, h_b, w_b) of every tapped block, after its hook.
        """
        unet = self.unet
        context = self._context(noised)
        tapped: dict[str, Tensor] = {}

        def visit(name: str, hidden: Tensor) -> Tensor:
            hidden = hooks[name](hidden) if name in hooks else hidden
            if name in self.taps:
                tapped[name] = hidden
            return hidden

        hidden = unet.conv_in(noised)
        skips = [hidden]
        for i, block in enumerate(unet.down_blocks):
            hidden, outputs = block(hidden, **_accepted(block, context))
            hidden = visit(f"down{i}", hidden)
            skips += [*outputs[:-1], hidden] if inject_skips else outputs
        if unet.mid_block is not None:
            hidden = visit("mid", unet.mid_block(hidden, **context))
        for i, block in enumerate(unet.up_blocks):
            count = len(block.resnets)
            residuals, skips = tuple(skips[-count:]), skips[:-count]
            # Latents that 8 does not divide: the next skip says how large the upsampled map has to be.
            size = skips[-1].shape[-2:] if block.upsamplers is not None else None
            hidden = block(hidden, residuals, upsample_size=size, **_accepted(block, context))
            hidden = visit(f"up{i}", hidden)
        return tapped

    def _context(self, noised: Tensor) -> dict[str, Tensor | None]:
        """What the blocks are conditioned on, None where it is folded into their weights."""
        embedding = prompt = None
        if self.unet.time_embedding is not None:
            timesteps = torch.full((len(noised),), self.timestep, device=noised.device)
            embedding = self.unet.time_embedding(self.unet.time_proj(timesteps).to(noised.dtype))
        if not self.folded:
            prompt = self.null_prompt.expand(len(noised), -1, -1)
        return {"temb": embedding, "encoder_hidden_states": prompt}


def _accepted(block: nn.Module, context: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Blocks without cross attention take no prompt."""
    return context if getattr(block, "has_cross_attention", False) else {"temb": context["temb"]}


def block_widths(unet: Any) -> dict[str, int]:
    """Output channels of every block that can be a site or a tap, in order of execution."""
    widths = list(unet.config.block_out_channels)
    return (
        {f"down{i}": width for i, width in enumerate(widths)}
        | {"mid": widths[-1]}
        | {f"up{i}": width for i, width in enumerate(reversed(widths))}
    )


def drop_decoder(vae: Any) -> None:
    """Free of an `AutoencoderKL` what encoding does not need."""
    vae.decoder = vae.post_quant_conv = None


def drop_behind(unet: Any, taps: Collection[str]) -> None:
    """Free of a UNet what lies behind the last tap."""
    blocks = list(block_widths(unet))
    known = [blocks.index(tap) for tap in taps if tap in blocks]
    if not known:  # the configuration is wrong, and checked when there is all of it
        return
    kept = blocks[: max(known) + 1]
    unet.down_blocks = unet.down_blocks[: sum(name.startswith("down") for name in kept)]
    unet.up_blocks = unet.up_blocks[: sum(name.startswith("up") for name in kept)]
    if "mid" not in kept:
        unet.mid_block = None
    unet.conv_norm_out = unet.conv_act = unet.conv_out = None


def _cut(kind: Any, drop: Callable[[Any], None]) -> Any:
    """A class of diffusers whose models drop something as soon as they are built.

    Its `from_pretrained` builds without memory first, and then reads the weights that have a place: what was dropped
    is never read.
    """

    @functools.wraps(kind.__init__)  # diffusers takes a configuration's keys from the signature
    def build(self: Any, *arguments: Any, **settings: Any) -> None:
        kind.__init__(self, *arguments, **settings)
        drop(self)

    return type(kind.__name__, (kind,), {"__init__": build})


def load(
    origin: Location | Any, dtype: torch.dtype, variant: str | None, *, taps: Collection[str] | None = None
) -> tuple[Any, Any, Any]:
    """VAE, UNet and scheduler from a location in diffusers' layout, or from a loaded pipeline (copied, not touched).

    Args:
        taps: of a location, read only what encoding to these taps needs; None reads all.

    Raises:
        LoadError: something is missing, not safetensors, corrupt, or a UNet of another family.
    """
    if isinstance(origin, Location):
        vae_class: Any = AutoencoderKL
        unet_class: Any = UNet2DConditionModel
        if taps is not None:
            vae_class = _cut(vae_class, drop_decoder)
            unet_class = _cut(unet_class, functools.partial(drop_behind, taps=taps))
        vae = origin.inside("vae").load(vae_class, WEIGHTS, variant=variant, torch_dtype=dtype)
        unet = origin.inside("unet").load(unet_class, WEIGHTS, variant=variant, torch_dtype=dtype)
        # A class without a name in its module could not be pickled.
        vae.__class__, unet.__class__ = AutoencoderKL, UNet2DConditionModel
        path = origin.file(SCHEDULER)
        with origin.explained(f"reading {path}"):
            settings = json.loads(path.read_text(encoding="utf-8"))
    else:
        for part in ("vae", "unet", "scheduler"):
            if getattr(origin, part, None) is None:
                raise LoadError(
                    f"{type(origin).__name__} has no {part}: the diffusion backbone is a Stable Diffusion pipeline, "
                    "a folder in diffusers' layout or a Hub repository"
                )
        # Not the module's own .to(): diffusers' logs a warning whenever it is given a dtype.
        vae, unet = (nn.Module.to(shared_copy(module), dtype) for module in (origin.vae, origin.unet))
        settings = origin.scheduler.config
    for key in _FOREIGN_CONDITIONS:
        if unet.config.get(key) is not None:
            raise LoadError(f"this UNet is conditioned by {key}; Stable Diffusion 1.x and 2.x are supported")
    if unet.config.in_channels != vae.config.latent_channels:
        raise LoadError(
            f"this UNet takes {unet.config.in_channels} channels and the VAE makes {vae.config.latent_channels}: it is "
            "one for inpainting, depth or upscaling; Stable Diffusion 1.x and 2.x for text alone are supported"
        )
    with undisturbed():
        return vae, unet, DDPMScheduler.from_config(settings)


def make_null_prompt(origin: Location | Any, variant: str | None = None) -> Tensor:
    """(L, cross_attention_dim): the text encoder's output for the empty prompt, in float32.

    Run once, when a checkpoint is first built; afterwards the embedding is part of the checkpoint.

    Raises:
        LoadError: the source has no `text_encoder` or no `tokenizer`.
    """
    try:
        encoder, tokenizer = _load_text_encoder(origin, variant)
    except MissingFile as error:
        raise LoadError(f"{error}: pass null_prompt=, the embedding of the empty prompt, to do without") from error
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)  # the first may not be known
    ids = tokenizer("", padding="max_length", max_length=length, return_tensors="pt").input_ids
    if (
        ids[0, :2].tolist() != [tokenizer.bos_token_id, tokenizer.eos_token_id]
        or ids.max() >= encoder.config.vocab_size
    ):
        raise LoadError(
            f"the tokenizer of {origin} does not fit its text encoder: the empty prompt is {ids[0].tolist()}"
        )
    with torch.no_grad():
        prompt: Tensor = encoder.eval()(ids.to(encoder.device)).last_hidden_state[0]
    return prompt.cpu()


def _load_text_encoder(origin: Location | Any, variant: str | None) -> tuple[Any, Any]:
    if not isinstance(origin, Location):
        for part in ("text_encoder", "tokenizer"):
            if getattr(origin, part, None) is None:
                raise MissingFile(f"{type(origin).__name__} has no {part}")
        return shared_copy(origin.text_encoder).float(), origin.tokenizer
    from transformers import CLIPTextModel, CLIPTokenizer

    inside = origin.inside("text_encoder")
    try:
        encoder = inside.load(CLIPTextModel, "model", dtype=torch.float32)
    except MissingFile:
        encoder = inside.load(CLIPTextModel, "model", variant=variant, dtype=torch.float32)
    folder = origin.file("tokenizer/tokenizer_config.json").parent
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        with suppress(MissingFile):  # published are the first, or the next three
            origin.file(f"tokenizer/{name}")
    with origin.explained(f"loading the tokenizer from {folder}"), undisturbed():
        return encoder, CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def save_complete(origin: Location | Any, target: Path, variant: str | None) -> None:
    """Write the whole VAE and UNet and the scheduler's configuration, in diffusers' layout, into `target`.

    From the origin, since what never runs was not loaded.
    """
    if isinstance(origin, Location):
        for part in ("vae", "unet"):
            origin.inside(part).copy_model(target / part, WEIGHTS, variant=variant)
        (target / SCHEDULER).parent.mkdir(parents=True)
        shutil.copyfile(origin.file(SCHEDULER), target / SCHEDULER)
    else:
        for part in ("vae", "unet", "scheduler"):
            getattr(origin, part).save_pretrained(target / part)
