"""The five protocols: what is encoded, what is compared with what, and what comes out for every row."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import check_count
from ..data import DataError, DataSet, Record, spaced, split
from ..data.layout import listed
from ..data.shoes import ink_box
from ..data.sketchy import EXTENDED
from ..data.splits import check_share, split_set, split_sketches
from ..errors import ConfigError, SketchFusionError
from ..features import Features
from ..tasks.correspondence import match, pck
from ..tasks.recognition import fit_linear
from ..tasks.retrieval import CONVENTIONS, FIGURES, TIES, average, query_weights, score, search
from ..tasks.segmentation import THRESHOLD, check_mask, mask_iou, pixel_accuracy, predict, similarity
from .rows import Extractor

GALLERIES = ("all", "class")
SAME_POSITION, SAME_IN_INK, WHOLE_PHOTO = "same-position", "same-position-in-ink", "whole-photo"  # without features
OTHER_CLASS = "fused-other-class"
THRESHOLDS = torch.arange(-1000, 1001) / 1000  # of the cosine, among which the best in hindsight is looked for
SHOWN = 8  # queries kept for a report, and photos for each


class Example(NamedTuple):
    """A query and the first that it found, each with whether it is relevant."""

    query: Record
    found: tuple[tuple[Record, bool], ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """What one row reached.

    Attributes:
        task: the protocol.
        row: the extractor, see `ROWS`.
        data, split: the set, and which part of it, in words.
        model, fingerprint: what the model is called, and its `SketchFusion.fingerprint`, since a name can stand for
            another tomorrow.
        dtype: that the backbones computed in.
        ensemble: noised copies an image.
        size: side of the canvas, pixels.
        figures: counts, settings and metrics by name; shares are 0 to 1. `fused_ahead` is by how much the row `fused`
            is above this one, with standard errors, where it is among the rows.
        ties: the rule for equal similarities, where something is ranked.
        examples: some queries and what they found, where something is retrieved.
    """

    task: str
    row: str
    data: str
    split: str
    model: str
    fingerprint: str
    dtype: str
    ensemble: int
    size: int
    figures: dict[str, Any]
    ties: str | None = None
    examples: tuple[Example, ...] = dataclasses.field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """One flat object for JSON, without the examples."""
        names = ("row", "task", "data", "split", "model", "fingerprint", "dtype", "ensemble", "size")
        named = {name: getattr(self, name) for name in names}
        return named | self.figures | ({} if self.ties is None else {"ties": self.ties})


# ---- retrieval


class Side(NamedTuple):
    """The queries of one row, or its gallery."""

    records: Sequence[Record]
    ids: list[str]  # what has the same one is relevant
    vectors: Tensor  # (N, D)

    def of(self, label: str | None) -> Side:
        """Those of one class."""
        rows = [i for i, record in enumerate(self.records) if record.label == label]
        return Side([self.records[i] for i in rows], [self.ids[i] for i in rows], self.vectors[rows])


def zs_sbir(
    extractor: Extractor, data: DataSet, *, photos: DataSet | None = None, convention: str = CONVENTIONS[0]
) -> list[Result]:
    """Category-level retrieval: every sketch against all photos, of which those of its class are relevant.

    It is zero-shot where the model was trained on other classes.

    Args:
        extractor: the rows.
        data: sketches, and photos unless `photos` has them.
        photos: another set, with photos of the same classes.
        convention: of the metrics, see `rank_metrics`.

    Raises:
        ConfigError: no such convention.
        DataError: a class lacks sketches or photos, or there is only one class.
        ImageError: an image cannot be read.
    """
    gallery = data if photos is None else photos
    if photos is not None:
        data = dataclasses.replace(data, split=f"{data.split}, photos from {photos.split}")
    return _retrieval("zs-sbir", extractor, data, gallery.photos, lambda record: str(record.label), False, convention)


def fg_sbir(
    extractor: Extractor, data: DataSet, *, gallery: str = "all", convention: str = CONVENTIONS[0]
) -> list[Result]:
    """Fine-grained retrieval: a sketch against photos, of which the one that it was drawn from is relevant.

    Args:
        extractor: the rows.
        data: sketches that name their photos, and the photos.
        gallery: `"all"` photos of the chosen classes, or those of the sketch's own `"class"`, which is easier.
        convention: of the metrics, see `rank_metrics`.

    Raises:
        ConfigError: no such convention or gallery.
        DataError: a class lacks sketches or photos, or a sketch its photo, or there is only one photo.
        ImageError: an image cannot be read.
    """
    if gallery not in GALLERIES:
        raise ConfigError("gallery", f"is {gallery!r}", legal=", ".join(GALLERIES))
    shown = {record.photo for record in data.photos}
    lost = [record.path for record in data.sketches if record.photo is None or record.photo not in shown]
    if lost:
        raise DataError(
            f"{data.name} ({data.split}): {len(lost)} of {len(data.sketches)} sketches, such as {lost[0]}, lack the "
            "photo that they were drawn from, and fine-grained retrieval is about that"
        )
    # Each photo once: the extended set of Sketchy holds the published ones again, and others that nobody drew.
    photos = {r.photo or r.path: r for r in data.photos if f"/{EXTENDED}/" not in r.path}.values()
    within = gallery == "class"
    return _retrieval("fg-sbir", extractor, data, tuple(photos), lambda record: str(record.photo), within, convention)


def _ranked(queries: Side, gallery: Side, convention: str) -> Tensor:
    """The FIGURES of each query against the whole gallery."""
    return score(queries.vectors, gallery.vectors, queries.ids, gallery.ids, convention=convention)


def _ranked_within_classes(queries: Side, gallery: Side, convention: str) -> Tensor:
    """The same with only a query's own class for its gallery."""
    labels = [record.label for record in queries.records]
    scores = torch.empty(len(labels), len(FIGURES), dtype=torch.float64)
    for label in set(labels):
        ours = torch.tensor([one == label for one in labels])
        scores[ours] = _ranked(queries.of(label), gallery.of(label), convention)
    return scores


def _retrieval(
    task: str,
    extractor: Extractor,
    data: DataSet,
    photos: Sequence[Record],
    id_of: Callable[[Record], str],
    within_class: bool,
    convention: str,
) -> list[Result]:
    if convention not in CONVENTIONS:  # said before anything is encoded
        raise ConfigError("convention", f"is {convention!r}", legal=", ".join(CONVENTIONS))
    sketches = data.sketches
    _check_classes(data, {"sketches": sketches, "photos": photos})
    query_ids, gallery_ids = ([id_of(record) for record in records] for records in (sketches, photos))
    if len({*gallery_ids}) == 1:
        raise DataError(
            f"{data.name} ({data.split}): every photo is right for every sketch, so nothing can be measured"
        )
    scores, examples = {}, {}
    for row, vectors in _pooled(extractor, [*sketches, *photos]).items():
        vectors = vectors.to(extractor.model.device)
        queries = Side(sketches, query_ids, vectors[: len(sketches)])
        gallery = Side(photos, gallery_ids, vectors[len(sketches) :])
        scores[row] = (_ranked_within_classes if within_class else _ranked)(queries, gallery, convention)
        examples[row] = _examples(queries, gallery, within_class)
    counts = {"queries": len(sketches), "gallery": len(photos)}
    rules = {"convention": convention} | ({"gallery_of": "class"} if within_class else {})
    return [
        _result(task, row, extractor, data, counts | figures | rules, TIES, examples[row])
        # The queries of an id look for the same photos, so they succeed and fail together.
        for row, figures in _averaged(scores, FIGURES, query_ids, query_weights(query_ids, convention)).items()
    ]


def _examples(queries: Side, gallery: Side, within_class: bool) -> tuple[Example, ...]:
    """A few queries, evenly spaced over the set, and the first photos that each found."""
    examples = []
    for i in spaced(range(len(queries.records)), SHOWN):
        among = gallery.of(queries.records[i].label) if within_class else gallery
        (found,) = search(queries.vectors[i : i + 1], among.vectors, SHOWN)[1].tolist()
        shown = tuple((among.records[j], among.ids[j] == queries.ids[i]) for j in found)
        examples.append(Example(queries.records[i], shown))
    return tuple(examples)


# ---- recognition


def recognition(
    extractor: Extractor, data: DataSet, *, test: DataSet | None = None, held_out: float = 0.2
) -> list[Result]:
    """Linear probe: a linear head on the pooled features, fitted to some sketches, names the class of others.

    The features stay as they are, and every row gets a head of its own.

    Args:
        extractor: the rows.
        data: labelled sketches.
        test: the sketches to test on, where all of `data` is fitted to.
        held_out: without `test`, the share of each class, by and large, that is tested on, always the same sketches.
            Of a class of few that can be all of them: it is left out.

    Raises:
        ConfigError: `held_out` is no share.
        DataError: fewer than two classes to fit to, nothing to test on, or classes that are only tested on.
        ImageError: an image cannot be read.
    """
    check_share(held_out)
    if test is None:
        fitted, tested = split(data.sketches, held_out)
        known = {record.label for record in fitted}
        tested = tuple(record for record in tested if record.label in known)
    else:
        fitted, tested = data.sketches, test.sketches
        data = dataclasses.replace(data, split=f"all of {data.split}; tested on {test.split} of another root or part")
    classes = sorted({str(record.label) for record in fitted})
    foreign = sorted({str(record.label) for record in tested} - set(classes))
    if len(classes) < 2 or not tested or foreign:
        raise DataError(
            f"{data.name} ({data.split}): {len(fitted)} sketches of {len(classes)} classes to fit to, {len(tested)} to "
            "test on"
            + (f", of classes that are only there: {listed(foreign)}" if foreign else "")
            + "; recognition needs two classes or more, and tests on those that it has fitted to (see --held-out)"
        )
    index = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([index[str(record.label)] for record in (*fitted, *tested)])
    count = len(fitted)
    scores = {}
    for row, vectors in _pooled(extractor, [*fitted, *tested]).items():
        vectors, labels = vectors.to(extractor.model.device), labels.to(extractor.model.device)
        head = fit_linear(vectors[:count], labels[:count], len(classes))
        scores[row] = (head(vectors[count:]).argmax(1) == labels[count:]).double().cpu()[:, None]
    counts = {"train": count, "test": len(tested), "classes": len(classes)}
    averaged = _averaged(scores, ("acc_1",), [_source(record) for record in tested])
    return [_result("recognition", row, extractor, data, counts | figures) for row, figures in averaged.items()]


# ---- correspondence


def correspondence(extractor: Extractor, data: DataSet, *, held_out: float | None = None) -> list[Result]:
    """Key points of a sketch are looked for in the photo that it was drawn from.

    PCK@a is the share of all points that are found within a % of the photo's longer side (PSC6K: of 256 px). Rows
    without features show what there is to beat: `same-position` answers with the same relative position in the photo;
    and of the shoes, whose photos are on white, `same-position-in-ink` with that in the tight box around the shoe.

    Args:
        extractor: the rows.
        data: a set with pairs.
        held_out: look at the photos, and their sketches, that a training with this share holds out; None: at all.

    Raises:
        ConfigError: `held_out` is no share.
        DataError: there are no pairs, or a key point lies outside of its image.
        ImageError: an image cannot be read.
    """
    if held_out is not None:
        data = split_set(data, held_out)[1]
    drawn: dict[Record, list[tuple[Record, tuple[str, ...]]]] = defaultdict(list)
    for sketch, photo, names in data.pairs():
        drawn[photo].append((sketch, names))
    if not drawn:
        raise DataError(
            f"{data.name} ({data.split}): no sketch has a key point in common with the photo that it was drawn from"
        )
    # Photo by photo, each followed by its sketches: of a row's photos only one has to be kept.
    queue: list[tuple[Record, Record, tuple[str, ...]]] = []
    for photo, sketches in drawn.items():
        queue += [(photo, photo, ()), *((sketch, photo, names) for sketch, names in sketches)]
    on_white = data.name == "shoes"
    controls = (SAME_POSITION, SAME_IN_INK) if on_white else (SAME_POSITION,)
    hits: dict[str, list[Tensor]] = {row: [] for row in (*extractor.rows, *controls)}
    sources: list[str] = []  # of each point
    box_of = functools.cache(ink_box)  # of a photo it is asked for each of its sketches
    targets: dict[str, Features] = {}
    for start, row, batch in extractor.stream([record for record, _, _ in queue]):
        for (record, photo, names), features in zip(queue[start : start + len(batch)], batch, strict=True):
            if record is photo:
                targets[row] = dataclasses.replace(features, dense=features.dense.clone())  # it was a view of the batch
                continue
            points, truth = _positions(record, names), _positions(photo, names)
            try:
                found = match(features, targets[row], points).cpu()
            except SketchFusionError as error:
                raise DataError(f"{record.path}: its key points do not fit: {error}") from error
            source, target = (torch.tensor(one.geometry[:2]) for one in (features, targets[row]))  # width and height
            photo.check_points(*target.tolist())
            side = 256.0 if data.name == "psc6k" else float(target.max())
            hits[row].append(_hits(found, truth, side))
            if row == extractor.rows[0]:
                hits[SAME_POSITION].append(_hits(points / source * target, truth, side))
                if on_white:
                    boxes = (torch.tensor(box_of(one.path)) for one in (record, photo))
                    (corner, size), (its_corner, its_size) = (box.split(2) for box in boxes)
                    hits[SAME_IN_INK].append(_hits((points - corner) / size * its_size + its_corner, truth, side))
                sources += [_source(record)] * len(points)
    counts = {"pairs": len(hits[SAME_POSITION]), "points": len(sources)}
    scores = {row: torch.cat(parts).double() for row, parts in hits.items()}
    averaged = _averaged(scores, ("pck_5", "pck_10"), sources)
    return [_result("correspondence", row, extractor, data, counts | figures) for row, figures in averaged.items()]


def _positions(record: Record, names: tuple[str, ...]) -> Tensor:
    """(P, 2) in original pixels, in the order of the names."""
    named = {name: (x, y) for name, x, y in record.points}
    return torch.tensor([named[name] for name in names])


def _hits(found: Tensor, truth: Tensor, side: float) -> Tensor:
    """(P, 2): which points count for PCK@5, and which for PCK@10."""
    return torch.stack([pck(found, truth, side, alpha) for alpha in (0.05, 0.10)], 1)


# ---- segmentation


def segmentation(
    extractor: Extractor, data: DataSet, sketches: DataSet, *, queries: int = 1, held_out: float | None = None
) -> list[Result]:
    """A sketch of a photo's class is looked for in the photo: the mask is where the cosine exceeds 0.47.

    `miou_best` is the mIoU at the one threshold that suits the row best on this very set: an upper bound, no result.
    It is there because the cosines of different extractors keep to different ranges. The row `whole-photo` looks at
    nothing: its mask is everything. Where there are sketches of several classes, the row `fused-other-class` is
    `fused` asked by one of the next class: what it finds whatever is asked.

    Args:
        extractor: the rows.
        data: photos with masks.
        sketches: a set with sketches of the same classes.
        queries: sketches that are looked for in each photo, one after the other, always the same ones.
        held_out: look at the photos and the sketches that a training with this share holds out; None: at all.

    Raises:
        ConfigError: `queries` is below 1, or `held_out` is no share.
        DataError: there are no photos with masks, a class has no sketches, or a mask does not fit its photo.
        ImageError: an image or a mask cannot be read.
    """
    check_count("queries", queries)
    if held_out is not None:
        data, sketches = split_set(data, held_out)[1], split_sketches(sketches, held_out)[1]
    photos = [record for record in data.photos if record.mask is not None]
    labels = {record.label for record in photos}
    drawings = [record for record in sketches.sketches if record.label in labels]
    data = dataclasses.replace(data, split=f"{data.split}, sketches from {sketches.split}")
    _check_classes(data, {"photos with masks": photos, "sketches": drawings})
    asked = _in_turn(photos, drawings, queries)
    used = list(dict.fromkeys(sketch for few in asked for sketch in few))
    names = sorted({str(sketch.label) for sketch in sketches.sketches})
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    astray = [dataclasses.replace(photo, label=following[str(photo.label)]) for photo in photos]
    wrong = None
    if "fused" in extractor.rows and len(names) > 1:
        wrong = _in_turn(astray, sketches.sketches, queries)
    both = list(dict.fromkeys([*used, *(sketch for few in wrong or () for sketch in few)]))
    number = {sketch: i for i, sketch in enumerate(both)}
    vectors = _pooled(extractor, both)
    rows = (*extractor.rows, *([] if wrong is None else [OTHER_CLASS]), WHOLE_PHOTO)
    scores: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}  # a photo's IoU and pAcc
    curves = {row: torch.zeros(len(THRESHOLDS), dtype=torch.float64) for row in rows}  # the IoUs at each, summed
    for start, row, batch in extractor.stream(photos):
        for i, features in enumerate(batch, start):
            truth = torch.from_numpy(photos[i].read_mask())
            check_mask(photos[i], truth, features.geometry)
            asks = {row: asked[i]} | ({OTHER_CLASS: wrong[i]} if row == "fused" and wrong is not None else {})
            for name, sketches_of in asks.items():
                ours = [vectors[row][number[one]].to(features.dense.device) for one in sketches_of]
                maps = [similarity(vector, features).cpu() for vector in ours]
                masks = [predict(cosines) for cosines in maps]
                iou, accuracy = (fmean(f(mask, truth) for mask in masks) for f in (mask_iou, pixel_accuracy))
                scores[name].append((iou, accuracy))
                curves[name] += torch.stack([_ious(cosines, truth) for cosines in maps]).mean(0)
            if row == extractor.rows[0]:
                everything = torch.ones_like(truth)
                scores[WHOLE_PHOTO].append((mask_iou(everything, truth), pixel_accuracy(everything, truth)))
                curves[WHOLE_PHOTO] += _ious(everything.float(), truth)
    tables = {row: torch.tensor(pairs, dtype=torch.float64) for row, pairs in scores.items()}
    averaged = _averaged(tables, ("miou", "pacc"), [photo.path for photo in photos])
    results = []
    for row in rows:
        by_class = defaultdict(list)
        for photo, (iou, _) in zip(photos, scores[row], strict=True):
            by_class[str(photo.label)].append(iou)
        best, at = (curves[row] / len(photos)).max(0)
        figures = {
            "photos": len(photos),
            "sketches": len(used),
            "queries": queries * len(photos),
            "threshold": THRESHOLD,
            **averaged[row],
            "miou_best": float(best),
            "threshold_best": round(float(THRESHOLDS[at]), 3),
            "miou_by_class": {label: fmean(values) for label, values in sorted(by_class.items())},
        }
        results.append(_result("segmentation", row, extractor, data, figures))
    return results


def _in_turn(photos: Sequence[Record], sketches: Sequence[Record], queries: int) -> list[list[Record]]:
    """The sketches of each photo: a class's sketches take turns over its photos."""
    drawn = defaultdict(list)
    for sketch in sketches:
        drawn[sketch.label].append(sketch)
    turn: dict[str | None, int] = defaultdict(int)
    chosen = []
    for photo in photos:
        ours, first = drawn[photo.label], turn[photo.label]
        chosen.append([ours[(first + k) % len(ours)] for k in range(queries)])
        turn[photo.label] += queries
    return chosen


def _ious(cosines: Tensor, truth: Tensor) -> Tensor:
    """IoU of `cosines > threshold` with a mask, for all THRESHOLDS at once; 1 where both are empty."""
    below = torch.searchsorted(THRESHOLDS, cosines)  # how many thresholds a pixel exceeds

    def exceeding(part: Tensor) -> Tensor:
        return torch.bincount(part, minlength=len(THRESHOLDS) + 1).flip(0).cumsum(0).flip(0)[1:]

    both, predicted = exceeding(below[truth]), exceeding(below.flatten())
    either = predicted + truth.sum() - both
    return (both / either.clamp(min=1)).where(either > 0, 1.0)


# ---- shared


def _pooled(extractor: Extractor, records: Sequence[Record]) -> dict[str, Tensor]:
    """Each row's pooled features (N, D), in host memory."""
    parts: dict[str, list[Tensor]] = {row: [] for row in extractor.rows}
    for _, row, features in extractor.stream(records):
        parts[row].append(features.pooled.cpu())
    return {row: torch.cat(part) for row, part in parts.items()}


def _source(record: Record) -> str:
    """What was drawn from one photo is not independent."""
    return record.photo or f"{record.path}:{record.row}"  # a file can hold many drawings


def _averaged(
    scores: Mapping[str, Tensor], names: Sequence[str], groups: Sequence[str], weights: Tensor | None = None
) -> dict[str, dict[str, Any]]:
    """The metrics of each row, and how far `fused` is ahead of it.

    Standard errors are of the weighted mean of the differences, line by line, and take the lines of a group as one:
    clustered, linearised, with the factor G / (G - 1) of G groups. A single group has none.

    Args:
        scores: of each row (n, F) in float64, a line for each query, point or photo.
        names: of the F metrics, which are means of the lines.
        groups: what each of the n lines belongs to. weights: (n,), by default all alike.
    """
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    members, count = torch.tensor([number[group] for group in groups]), len(number)
    weights = torch.ones(len(groups), dtype=torch.float64) if weights is None else weights
    share = (weights / weights.sum())[:, None]

    def estimate(values: Tensor) -> dict[str, dict[str, float | None]]:
        mean = average(values, weights)
        sums = torch.zeros(count, len(names), dtype=torch.float64)
        sums.index_add_(0, members, share * (values - mean))
        errors = (sums.square().sum(0) * count / (count - 1)).sqrt().tolist() if count > 1 else [None] * len(names)
        parts = zip(names, mean.tolist(), errors, strict=True)
        return {name: {"mean": value, "standard_error": error} for name, value, error in parts}

    averaged: dict[str, dict[str, Any]] = {}
    for row, values in scores.items():
        averaged[row] = dict(zip(names, average(values, weights).tolist(), strict=True)) | {"independent": count}
        if row != "fused" and "fused" in scores:
            averaged[row]["fused_ahead"] = estimate(scores["fused"] - values)
    return averaged


def _check_classes(data: DataSet, sides: dict[str, Sequence[Record]]) -> None:
    """Raise a DataError unless there is something on every side, of the same classes."""
    labels = {name: {record.label for record in records} for name, records in sides.items()}
    everything = set().union(*labels.values())
    for name, found in labels.items():
        if not found:
            raise DataError(f"{data.name} ({data.split}) has no {name}")
        if lacking := everything - found:
            raise DataError(f"{data.name} ({data.split}) has no {name} of {listed(sorted(map(str, lacking)))}")


def _result(
    task: str,
    row: str,
    extractor: Extractor,
    data: DataSet,
    figures: dict[str, Any],
    ties: str | None = None,
    examples: tuple[Example, ...] = (),
) -> Result:
    model = extractor.model
    how = (str(model.dtype).removeprefix("torch."), extractor.ensemble, extractor.preprocess.size)
    return Result(task, row, data.name, data.split, extractor.source, model.fingerprint, *how, figures, ties, examples)
