"""Train the paper's extractor at its true size, with random weights: seconds and memory of an optimiser step.

    python examples/full_size.py PHOTO [--steps 3] [--dtype bfloat16]

Builds Stable Diffusion 2.1-base and CLIP ViT-L/14 at 336 px in their published configurations. Random weights tell
what a step costs, never what is learned: for that load published weights with `SketchFusion.from_backbones()`. Two
views of the photo, and two of its mirror image, have to find one another. `sketchfusion bench --model full` measures
what encoding costs.
"""

import argparse
import resource
import time

import torch
from PIL import Image, ImageOps

from sketchfusion.evaluation.bench import full_size
from sketchfusion.images import collate
from sketchfusion.tasks.retrieval import info_nce


def peak_memory() -> str:
    host = f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    if not torch.cuda.is_available():
        return host
    return f"{host}, on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()

    model = full_size(dtype=arguments.dtype, published=getattr(torch, arguments.dtype))
    for parameter in model.adapters.parameters():
        torch.nn.init.zeros_(parameter)  # where training begins
    trained = sum(p.numel() for p in model.trainable_parameters())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    print(f"{model.device}, {model.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"trainable parameters {trained / 1e6:.2f} M, frozen parameters that run {frozen / 1e6:.1f} M")

    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3)
    image = Image.open(arguments.photo).convert("RGB")
    views = [image, ImageOps.mirror(image), ImageOps.grayscale(image), ImageOps.grayscale(ImageOps.mirror(image))]
    pixels, geometries = zip(*(model.preprocess(view) for view in views), strict=True)
    geometry = collate(geometries)
    for step in range(arguments.steps):
        start = time.perf_counter()
        pooled = model(torch.stack(pixels), geometry).pooled
        loss = info_nce(pooled[:2], pooled[2:], torch.eye(2, dtype=torch.bool, device=pooled.device), temperature=0.07)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(f"step {step + 1}: loss {loss.item():.4f}, {seconds:.1f} s for {len(views)} images, {peak_memory()}")


if __name__ == "__main__":
    main()
