"""The benchmark: seconds, memory and agreement of the extractor beside its peers, in one run on one machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profile_run
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..backbones.published import CLIP_L14_336, SD21_UNET, SD_SCHEDULER, SD_VAE
from ..config import check_ensemble
from ..errors import ConfigError, SketchFusionError
from ..images import Geometry, Preprocess, collate
from ..kernels import usable
from ..loading import PathLike
from ..model import SketchFusion
from ..progress import Progress
from .peers import DIFT_ENSEMBLE, PlainLoop

OURS = "sketchfusion"
PEERS = {  # in words
    "plain": "diffusers and Python hooks, whole networks, batched, in our dtype",
    "plain-float32": "the same in float32",
    "released": "the released script: float32, one image at a time, its copies all through the VAE",
    "dift": f"DIFT: Stable Diffusion alone, {DIFT_ENSEMBLE} noises, one image at a time, float16 (float32 on a CPU)",
}
OPERATORS = 12  # that a profile names
FULL = "full"  # the model with random weights at the published shapes
DEFINITION = 1  # of everything measured here; counted up whenever a figure changes its meaning


def bench(
    model: SketchFusion | PathLike = "mini",
    *,
    peers: Sequence[str] = tuple(PEERS),
    sizes: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1,),
    ensembles: Sequence[int] = (1,),
    runs: int = 5,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    profile: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure the extractor beside its peers: same weights, same pixels, same noises.

    What is timed is a batch from pixels in host memory to features on the device. Every way runs once to warm up, then
    the ways take turns, so that what else the machine does hits all of them; figures are medians.

    Args:
        model: `"full"`, Stable Diffusion 2.1 and CLIP ViT-L/14 at their published shapes with random weights; or a
            model, or what `SketchFusion.from_pretrained` takes.
        peers: names out of `PEERS`.
        sizes: sides of the canvas, pixels; by default the configuration's.
        batch_sizes, ensembles: every combination is measured. DIFT's ensemble is its own.
        runs: timed runs of every way.
        device, dtype, compile: as for `SketchFusion.from_pretrained`; a model that is given has its own.
        profile: say which operators (on CUDA, kernels) take the time.
        progress: show a progress bar; by default on a terminal.

    Returns:
        `device`, `threads`, `kernels` (`triton` or `torch`: whose injections and norms run), `torch`, `date` and so on;
        `peak_tflops`, what a large matrix product reaches in the compute dtype; `rows`, one a combination and way:
        `way`, `dtype`, `size`, `batch_size`, `ensemble`,
        `seconds_per_image`, `images_per_second`, `tflop_per_image` (products and attention), `tflops` (reached),
        `of_peak` (None in another dtype), `peak_memory_gib` (weights and what a run adds; None where it is not known),
        `ratio` (its seconds over ours), and `cosine` with our dense cells (`mean`, `percentile_1`, `least`; None for
        DIFT). Ours has `parts`, the seconds of each in one image (on CUDA without a graph), and, asked for,
        `operators`: `name`, `calls` in one batch and `share` of the time of all, the longest ones first.

    Raises:
        ConfigError: an argument is unknown or illegal.
        LoadError: the model cannot be loaded.
        SketchFusionError: the GPU's memory is too small.
    """
    for peer in peers:
        if peer not in PEERS:
            raise ConfigError("peers", f"there is no peer {peer!r}", legal=", ".join(PEERS))
    for key, values in {"batch_sizes": batch_sizes, "runs": (runs,)}.items():
        if not values or any(value < 1 for value in values):
            raise ConfigError(key, f"is {', '.join(map(str, values)) or 'empty'}", legal="integers from 1 up")
    if not ensembles:
        raise ConfigError("ensembles", "is empty", legal="1, or even numbers")
    for ensemble in ensembles:
        check_ensemble(ensemble)
    if isinstance(model, SketchFusion):
        for key, value, usual in (("device", device, "auto"), ("dtype", dtype, "auto"), ("compile", compile, False)):
            if value != usual:
                raise ConfigError(key, f"is {value!r} for a model in memory, which has its own", legal=repr(usual))
        source = "in memory"
    elif model == FULL:
        source, model = FULL, full_size(device=device, dtype=dtype)
    else:
        source, model = str(model), SketchFusion.from_pretrained(model, device=device, dtype=dtype)
    views = [model.preprocess if size is None else Preprocess(size) for size in sizes or (None,)]
    loops = _loops(model, peers)
    if compile:
        model._compile()
    plans = [(v, n, k) for v in views for n in batch_sizes for k in ensembles]
    named = {"definition": DEFINITION, "model": source, "fingerprint": model.fingerprint}
    result = {**named, **_machine(model), "runs": runs, "compiled": compile}
    rows: list[dict[str, Any]] = []
    total = len(plans) * (1 + len(loops)) * (runs + 1)
    with Progress("bench", "run", total, progress) as bar:
        for view, count, ensemble in plans:
            try:
                rows += _compare(model, loops, view, count, ensemble, runs, result["peak_tflops"], compile, bar)
            except torch.OutOfMemoryError as error:
                raise SketchFusionError(
                    f"out of memory on {model.device} at {count} images of {view.size} px, with the weights of all "
                    "these peers there at once: use a smaller batch size, or fewer peers"
                ) from error
    if profile:  # at the end: CUDA's profiler slows down what comes after it
        for row, plan in zip((row for row in rows if row["way"] == OURS), plans, strict=True):
            row["operators"] = _operators(model, *plan)
    return result | {"rows": rows}


def full_size(*, device: str = "auto", dtype: str = "auto", published: torch.dtype = torch.float32) -> SketchFusion:
    """Stable Diffusion 2.1-base and CLIP ViT-L/14 at 336 px as `from_backbones()` loads them, with random weights.

    They tell what the model costs, never what it sees.

    Args:
        device, dtype: as for `SketchFusion.from_backbones`.
        published: dtype of the weights it is built from, which stay in host memory: 5.1 GB in float32, and nothing
            more than the model itself takes where it is the compute dtype of a model on the CPU.
    """
    usual = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(published)  # built in float32 first, the UNet alone would take 3.5 GB
        try:
            pipeline = SimpleNamespace(
                vae=AutoencoderKL(**SD_VAE),
                unet=UNet2DConditionModel(**SD21_UNET),
                scheduler=PNDMScheduler(**SD_SCHEDULER),
            )
            clip = CLIPVisionModel(CLIPVisionConfig(**CLIP_L14_336))
        finally:
            torch.set_default_dtype(usual)
        prompt = torch.randn(77, SD21_UNET["cross_attention_dim"])
        model = SketchFusion.from_backbones(pipeline, clip, null_prompt=prompt, device=device, dtype=dtype)
        for parameter in model.adapters.parameters():
            nn.init.normal_(parameter, std=CLIP_L14_336["hidden_size"] ** -0.5)
    return model


def _loops(model: SketchFusion, peers: Sequence[str]) -> dict[str, PlainLoop]:
    """Each peer's networks. Those in one dtype share them, but for DIFT's, whose UNet is cut."""
    whole: dict[torch.dtype, PlainLoop] = {}
    loops = {}
    for peer in peers:
        if peer == "dift":
            half = torch.float16 if model.device.type == "cuda" else torch.float32
            loops[peer] = PlainLoop(model, half, alone=True)
            continue
        dtype = model.dtype if peer == "plain" else torch.float32
        if peer == "plain-float32" and model.dtype is torch.float32 and "plain" in peers:
            continue  # it is the same
        whole[dtype] = loops[peer] = whole.get(dtype) or PlainLoop(model, dtype)
    return loops


def _compare(
    model: SketchFusion,
    loops: dict[str, PlainLoop],
    view: Preprocess,
    count: int,
    ensemble: int,
    runs: int,
    peak: float,
    compiled: bool,
    bar: Progress,
) -> list[dict[str, Any]]:
    """The rows of one combination, ours first."""
    pixels, geometry = _pictures(view, count)
    cuda = model.device.type == "cuda"
    if cuda:
        pixels = pixels.pin_memory()
    ways: dict[str, Callable[[], Any]] = {OURS: partial(_ours, model, pixels, geometry, ensemble)}
    for name, peer in loops.items():
        if name == "dift":
            ways[name] = partial(peer.dift, pixels)
        else:
            ways[name] = partial(peer.released if name == "released" else peer, pixels, ensemble)
    dense: dict[str, Any] = {}
    flops: dict[str, int] = {}
    memory: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for name, way in ways.items():
            # What is compiled cannot be counted: it runs once as it was written, and is compiled afterwards.
            mode = FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU)
            written = partial(model, pixels, geometry, ensemble=ensemble) if name == OURS else way
            with torch.compiler.set_stance("force_eager"), mode as counter:
                written()
            flops[name] = counter.get_total_flops()
            if name == OURS and (compiled or cuda):
                way()  # as it is written, or compiled
            if name == OURS and cuda:
                # Captured as a graph. What it computes in is seen now, and in no replay.
                with _watched(model.device) as added:
                    way()
                memory[name] = added
            bar.advance()
        for _ in range(runs):
            for name, way in ways.items():
                with _watched(model.device) as added:
                    taken, dense[name] = _timed(way, model.device)  # ours on CUDA from the graph
                seconds[name].append(taken)
                memory.setdefault(name, []).extend(added)
                bar.advance()
        model._graphs.clear()  # whose memory the next ones may need
        parts = [_seconds_by_part(model, pixels, geometry, ensemble) for _ in range(runs)]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    rows = []
    for name, median in medians.items():
        loop = loops.get(name)  # None: ours
        dtype = model.dtype if loop is None else loop.dtype
        reached = flops[name] / median / 1e12
        held = _bytes([model] if loop is None else loop.parts)
        row = {
            "way": name,
            "dtype": str(dtype).removeprefix("torch."),
            "size": view.size,
            "batch_size": count,
            "ensemble": DIFT_ENSEMBLE if name == "dift" else ensemble,
            "seconds_per_image": median / count,
            "images_per_second": count / median,
            "tflop_per_image": flops[name] / count / 1e12,
            "tflops": reached,
            "of_peak": reached / peak if dtype is model.dtype else None,
            "peak_memory_gib": (held + max(memory[name])) / 2**30 if memory[name] else None,
            "ratio": median / medians[OURS],
            "cosine": None if name in (OURS, "dift") else _agreement(dense[OURS], dense[name]),
        }
        if loop is None:
            names = parts[0].keys()
            row["parts"] = {part: statistics.median(one[part] for one in parts) / count for part in names}
        rows.append(row)
    return rows


def _seconds_by_part(model: SketchFusion, pixels: Tensor, geometry: Geometry, ensemble: int) -> dict[str, float]:
    seconds: dict[str, float] = {}

    def timed(name: str, part: Callable[[], Any]) -> Any:
        seconds[name], found = _timed(part, model.device)
        return found

    latents = timed("vae", lambda: model.diffusion.encode(pixels.to(model.device)))
    tokens = timed("semantic", lambda: model.semantic(pixels.to(model.device)))
    maps = timed("unet", lambda: model.tap(latents, tokens, ensemble=ensemble))
    timed("aggregator", lambda: model.aggregate(maps, geometry))
    return seconds


def _ours(model: SketchFusion, pixels: Tensor, geometry: Geometry, ensemble: int) -> Tensor:
    return model._infer(pixels, geometry, ensemble=ensemble, rows=model.default_batch_size)[1]


def _operators(model: SketchFusion, view: Preprocess, count: int, ensemble: int) -> list[dict[str, Any]]:
    """What takes the time of one run: the device's kernels on CUDA, torch's operators elsewhere."""
    cuda = model.device.type == "cuda"
    way = partial(_ours, model, *_pictures(view, count), ensemble)
    for _ in range(2 * cuda):  # as it is written, then captured
        way()
    with profile_run(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        _timed(way, model.device)
    spent = [
        (event.self_device_time_total if cuda else event.self_cpu_time_total, event.key, event.count)
        for event in profiler.key_averages()
    ]
    total = sum(time for time, _, _ in spent)
    longest = sorted(spent, reverse=True)[:OPERATORS]
    return [{"name": name, "calls": count, "share": time / total} for time, name, count in longest if total]


def _timed(way: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    found = way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start, found


def _pictures(view: Preprocess, count: int) -> tuple[Tensor, Geometry]:
    """Smooth random colours: what is drawn has no part in what it costs."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(coarse, size=(view.size, view.size), mode="bicubic").clamp(0, 1)
    prepared, geometries = zip(*(view(picture) for picture in pixels), strict=True)
    return torch.stack(prepared), collate(geometries)


def _agreement(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    cosines = F.cosine_similarity(ours.double(), theirs.double(), dim=1).flatten()
    # By sorting: torch's quantile takes no more than 16 million values.
    first = cosines.sort().values[int(0.01 * len(cosines))]
    return {"mean": cosines.mean().item(), "percentile_1": first.item(), "least": cosines.min().item()}


def _machine(model: SketchFusion) -> dict[str, Any]:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{device.type}: {name}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "kernels": "triton" if usable(torch.empty(0, device=device, dtype=model.dtype)) else "torch",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "peak_tflops": _peak_tflops(device, model.dtype),
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """What a large matrix product reaches, the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    _timed(lambda: a @ b, device)
    return 2 * side**3 / min(_timed(lambda: a @ b, device)[0] for _ in range(10)) / 1e12


def _bytes(parts: Sequence[nn.Module]) -> int:
    return sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))


@contextmanager
def _watched(device: torch.device) -> Iterator[list[int]]:
    """Yields a list, into which goes by how many bytes memory was higher at its peak: on CUDA what tensors take, on
    Linux the process's resident set, whose peak can be set back. Elsewhere it stays empty."""
    added: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield added
        added.append(torch.cuda.max_memory_allocated(device) - before)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        yield added
        return
    before = _resident("VmRSS")
    yield added
    added.append(_resident("VmHWM") - before)


def _resident(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    count: int = sdpa_flop_count(query, key, value)
    return count


_ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}  # torch counts CUDA's only


# ---- the table


def table(result: dict[str, Any]) -> str:
    """The result for a person to read."""
    lines = [
        f"{result['model']} on {result['device']}, {result['dtype']}, {result['threads']} threads, "
        f"{result['kernels']}'s kernels, torch {result['torch']}, {result['date']}, medians of {result['runs']} runs",
        f"a large matrix product reaches {result['peak_tflops']:.2f} TFLOP/s",
        "",
        f"{'size':>5}{'batch':>6}{'noises':>7}  {'way':<14}{'dtype':<9}{'s/image':>9}{'images/s':>10}{'ratio':>8}"
        f"{'TFLOP/s':>9}{'of peak':>8}{'GiB':>7}  cosine with ours: mean, 1 %, least",
    ]
    for row in result["rows"]:
        cosine, share, memory = row["cosine"], row["of_peak"], row["peak_memory_gib"]
        lines.append(
            f"{row['size']:>5}{row['batch_size']:>6}{row['ensemble']:>7}  {row['way']:<14}{row['dtype']:<9}"
            f"{row['seconds_per_image']:>9.3f}{row['images_per_second']:>10.2f}{row['ratio']:>7.2f}×"
            f"{row['tflops']:>9.2f}{'' if share is None else f'{share:.0%}':>8}"
            f"{'' if memory is None else f'{memory:.2f}':>7}"
            + ("" if cosine is None else f"  {cosine['mean']:.6f}, {cosine['percentile_1']:.6f}, {cosine['least']:.6f}")
        )
        if "parts" in row:
            whole = sum(row["parts"].values())
            shares = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in row["parts"].items())
            lines.append(f"{'':>20}of which {shares}")
        for operator in row.get("operators", ()):
            lines.append(f"{'':>20}{operator['share']:>4.0%}{operator['calls']:>6} × {operator['name'][:90]}")
    return "\n".join(lines)
