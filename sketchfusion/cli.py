"""The command line. Commands import what they need when they run: `--help` answers without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .errors import ConfigError, ImageError, SketchFusionError

if TYPE_CHECKING:
    from .images import ImageInput

app = typer.Typer(
    name="sketchfusion",
    help="Universal features for sketches and photos.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option("--model", help="Bundled name, folder or Hub repository.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="Compute dtype: auto, float32, bfloat16, float16, float64.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except SketchFusionError as error:
        complain(error)
        code = 2
    except typer.Abort:  # Ctrl-C
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a command line it cannot read
            raise
        complain(f"{error.format_message()} See sketchfusion --help.")
        code = 2
    raise SystemExit(code)


def complain(problem: SketchFusionError | str) -> None:
    print("sketchfusion:", " ".join(str(problem).split()), file=sys.stderr)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def encode(
    images: Annotated[list[str], typer.Argument(help="Image files, SVG drawings or URLs.", metavar="IMAGE")],
    out: Annotated[Path | None, typer.Option(help="Write the features to this safetensors file.")] = None,
    model: Model = "mini",
    as_json: Json = False,
    dense: Annotated[bool, typer.Option(help="Keep the dense maps.")] = True,
    normalize: Annotated[bool, typer.Option(help="Scale features to L2 norm 1.")] = False,
    ensemble: Annotated[int | None, typer.Option(help="Noised copies an image: 1 or even.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the canvas in pixels, a multiple of 8.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a forward.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Turn images into pooled and dense features.

    The file holds `pooled` (N, D) and `dense` (N, D, h, w), and the images' paths in its metadata. Among several
    images the good ones are written, each bad one gets a line on stderr, and the exit code is 2.
    """
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError("--out", f"the folder {out.parent} does not exist", legal="a file in a folder that does")
    if out is not None and out.is_dir():
        raise ConfigError("--out", f"{out} is a folder", legal="a file")

    from .model import SketchFusion

    extractor = SketchFusion.from_pretrained(model, device=device, dtype=dtype)
    read: list[str] = []
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "dense": dense,
        "normalize": normalize,
        "ensemble": ensemble,
        "size": size,
    }
    kept = None if out is None else extractor.encode(readable(images, read), **options)  # a file needs all at once
    for features in extractor.stream(readable(images, read), **options) if kept is None else [kept]:
        rows += [
            {
                "path": path,
                "pooled": list(one.pooled.shape),
                "dense": None if one.dense is None else list(one.dense.shape),
                "norm": float(one.pooled.norm()),
            }
            for path, one in zip(read[len(rows) :], features, strict=False)
        ]
    if kept is not None and out is not None and read:
        kept.save(out, paths=read)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['path']}: pooled {row['pooled']}, dense {row['dense']}, norm {row['norm']:.3f}")
    if len(read) < len(images):
        raise typer.Exit(2)


def readable(paths: list[str], read: list[str]) -> Iterator[ImageInput]:
    """Load the images one by one, complain about the bad ones, and append the paths of the good ones to `read`."""
    from .images import open_image

    for path in paths:
        try:
            image = open_image(path)
        except ImageError as error:
            complain(error)
            continue
        read.append(path)
        yield image


@app.command()
def info(
    source: Annotated[str, typer.Argument(help="Bundled name, folder or Hub repository.")] = "mini",
    as_json: Json = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Show a model: its configuration, parameters and bytes by part, device and dtype."""
    from .model import SketchFusion

    model = SketchFusion.from_pretrained(source, device=device, dtype=dtype)
    parts = {
        "vae": model.diffusion.vae,
        "unet": model.diffusion.unet,
        "semantic": model.semantic,
        "adapters": model.adapters,
        "aggregator": model.aggregator,
    }
    summary: dict[str, Any] = {
        "source": source,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "bytes": {name: sum(p.nbytes for p in part.parameters()) for name, part in parts.items()},
        "config": model.config.to_dict(),
    }
    for figures in (summary["parameters"], summary["bytes"]):
        figures["total"] = sum(figures.values())
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    print(f"{source} on {summary['device']} in {summary['dtype']}")
    for name, count in summary["parameters"].items():
        print(f"  {name:<10} {count:>13,} parameters {summary['bytes'][name] / 1e6:>9.2f} MB")
    for key, value in summary["config"].items():
        print(f"  {key}: {value}")
