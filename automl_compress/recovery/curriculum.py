"""Easy samples first: of each batch the part that the teacher finds easiest.

Source: Bengio et al. 2009, "Curriculum learning". Easy is what the teacher has a small loss on. The choice is within a
batch, so any loader serves.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from automl_compress.model.surgery import copy_model
from automl_compress.model.task import Batch, Task
from automl_compress.techniques.objective import Loss, Memory, Objective

START = 0.5


class Easiest:
    """An objective on the easiest `share` of each batch, at least two samples."""

    def __init__(self, objective: Objective, task: Task, teacher: nn.Module, share: float) -> None:
        self._objective, self._task, self._teacher, self._share = objective, task, teacher.eval(), share

    def __call__(self, student: nn.Module, batch: Batch) -> Loss:
        count = max(min(2, len(batch[1])), math.ceil(self._share * len(batch[1])))
        if not student.training or count == len(batch[1]):
            return self._objective(student, batch)
        # Ascending, so that which samples were chosen doesn't depend on how equal losses are ordered among themselves.
        chosen = torch.argsort(self.difficulty(batch), stable=True)[:count].sort().values
        return self._objective(student, (tuple(part[chosen] for part in batch[0]), batch[1][chosen]))

    def modules(self) -> nn.Module | None:
        return self._objective.modules()

    def memory(self) -> Memory | None:
        return self._objective.memory()

    @torch.no_grad()
    def difficulty(self, batch: Batch) -> Tensor:
        """The teacher's loss on each sample [batch]."""
        inputs, targets = batch
        if any(parameter.device != targets.device for parameter in self._teacher.parameters()):
            self._teacher = copy_model(self._teacher).to(targets.device)  # the caller's own stays where it is
        outputs = self._teacher(*inputs)
        if self._task.classifies:
            return functional.cross_entropy(outputs.float(), targets, reduction="none")
        return torch.stack([self._loss(outputs, targets, slice(i, i + 1)) for i in range(len(targets))])

    def _loss(self, outputs: Any, targets: Tensor, row: slice) -> Tensor:
        return self._task.loss_of(tree_map_only(Tensor, lambda part: part[row], outputs), targets[row]).float()


def pace(way: float) -> float:
    """The share of samples that is used after a share of the way (linear, from half to all)."""
    return min(1.0, START + (1 - START) * way)
