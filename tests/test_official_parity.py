"""Our forward against vectors of the released modules: seeded random weights, float32, seven injections.

Reads the file named by SKETCHFUSION_GOLDEN, else the one beside the checkout.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open

from sketchfusion.backbones.diffusion import DiffusionBackbone, block_widths
from sketchfusion.fusion.aggregation import Aggregator
from sketchfusion.fusion.injection import Adapters

SITES = ("down0", "down1", "down2", "down3", "up0", "up1", "up2")
TAPS = ("up0", "up1", "up2")
Golden = tuple[dict[str, torch.Tensor], dict[str, str]]
BESIDE = Path(__file__).parents[2] / "shared" / "golden" / "official_forward.safetensors"


@pytest.fixture(scope="module")
def golden() -> Golden:
    path = Path(os.environ.get("SKETCHFUSION_GOLDEN", BESIDE))
    if not path.is_file():
        pytest.skip(f"no golden vectors at {path}; name the file in SKETCHFUSION_GOLDEN")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def section(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def backbone(golden: Golden, prompt: torch.Tensor, fold: bool) -> DiffusionBackbone:
    tensors, metadata = golden
    config: dict[str, Any] = json.loads(metadata["unet_config"])
    unet = UNet2DConditionModel(**config)
    unet.load_state_dict(section(tensors, "unet."))
    return DiffusionBackbone(
        AutoencoderKL(),  # the latents are given: never run
        unet,
        alpha_bar=1.0,
        null_prompt=prompt,
        taps=TAPS,
        timestep=int(metadata["timestep"]),
        fold=fold,
    )


def run(golden: Golden, *, inject_skips: bool, fold: bool = True) -> dict[str, torch.Tensor]:
    """The released forward with our modules: every tapped map, and `dense`."""
    tensors, metadata = golden
    backbones = [backbone(golden, prompt, fold) for prompt in tensors["in.text"]]  # one an image: it is folded in
    unet = backbones[0].unet
    widths = block_widths(unet)
    adapters = Adapters(tensors["in.clip_tokens"].shape[1], {site: widths[site] for site in SITES})
    for number, site in enumerate(SITES, start=1):
        adapters.sites[site].load_state_dict(section(tensors, f"vit.train_conv_{number}."))

    width = tensors["out.dense"].shape[1]
    groups = unet.config.norm_num_groups if width // 4 % unet.config.norm_num_groups == 0 else 4
    aggregator = Aggregator({tap: widths[tap] for tap in TAPS}, width, int(metadata["num_patches"]), groups)
    for number, tap in enumerate(reversed(TAPS)):
        state = section(tensors, f"agg.bottleneck_layers.{number}.0.")
        renamed = {official_name(name): value for name, value in state.items()}
        aggregator.taps[tap].load_state_dict(renamed)
    aggregator.mixing_weights.data = tensors["agg.mixing_weights"].flip(0)

    with torch.no_grad():
        each = [
            diffusion(latents[None], adapters(tokens[None]), inject_skips=inject_skips)
            for diffusion, latents, tokens in zip(
                backbones, tensors["in.latents"], tensors["in.clip_tokens"], strict=True
            )
        ]
        maps = {tap: torch.cat([tapped[tap] for tapped in each]) for tap in TAPS}
        return maps | {"dense": aggregator(maps)}


def official_name(name: str) -> str:
    """`conv1.norm.weight` -> `norm1.weight`, `shortcut.norm.bias` -> `shortcut.1.bias`."""
    for number in "123":
        name = name.replace(f"conv{number}.norm.", f"norm{number}.")
    return name.replace("shortcut.norm.", "shortcut.1.").replace("shortcut.weight", "shortcut.0.weight")


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "plain"])
def test_forward_reproduces_the_released_modules(golden: Any, fold: bool) -> None:
    ours = run(golden, inject_skips=True, fold=fold)
    for name, reference in section(golden[0], "out.").items():
        assert relative_error(ours[name], reference) <= 1e-5, name


def test_without_injected_skips_it_computes_something_else(golden: Any) -> None:
    ours = run(golden, inject_skips=False)
    for name, reference in section(golden[0], "out.").items():
        assert relative_error(ours[name], reference) > 1e-3, name
