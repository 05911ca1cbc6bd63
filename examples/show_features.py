"""Draw what the extractor sees: dense features of images side by side, their principal components as colours.

    python examples/show_features.py examples/images/cat.svg examples/images/cat.jpg --out features.png

One projection for all images, each image's mean removed: cells of the same colour differ from their image's mean in the
same way.
"""

import argparse

from PIL import Image

from sketchfusion import SketchFusion
from sketchfusion.plots import principal_colours

TILE = 320  # side of a picture, pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--out", default="features.png")
    parser.add_argument("--model", default="mini")
    arguments = parser.parse_args()

    model = SketchFusion.from_pretrained(arguments.model)
    features = model.encode(arguments.images, ensemble=8)
    colours = principal_colours(features.dense, features.geometry.mask(model.config.aggregator_grid))

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
