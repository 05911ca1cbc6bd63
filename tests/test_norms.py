"""The frozen networks with their group norms replaced are the networks that diffusers runs."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, Transformer2DModel, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from sketchfusion import SketchFusion
from sketchfusion.backbones.norms import GroupNorm, QuickGELUMLP, Resnet, fuse


def outputs(network: nn.Module) -> torch.Tensor:
    """What a VAE's encoder or a UNet makes of the same noise, in both layouts."""
    torch.manual_seed(0)
    if isinstance(network, AutoencoderKL):
        return network.encode(torch.rand(2, 3, 32, 32)).latent_dist.parameters
    context = torch.randn(2, 7, network.config.cross_attention_dim, dtype=network.dtype)
    return network(torch.randn(2, 4, 8, 8, dtype=network.dtype), 195, context).sample


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("scale_shift", ["default", "scale_shift"])
@torch.no_grad()
def test_a_fused_unet_is_the_same(backbones: dict[str, Path], scale_shift: str, linear: bool) -> None:
    config = dict(UNet2DConditionModel.load_config(backbones["diffusion"] / "unet"))
    torch.manual_seed(1)
    plain = UNet2DConditionModel.from_config(
        config | {"resnet_time_scale_shift": scale_shift, "use_linear_projection": linear}
    )
    plain = plain.eval().double()
    fused = copy.deepcopy(plain)
    fuse(fused)
    for one in (fused, copy.deepcopy(fused).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(outputs(one), outputs(plain), rtol=0, atol=1e-12)
    assert list(fused.state_dict()) == list(plain.state_dict())
    with_silu = [part.silu for part in fused.modules() if isinstance(part, GroupNorm)]
    resnets = 0 if scale_shift == "scale_shift" else sum("norm2.weight" in name for name in resnet_keys(plain))
    assert sum(with_silu) == 2 * resnets
    assert len(with_silu) > sum(with_silu)


@pytest.mark.parametrize(("activation", "fused_ones"), [("quick_gelu", 2), ("gelu", 0)])
def test_a_fused_clip_is_the_same(activation: str, fused_ones: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, hidden_act=activation)
    plain = CLIPVisionModel(config).eval().double()
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert sum(isinstance(part, QuickGELUMLP) for part in fused.modules()) == fused_ones
    assert list(fused.state_dict()) == list(plain.state_dict())
    pixels, gradients = torch.randn(3, 3, 32, 32).double(), []
    expected, found = (network(pixels).last_hidden_state for network in (plain, fused))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for network, tokens in ((plain, expected), (fused, found)):  # B-Finetuning trains it
        gradients.append(torch.autograd.grad(tokens.square().sum(), list(network.parameters())[:6]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_maps_stay_channels_last(model: SketchFusion) -> None:
    """A map in another layout is turned back by what takes it, at the price of a pass over it."""
    found: list[torch.Tensor] = []
    for part in model.diffusion.unet.modules():
        if isinstance(part, Resnet | Transformer2DModel):
            part.register_forward_hook(lambda part, _, out: found.append(out[0] if isinstance(out, tuple) else out))
    model.encode(Image.effect_noise((64, 48), 80))
    assert len(found) > 10
    wide = [out for out in found if out.shape[-1] > 1]
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in wide)


def resnet_keys(network: nn.Module) -> list[str]:
    return [name for name in network.state_dict() if ".resnets." in name]


@torch.no_grad()
def test_a_fused_encoder_is_the_same_bit_for_bit(backbones: dict[str, Path]) -> None:
    plain = AutoencoderKL.from_pretrained(backbones["diffusion"] / "vae").eval()
    fused = copy.deepcopy(plain)
    fuse(fused.encoder)
    assert torch.equal(outputs(fused), outputs(plain))
    left = {name for name, part in fused.encoder.named_modules() if type(part) is nn.GroupNorm}
    assert left == {"mid_block.attentions.0.group_norm"}  # on tokens, not on maps


def test_what_a_model_runs_is_fused(model: SketchFusion) -> None:
    for network in (model.diffusion.vae, model.diffusion.unet):
        norms = [name for name, part in network.named_modules() if type(part) is nn.GroupNorm]
        assert all("attentions.0.group_norm" in name for name in norms)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_features_on_cuda_are_those_on_the_cpu(model: SketchFusion, dtype: torch.dtype, tolerance: float) -> None:
    picture = Image.effect_noise((50, 40), 80)
    expected = model.encode(picture).dense
    found = model.to("cuda", dtype).encode(picture).dense.cpu()
    cosines = torch.nn.functional.cosine_similarity(found, expected, dim=0)
    assert cosines.min() > 1 - tolerance
