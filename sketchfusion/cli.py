"""`sketchfusion COMMAND --help` says what is written here; `python -m sketchfusion` is `sketchfusion`.

Results go to stdout, what is done and how far it is to stderr. A mistake is one line on stderr and exit code 2. The
Hub's client reads from the environment `HF_TOKEN` (or `hf auth login`) for private repositories and `HF_HUB_CACHE` for
where downloads are kept; with `HF_HUB_OFFLINE=1` the Hub is never asked.
"""

# Commands import what they need when they run: `--help` answers without torch.

from __future__ import annotations

import gc
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .errors import ConfigError, ImageError, SketchFusionError

if TYPE_CHECKING:
    from .images import ImageInput, Preprocess

app = typer.Typer(
    name="sketchfusion",
    help="Universal features for sketches and photos.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it takes "[default: 0.2]" for markup, and leaves it out
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option("--model", help="Bundled name, folder or Hub repository (owner/name@revision).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="Compute dtype: auto, float32, bfloat16, float16, float64.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files can be any bytes
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


def together(one: str, its: Any, other: str, others: Any) -> None:
    if (its is None) != (others is None):
        raise ConfigError(f"--{one}", f"and --{other} go together", legal="both, or neither")


def check_sketches(wanted: bool, sketches: str | None) -> None:
    if wanted and sketches is None:
        raise ConfigError("--sketches", "is missing: a sketch says what to find", legal="a set, and --sketches-root")


@contextmanager
def starting() -> Iterator[None]:
    """Around imports and loading: what they make stays, so no time is spent on looking for garbage in it."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def complain(problem: SketchFusionError | str) -> None:
    if isinstance(problem, ConfigError):  # what an option gave is called as the option is
        option = f"--{problem.key.replace('_', '-')}"
        if option in [argument.partition("=")[0] for argument in sys.argv]:
            problem = ConfigError(option, problem.problem, legal=problem.legal)
    print("sketchfusion:", " ".join(str(problem).split()), file=sys.stderr)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.INFO)  # what is done, and how far it is
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def encode(
    images: Annotated[list[str], typer.Argument(help="Image files, folders or URLs.", metavar="IMAGE")],
    out: Annotated[Path | None, typer.Option(help="Write the features to this safetensors file.")] = None,
    model: Model = "mini",
    as_json: Json = False,
    dense: Annotated[bool, typer.Option(help="Keep the dense maps; without them pooled vectors only.")] = True,
    normalize: Annotated[bool, typer.Option(help="Scale features to L2 norm 1.")] = False,
    ensemble: Annotated[int | None, typer.Option(help="Noised copies an image: 1 or even.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the canvas in pixels, a multiple of 8.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a forward.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Turn images, and all images in folders, into pooled and dense features.

    The file, which `Features.load` reads, holds `pooled` (N, D), `dense` (N, D, h, w) and the images' paths; it is made
    in memory, where a dense map takes 1 MB with the bundled model and 18 MB at full size. `--json` prints a list of
    objects, one an image: `path`, `pooled` and `dense` (their shapes) and `norm` (of the pooled vector). Among several
    images the good ones are written, each bad one gets a line on stderr, and the exit code is 2.
    """
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError("--out", f"the folder {out.parent} does not exist", legal="a file in a folder that does")
    if out is not None and not os.access(out.resolve().parent, os.W_OK):
        raise ConfigError("--out", f"the folder {out.parent} cannot be written to", legal="a file in one that can")
    if out is not None and out.is_dir():
        raise ConfigError("--out", f"{out} is a folder", legal="a file")

    with starting():
        from .data import find_images
        from .model import SketchFusion

        files = [file for image in images for file in (find_images(image) if os.path.isdir(image) else [image])]
        extractor = SketchFusion.from_pretrained(model, device=device, dtype=dtype)
    bad: list[ImageError] = []

    def leave_out(error: ImageError) -> None:
        complain(error)
        bad.append(error)

    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "dense": dense,
        "normalize": normalize,
        "ensemble": ensemble,
        "size": size,
        "on_error": leave_out,
    }
    kept = None if out is None else extractor.encode(files, **options)  # a file needs all at once
    for features in extractor.stream(files, **options) if kept is None else [kept]:
        rows += [
            {
                "path": path,
                "pooled": list(one.pooled.shape),
                "dense": None if one.dense is None else list(one.dense.shape),
                "norm": float(one.pooled.norm()),
            }
            for one, path in zip(features, features.paths or (), strict=True)
        ]
    if kept is not None and out is not None and rows:
        kept.save(out)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['path']}: pooled {row['pooled']}, dense {row['dense']}, norm {row['norm']:.3f}")
    if bad:
        raise typer.Exit(2)


def readable(paths: list[str], read: list[str], preprocess: Preprocess) -> Iterator[ImageInput]:
    """Load the images one by one, complain about the bad ones, and append the paths of the good ones to `read`."""
    from .images import open_image
    from .strokes import Strokes

    for path in paths:
        try:
            image = open_image(path)
            if isinstance(image, Strokes):
                preprocess(path)  # whether it can be drawn shows only then
        except ImageError as error:
            complain(error)
            continue
        read.append(path)
        yield image


@app.command()
def info(
    source: Annotated[str, typer.Argument(help="Bundled name, folder or Hub repository.", metavar="SOURCE")] = "mini",
    as_json: Json = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Show a model: its configuration, parameters and bytes by part, device and dtype.

    `--json` prints an object: `source`, `fingerprint`, `device`, `dtype`, `parameters` and `bytes` (by part, and
    `total`), `config`. Features can be compared where the fingerprints of their models are equal.
    """
    with starting():
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
        "fingerprint": model.fingerprint,
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
    print(f"{source} on {summary['device']} in {summary['dtype']}, fingerprint {summary['fingerprint']}")
    for name, count in summary["parameters"].items():
        print(f"  {name:<10} {count:>13,} parameters {summary['bytes'][name] / 1e6:>9.2f} MB")
    for key, value in summary["config"].items():
        print(f"  {key}: {value}")


@app.command()
def analyze(
    out: Annotated[Path, typer.Option(help="Folder to write to; made where it is missing.")],
    sketches: Annotated[Path | None, typer.Argument(help="Folder of sketches.", metavar="SKETCHES")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of photos.")] = None,
    model: Model = "mini",
    limit: Annotated[int | None, typer.Option(help="Images of each kind, evenly spaced over its folder.")] = None,
    as_json: Json = False,
    ensemble: Annotated[int | None, typer.Option(help="Noised copies an image: 1 or even.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a forward.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Show which spatial frequencies semantic, diffusion and fused features hold, and check the paper's claims.

    Writes `spectrum.png`, `components.png` (some images and their maps as colours) and `analysis.json`. Folders are
    searched with all that is inside them; of sketches and photos one is enough, and either may be a single file. Bad
    images are left out, each gets a line on stderr, and the exit code is 2.
    """
    folders = {kind: place for kind, place in {"sketch": sketches, "photo": photos}.items() if place is not None}
    if not folders:
        raise ConfigError("SKETCHES", "and --photos are both missing", legal="a folder of images for one or both")
    for place in folders.values():
        if out.resolve().is_relative_to(place.resolve()):  # and the next run would take its figures for images
            raise ConfigError("--out", f"{out} lies in {place}", legal="a folder outside of those that are searched")

    from . import plots
    from .data import find_images, spaced
    from .evaluation import analysis
    from .files import make_folder
    from .model import SketchFusion
    from .progress import Progress

    plots.require_matplotlib()
    paths = {kind: find_images(place, limit) for kind, place in folders.items()}
    make_folder(out)
    extractor = SketchFusion.from_pretrained(model, device=device, dtype=dtype)
    read: dict[str, list[str]] = {kind: [] for kind in paths}
    options: dict[str, Any] = {"ensemble": ensemble, "batch_size": batch_size}
    streams = {
        kind: Progress(kind, "image", len(found), None).over(readable(found, read[kind], extractor.preprocess))
        for kind, found in paths.items()
    }
    result = {"model": model} | analysis.analyze(extractor, streams, **options)
    for kind, good in read.items():
        if not good:
            raise SketchFusionError(f"{folders[kind]}: not one of its {len(paths[kind])} images can be read")
        result["kinds"][kind] |= {"folder": str(folders[kind]), "skipped": len(paths[kind]) - len(good)}
    text = json.dumps(result, indent=2)
    try:
        (out / "analysis.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SketchFusionError(f"{out}: cannot be written to: {error.strerror}") from None
    plots.save(plots.spectra(result), out / "spectrum.png")
    few = [(kind, path) for kind, good in read.items() for path in spaced(good, analysis.PICTURES)]
    pictures = analysis.pictures(extractor, [path for _, path in few], **options)
    plots.save(plots.components(pictures, [kind for kind, _ in few]), out / "components.png")
    print(text if as_json else analysis.table(result))
    if any(kind["skipped"] for kind in result["kinds"].values()):
        raise typer.Exit(2)


@app.command()
def train(
    task: Annotated[list[str], typer.Option(help="retrieval, recognition, correspondence, segmentation; repeatable.")],
    data: Annotated[list[str], typer.Option(help="Data set of each task, or one for all; see docs/data.md.")],
    root: Annotated[list[Path], typer.Option(help="Folder of each data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the log and the state to resume from.")],
    classes: Annotated[
        list[str], typer.Option(help="Of each set, or of all: seen, unseen, all, or a file with a name a line.")
    ] = ["all"],  # noqa: B006
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="Of each set, or of all: train, valid or test, where it has parts; all for none. [default: all]"
        ),
    ] = None,
    held_out: Annotated[
        list[str], typer.Option(help="To validate on: a share of each set, or classes: unseen, or a file.")
    ] = ["0.2"],  # noqa: B006
    limit: Annotated[int | None, typer.Option(help="At most so many sketches and photos a class of each set.")] = None,
    sketches: Annotated[str | None, typer.Option(help="Segmentation: the set with the sketches.")] = None,
    sketches_root: Annotated[Path | None, typer.Option(help="Segmentation: its folder.")] = None,
    model: Annotated[
        str | None, typer.Option(help="What to begin with: bundled name, folder or Hub repository. [default: mini]")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Begin with untrained adapters and aggregator.")] = False,
    diffusion: Annotated[
        str | None, typer.Option(help="With --semantic: build a new model on these backbones instead.")
    ] = None,
    semantic: Annotated[str | None, typer.Option(help="See --diffusion.")] = None,
    images: Annotated[int, typer.Option(help="Images of each task in a batch.")] = 64,
    level: Annotated[
        list[str] | None, typer.Option(help="Retrieval, of each task or of all: category or fine. [default: category]")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="Retrieval: info_nce or triplet. [default: info_nce]")] = None,
    hidden: Annotated[int | None, typer.Option(help="Recognition: hidden width of an MLP head.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    lr: Annotated[float, typer.Option(help="Learning rate after the warm-up.")] = 1e-3,
    mixing_lr_scale: Annotated[float, typer.Option(help="Mixing weights learn at so many times --lr.")] = 1.0,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-3,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.03,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    accumulate: Annotated[int, typer.Option(help="Batches an optimiser step.")] = 1,
    views: Annotated[
        int, typer.Option(help="Views per image in --cache, without which each look is another; 1: the image as it is.")
    ] = 4,
    cache: Annotated[Path | None, typer.Option(help="Keep latents and tokens of all views in this folder.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Ablation: adapters or mixing stay as they begin.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Recompute the UNet's activations instead of keeping them: slower, less memory.")
    ] = False,
    finetune: Annotated[bool, typer.Option(help="B-Finetuning: train UNet and semantic backbone too.")] = False,
    include_backbones: Annotated[bool, typer.Option(help="Copy the backbones into the checkpoint.")] = False,
    seed: Annotated[int, typer.Option(help="Of batches, views and heads.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two states to resume from.")] = 200,
    validate_every: Annotated[
        int, typer.Option(help="Steps, each with a checkpoint in --out, step-N; 0 for the end only.")
    ] = 0,
    as_json: Json = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Compute dtype; auto: bfloat16 on CUDA and where a CPU has it.")] = "auto",
) -> None:
    """Train adapters, aggregator and heads; the same command again resumes a run that was interrupted.

    For several GPUs: accelerate launch -m sketchfusion train … With `--json` it prints an object at the end:
    `checkpoint`, its folder, and `metrics`, what was measured on what was held out.
    """
    from functools import partial

    import torch
    from accelerate import PartialState

    from .data import DataSet, limited, load, load_common
    from .loading import resolve_device
    from .model import SketchFusion
    from .tasks.retrieval import LEVELS, LOSSES
    from .training import Settings
    from .training import train as run
    from .training.jobs import TASKS, make_job, make_jobs, open_held_out

    def of_each(name: str, given: list[Any]) -> list[Any]:
        if len(given) not in (1, len(task)):
            raise ConfigError(
                name, f"is given {len(given)} times for {len(task)} tasks", legal=f"once, or {len(task)} times"
            )
        return given * (len(task) // len(given))

    sets = list(zip(of_each("--data", data), of_each("--root", root), strict=True))
    chosen, parts, apart_of, levels = (
        of_each(name, given)
        for name, given in (
            ("--classes", classes),
            ("--part", [None if one == "all" else one for one in part or ["all"]]),
            ("--held-out", held_out),
            ("--level", level or ["category"]),
        )
    )
    for name, given, owner in (
        ("--level", level, "retrieval"),
        ("--loss", loss, "retrieval"),
        ("--hidden", hidden, "recognition"),
        ("--sketches", sketches, "segmentation"),
    ):
        if given is not None and owner not in task:
            raise ConfigError(name, f"says something about {owner}", legal=f"with --task {owner}")
    spelled = ("--task", task, TASKS), ("--level", levels, LEVELS), ("--loss", [loss or LOSSES[0]], LOSSES)
    for name, named, legal in spelled:
        for one in named:
            if one not in legal:
                raise ConfigError(name, f"is {one!r}", legal=", ".join(legal))
    together("sketches", sketches, "sketches-root", sketches_root)
    check_sketches("segmentation" in task, sketches)
    together("diffusion", diffusion, "semantic", semantic)
    if diffusion is not None and model is not None:
        raise ConfigError("--model", "and --diffusion each name what to begin with", legal="one of them")
    if finetune and dtype not in ("auto", "float32"):
        raise ConfigError("--dtype", f"is {dtype}", legal="float32 with --finetune, or not given")
    if finetune and cache is not None:
        raise ConfigError("--cache", "keeps what --finetune trains", legal="one of them")
    settings = Settings(
        steps=steps, lr=lr, mixing_lr_scale=mixing_lr_scale, weight_decay=weight_decay, warmup=warmup, clip=clip,
        accumulate=accumulate, views=views, seed=seed, checkpoint_every=checkpoint_every,
        validate_every=validate_every, without=tuple(without or ()), gradient_checkpointing=gradient_checkpointing,
        finetune=finetune,
    )  # fmt: skip
    loaded = [
        limited(load(*where, classes=names, part=one), limit)
        for where, names, one in zip(sets, chosen, parts, strict=True)
    ]
    apart: list[Any] = [
        float(names) if is_number(names) else limited(load(*where, classes=names, part=one), limit)
        for where, names, one in zip(sets, apart_of, parts, strict=True)
    ]
    drawn = None
    if sketches is not None and sketches_root is not None:
        masked = [i for i, name in enumerate(task) if name == "segmentation"]
        photos = [part for i in masked for part in (loaded[i], apart[i]) if isinstance(part, DataSet)]
        labels = sorted({label for part in photos for label in part.classes})
        drawn = limited(load_common(sketches, sketches_root, labels), limit)

    where = resolve_device(device)
    # float16 needs its gradients scaled, which `train` does; bfloat16 does not.
    kind = "float32" if finetune else "bfloat16" if dtype == "auto" and where.type == "cuda" else dtype
    torch.manual_seed(seed)
    extractor = (
        SketchFusion.from_pretrained(model or "mini", device=where, dtype=kind)
        if diffusion is None
        else SketchFusion.from_backbones(diffusion, semantic, device=where, dtype=kind)
    )
    if fresh:
        extractor.reset()
    jobs = make_jobs([
        partial(
            make_job, name, shown, extractor,
            held_out=kept, sketches=drawn, images=images, level=kind_of, loss=loss or "info_nce", hidden=hidden,
        )
        for name, shown, kept, kind_of in zip(task, loaded, apart, levels, strict=True)
    ])  # fmt: skip
    open_held_out(jobs)
    figures = run(
        extractor,
        [job.task for job in jobs],
        out,
        settings,
        cache=cache,
        validate=lambda model: {key: value for job in jobs for key, value in job.validate(model).items()},
        training_data="; ".join(job.shown for job in jobs),
        include_backbones=include_backbones,
    )
    if not PartialState().is_main_process:
        return
    for number, job in enumerate(jobs, 1):
        if {*job.held_out.classes}.isdisjoint(record.label for record in job.task.records):  # whole classes
            file = out / f"held-out{number if len(jobs) > 1 else ''}.txt"
            names = "".join(f"{name}\n" for name in job.held_out.classes)
            file.write_text(f"# {job.task.name}: {job.held_out.split}\n{names}", "utf-8", "surrogateescape")
    if as_json:
        print(json.dumps({"checkpoint": str(out), "metrics": figures}, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name}: {value:.4f}")
        print(f"checkpoint: {out}")


def split_commas(text: str) -> list[str]:
    """What stands between the commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@app.command()
def evaluate(
    task: Annotated[
        str, typer.Argument(help="zs-sbir, fg-sbir, recognition, correspondence or segmentation.", metavar="TASK")
    ],
    data: Annotated[str, typer.Option(help="Data set: sketchy, tuberlin, …; see docs/data.md.")],
    root: Annotated[Path, typer.Option(help="Its folder.")],
    classes: Annotated[str, typer.Option(help="seen, unseen, all, or a file with a name a line.")] = "all",
    part: Annotated[str | None, typer.Option(help="train, valid or test, where the set has parts.")] = None,
    model: Model = "mini",
    rows: Annotated[
        str | None,
        typer.Option(help="Comma-separated; other encoders by repository or folder. [default: the built-in ones]"),
    ] = None,
    convention: Annotated[str | None, typer.Option(help="Retrieval: zse, sake or sem-pcyc. [default: zse]")] = None,
    gallery: Annotated[
        str | None, typer.Option(help="fg-sbir: all, or class, photos of the sketch's own. [default: all]")
    ] = None,
    photos: Annotated[str | None, typer.Option(help="zs-sbir: another set with the photos.")] = None,
    photos_root: Annotated[Path | None, typer.Option(help="zs-sbir: its folder.")] = None,
    test_root: Annotated[Path | None, typer.Option(help="recognition: fit to all of root, test on this.")] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="recognition: share of the sketches to test on [default: 0.2]; correspondence and segmentation: "
            "what a training with this share held out [default: all]."
        ),
    ] = None,
    sketches: Annotated[str | None, typer.Option(help="segmentation: the set with the sketches.")] = None,
    sketches_root: Annotated[Path | None, typer.Option(help="segmentation: its folder.")] = None,
    queries: Annotated[int | None, typer.Option(help="segmentation: sketches per photo. [default: 1]")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many sketches and photos a class.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a forward.")] = None,
    ensemble: Annotated[int | None, typer.Option(help="Noised copies an image: 1 or even.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the canvas in pixels, a multiple of 8.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a report with figures to this folder.")] = None,
    as_json: Json = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure the model, its parts and other encoders on a task, beside the paper's rows.

    docs/evaluation.md describes the protocols and rows.
    """
    together("photos", photos, "photos-root", photos_root)
    together("sketches", sketches, "sketches-root", sketches_root)
    check_sketches(task == "segmentation", sketches)

    from . import evaluation
    from .evaluation import report as reporting

    if report is not None:
        reporting.check_directory(report)
    results = evaluation.evaluate(
        task, data, root, classes=classes, part=part, model=model, limit=limit, batch_size=batch_size,
        rows=split_commas(rows) if rows else tuple(evaluation.ROWS), ensemble=ensemble, size=size, device=device,
        dtype=dtype, convention=convention, gallery=gallery, test=test_root, held_out=held_out, queries=queries,
        photos=photos and (photos, photos_root), sketches=sketches and (sketches, sketches_root),
    )  # fmt: skip
    print(reporting.as_json(results) if as_json else reporting.text(results), flush=True)
    if report is not None:
        reporting.write(results, report)


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="Bundled name, folder, Hub repository; full: the published shapes, random weights.")
    ] = "mini",
    peers: Annotated[
        str | None, typer.Option(help="Comma-separated: plain, plain-float32, released, dift; or none. [default: all]")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Sides of the canvas in pixels, comma-separated. [default: the model's]")
    ] = "",
    batch_size: Annotated[str, typer.Option(help="Images a forward, comma-separated.")] = "1",
    ensemble: Annotated[str, typer.Option(help="Noised copies an image, comma-separated.")] = "1",
    runs: Annotated[int, typer.Option(help="Timed runs; the figures are their medians.")] = 5,
    plot: Annotated[Path | None, typer.Option(help="Draw images a second against batch size to this file.")] = None,
    compile: Annotated[bool, typer.Option(help="Compile the backbones with torch.compile.")] = False,
    profile: Annotated[bool, typer.Option(help="Say which operators take the time.")] = False,
    as_json: Json = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure the extractor on this machine beside other ways to run Stable Diffusion for features.

    All run in turns on the same weights, pixels and noises. docs/performance.md says what each way does.
    """

    def integers(name: str, text: str) -> list[int]:
        parts = split_commas(text)
        for part in parts:
            if not part.isdecimal():
                raise ConfigError(name, f"is {text!r}", legal="integers, separated by commas")
        return [int(part) for part in parts]

    batch_sizes, ensembles = integers("--batch-size", batch_size), integers("--ensemble", ensemble)
    sizes = integers("--size", size) or None

    from . import plots
    from .evaluation import bench as benchmark

    if plot is not None:
        plots.check_file(plot)
    chosen = list(benchmark.PEERS) if peers is None else [] if peers == "none" else split_commas(peers)
    result = benchmark.bench(
        model, peers=chosen, sizes=sizes, batch_sizes=batch_sizes, ensembles=ensembles, runs=runs,
        device=device, dtype=dtype, compile=compile, profile=profile,
    )  # fmt: skip
    print(json.dumps(result, indent=2) if as_json else benchmark.table(result), flush=True)
    if plot is not None:
        plots.save(plots.throughput(result), plot)
