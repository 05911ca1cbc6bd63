"""CUDA graphs: a computation that is the same at every call is launched in one piece."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIMIT = 4  # keys that are remembered: a graph keeps memory for its inputs and outputs, and what it computes in

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """A graph, and the memory that it reads from and writes to whenever it is replayed."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Runs functions of tensors on a CUDA device, from the second call with the same key on as a graph.

    The first call with a key runs as it is written: kernels are compiled, algorithms chosen, and what comes once only
    costs no capture. The second is captured, and later ones are replayed. Where a function cannot be captured, it goes
    on running as it is written. Of `LIMIT` keys the least recently used makes room for another.

    All graphs compute in one pool of memory, so they run one after the other, whatever the threads and streams of
    their callers, and what is returned is a copy.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Captured | None] = OrderedDict()  # None: seen once
        self._refused: set[Hashable] = set()
        self._last: Any = None  # the event behind the last use of the pool
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Graphs, ()  # a copy, here or in another process, captures its own

    def clear(self) -> None:
        """Forget all: the addresses of what they read have changed."""
        with self._lock:
            self._drop(len(self._known))
            self._refused.clear()

    def run(
        self, key: Hashable, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], device: torch.device
    ) -> tuple[Tensor, ...]:
        """What `function` returns for the inputs on `device`, all of it queued on the current stream.

        Args:
            key: says all that `function` does, and the inputs' shapes and dtypes.
            function: tensors on the device -> tensors on the device. Whatever else it reads stays where it is.
            inputs: on the device or in pinned memory, and not written to before the stream has read them.
        """
        with self._lock, torch.cuda.device(device):
            captured = self._find(key, function, inputs, device)
            if captured is not None:
                return self._replay(captured, inputs, device)
        return function(*(value.to(device, non_blocking=True) for value in inputs))

    def _find(
        self, key: Hashable, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], device: torch.device
    ) -> Captured | None:
        """The graph of a key, captured if it is time to; None where the function has to run as it is written."""
        if key in self._refused:
            return None
        if key not in self._known:
            self._known[key] = None
            self._drop(len(self._known) - LIMIT)
            return None
        self._known.move_to_end(key)
        if self._known[key] is None:
            try:
                self._known[key] = self._capture(function, inputs, device)
            except RuntimeError as error:  # out of memory is one
                log.info("no CUDA graph: %s", error)
                self._refused.add(key)
                del self._known[key]
                return None
        return self._known[key]

    def _capture(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], device: torch.device
    ) -> Captured:
        held = [torch.empty_like(value, device=device) for value in inputs]
        graph = torch.cuda.CUDAGraph()
        pool = next((known.graph.pool() for known in self._known.values() if known is not None), None)
        # Other threads may allocate, pinned memory for example, while this one captures. A capture that fails leaves
        # its stream current, which the outer context mends.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
        ):
            outputs = function(*held)
        return Captured(graph, held, outputs)

    def _replay(self, captured: Captured, inputs: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream(device)
        if self._last is not None:
            stream.wait_event(self._last)
        for held, value in zip(captured.inputs, inputs, strict=True):
            held.copy_(value, non_blocking=True)
        captured.graph.replay()
        outputs = tuple(output.clone() for output in captured.outputs)
        self._last = stream.record_event()
        return outputs

    def _drop(self, count: int) -> None:
        """Give up the `count` keys that were used longest ago."""
        if count > 0 and self._last is not None:
            self._last.synchronize()
        for _ in range(count):
            self._known.popitem(last=False)
