"""Retrieval: a sketch finds the photos of its class (category level), or the photo it was drawn from (fine-grained)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_count
from ..data import DataSet, Record
from ..errors import ConfigError, SketchFusionError
from ..features import Features, as_tensor, check_one_model
from . import Sample

LEVELS, LOSSES = ("category", "fine"), ("info_nce", "triplet")
CONVENTIONS = ("zse", "sake", "sem-pcyc")
TIES = "equal similarities keep the gallery's order"
Item = TypeVar("Item")
BLOCK_BYTES = 2**28  # what a block of similarities and its ranking may take

# ---- loss


def info_nce(queries: Tensor, gallery: Tensor, relevant: Tensor, temperature: float) -> Tensor:
    """Cross entropy of finding what is relevant by cosine, both ways, averaged over those that have something to find.

    Args:
        queries: (N, D). gallery: (M, D). relevant: bool (N, M).
        temperature: cosines are divided by it.
    """
    cosines = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T / temperature

    def one_way(logits: Tensor, right: Tensor) -> Tensor:
        found = (logits.log_softmax(1) * right).sum(1) / right.sum(1).clamp(min=1)
        return -found[right.any(1)].mean()

    return (one_way(cosines, relevant) + one_way(cosines.T, relevant.T)) / 2


def triplet_loss(queries: Tensor, gallery: Tensor, relevant: Tensor, margin: float) -> Tensor:
    """The paper's triplet loss (section 4.4) on cosine distances, with the hardest negative in the batch.

    Every relevant pair of a query has to be nearer, by the margin, than the nearest of what is not relevant to it.

    Args:
        queries: (N, D). gallery: (M, D). relevant: bool (N, M). margin: in cosine distance, 0 to 2.
    """
    distances = 1 - F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    nearest = distances.masked_fill(relevant, torch.inf).amin(1, keepdim=True)
    return F.relu(margin + distances - nearest)[relevant].mean()


class Retrieval(nn.Module):
    """Trains the pooled features themselves; there is no head.

    A batch holds sketches and photos of `classes` classes, `per_class` of each kind. Category level: what shares a
    class is relevant. Fine-grained: a sketch's photo is, and the batch's other photos of its class are the hard
    negatives.

    Args:
        data: a set with sketches and photos; at the fine level sketches that name no photo of it are left out.
        level: `"category"` or `"fine"`.
        loss: `"info_nce"` or `"triplet"`.
        classes: of a batch.
        per_class: sketches of each, and as many photos.
        temperature: of `info_nce`, above 0.
        margin: of `triplet_loss`, a cosine distance from 0 to 2.

    Raises:
        ConfigError: no such level or loss.
        SketchFusionError: fewer than two classes have both sketches and photos, or at the fine level fewer than two
            photos have sketches: nothing that is found could be wrong.
    """

    name = "retrieval"

    def __init__(
        self,
        data: DataSet,
        *,
        level: str = "category",
        loss: str = "info_nce",
        classes: int = 16,
        per_class: int = 2,
        temperature: float = 0.07,
        margin: float = 0.3,
    ):
        super().__init__()
        for key, value, legal in (("level", level, LEVELS), ("loss", loss, LOSSES)):
            if value not in legal:
                raise ConfigError(key, f"is {value!r}", legal=", ".join(legal))
        self.level, self.kind, self.temperature, self.margin = level, loss, temperature, margin
        self.classes, self.per_class = classes, per_class
        photos, sketches = _by_class(data.photos), _by_class(data.sketches)
        if level == "fine":
            named = (record for record in data.photos if record.photo is not None)
            self._photo_of: dict[str | None, Record] = {record.photo: record for record in named}
            drawn = [sketch for sketch in data.sketches if sketch.photo in self._photo_of]
            sketches = _by_class(drawn)
            shown = {sketch.photo for sketch in drawn}
            photos = _by_class([photo for name, photo in self._photo_of.items() if name in shown])
        self._photos = {name: photos[name] for name in sorted(photos.keys() & sketches.keys())}
        self._sketches = {name: sketches[name] for name in self._photos}
        self._by_photo = {
            name: list(_grouped(group, lambda sketch: sketch.photo).values()) for name, group in self._sketches.items()
        }
        different = sum(map(len, self._photos.values())) if level == "fine" else len(self._photos)
        if different < 2:
            what = (
                "photos with sketches drawn from them" if level == "fine" else "classes with both sketches and photos"
            )
            raise SketchFusionError(f"{data.name} ({data.split}) has {different} {what}: retrieval needs two or more")
        self.records = tuple(r for part in (self._sketches, self._photos) for group in part.values() for r in group)

    def batch(self, generator: np.random.Generator) -> list[Record]:
        names = generator.permutation(list(self._photos))[: self.classes]
        if self.level == "fine":  # one sketch a photo, so that a class's photos differ
            groups = [group for name in names for group in self._some(generator, self._by_photo[name])]
            sketches = [group[generator.integers(len(group))] for group in groups]
            return sketches + [self._photo_of[sketch.photo] for sketch in sketches]
        sides = (self._sketches, self._photos)
        return [record for side in sides for name in names for record in self._some(generator, side[name])]

    def _some(self, generator: np.random.Generator, items: list[Item]) -> list[Item]:
        return [items[row] for row in generator.permutation(len(items))[: self.per_class]]

    def loss(self, features: Features, samples: list[Sample]) -> tuple[Tensor, dict[str, float]]:
        sketch = torch.tensor([sample.record.kind == "sketch" for sample in samples])
        (ids,) = _ids([s.record.photo if self.level == "fine" else s.record.label for s in samples])
        relevant = (ids[sketch][:, None] == ids[~sketch][None]).to(features.pooled.device)
        queries, gallery = features.pooled[sketch], features.pooled[~sketch]
        if self.kind == "triplet":
            loss = triplet_loss(queries, gallery, relevant, self.margin)
        else:
            loss = info_nce(queries, gallery, relevant, self.temperature)
        return loss, {self.kind: loss.item()}


def _grouped(records: Sequence[Record], key: Any) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _by_class(records: Sequence[Record]) -> dict[str, list[Record]]:
    return _grouped([record for record in records if record.label is not None], lambda record: record.label)


def _ids(*names: Sequence[str | None]) -> list[Tensor]:
    """Names as integers, alike over all the sequences: a tensor for each."""
    known: dict[str | None, int] = {}
    return [torch.tensor([known.setdefault(name, len(known)) for name in part], dtype=torch.int64) for part in names]


# ---- prediction


def search(
    queries: Features | Tensor | np.ndarray,
    gallery: Features | Tensor | np.ndarray,
    k: int,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The k nearest of the gallery by cosine, in blocks of queries.

    Args:
        queries: features, of which the pooled vectors count, or Q vectors (Q, D), or one (D,).
        gallery: the same of G images: (G, D). The queries are taken to its device.
        k: 1 or more; at most G are returned.

    Returns:
        Cosines (Q, k), best first, and rows of the gallery (Q, k); equal cosines keep the gallery's order. A single
        image or vector is a batch of one.

    Raises:
        SketchFusionError: features that two models made, or without pooled vectors; vectors of two widths, none at all,
            or such as are not finite.
        ConfigError: `k` is not such a number.
    """
    check_one_model(queries, gallery, "queries and the gallery")
    check_count("k", k)
    candidates = _vectors(gallery, "gallery")
    parts = []
    for scores, rows in _ranked(_vectors(queries, "queries").to(candidates.device), candidates, block_bytes):
        parts.append((scores[:, :k].clone(), rows[:, :k].clone()))  # slices would keep the whole block
        del scores, rows  # before the next one is made
    return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])


def _vectors(features: Features | Tensor | np.ndarray, name: str) -> Tensor:
    pooled = features.pooled if isinstance(features, Features) else features
    if pooled is None:
        raise SketchFusionError(f"the {name} have no pooled vectors; encode with pooled=True")
    pooled = as_tensor(pooled)
    return pooled[None] if pooled.ndim == 1 else pooled


def _ranked(queries: Tensor, gallery: Tensor, block_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosines and gallery rows, best first, (B, G) each, for one block of queries after the other."""
    for name, vectors in (("queries", queries), ("gallery", gallery)):
        if vectors.ndim != 2 or not len(vectors):
            raise SketchFusionError(f"{name} have shape {tuple(vectors.shape)}, not (count, D) with a count above 0")
        if not vectors.float().norm(dim=1).isfinite().all():  # of all values it takes torch ten times as long
            raise SketchFusionError(f"{name} hold values that are not finite: nothing can be ranked by them")
    if queries.shape[1] != gallery.shape[1]:
        raise SketchFusionError(f"queries are {queries.shape[1]} wide and the gallery is {gallery.shape[1]}")
    unit = F.normalize(gallery.float(), dim=1).T
    # A cosine, its sorted copy, the sort's own, and the row: some 32 bytes a pair.
    for block in queries.split(max(1, block_bytes // (32 * len(gallery)))):
        yield (F.normalize(block.float(), dim=1) @ unit).sort(dim=1, descending=True, stable=True)


# ---- metric


def rank_metrics(
    queries: Tensor,
    gallery: Tensor,
    query_ids: Sequence[str],
    gallery_ids: Sequence[str],
    *,
    convention: str = "zse",
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, Any]:
    """Retrieval by cosine, measured. What has the query's id is relevant to it.

    Published figures follow different conventions, and are comparable within one only:

    - `"zse"` (ZSE-SBIR): AP@k divides by min(k, number of relevant), P@k by min(k, gallery); means over queries.
    - `"sake"` (SAKE): the same, but means over the queries of a class first, then over classes.
    - `"sem-pcyc"` (SEM-PCYC, torchmetrics): AP@k divides by the hits among the k, P@k by k; means over queries.

    A query without anything relevant in the gallery counts as 0.

    Args:
        queries: (Q, D). gallery: (G, D). query_ids, gallery_ids: Q and G of them.
        block_bytes: memory for the similarities of a block of queries.

    Returns:
        `queries`, `gallery` (counts), `map_all`, `map_200`, `p_200`, `p_100`, `acc_1`, `acc_5` (something relevant
        among the first k), `convention`.

    Raises:
        ConfigError: no such convention.
        SketchFusionError: nothing to rank, or values that are not finite.
    """
    scores = score(queries, gallery, query_ids, gallery_ids, convention=convention, block_bytes=block_bytes)
    means = dict(zip(FIGURES, average(scores, query_weights(query_ids, convention)).tolist(), strict=True))
    return {"queries": len(queries), "gallery": len(gallery), **means, "convention": convention}


def query_weights(query_ids: Sequence[str], convention: str) -> Tensor:
    """How much each query counts in a mean, (Q,) in float64: in SAKE's convention those of an id as one."""
    often = Counter(query_ids)
    return torch.tensor([1 / often[one] if convention == "sake" else 1.0 for one in query_ids], dtype=torch.float64)


def average(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the lines of (N, F): (F,). Of ones it is exactly 1."""
    return (weights[:, None] * values).sum(0) / weights.sum()


def score(
    queries: Tensor, gallery: Tensor, query_ids: Sequence[str], gallery_ids: Sequence[str], *, convention: str,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:  # fmt: skip
    """What `rank_metrics` takes the means of: the `FIGURES` of each query, (Q, 6) in float64."""
    if convention not in CONVENTIONS:
        raise ConfigError("convention", f"is {convention!r}", legal=", ".join(CONVENTIONS))
    if (len(queries), len(gallery)) != (len(query_ids), len(gallery_ids)):
        raise SketchFusionError(
            f"{len(query_ids)} ids for {len(queries)} queries, {len(gallery_ids)} for a gallery of {len(gallery)}"
        )
    wanted, present = _ids(query_ids, gallery_ids)
    blocks, start = [], 0
    for _, rows in _ranked(queries, gallery, block_bytes):
        hits = present.to(rows.device)[rows] == wanted[start : start + len(rows), None].to(rows.device)
        blocks.append(_figures(hits, convention).cpu())
        start += len(rows)
    return torch.cat(blocks)


FIGURES = ("map_all", "map_200", "p_200", "p_100", "acc_1", "acc_5")


def _figures(hits: Tensor, convention: str) -> Tensor:
    """(B, 6) in float64: the figures of each query, from whether what it found is relevant, best first (B, G)."""
    size = hits.shape[1]
    found = hits.cumsum(1, dtype=torch.int32)
    precision = (found / torch.arange(1, size + 1, device=hits.device)).where(hits, 0)
    relevant = found[:, -1]

    def average_precision(k: int) -> Tensor:
        count = found[:, k - 1] if convention == "sem-pcyc" else relevant.clamp(max=k)
        return precision[:, :k].sum(1, dtype=torch.float64) / count.clamp(min=1)

    def precision_at(k: int) -> Tensor:
        return found[:, min(k, size) - 1].double() / (k if convention == "sem-pcyc" else min(k, size))

    def found_in(k: int) -> Tensor:
        return hits[:, :k].any(1).double()

    first = min(200, size)
    columns = [average_precision(size), average_precision(first), precision_at(200), precision_at(100)]
    return torch.stack([*columns, found_in(1), found_in(5)], 1)
