"""Four tasks on the same features: each file holds a task's loss, head, prediction and metric."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..data import Record
from ..features import Features


class Sample(NamedTuple):
    """One image of a training batch: its record, and what augmentation left of its annotations."""

    record: Record  # which image
    points: dict[str, tuple[float, float]]  # named key points, x then y, in pixels of the augmented image
    mask: Tensor | None  # bool (H, W) of the augmented image


class Task(Protocol):
    """What the training loop needs of a task: which images a step looks at, and what they cost.

    A task is a module: a head it trains along with the adapters is its parameters.

    Attributes:
        name: in the log.
        records: everything that `batch` draws from.
    """

    name: str
    records: tuple[Record, ...]

    def batch(self, generator: Any) -> list[Record]:
        """The images of one step, drawn with a `numpy.random.Generator`."""

    def loss(self, features: Features, samples: list[Sample]) -> tuple[Tensor, dict[str, float]]:
        """Features of the batch, in its order -> the loss, and its parts for the log."""

    def parameters(self) -> Any: ...
