"""From a task's name and a data set to what is trained on, and what is held out to validate on."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from ..config import check_count
from ..data import DataSet, Record, spaced
from ..data.layout import letters, listed
from ..data.splits import split_set, split_sketches
from ..errors import ConfigError, SketchFusionError
from ..evaluation import protocols
from ..evaluation.rows import Extractor
from ..model import SketchFusion
from ..progress import Progress
from ..tasks import Task
from ..tasks.correspondence import Correspondence
from ..tasks.recognition import Recognition, accuracy
from ..tasks.retrieval import Retrieval
from ..tasks.segmentation import Segmentation
from .cache import WORKERS

log = logging.getLogger(__name__)

TASKS = ("retrieval", "recognition", "correspondence", "segmentation")


class Apart(NamedTuple):
    """What is not to be trained on, whichever loader found it: image files, Sketchy's photos whatever the file, and
    classes whatever their spelling (not under another name, as "mouse" and "mouse (animal)").
    """

    images: frozenset[tuple[str, int | None]] = frozenset()
    photos: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()

    @classmethod
    def of(cls, data: DataSet, classes: Iterable[str] = ()) -> Apart:
        return cls(frozenset(map(_image, data.records)), _photos(data), frozenset(map(letters, classes)))

    def taken_from(self, data: DataSet, words: str = "without what others are validated on") -> DataSet:
        """The rest of a set, which `words` adds to its split."""
        labels = {name for name in data.classes if letters(name) in self.classes}
        photos = self.photos & _photos(data)
        rest = tuple(
            r for r in data.records
            if r.label not in labels and _image(r) not in self.images and r.photo not in photos
        )  # fmt: skip
        if len(rest) == len(data.records):
            return data
        left = {record.label for record in rest}
        classes = tuple(name for name in data.classes if name in left)
        return DataSet(data.name, classes, rest, f"{data.split}, {words}")


def _photos(data: DataSet) -> frozenset[str]:
    """Of PSC6K and of Sketchy, whose extended set has a third copy, the names of the photos, which both share."""
    return frozenset(r.photo for r in data.records if r.photo) if data.name in ("sketchy", "psc6k") else frozenset()


def _image(record: Record) -> tuple[str, int | None]:
    """Which image a record shows. A row of a mask says which thing on it is meant."""
    row = record.row if record.path.endswith((".ndjson", ".npy")) else None
    return os.path.realpath(record.path), row


NOTHING = Apart()


@dataclasses.dataclass(frozen=True)
class Job:
    """A task, what it is trained on in words, and how well the model does it on what was held out.

    Attributes:
        held_out: what `validate` looks at.
        apart: the same, however it is found; and classes of which nothing may have been seen, for category retrieval.
    """

    task: Task
    shown: str
    validate: Callable[[SketchFusion], dict[str, float]]
    held_out: DataSet
    apart: Apart


def make_jobs(plans: Sequence[Callable[..., Job]]) -> list[Job]:
    """Tasks that share a model: what one of them is validated on, none is trained on.

    Args:
        plans: `make_job` with all arguments but `elsewhere`.

    Raises:
        SketchFusionError: as `make_job`.
    """
    jobs = [plan() for plan in plans]
    apart = Apart(*(frozenset().union(*parts) for parts in zip(*(job.apart for job in jobs), strict=True)))
    return [plan(elsewhere=apart) for plan in plans] if len(jobs) > 1 else jobs


def make_job(
    name: str,
    data: DataSet,
    model: SketchFusion,
    *,
    held_out: DataSet | float = 0.2,
    sketches: DataSet | None = None,
    images: int = 64,
    level: str = "category",
    loss: str = "info_nce",
    hidden: int | None = None,
    elsewhere: Apart = NOTHING,
) -> Job:
    """A task on a data set, with a part of it held out.

    Args:
        name: one of `TASKS`.
        data: what to train on. Segmentation: photos with masks.
        model: that is to be trained.
        held_out: what to validate on, or the share of `data` to hold out: whole classes for retrieval, since that is
            to work on classes never seen (at the fine level only where there are three or more); photos with their
            sketches for the others, and for segmentation the same share of each class's `sketches` as well. What is
            held out is not trained on, wherever it comes from.
        sketches: segmentation: the sketches that say what to find.
        images: in a batch; retrieval needs 4 or more, two sketches and two photos.
        level, loss: see `Retrieval`. hidden: see `Recognition`.
        elsewhere: what other tasks of the same model are validated on.

    Raises:
        ConfigError: no such task, or an illegal setting.
        SketchFusionError: the data does not fit the task, or nothing would be left to train on.
    """
    if name not in TASKS:
        raise ConfigError("task", f"is {name!r}", legal=", ".join(TASKS))
    if name == "segmentation" and sketches is None:
        raise ConfigError("sketches", "are missing: a sketch says what to find", legal="a set with sketches")
    least = 4 if name == "retrieval" else 1
    check_count("images", images, least)
    if hidden is not None:
        check_count("hidden", hidden)
    if not isinstance(held_out, DataSet) and not 0 < held_out < 1:
        raise ConfigError("held_out", f"is {held_out}", legal="a share between 0 and 1, or what is validated on")
    data = _usable(name, data, sketches)
    if isinstance(held_out, DataSet):
        apart = _usable(name, held_out, sketches)
        unseen = held_out.classes if name == "retrieval" and level == "category" else ()
        kept = Apart.of(held_out, unseen).taken_from(data, f"without {held_out.split}")
    else:
        by_class = name == "retrieval" and (level == "category" or len(data.classes) > 2)
        kept, apart = _split_classes(data, held_out, level) if by_class else _split_records(data, held_out)
    kept = elsewhere.taken_from(kept)
    away, watched = Apart.of(apart), apart
    half = max(1, images // 2)
    few = min(images, model.default_batch_size)  # to validate: no more than in a step, for which there is memory
    if name == "retrieval":
        # At the fine level a class's other photos are the hard negatives: in Sketchy two to four of those drawn from.
        # Of few classes it takes more photos to fill a batch.
        usual = 4 if level == "fine" else 1 if half < 4 else 2
        per_class = min(half, max(usual, half // max(1, len(kept.classes))))
        if level == "fine":
            apart = watched = _usable(name, _drawn_from_photos(apart), None)
            different = {record.photo for record in apart.photos}
        else:
            away = Apart.of(apart, apart.classes)
            different = {*apart.classes}
        if len(different) < 2:
            raise SketchFusionError(
                f"{apart.name} ({apart.split}): retrieval is validated on two classes or more, at the fine level two "
                "drawn photos, of which a sketch can find the wrong one"
            )
        task: Any = Retrieval(
            kept,
            level=level,
            loss=loss,
            classes=half // per_class,
            per_class=per_class,
        )

        def figures(model: SketchFusion) -> dict[str, Any]:
            if level == "fine":
                return protocols.fg_sbir(_fused(model, few), apart)[0].figures
            return protocols.zs_sbir(_fused(model, few), apart)[0].figures

        shown: tuple[str, ...] = ("acc_1", "acc_5") if level == "fine" else ("map_all", "p_100")
    elif name == "recognition":
        kept = _only(kept, {record.label for record in kept.sketches}, "without sketches to train on")
        task = Recognition(kept, model.config.aggregator_width, hidden=hidden, batch_size=images)
        known = [record for record in apart.sketches if record.label in task.classes]
        if not known:
            raise SketchFusionError(
                f"{apart.name} ({apart.split}) has no sketches of the classes that are trained on: hold out more, or "
                "others (those of one photo stay together)"
            )

        def figures(model: SketchFusion) -> dict[str, Any]:
            return {"acc_1": _head_accuracy(task, model, known, few)}

        shown = ("acc_1",)
    elif name == "correspondence":
        if not apart.pairs():
            raise SketchFusionError(
                f"{apart.name} ({apart.split}): no sketch and photo with key points in common to validate on"
            )
        task = Correspondence(kept, pairs=half)

        def figures(model: SketchFusion) -> dict[str, Any]:
            return protocols.correspondence(_fused(model, few), apart)[0].figures

        shown = ("pck_5", "pck_10")
    else:
        assert sketches is not None
        drawn, queries = sketches, sketches
        if not isinstance(held_out, DataSet):
            drawn, queries = split_sketches(sketches, held_out)
        # A sketch that asks is apart where its class has others to train on, or no photos to.
        still = {record.label for record in kept.records}
        trained = {record for record in drawn.records if record.label in still}
        asked = [r for r in queries.sketches if r.label in apart.classes and r not in trained]
        watched = dataclasses.replace(apart, records=(*apart.records, *asked))
        away = Apart.of(watched)
        drawn = elsewhere.taken_from(away.taken_from(drawn))
        task = Segmentation(kept, drawn, pairs=half)

        def figures(model: SketchFusion) -> dict[str, Any]:
            return protocols.segmentation(_fused(model, few), apart, queries)[0].figures

        shown = ("miou", "pacc")

    def validate(model: SketchFusion) -> dict[str, float]:
        found = figures(model)
        return {f"{name} {key}, {apart.split}": float(found[key]) for key in shown}

    seen = f"{kept.name}: {kept.split}"
    if name == "retrieval":
        seen += f" ({level} level, {loss})"
    elif name == "segmentation":
        seen += f", {drawn.name}: {drawn.split}"
    return Job(task, seen, validate, watched, away)


def _usable(task: str, data: DataSet, sketches: DataSet | None) -> DataSet:
    """Without the classes that a task cannot use, and its protocol would refuse."""
    drawn = data if task == "retrieval" else sketches if task == "segmentation" else None
    if drawn is None:
        return data
    both = {record.label for record in data.photos} & {record.label for record in drawn.sketches}
    return _only(data, both, "without photos or without sketches")


def _only(data: DataSet, usable: Collection[str | None], lacking: str) -> DataSet:
    """These classes of a set; the others are said to be left out, and why."""
    lost = [name for name in data.classes if name not in usable]
    if not lost:
        return data
    log.info("%s (%s): left out, %s: %s", data.name, data.split, lacking, listed(lost))
    return data.of_classes([name for name in data.classes if name in usable], f"without {listed(lost)}")


def open_held_out(jobs: Sequence[Job], progress: bool | None = None) -> None:
    """Open every image that is validated on, and its mask, so that a damaged one is known before a long run.

    Raises:
        ImageError: naming the file.
    """
    records = list(dict.fromkeys(record for job in jobs for record in job.held_out.records))

    def opened(record: Record) -> None:
        record.open()
        if record.mask is not None:
            record.read_mask()

    with ThreadPoolExecutor(WORKERS) as pool:  # whose map gives up the rest where one raises
        for _ in Progress("check", "image", len(records), progress).over(pool.map(opened, records)):
            pass


def _fused(model: SketchFusion, batch_size: int) -> Extractor:
    return Extractor(model, ["fused"], batch_size=batch_size, progress=False)


def _head_accuracy(task: Recognition, model: SketchFusion, sketches: Sequence[Record], batch_size: int) -> float:
    opened = (record.open() for record in sketches)
    features = model.encode(opened, batch_size=batch_size, dense=False, progress=False)
    labels = torch.tensor([task.classes.index(str(record.label)) for record in sketches])
    task.eval()
    device = next(task.parameters()).device
    found = accuracy(task.head(features.pooled.to(device)).cpu(), labels)
    task.train()
    return found


def _split_classes(data: DataSet, share: float, level: str) -> tuple[DataSet, DataSet]:
    """Classes evenly spaced in the alphabet are held out: two at least, or at the fine level one."""
    least = 1 if level == "fine" else 2
    apart = tuple(spaced(data.classes, max(least, round(share * len(data.classes)))))
    kept = tuple(name for name in data.classes if name not in apart)
    if len(kept) < 2:
        raise SketchFusionError(
            f"{data.name} ({data.split}): of {len(data.classes)} classes {share:g} cannot be held out to validate on: "
            f"{least} at least are, and two have to be left to train on"
        )
    words = "one class" if len(apart) == 1 else f"{len(apart)} classes"
    return data.of_classes(kept, f"without {words}"), data.of_classes(apart, f"{words} held out")


def _drawn_from_photos(data: DataSet) -> DataSet:
    """Without the sketches that name no photo of the set, which fine-grained retrieval cannot be measured with."""
    photos = {record.photo for record in data.photos} - {None}
    records = tuple(record for record in data.records if record.kind == "photo" or record.photo in photos)
    return dataclasses.replace(data, records=records)


def _split_records(data: DataSet, share: float) -> tuple[DataSet, DataSet]:
    kept, apart = split_set(data, share)
    if not kept.records or not apart.records:
        raise SketchFusionError(
            f"{data.name} ({data.split}): of {len(data.records)} images {share:g} cannot be held out to validate on"
        )
    return kept, apart
