"""How many noises are enough? Features of a few noises against the mean over 256.

    python examples/noise_study.py FOLDER… [--images 16] [--model mini] [--plot noises.png]

Diffusion features are those of noised latents, so each noise gives others; an ensemble averages them. For every way to
draw k noises this prints how far the features from the mean of k draws are from those from the mean of 256 others
(antithetic ones): the mean squared difference as a share of the features' variance over all images and cells, averaged
over trials, for the dense map and for the pooled vector. Ways:

    random       independent draws, as the released script's
    antithetic   pairs of a noise and its negative: what is odd in the noise cancels
    stratified   antithetic, and every value of the k noises from another of k strata of the normal distribution
    none         no noise at all, once: not what the UNet was trained on
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sketchfusion import Features, SketchFusion
from sketchfusion.data import find_images
from sketchfusion.images import collate

REFERENCE = 256
COUNTS = (1, 2, 4, 8, 16, 32)


def random(k: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(k, *shape, generator=generator)


def antithetic(k: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
    half = torch.randn(k // 2, *shape, generator=generator)
    return torch.cat([half, -half])


def stratified(k: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The k/2 strata below the median in another order at every value, and their mirror images."""
    order = torch.rand(k // 2, *shape, generator=generator).argsort(0)
    below = (order + torch.rand(k // 2, *shape, generator=generator)) / k
    half = torch.special.ndtri(below.clamp(min=1e-6))
    signs = torch.where(torch.rand(k // 2, *shape, generator=generator) < 0.5, -1, 1)
    return torch.cat([signs * half, -signs * half])


WAYS = {"random": random, "antithetic": antithetic, "stratified": stratified}


class Study:
    """Features of one batch of images under any noises."""

    def __init__(self, model: SketchFusion, paths: list[Path]):
        pixels, geometries = zip(*(model.preprocess(str(path)) for path in paths), strict=True)
        self.model, self.geometry = model, collate(geometries)
        self.latents, tokens = model.embed(torch.stack(pixels))
        self.hooks = model.adapters(tokens)

    def maps(self, noise: Tensor) -> dict[str, Tensor]:
        """The tapped maps under one noise, the same for all images."""
        diffusion = self.model.diffusion
        noised = diffusion.mix(self.latents, noise.to(self.latents.device))
        return diffusion(noised, self.hooks, inject_skips=self.model.config.inject_skips)

    def features(self, noises: Tensor) -> Features:
        totals: dict[str, Tensor] = {}
        for noise in noises:
            for tap, found in self.maps(noise).items():
                totals[tap] = totals.get(tap, 0) + found.float() / len(noises)
        return self.model.aggregate({tap: total.to(self.latents.dtype) for tap, total in totals.items()}, self.geometry)

    def error(self, found: Features, reference: Features) -> tuple[float, float]:
        """Of the cells on the images, and of the pooled vectors: a share of their variance."""
        on_image = self.geometry.mask(found.dense.shape[-1]).to(found.dense.device)
        cells = (features.dense.movedim(1, -1)[on_image] for features in (found, reference))
        return share_of_variance(*cells), share_of_variance(found.pooled, reference.pooled)


def share_of_variance(found: Tensor, reference: Tensor) -> float:
    found, reference = found.double(), reference.double()
    return ((found - reference).square().sum() / (reference - reference.mean(0)).square().sum()).item()


def draws(trials: int) -> Iterator[tuple[str, int, int]]:
    for way in WAYS:
        for k in COUNTS:
            if k % 2 == 0 or way == "random":
                yield from ((way, k, trial) for trial in range(trials))


@torch.no_grad()
def study(model: SketchFusion, paths: list[Path], trials: int) -> dict[str, dict[int, dict[str, float]]]:
    batch = Study(model, paths)
    shape = batch.latents.shape[1:]
    reference = batch.features(antithetic(REFERENCE, shape, torch.Generator().manual_seed(10**6)))
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for way, k, trial in draws(trials):
        noises = WAYS[way](k, shape, torch.Generator().manual_seed(trial))
        found.setdefault((way, k), []).append(batch.error(batch.features(noises), reference))
    found["none", 1] = [batch.error(batch.features(torch.zeros(1, *shape)), reference)]
    curves: dict[str, dict[int, dict[str, float]]] = {}
    for (way, k), pairs in found.items():
        dense, pooled = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        curves.setdefault(way, {})[k] = {"dense": dense, "pooled": pooled}
    return curves


def draw(curves: Mapping[str, Mapping[int, Mapping[str, float]]], path: str) -> None:
    from sketchfusion import plots

    figure, ((left, right),) = plots.new_figure(1, 2, 9, 3.4)
    for axes, kind in ((left, "dense"), (right, "pooled")):
        for way, points in curves.items():
            axes.plot(list(points), [point[kind] for point in points.values()], "o-", ms=4, label=way)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(COUNTS, [str(k) for k in COUNTS])
        axes.set_xlabel("noises", fontsize=8)
        axes.set_ylabel("error, share of the variance", fontsize=8)
        axes.set_title(kind, fontsize=9, loc="left")
    left.legend(fontsize=7, frameon=False)
    plots.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="of images")
    parser.add_argument("--images", type=int, default=16, help="of each folder, evenly spaced")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--plot")
    arguments = parser.parse_args()
    paths = [path for folder in arguments.folders for path in find_images(Path(folder), arguments.images)]
    curves = study(SketchFusion.from_pretrained(arguments.model, dtype="float32"), paths, arguments.trials)
    for way, points in curves.items():
        for k, point in points.items():
            print(f"{way:<11} {k:>3}  dense {point['dense']:.2e}  pooled {point['pooled']:.2e}")
    if arguments.plot:
        draw(curves, arguments.plot)
        Path(arguments.plot).with_suffix(".json").write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
