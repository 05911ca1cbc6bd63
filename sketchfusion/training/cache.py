"""Frozen work: the clean latents and semantic tokens that training does not change, on the fly or kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..data import Record
from ..errors import SketchFusionError
from ..files import make_folder, write_tensors
from ..images import Geometry, Preprocess, collate, read_ahead
from ..model import SketchFusion
from ..progress import Progress
from .views import draw_view

log = logging.getLogger(__name__)

SHARD = 256  # views a file, by and large
WORKERS = min(16, os.cpu_count() or 1)


class Entry(NamedTuple):
    """One view of one record."""

    record: Record
    view: int  # its number, see `draw_view`


class Embedded(NamedTuple):
    """What `SketchFusion.embed` gives for N views, and where they lie on their canvases."""

    latents: Tensor  # (N, 4, S/8, S/8)
    tokens: Tensor  # (N, width, t, t)
    geometry: Geometry  # (N,) tensors


def pixels_of(entries: Iterable[Entry], preprocess: Preprocess, seed: int) -> tuple[Tensor, Geometry]:
    """Open, view and letterbox: (N, 3, S, S) in [0, 1] and the geometry, decoded by several threads.

    Raises:
        ImageError: naming the file that cannot be read.
    """

    with ThreadPoolExecutor(WORKERS) as pool:
        pixels, geometries = zip(*pool.map(partial(_opened, preprocess=preprocess, seed=seed), entries), strict=True)
    return torch.stack(pixels), collate(geometries)


def _opened(entry: Entry, preprocess: Preprocess, seed: int) -> tuple[Tensor, Geometry]:
    view = draw_view(entry.record, entry.view, seed)
    with entry.record.named():
        return preprocess(view.image(entry.record.open(), preprocess.size))


class FrozenCache:
    """Latents and tokens of `views` views of every record, in safetensors files of one folder.

    A file holds some `SHARD` views and is named by all that its contents depend on: the images' bytes, the views, the
    backbones' weights, sizes and dtype. So it is found again by another run, and never by one it does not fit; it
    appears complete or not at all, so a killed run goes on where it was. What it holds decides where it ends, and the
    first views of all images come before the second: a run with a class less, a task or a view more makes few files
    anew. Old files are left for the user to delete.

    Args:
        model: whose backbones do the work.
        records: the images.
        views: K, views an image; view 0 is the image as it is.
        folder: where the files go; several runs and sets can share it.
        rank, world: this process does every world-th file, where it is missing.
        progress: show a progress bar; by default on a terminal.
    """

    def __init__(
        self,
        model: SketchFusion,
        records: Sequence[Record],
        views: int,
        folder: Path,
        *,
        seed: int,
        batch_size: int = 16,
        rank: int = 0,
        world: int = 1,
        progress: bool | None = None,
    ):
        keys = dict(zip(records, _content_keys(records), strict=True))
        common = backbones_key(model)
        shards: list[list[Entry]] = []
        make_folder(folder)
        self._paths: list[Path] = []
        entries = (Entry(record, view) for view in range(views) for record in records)
        for names, shard in _shards((f"{keys[e.record]} {draw_view(e.record, e.view, seed)}", e) for e in entries):
            shards.append(shard)
            self._paths.append(folder / f"{digest(json.dumps([common, *names]).encode())}.safetensors")
        self._places = {entry: (s, row) for s, shard in enumerate(shards) for row, entry in enumerate(shard)}
        self._files: dict[int, Any] = {}
        missing = [s for s, path in enumerate(self._paths) if not path.exists()]
        kept = len(shards) - len(missing)
        log.info(
            "cache %s: %d images × %d views, %d of %d files there already",
            folder,
            len(records),
            views,
            kept,
            len(shards),
        )
        mine = [s for s in missing if s % world == rank]  # whatever the others have written by now
        with Progress("cache", "view", sum(len(shards[s]) for s in mine), progress) as bar:
            for s in mine:
                self._write(model, shards[s], self._paths[s], seed, batch_size, bar)

    def _write(
        self, model: SketchFusion, shard: list[Entry], path: Path, seed: int, batch_size: int, bar: Progress
    ) -> None:
        parts: list[Embedded] = []
        read = partial(_opened, preprocess=model.preprocess, seed=seed)
        with closing(read_ahead(iter(shard), read, batch_size, listed=True)) as ahead:
            while batch := [opened.result() for opened in islice(ahead, batch_size)]:
                pixels, geometries = zip(*batch, strict=True)
                latents, tokens = model.embed(torch.stack(pixels))
                parts.append(Embedded(latents.cpu(), tokens.cpu(), collate(geometries)))
                bar.advance(len(batch))
        tensors = {
            "latents": torch.cat([part.latents for part in parts]).contiguous(),
            "tokens": torch.cat([part.tokens for part in parts]).contiguous(),
            "geometry": torch.cat([torch.stack([torch.as_tensor(f) for f in part.geometry], 1) for part in parts]),
        }
        write_tensors(tensors, path)

    def fetch(self, entries: Sequence[Entry]) -> Embedded:
        """What is kept of these views, in host memory."""
        latents, tokens, geometry = [], [], []
        for entry in entries:
            shard, row = self._places[entry]
            if shard not in self._files:
                try:
                    self._files[shard] = safe_open(self._paths[shard], framework="pt")
                except (OSError, SafetensorError) as error:
                    path = self._paths[shard]
                    raise SketchFusionError(f"{path} is damaged ({error}): delete it, and it is made again") from error
            file = self._files[shard]
            latents.append(file.get_slice("latents")[row : row + 1])
            tokens.append(file.get_slice("tokens")[row : row + 1])
            geometry.append(file.get_slice("geometry")[row : row + 1])
        return Embedded(torch.cat(latents), torch.cat(tokens), Geometry(*torch.cat(geometry).unbind(1)))


def _shards(entries: Iterable[tuple[str, Entry]]) -> Iterator[tuple[list[str], list[Entry]]]:
    """Runs of entries and their names: half of `SHARD` to twice it, ending behind a name that says so by its digest."""
    names: list[str] = []
    run: list[Entry] = []
    half = max(1, SHARD // 2)
    for name, entry in entries:
        names.append(name)
        run.append(entry)
        ends = int(digest(name.encode())[:8], 16) % half == 0
        if (ends and len(run) >= half) or len(run) == 2 * SHARD:
            yield names, run
            names, run = [], []
    if run:
        yield names, run


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _content_keys(records: Sequence[Record]) -> list[str]:
    """A digest of each record's file, and its row; a file of many is read once."""
    files = sorted({record.path for record in records})

    def one(path: str) -> str:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
        except OSError as error:
            raise SketchFusionError(f"{path} cannot be read: {error.strerror}") from error

    with ThreadPoolExecutor(WORKERS) as pool:
        digests = dict(zip(files, pool.map(one, files), strict=True))
    return [f"{digests[record.path]}:{record.row}" for record in records]


def backbones_key(model: SketchFusion) -> str:
    """A digest of all that latents and tokens depend on besides the image: weights, dtype, sizes, normalisation."""
    config = model.config
    sees = [(b.image_size, b.mean, b.std) for b in (config.diffusion, config.semantic)]
    seen = repr((sees, model.semantic.grid, model.dtype, model.diffusion.vae.config.scaling_factor))
    return digest(f"{seen} {digest_of(model.diffusion.vae, model.semantic.model)}".encode())


def digest_of(*networks: nn.Module) -> str:
    """A digest of their weights, and of the constants that were folded out of them."""
    hasher = hashlib.blake2b(digest_size=16)
    for network in networks:
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            hasher.update(name.encode())
            hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
