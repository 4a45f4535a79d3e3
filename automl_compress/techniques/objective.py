"""What a student is trained for: a scalar to lower, and the parts that it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from automl_compress.model.task import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """What a training step lowers: `total`, a scalar with a graph, and its parts by name, unweighted and detached."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Memory(Protocol):
    """What an objective remembers of the batches of one training, and what the losses of later ones depend on."""

    def forget(self) -> None:
        """A training starts, or starts again."""
        ...

    def write(self, beside: Path) -> dict[str, Any]:
        """Write what came since the last time into files whose names begin with a checkpoint's, and return plain values
        by which `read` finds what was there now, whatever is written later."""
        ...

    def read(self, beside: Path, facts: dict[str, Any]) -> None: ...


class Objective(Protocol):
    """The loss of a student on one batch. A student in train mode is one that a step will be made on."""

    def __call__(self, student: nn.Module, batch: Batch) -> Loss: ...

    def modules(self) -> nn.Module | None:
        """What the objective trains or remembers itself: its parameters belong to the optimizer, its state to a
        checkpoint. None where there is nothing."""
        ...

    def memory(self) -> Memory | None:
        """What else it remembers. None where there is nothing."""
        ...
