"""The true configurations, on the meta device: published key counts, and every site, tap and adapter width fits."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from sketchfusion import SketchFusion
from sketchfusion.backbones import published
from sketchfusion.images import collate, letterbox

UNETS = {"sd15": published.SD15_UNET, "sd21-base": published.SD21_UNET}
CLIPS = {"clip-l14": published.CLIP_L14, "clip-l14-336": published.CLIP_L14_336}


@pytest.mark.parametrize("name", UNETS)
def test_published_key_counts_of_stable_diffusion(name: str) -> None:
    with torch.device("meta"):
        assert len(UNet2DConditionModel(**UNETS[name]).state_dict()) == 686
        assert len(AutoencoderKL(**published.SD_VAE).state_dict()) == 248


@pytest.mark.parametrize("name", CLIPS)
def test_published_key_counts_of_clip(name: str) -> None:
    config = CLIPVisionConfig(**CLIPS[name])
    with torch.device("meta"):
        assert len(CLIPVisionModel(config).state_dict()) == 391
        assert len(CLIPVisionModelWithProjection(config).state_dict()) == 392


def build(unet: dict[str, Any], clip: dict[str, Any], **settings: Any) -> SketchFusion:
    with torch.device("meta"):
        vae, diffuser = AutoencoderKL(**published.SD_VAE), UNet2DConditionModel(**unet)
        vision = CLIPVisionModel(CLIPVisionConfig(**clip))
        prompt = torch.empty(77, unet["cross_attention_dim"])
    scheduler = PNDMScheduler(**published.SD_SCHEDULER)
    pipeline = SimpleNamespace(vae=vae, unet=diffuser, scheduler=scheduler)
    return SketchFusion.from_backbones(pipeline, vision, null_prompt=prompt, device="meta", dtype="float32", **settings)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("unet", UNETS)
def test_every_site_tap_and_adapter_width_fits(unet: str, clip: str) -> None:
    model = build(UNETS[unet], CLIPS[clip])
    assert {site: tuple(a.weight.shape[:2]) for site, a in model.adapters.sites.items()} == {
        "down0": (320, 1024),
        "down1": (640, 1024),
        "down2": (1280, 1024),
        "down3": (1280, 1024),
        "up0": (1280, 1024),
        "up1": (1280, 1024),
        "up2": (640, 1024),
    }
    adapters, aggregator = (sum(p.numel() for p in part.parameters()) for part in (model.adapters, model.aggregator))
    assert round(adapters / 1e6, 2) == 6.89
    assert round(aggregator / 1e6, 2) == 5.85

    pixels = torch.empty(2, 3, 512, 512, device="meta")
    latents, tokens = model.embed(pixels)
    assert latents.shape == (2, 4, 64, 64)
    assert tokens.shape == (2, 1024, *(2 * [CLIPS[clip]["image_size"] // 14]))
    maps = model.diffusion(latents, model.adapters(tokens), inject_skips=True)
    shapes = {tap: tuple(m.shape[1:]) for tap, m in maps.items()}
    assert shapes == {"up0": (1280, 16, 16), "up1": (1280, 32, 32), "up2": (640, 64, 64)}
    features = model(pixels, collate([letterbox(512, 512, 512)] * 2))
    assert features.dense.shape == (2, 1280, 60, 60)
    assert features.pooled.shape == (2, 1280)


def test_up_block_3_can_be_tapped_by_configuration() -> None:
    model = build(published.SD21_UNET, published.CLIP_L14, taps=["up1", "up3"], sites=["down0", "mid", "up3"])
    maps = model.diffusion(torch.empty(1, 4, 64, 64, device="meta"), {}, inject_skips=True)
    assert {tap: m.shape[1] for tap, m in maps.items()} == {"up1": 1280, "up3": 320}
    assert model.adapters.sites["up3"].weight.shape[0] == 320
    assert list(model.aggregator.taps) == ["up1", "up3"]
