"""Recognition: the class of a sketch, by a head on the pooled features."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import DataSet, Record
from ..errors import SketchFusionError
from ..features import Features
from . import Sample

# ---- head


def make_head(width: int, classes: int, hidden: int | None = None, dropout: float = 0.0) -> nn.Module:
    """A linear head (width -> classes), or an MLP with one hidden layer; feature dropout before the first layer."""
    if hidden is None:
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(width, classes))
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
    )


# ---- loss


class Recognition(nn.Module):
    """Cross entropy on the pooled features of sketches, through a head that is trained along.

    Args:
        data: a set with labelled sketches.
        width: of the pooled features, `model.config.aggregator_width`.
        hidden: width of the MLP's hidden layer; without one the head is linear.
        batch_size: sketches a step; every class is as likely as the next.
        label_smoothing, dropout: regularisation, each from 0 to 1.

    Raises:
        SketchFusionError: fewer than two classes have sketches.
    """

    name = "recognition"

    def __init__(
        self,
        data: DataSet,
        width: int,
        *,
        hidden: int | None = None,
        batch_size: int = 64,
        label_smoothing: float = 0.1,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.records = tuple(record for record in data.sketches if record.label is not None)
        self.classes = tuple(sorted({str(record.label) for record in self.records}))
        if len(self.classes) < 2:
            raise SketchFusionError(
                f"{data.name} ({data.split}) has sketches of {len(self.classes)} classes: recognition needs two or more"
            )
        self.batch_size, self.label_smoothing = batch_size, label_smoothing
        self.head = make_head(width, len(self.classes), hidden, dropout)
        self._index = {name: i for i, name in enumerate(self.classes)}
        self._by_class: list[list[Record]] = [[] for _ in self.classes]
        for record in self.records:
            self._by_class[self._index[str(record.label)]].append(record)

    def batch(self, generator: np.random.Generator) -> list[Record]:
        groups = [self._by_class[i] for i in generator.integers(len(self.classes), size=self.batch_size)]
        return [group[generator.integers(len(group))] for group in groups]

    def loss(self, features: Features, samples: list[Sample]) -> tuple[Tensor, dict[str, float]]:
        logits = self.head(features.pooled)
        labels = torch.tensor([self._index[str(s.record.label)] for s in samples], device=logits.device)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss, {"cross_entropy": loss.item(), "batch_accuracy": accuracy(logits, labels)}


# ---- prediction


def fit_linear(features: Tensor, labels: Tensor, classes: int, *, seed: int = 0) -> nn.Linear:
    """A linear head on frozen features: multinomial logistic regression, solved rather than stepped through.

    Features are standardised first, and the scaling is folded into the head's weights. The strength of the L2
    penalty is the best of four on a tenth of the samples; then the head is fitted to all of them.

    Args:
        features: (N, D). labels: (N,) int64, 0 to classes - 1. seed: of the choice of the tenth.

    Returns:
        `nn.Linear(D, classes)` without gradients, on the features' device.
    """
    mean, std = features.float().mean(0), features.float().std(0, correction=0).clamp(min=1e-6)
    inputs = (features.float() - mean) / std
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    tenth = max(1, len(labels) // 10)
    watched, rest = order[:tenth], order[tenth:]
    best = max(_PENALTIES, key=lambda penalty: _quality(inputs, labels, classes, penalty, rest, watched))
    weight, bias = _solve(inputs, labels, classes, best)
    head = nn.Linear(features.shape[1], classes, device=features.device).requires_grad_(False)
    head.weight.copy_(weight / std)
    head.bias.copy_(bias - (weight / std) @ mean)
    return head


_PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)  # from strong to weak: of equal ones the stronger is taken


def _quality(inputs: Tensor, labels: Tensor, classes: int, penalty: float, rest: Tensor, watched: Tensor) -> float:
    weight, bias = _solve(inputs[rest], labels[rest], classes, penalty)
    return accuracy(inputs[watched] @ weight.T + bias, labels[watched])


@torch.enable_grad()
def _solve(inputs: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def cost() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T + bias, labels) + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(cost)
    return weight.detach(), bias.detach()


# ---- metric


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Acc@1: the share, 0 to 1, of samples (N, classes) whose highest logit is their label's (N,)."""
    return float((logits.argmax(1) == labels).double().mean())
