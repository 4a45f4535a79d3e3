"""What a student is trained for: a scalar to lower, and the parts that it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from automl_compress.model.task import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """What a training step lowers: `total`, a scalar with a graph, and its parts by name, unweighted and detached."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """The loss of a student on one batch. A student in train mode is one that a step will be made on."""

    def __call__(self, student: nn.Module, batch: Batch) -> Loss: ...

    def modules(self) -> nn.Module | None:
        """What the objective trains or remembers itself: its parameters belong to the optimizer, its state to a
        checkpoint. None where there is nothing."""
        ...
