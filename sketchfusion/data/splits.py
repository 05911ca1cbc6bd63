"""A share of the records held out, the same ones whatever else is there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from ..errors import ConfigError
from .records import Record


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


def _fraction(record: Record, seed: int) -> float:
    """A number in [0, 1) that depends on what the record is and on the seed, evenly spread."""
    identity = record.photo or f"{record.label}/{os.path.basename(record.path)}/{record.row}"
    digest = hashlib.blake2b(f"{seed}/{identity}".encode(errors="surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48
