"""Parts of a set: a share held out, or a few of each class; always the same ones."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from ..config import check_count
from ..errors import ConfigError
from .records import DataSet, Record

Item = TypeVar("Item")


def split(records: Sequence[Record], held_out: float, seed: int = 0) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Records -> (those kept, those held out), both in their order.

    Each record's side is decided by a hash of what it is (its photo; without one its label, file name and row) and
    of the seed alone, so it stays where it is in another order, in a part of the set, and in another folder: nothing
    that was trained on can slip into a test. A photo and the sketches drawn from it fall on one side. Every label
    thereby gives up the same share in expectation; the exact number varies, as that of coin tosses does.

    Raises:
        ConfigError: `held_out` is not a share from 0 to 1.
    """
    if not 0 <= held_out <= 1:
        raise ConfigError("held_out", f"{held_out!r} is no share of the records", legal="0 to 1")
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        sides[_fraction(record, seed) < held_out].append(record)
    return tuple(sides[0]), tuple(sides[1])


def check_share(held_out: float) -> None:
    """Raise a ConfigError unless `held_out` is a share that leaves something on both sides."""
    if not 0 < held_out < 1:
        raise ConfigError("held_out", f"is {held_out}", legal="a share between 0 and 1")


def split_set(data: DataSet, share: float) -> tuple[DataSet, DataSet]:
    """`split` of a set -> (what is kept, what is held out), each saying so.

    Raises:
        ConfigError: as `check_share`.
    """
    check_share(share)
    kept, apart = split(data.records, share)
    return _parts(data, kept, apart, share)


def split_sketches(data: DataSet, share: float) -> tuple[DataSet, DataSet]:
    """`split` of the sketches, by a hash as there, but one at least of each class: without a query it could not be
    validated. A class's only sketch is on both sides.
    """
    groups: dict[str | None, list[Record]] = defaultdict(list)
    for record in data.sketches:
        groups[record.label].append(record)
    apart = tuple(r for group in groups.values() for r in split(group, share)[1] or [min(group, key=_fraction)])
    gone = set(apart)
    kept = tuple(r for group in groups.values() for r in group if r not in gone or len(group) == 1)
    return _parts(data, kept, apart, share)


def _parts(data: DataSet, kept: tuple[Record, ...], apart: tuple[Record, ...], share: float) -> tuple[DataSet, DataSet]:
    return (
        replace(data, records=kept, split=f"{data.split}, {1 - share:.0%}"),
        replace(data, records=apart, split=f"{data.split}, {share:.0%} held out"),
    )


def _fraction(record: Record, seed: int = 0) -> float:
    """A number in [0, 1) that depends on what the record is and on the seed, evenly spread."""
    identity = record.photo or f"{record.label}/{os.path.basename(record.path)}/{record.row}"
    digest = hashlib.blake2b(f"{seed}/{identity}".encode(errors="surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def limited(data: DataSet, count: int | None) -> DataSet:
    """At most `count` sketches and `count` photos of each class, evenly spaced, always the same ones; None: all.

    The photos that the sketches were drawn from come first.
    """
    if count is None:
        return data
    check_count("limit", count)
    groups: dict[str | None, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    for record in data.records:
        groups[record.label][record.kind == "photo"].append(record)
    kept: set[Record] = set()
    for drawings, photos in groups.values():
        sketches = spaced(drawings, count)
        named = {record.photo for record in sketches} - {None}
        drawn = [record for record in photos if record.photo in named][:count]
        others = [record for record in photos if record.photo not in named]
        kept.update(sketches, drawn, spaced(others, count - len(drawn)))
    records = tuple(record for record in data.records if record in kept)
    return replace(data, records=records, split=f"{data.split}, at most {count} a class and kind")


def spaced(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, evenly spaced, or all where there are no more."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
