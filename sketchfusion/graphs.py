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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LIMIT = 4  # keys that are remembered: a graph keeps memory for its inputs and outputs, and what it computes in

Function = Callable[..., tuple[Tensor, ...]]

log = logging.getLogger(__name__)
_lock = threading.Lock()  # of all: beginning a capture synchronises the device, which another capture does not survive


class NotCapturable(RuntimeError):
    """A computation waits for the CPU, or the CPU for it."""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory was short: the device's, or pinned memory and what graphs take, which torch has no class for."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


class OnDevice(TorchDispatchMode):
    """Raises NotCapturable where an operator reads a value back, or takes a tensor that lies elsewhere.

    Asked before a capture, since torch does not recover from one that such an operator breaks.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise NotCapturable(f"{func} reads values back")
        out = func(*args, **(kwargs or {}))
        # The attention kernels' random state is one more output, on the CPU unless it is captured. Nothing reads it.
        seen = (args, kwargs) if "attention" in str(func) else (args, kwargs, out)
        for leaf in tree_leaves(seen):
            if isinstance(leaf, Tensor) and leaf.device != self.device:
                raise NotCapturable(f"{func} has a tensor on {leaf.device}")
        return out


@dataclass(frozen=True)
class Captured:
    """A graph, and the memory that it reads from and writes to whenever it is replayed."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Runs functions of tensors on a CUDA device, from the third call with the same key on as a graph.

    The first call with a key runs as it is written: what comes once only costs no capture. The second is captured, and
    later ones are replayed. Where a function cannot be captured, it goes on running as it is written. Of `LIMIT` keys
    the least recently used makes room for another.

    All graphs compute in one pool of memory, so they run one after the other, whatever the threads and streams of
    their callers, and what is returned is a copy.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Captured | None] = OrderedDict()  # None: seen once
        self._refused: set[Hashable] = set()
        self._stream: Any = None  # that is captured: free memory belongs to its stream, and so do libraries' workspaces
        self._pool: Any = None
        self._last: Any = None  # the event behind the last use of the pool
        self._broken: Any = None  # a capture that torch does not recover from: the last one

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Graphs, ()  # a copy captures its own

    def clear(self) -> bool:
        """Forget all, since the addresses of what they read have changed, or their memory is needed.

        Returns:
            Whether there was a graph.
        """
        with _lock:
            found = any(self._known.values())
            self._drop(len(self._known))
            self._refused.clear()
            return found

    def run(
        self, key: Hashable, function: Function, inputs: Sequence[Tensor], device: torch.device
    ) -> tuple[Tensor, ...]:
        """What `function` returns for the inputs on `device`, all of it queued on the current stream.

        Args:
            key: says all that `function` does, and the inputs' shapes and dtypes.
            function: tensors on the device -> tensors on the device. Whatever else it reads stays where it is.
            inputs: on the device or in host memory, and not written to before the stream has read them.
        """
        with _lock, torch.cuda.device(device):
            outputs = self._run(key, function, inputs, device)
        if outputs is not None:
            return outputs
        outputs = function(*(value.to(device, non_blocking=True) for value in inputs))
        with _lock:  # seen now, and not before: what it makes once, noises for example, is there by then
            if key not in self._known and key not in self._refused:
                self._known[key] = None
                self._drop(len(self._known) - LIMIT)
        return outputs

    def _run(
        self, key: Hashable, function: Function, inputs: Sequence[Tensor], device: torch.device
    ) -> tuple[Tensor, ...] | None:
        """From the graph, captured if it is time to; None where the function has to run as it is written."""
        if key in self._refused or key not in self._known or self._broken is not None:
            return None
        self._known.move_to_end(key)
        captured = self._known[key]
        if captured is not None:
            return self._replay(captured, inputs, device)
        try:
            self._known[key], outputs = self._capture(function, inputs, device)
        except RuntimeError as error:
            log.warning("runs without a CUDA graph: %s", error)
            self._refused.add(key)
            del self._known[key]
            if not isinstance(error, NotCapturable):
                self._drop(len(self._known))  # their memory may be what was missing
            return None
        return outputs

    def _capture(
        self, function: Function, inputs: Sequence[Tensor], device: torch.device
    ) -> tuple[Captured, tuple[Tensor, ...]]:
        """The graph, which computes nothing yet, and what the function returns for these inputs."""
        held = [value.to(device, copy=True) for value in inputs]
        # In this thread: its libraries' handles are not made inside of the capture.
        with torch.compiler.set_stance("force_eager"), OnDevice(device):
            answer = function(*held)
        if self._stream is None or self._stream.device != held[0].device:  # which is numbered, as `device` may not be
            # Of the streams that torch hands out in turn, no other part of the package takes one of this priority.
            self._stream = torch.cuda.Stream(device, priority=-1)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate, pinned memory for example, while this one captures. A capture that fails
            # leaves its stream current, which the outer context mends.
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                outputs = function(*held)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self._broken = graph  # which torch's allocator still knows
            raise
        return Captured(graph, held, outputs), answer

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
        if not any(self._known.values()):
            self._pool = None  # a pool without a graph is gone
