"""How far something has come: a bar on a terminal, elsewhere a line in the log once a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

from tqdm.auto import tqdm

log = logging.getLogger(__name__)
Item = TypeVar("Item")

DELAY, SILENCE = 2, 60  # seconds: what takes less has no bar, and how long a log says nothing


class Progress:
    """To be entered, and told of every `unit` that is done.

    Args:
        what: is done, in a word.
        total: units, where that is known.
        shown: True for the bar at once, False for nothing at all; None for a bar where somebody looks, if it takes a
            while, and lines in the log where nobody does.
        done: units that were there already.
    """

    def __init__(self, what: str, unit: str, total: int | None, shown: bool | None, *, done: int = 0):
        self._what, self._unit, self._total, self._shown = what, unit, total, shown
        self._first = self._done = done
        disable, delay = (None, DELAY) if shown is None else (not shown, 0)
        self._bar: Any = tqdm(total=total, initial=done, desc=what, unit=unit, disable=disable, delay=delay)
        self._started = self._told = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` is what is to be known of the last."""
        self._done += count
        self._bar.update(count)
        if note:
            self._bar.set_postfix_str(note)
        if self._shown is None and self._bar.disable and time.monotonic() - self._told > SILENCE:
            self._told = time.monotonic()
            log.info("%s", self._line(note))

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each of which is done when the next is asked for."""
        with self:
            for item in items:
                yield item
                self.advance()

    def _line(self, note: str) -> str:
        parts = [f"{self._what}: {self._unit} {self._done}", note]
        if self._total is not None:
            parts[0] += f" of {self._total}"
            pace = (self._told - self._started) / (self._done - self._first)
            parts.append(f"{pace * (self._total - self._done):.0f} s left")
        return ", ".join(part for part in parts if part)
