"""Draw what the extractor sees: dense features of images side by side, their principal components as colours.

    python examples/show_features.py examples/images/cat.svg examples/images/cat.jpg --out features.png

One projection for all images, each image's mean removed: cells of the same colour differ from their image's mean in the
same way.
"""

import argparse

import torch
from PIL import Image

from sketchfusion import Features, SketchFusion

TILE = 320  # side of a picture, pixels


def principal_colours(features: Features, grid: int) -> torch.Tensor:
    """The first three principal components of all cells that lie on an image, (N, g, g, 3) in [0, 1].

    Each image's mean is removed first: it says sketch or photo, and would take the first component for itself.
    """
    cells = torch.nn.functional.normalize(features.dense, dim=1).permute(0, 2, 3, 1)
    on_image = features.geometry.mask(grid)[..., None]
    mean = (cells * on_image).sum((1, 2), keepdim=True) / on_image.sum((1, 2), keepdim=True)
    cells, on_image = cells - mean, on_image[..., 0]
    _, _, directions = torch.linalg.svd(cells[on_image], full_matrices=False)
    projected = cells @ directions[:3].T
    low, high = (projected[on_image].quantile(q, dim=0) for q in (0.02, 0.98))
    colours = ((projected - low) / (high - low)).clamp(0, 1)
    return torch.where(on_image[..., None], colours, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--out", default="features.png")
    parser.add_argument("--model", default="mini")
    arguments = parser.parse_args()

    model = SketchFusion.from_pretrained(arguments.model)
    features = model.encode(arguments.images, ensemble=8)
    colours = principal_colours(features, model.config.aggregator_grid)

    sheet = Image.new("RGB", (2 * TILE * len(arguments.images), TILE), "white")
    for column, (image, colour) in enumerate(zip(arguments.images, colours, strict=True)):
        pixels, _ = model.preprocess(image)
        for offset, picture in enumerate((pixels.permute(1, 2, 0), colour)):
            tile = Image.fromarray((picture * 255).byte().numpy())
            resample = Image.Resampling.NEAREST if offset else Image.Resampling.BICUBIC
            sheet.paste(tile.resize((TILE, TILE), resample), ((2 * column + offset) * TILE, 0))
    sheet.save(arguments.out)


if __name__ == "__main__":
    main()
