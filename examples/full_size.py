"""The paper's extractor at its true size, with random weights: shapes, seconds a part, peak memory.

    python examples/full_size.py PHOTO [--dtype bfloat16] [--runs 3] [--train 3]

Builds Stable Diffusion 2.1-base and CLIP ViT-L/14 at 336 px in their published configurations. Random weights tell
what the model costs, never what it sees: for features that mean something load published weights with
`SketchFusion.from_backbones()`. With `--train`, so many optimiser steps follow on the adapters and the aggregator: two
views of the photo, and two of its mirror image, have to find one another.
"""

import argparse
import resource
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from PIL import Image, ImageOps
from transformers import CLIPVisionConfig, CLIPVisionModel

from sketchfusion import SketchFusion
from sketchfusion.backbones.published import CLIP_L14_336, SD21_UNET, SD_SCHEDULER, SD_VAE
from sketchfusion.images import collate
from sketchfusion.tasks.retrieval import info_nce


def build(dtype: torch.dtype) -> SketchFusion:
    """SD 2.1-base and CLIP ViT-L/14 at 336 px, as `from_backbones()` would load them, with random weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # a float32 UNet would take 3.5 GB before it is cast
    pipeline = SimpleNamespace(
        vae=AutoencoderKL(**SD_VAE),
        unet=UNet2DConditionModel(**SD21_UNET),
        scheduler=PNDMScheduler(**SD_SCHEDULER),
    )
    clip = CLIPVisionModel(CLIPVisionConfig(**CLIP_L14_336))
    torch.set_default_dtype(torch.float32)
    return SketchFusion.from_backbones(pipeline, clip, null_prompt=torch.randn(77, 1024), dtype=dtype)


@torch.no_grad()
def seconds_by_part(model: SketchFusion, photo: str) -> dict[str, float]:
    """One pass of one image, timed part by part."""
    seconds: dict[str, float] = {}

    def timed(name: str, part: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = part()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        return result

    pixels, _ = timed("preprocess", lambda: model.preprocess(photo))
    pixels = pixels[None].to(model.device)
    latents = timed("vae encoder", lambda: model.diffusion.encode(pixels))
    tokens = timed("semantic", lambda: model.semantic(pixels))
    hooks = timed("adapters", lambda: model.adapters(tokens))
    noised = model.diffusion.add_noise(latents, 0)
    maps = timed("unet", lambda: model.diffusion(noised, hooks, inject_skips=True))
    timed("aggregator", lambda: model.aggregator(maps))
    return seconds | {"total": sum(seconds.values())}


def train(model: SketchFusion, photo: str, steps: int) -> None:
    """Optimiser steps at true size, activations recomputed; the adapters leave zero, so the last loss differs."""
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3)
    image = Image.open(photo).convert("RGB")
    views = [image, ImageOps.mirror(image), ImageOps.grayscale(image), ImageOps.grayscale(ImageOps.mirror(image))]
    pixels, geometries = zip(*(model.preprocess(view) for view in views), strict=True)
    geometry = collate(geometries)
    for step in range(steps):
        start = time.perf_counter()
        pooled = model(torch.stack(pixels), geometry).pooled
        loss = info_nce(pooled[:2], pooled[2:], torch.eye(2, dtype=torch.bool, device=pooled.device), temperature=0.07)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - start
        print(f"step {step + 1}: loss {loss.item():.4f}, {seconds:.1f} s for {len(views)} images, {peak_memory()}")


def peak_memory() -> str:
    host = f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    if not torch.cuda.is_available():
        return host
    return f"{host}, on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--runs", type=int, default=3, help="the fastest of so many runs is printed")
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="then train for so many steps")
    arguments = parser.parse_args()

    model = build(getattr(torch, arguments.dtype))
    trained = sum(p.numel() for p in model.trainable_parameters())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    print(f"{model.device}, {model.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"trainable parameters {trained / 1e6:.2f} M, frozen parameters that run {frozen / 1e6:.1f} M")

    runs = [seconds_by_part(model, arguments.photo) for _ in range(arguments.runs)]
    for part, seconds in min(runs, key=lambda run: run["total"]).items():
        print(f"{part:<12} {seconds:8.3f} s")
    features = model.encode(arguments.photo)
    print(f"dense {tuple(features.dense.shape)}, pooled {tuple(features.pooled.shape)}, {features.dense.dtype}")
    print(peak_memory())
    if arguments.train:
        train(model, arguments.photo, arguments.train)


if __name__ == "__main__":
    main()
