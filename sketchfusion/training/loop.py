"""The training loop: batches of one or several tasks, on one or several devices, that goes on after a kill."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..config import check_count
from ..data import Record
from ..errors import ConfigError, SketchFusionError
from ..files import make_folder
from ..images import Geometry
from ..model import SketchFusion
from ..progress import Progress
from ..tasks import Sample, Task
from ..tasks.recognition import Recognition
from . import checkpoints
from .cache import Embedded, Entry, FrozenCache, digest, digest_of, pixels_of
from .views import draw_view

log = logging.getLogger(__name__)

ABLATIONS = ("adapters", "mixing")
SMALLEST_SCALE = 1e-4  # of float16 gradients: it begins at 65,536, and halves with each step that overflows
_LEAST = {"steps": 1, "accumulate": 1, "views": 1, "seed": 0, "checkpoint_every": 1, "validate_every": 0}


@dataclass(frozen=True)
class Settings:
    """How to train. The defaults suit the bundled model's size; the released script's are in brackets."""

    steps: int = 1000  # optimiser steps
    lr: float = 1e-3  # of AdamW, after the warm-up; falls to a thousandth of it by a cosine [1.25e-3, to 1e-6]
    mixing_lr_scale: float = 1.0  # the mixing weights, one number a tap, learn at so many times `lr`
    weight_decay: float = 1e-3  # of AdamW [1e-3]
    warmup: float = 0.03  # share of the steps in which the learning rate rises
    clip: float = 1.0  # largest gradient norm
    accumulate: int = 1  # batches an optimiser step
    # K: without a cache every look is a view of its own.
    views: int = 4  # views an image in the cache, the first the image as it is, the others augmented; 1: only that one
    seed: int = 0  # of batches and views
    checkpoint_every: int = 200  # steps
    validate_every: int = 0  # steps, each with a checkpoint of its own; 0: at the end only
    without: tuple[str, ...] = ()  # ablations, left as they start: "adapters" (zero), "mixing" (equal weights)
    gradient_checkpointing: bool = False  # recompute the UNet's activations instead of keeping them
    finetune: bool = False  # B-Finetuning: the UNet and the semantic backbone learn too

    def __post_init__(self) -> None:
        for key, low in _LEAST.items():
            check_count(key, getattr(self, key), low)
        for key in ("lr", "mixing_lr_scale", "clip"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(key, f"is {getattr(self, key)}", legal="a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError("weight_decay", f"is {self.weight_decay}", legal="a number from 0 up")
        if not 0 <= self.warmup <= 1:
            raise ConfigError("warmup", f"is {self.warmup}", legal="0 to 1, a share of the steps")
        for name in self.without:
            if name not in ABLATIONS:
                raise ConfigError("without", f"names {name!r}", legal=", ".join(ABLATIONS))

    def learning_rate(self, step: int) -> float:
        """Of optimiser step `step`, counted from 0: a linear warm-up, then a cosine down to a thousandth."""
        warmup = round(self.warmup * self.steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (0.001 + 0.999 * (1 + math.cos(math.pi * progress)) / 2)


Validate = Callable[[SketchFusion], dict[str, float]]


class _Trainee(nn.Module):
    """The model and the tasks' heads as one module, for accelerate: a batch in, a loss out."""

    def __init__(self, model: SketchFusion, tasks: Sequence[Task], finetune: bool):
        super().__init__()
        self.model, self.finetune = model, finetune
        self.tasks = nn.ModuleList(cast("Sequence[nn.Module]", tasks))
        names = [task.name for task in tasks]
        # In the log: a task that is there twice is told apart by its number.
        self.labels = [name if names.count(name) == 1 else f"{name}{i}" for i, name in enumerate(names, 1)]

    def forward(
        self, latents: Tensor, tokens: Tensor, geometry: Geometry, samples: list[list[Sample]]
    ) -> tuple[Tensor, dict[str, float]]:
        if self.finetune:  # these are pixels: what the semantic backbone sees in them is learned
            tokens = self.model.semantic(tokens)
        # Several GPUs: it came with the batch, and is looked at image by image.
        geometry = Geometry(*(torch.as_tensor(field).cpu() for field in geometry))
        features = self.model.fuse(latents, tokens, geometry)
        parts: dict[str, float] = {}
        total, start = torch.zeros((), device=latents.device), 0
        for label, task, mine in zip(self.labels, self.tasks, samples, strict=True):
            found: Any = cast("Task", task).loss(features[start : start + len(mine)], mine)
            if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
                raise ConfigError(
                    f"task {task.name}", "has another loss", legal="(loss, its parts for the log by name)"
                )
            cost, shown = found
            start += len(mine)
            total = total + cost
            parts |= {f"{label}.{name}": value for name, value in shown.items()}
        return total, parts


def train(
    model: SketchFusion,
    tasks: Task | Sequence[Task],
    out: str | Path,
    settings: Settings | None = None,
    *,
    cache: str | Path | None = None,
    validate: Validate | None = None,
    training_data: str | None = None,
    include_backbones: bool = False,
    progress: bool | None = None,
) -> dict[str, float]:
    """Train adapters, aggregator, mixing weights and the tasks' heads; write an ordinary checkpoint folder.

    A run that was killed is started again by the same call, goes on from `out/training.safetensors`, and comes to the
    same losses, on a GPU to rounding. (The same call begins with the same weights: load the model again, and before
    `from_backbones` or `reset`, which draw the aggregator at random, say `torch.manual_seed`.) Under `accelerate
    launch` every process draws batches of its own.

    Args:
        model: trained in place. Its dtype is what the backbones compute in; what is trained stays float32.
        tasks: one or several; with several, a step's batch holds images of each, and their losses are summed.
        out: folder for the checkpoint, `log.csv`, `validation.csv` and the state of a run that goes on.
        settings: how to train.
        cache: folder for latents and semantic tokens, which training does not change; without one they are computed
            at every step, from views that are drawn afresh each time.
        validate: called on the model every `validate_every` steps and at the end, without gradients, model and tasks
            in eval mode; what it returns goes into `validation.csv` and the checkpoint's card. It should look at
            classes that are not trained on. Before the end the checkpoint goes into `out/step-<N>`, so that the best
            one is not lost; with `finetune`, whose backbones are gigabytes, none does.
        training_data: what was trained on, in words, for the model card, which says it after what the model had seen
            before.
        include_backbones: as for `SketchFusion.save_pretrained`.
        progress: show a progress bar with the time left; by default on a terminal.

    Returns:
        What `validate` returned at the end; else an empty dict.

    Raises:
        ConfigError: a setting is illegal, or the model's dtype is float16 on a CPU; there is no task, or one draws
            or returns something else than a `Task` does, or `validate` does.
        ImageError: naming an image that cannot be read.
        SketchFusionError: `out` holds another run, or one is running there; the loss is not finite, or its gradient (in
            float16 such steps are left out, unless there is no end of them); out of memory on the GPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs

    settings = settings or Settings()
    jobs: list[Task] = list(tasks) if isinstance(tasks, Sequence) else [tasks]
    out = Path(out)
    drawn = [_draw(task) for task in jobs]
    if not drawn:
        raise ConfigError("tasks", "are none", legal="one task or more")
    # In half precision the gradients of a float16 UNet need a scaler; bfloat16 and float32 need nothing.
    half = model.dtype is torch.float16
    if half and model.device.type == "cpu":  # accelerate has none there
        raise ConfigError("dtype", "is float16", legal="float32 or bfloat16 to train on a CPU")
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # else accelerate would move it to the first
    precision = "fp16" if half else "no"
    if AcceleratorState._shared_state and not torch.distributed.is_initialized():
        known = AcceleratorState()
        if (known.mixed_precision, known.device.type) != (precision, model.device.type):
            AcceleratorState._reset_state(reset_partial_state=True)  # it would keep those of an earlier run
    accelerator = Accelerator(
        cpu=model.device.type == "cpu",
        mixed_precision=precision,
        kwargs_handlers=[
            # float16 is for the scaler: the layers see to their dtypes themselves, as they do in `encode`.
            AutocastKwargs(enabled=False),
            # A backbone that is fine-tuned has parameters behind what is read of it.
            DistributedDataParallelKwargs(find_unused_parameters=settings.finetune),
            InitProcessGroupKwargs(timeout=timedelta(days=1)),  # the others wait while one validates
        ],
    )
    if sum(isinstance(task, Recognition) for task in jobs) > 1:
        raise ConfigError("task", "is recognition twice", legal="recognition once: a checkpoint has one head")
    if settings.finetune:
        if model.dtype is not torch.float32 or cache is not None:
            raise ConfigError("finetune", "trains the backbones themselves", legal="dtype='float32' and no cache")
        model.unfold()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    make_folder(out)
    alone = _alone(out) if accelerator.is_main_process else nullcontext()
    with alone, _enough_memory(model.device), _learning(model, jobs, settings):
        return _train(
            model, jobs, out, settings, accelerator, sum(drawn),
            cache=cache, validate=validate, training_data=training_data, include_backbones=include_backbones,
            progress=progress,
        )  # fmt: skip


def _draw(task: Task) -> int:
    """How many images it draws for a step; what is wrong with its batch is better known before all else."""
    batch = task.batch(np.random.default_rng(0))
    if not isinstance(batch, Sequence) or not batch or not all(isinstance(one, Record) for one in batch):
        raise ConfigError(f"task {task.name}", "has another batch", legal="a list of records, one or more")
    if set(batch) - set(task.records):
        raise ConfigError(f"task {task.name}", "draws what is not among its records", legal="records of `task.records`")
    return len(batch)


@contextmanager
def _learning(model: SketchFusion, jobs: Sequence[Task], settings: Settings) -> Iterator[None]:
    """Meanwhile what the settings leave out does not learn, and the backbones that they fine-tune do; the tasks are in
    training mode.
    """
    heads = nn.ModuleList(cast("Sequence[nn.Module]", jobs)).train()
    left_out: list[Any] = [
        model.adapters if name == "adapters" else model.aggregator.mixing_weights for name in settings.without
    ]
    try:
        for part in left_out:
            part.requires_grad_(False)
        if settings.finetune:
            model.diffusion.thaw(model.diffusion.unet)
            model.semantic.thaw(model.semantic.model)
        yield
    finally:
        for part in left_out:
            part.requires_grad_(True)
        model.diffusion.freeze()
        model.semantic.freeze()
        model.eval()
        heads.eval()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Meanwhile no other process trains in this folder: its log is locked, where the system has locks."""
    path = out / "log.csv"
    with _written(path):
        file = path.open("a", encoding="utf-8")
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SketchFusionError(f"{out}: another process is training in this folder") from None
        except (ImportError, OSError):
            log.debug("%s cannot be locked", path)
        yield


def _train(
    model: SketchFusion,
    jobs: list[Task],
    out: Path,
    settings: Settings,
    accelerator: Any,
    batch: int,  # images of all tasks together
    *,
    cache: str | Path | None,
    validate: Validate | None,
    training_data: str | None,
    include_backbones: bool,
    progress: bool | None,
) -> dict[str, float]:
    trainee = _Trainee(model, jobs, settings.finetune).to(accelerator.device)
    parameters = [(name, p) for name, p in trainee.named_parameters() if p.requires_grad]
    mixing = model.aggregator.mixing_weights
    groups = [
        {"params": [p for _, p in parameters if p is not mixing], "scale": 1.0},
        {"params": [p for _, p in parameters if p is mixing], "scale": settings.mixing_lr_scale},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.99))
    records = tuple(dict.fromkeys(record for task in jobs for record in task.records))
    rank, world = accelerator.process_index, accelerator.num_processes
    run = identity(model, jobs, settings, kept=cache is not None, processes=world)
    state = checkpoints.State(out, run, trainee, optimizer, accelerator.scaler)
    first = state.resume()
    if first:
        log.info("%s goes on behind step %d", out, first)
    main = accelerator.is_main_process
    progress = progress if main else False
    # Before the cache, which can take hours: a folder that cannot be written to is better known at once.
    journal = _Journal(out / "log.csv", first) if main else None
    validated = 0  # the last step that was
    if main and first and validate is not None:
        validated = _Journal(out / "validation.csv", first).last
    elif main and not first:
        (out / "validation.csv").unlink(missing_ok=True)  # of another run that was here before

    kept = None
    if cache is not None:
        kept = FrozenCache(
            model, records, settings.views, Path(cache), seed=settings.seed, rank=rank, world=world,
            progress=progress,
        )  # fmt: skip
        accelerator.wait_for_everyone()

    # The optimiser's state is where it belongs: accelerate would move its counters to the GPU, and wait for each.
    prepared, steps = accelerator.prepare(trainee, optimizer, device_placement=[True, False])
    images = batch * settings.accumulate * world
    log.info(
        "%d steps of %d images, %.1f looks at each of %d; %d parameters",
        settings.steps, images, settings.steps * images / len(records), len(records),
        sum(p.numel() for _, p in parameters),
    )  # fmt: skip
    config = model.config

    def validate_now(step: int) -> None:
        """On the way, where it is due; the checkpoint at that step is kept."""
        if step == settings.steps or not settings.validate_every or step % settings.validate_every:
            return
        figures = _validated(model, trainee.tasks, validate, out / "validation.csv", step, main)
        if figures and not settings.finetune:  # whose backbones are gigabytes
            try:
                _write(model, jobs, out / f"step-{step}", figures, training_data, include_backbones=False)
            finally:
                model.config = config

    if main and validated < first:  # the run was killed while it validated
        validate_now(first)
    with (
        Progress("train", "step", settings.steps, progress, done=first) as bar,
        _Batches(model, jobs, settings, kept, rank, first * settings.accumulate) as batches,
    ):
        started = time.monotonic()
        for step in range(first, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate(step) * group["scale"]
            torch.manual_seed(settings.seed + step)  # dropout, the same after a kill
            means: dict[str, float] = {}
            for micro in range(settings.accumulate):
                last = micro + 1 == settings.accumulate
                with nullcontext() if last else accelerator.no_sync(prepared):
                    embedded, samples = next(batches)
                    moved = (embedded.latents.to(accelerator.device), embedded.tokens.to(accelerator.device))
                    loss, parts = prepared(*moved, embedded.geometry, samples)
                    _check_finite("loss", loss, step)
                    accelerator.backward(loss / settings.accumulate)
                for name, value in {"loss": loss.item(), **parts}.items():
                    means[name] = means.get(name, 0.0) + value / settings.accumulate
            norm = accelerator.clip_grad_norm_([p for _, p in parameters], settings.clip)
            if accelerator.scaler is None:
                _check_finite("gradient", norm, step)
            steps.step()
            if accelerator.scaler is not None:  # which leaves out steps whose gradients overflow
                _check_scale(accelerator.scaler, step)
            steps.zero_grad()
            bar.advance(note=f"loss {means['loss']:.3f}")
            if journal is not None:
                rate = images * (step + 1 - first) / (time.monotonic() - started)
                lr = settings.learning_rate(step)
                journal.write(
                    {"step": step + 1, "lr": lr, **means, "grad_norm": float(norm), "images_per_second": rate}
                )
            done = step + 1 == settings.steps
            if main and (done or (step + 1) % settings.checkpoint_every == 0):
                state.save(step + 1)
            validate_now(step + 1)
    figures = {}
    try:
        figures = _validated(model, trainee.tasks, validate, out / "validation.csv", settings.steps, main)
    finally:  # what was trained is kept, whatever validating it met with
        if main:
            whole = include_backbones or settings.finetune
            _write(model, jobs, out, figures, training_data, include_backbones=whole)
            if settings.finetune:
                checkpoints.save_finetuned(model, out)
    accelerator.wait_for_everyone()
    return figures


def _write(
    model: SketchFusion,
    jobs: Sequence[Task],
    folder: Path,
    figures: dict[str, float],
    training_data: str | None,
    *,
    include_backbones: bool,
) -> None:
    """The checkpoint and its head, into a folder; the model's configuration says what it was trained for and on."""
    before = model.config.training_data
    model.config = dataclasses.replace(
        model.config,
        task=", ".join(task.name for task in jobs),
        training_data=f"{before}. Then: {training_data or 'not stated'}" if before else training_data,
        metrics=figures,
    )
    model.save_pretrained(folder, include_backbones=include_backbones)
    (folder / checkpoints.HEAD).unlink(missing_ok=True)  # of another run that was here before
    for task in jobs:
        checkpoints.save_head(task, folder)


@contextmanager
def _enough_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SketchFusionError(
            f"out of memory on {device}: train on fewer images a batch (--images; --accumulate makes up for it), or "
            "with gradient checkpointing"
        ) from error


def _check_finite(name: str, value: Tensor, step: int) -> None:
    if not torch.isfinite(value):
        raise SketchFusionError(
            f"the {name} is {value.item()} at step {step + 1}: try a smaller learning rate, or dtype='bfloat16' or "
            "'float32', in another folder"
        )


def _check_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    if scaler.get_scale() < SMALLEST_SCALE:
        raise SketchFusionError(
            f"the gradients overflow in float16 however small they are made, last at step {step + 1}: try a smaller "
            "learning rate, or dtype='bfloat16' or 'float32', in another folder"
        )


def identity(
    model: SketchFusion, tasks: Sequence[Task], settings: Settings, *, kept: bool, processes: int
) -> dict[str, str]:
    """What a run is, by name: the state of one that is the same in everything goes on in it to the same losses."""
    config = dataclasses.replace(model.config, task=None, training_data=None, metrics={}, license=None).to_dict()
    plan = dataclasses.asdict(settings)
    # These may change between a kill and going on.
    for key in ("checkpoint_every", "validate_every", "gradient_checkpointing"):
        plan.pop(key)
    shown = [(t.name, str(t), _plain(t), [_identity(record) for record in t.records]) for t in tasks]
    begun = hashlib.blake2b(digest_size=16)  # the weights that the run begins with
    fixed = (p for t in tasks for p in t.parameters() if not p.requires_grad)  # a head's others come with the state
    for tensor in (*model.trainable_parameters(), *fixed):
        begun.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    frozen = digest_of(model.diffusion.vae, model.diffusion.unet, model.semantic.model)
    return {
        **{name: str(value) for name, value in plan.items()},
        "cache": "kept" if kept else "none",
        "processes": str(processes),
        "dtype": str(model.dtype).removeprefix("torch."),
        "configuration": digest(json.dumps(config).encode()),
        "tasks or images": digest(json.dumps(shown, default=str).encode()),
        "backbones": frozen,
        "weights to begin with": begun.hexdigest(),
    }


def _identity(record: Record) -> tuple[Any, ...]:
    """What a record is, wherever its folder lies."""
    files = [path and path.rpartition("/")[2] for path in (record.path, record.mask)]
    return *files, record.kind, record.label, record.row, record.photo, record.points


def _plain(task: Task) -> dict[str, Any]:
    return {k: v for k, v in vars(task).items() if isinstance(v, int | float | str) and not k.startswith("_")}


class _Batches:
    """The batches from `first` on, in order; while one is computed, a thread prepares the next.

    A context: leaving it waits for the thread. What a batch holds is decided by the seed, its number and the rank.
    """

    def __init__(
        self,
        model: SketchFusion,
        tasks: list[Task],
        settings: Settings,
        cache: FrozenCache | None,
        rank: int,
        first: int,
    ):
        self.model, self.tasks, self.settings, self.cache, self.rank = model, tasks, settings, cache, rank
        self.number = first
        self.pool = ThreadPoolExecutor(1)
        self.waiting: Future[Any] | None = None

    def __enter__(self) -> Iterator[tuple[Embedded, list[list[Sample]]]]:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Embedded, list[list[Sample]]]]:
        return self

    def __next__(self) -> tuple[Embedded, list[list[Sample]]]:
        waiting = self.waiting or self.pool.submit(self._prepare, self.number)
        found, samples = waiting.result()
        self.number += 1
        self.waiting = self.pool.submit(self._prepare, self.number)
        return self._embed(found), samples

    def _prepare(self, number: int) -> tuple[Any, list[list[Sample]]]:
        """What needs no network: tensors from the cache, or pixels; and the annotations as the views show them."""
        random = np.random.default_rng([self.settings.seed, number, self.rank])
        # Without a cache nothing is gained by seeing the same view again.
        views = self.settings.views if self.cache is not None or self.settings.views == 1 else 2**31
        plan = [_look_at(task.batch(random), views, random) for task in self.tasks]
        entries = [entry for part in plan for entry in part]
        seed = self.settings.seed
        found: Any = (
            pixels_of(entries, self.model.preprocess, seed) if self.cache is None else self.cache.fetch(entries)
        )
        geometry: Geometry = found[-1]
        samples = iter([_sample(entry, geometry.image(i), seed) for i, entry in enumerate(entries)])
        return found, [[next(samples) for _ in part] for part in plan]

    def _embed(self, found: Any) -> Embedded:
        if self.cache is not None:
            return cast("Embedded", found)
        pixels, geometry = found
        if self.settings.finetune:
            pixels = pixels.to(self.model.device)
            with torch.no_grad():
                return Embedded(self.model.diffusion.encode(pixels), pixels, geometry)
        return Embedded(*self.model.embed(pixels), geometry)


def _look_at(records: list[Record], views: int, random: np.random.Generator) -> list[Entry]:
    """A view of each, all of them mirrored or none: a sketch faces the way its photo does, which tells photos apart."""
    alike = range(int(random.integers(min(2, views))), views, 2)
    return [Entry(record, alike[int(random.integers(len(alike)))]) for record in records]


def _sample(entry: Entry, geometry: Geometry, seed: int) -> Sample:
    view = draw_view(entry.record, entry.view, seed)
    size = int(geometry.width), int(geometry.height)
    return Sample(entry.record, view.points(entry.record, *size), view.mask(entry.record, *size))


def _validated(
    model: SketchFusion, tasks: nn.Module, validate: Validate | None, path: Path, step: int, main: bool
) -> dict[str, float]:
    """The figures at this step, on the main process, which also writes them down."""
    if validate is None or not main:
        return {}
    model.eval()
    tasks.eval()
    with torch.no_grad():
        found = validate(model)
    tasks.train()
    if not isinstance(found, Mapping):
        raise ConfigError("validate", f"returned {type(found).__name__}", legal="a dict of figures by name")
    figures = {name: float(figure) for name, figure in found.items()}
    model._graphs.clear()  # training needs their memory
    log.info("step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    _Journal(path, step - 1).write({"step": step, **figures})
    return figures


class _Journal:
    """A CSV file with a line a step, of which `last` is the last; those after the one that a run goes on from are
    dropped.
    """

    last: int

    def __init__(self, path: Path, step: int):
        self.path = path
        with _written(self.path):
            lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
            # The last line may be half a line.
            width = [len(fields) for fields in csv.reader(lines)]
            whole = [line for line, fields in zip(lines[1:], width[1:], strict=True) if fields == width[0]]
            kept = lines[:1] + [line for line in whole if int(line.partition(",")[0]) <= step]
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            self.names = next(csv.reader(kept[:1]), [])
            self.last = int(kept[-1].partition(",")[0]) if len(kept) > 1 else 0

    def write(self, values: dict[str, float]) -> None:
        with _written(self.path):
            if new := [name for name in values if name not in self.names]:
                self.names += new
                before = list(csv.reader(self.path.read_text(encoding="utf-8").splitlines()))[1:]
                self._put([self.names, *(line + [""] * (len(self.names) - len(line)) for line in before)], "w")
            cells = (values.get(name, "") for name in self.names)
            self._put([[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells]], "a")

    def _put(self, lines: Iterable[Iterable[Any]], mode: str) -> None:
        with self.path.open(mode, encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Say which file cannot be written to."""
    try:
        yield
    except OSError as error:
        raise SketchFusionError(f"{path}: cannot be written to: {error.strerror or error}") from None
