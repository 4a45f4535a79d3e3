"""One step's gradients: objective, backward, in pieces that fit in memory, averaged over processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from automl_compress.errors import TaskError, TrainingError, first_line
from automl_compress.model.task import Batch
from automl_compress.techniques.objective import Loss, Objective
from automl_compress.techniques.training.memory import fitting, pieces_of
from automl_compress.techniques.training.optimizers import Held
from automl_compress.techniques.training.parallel import Processes
from automl_compress.techniques.training.placement import Placement


class Gradients:
    """Computes what an optimizer steps along. `micro` is how many samples are computed at a time, None: all."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        placement: Placement,
        processes: Processes,
        parameters: list[nn.Parameter],
        held: Held,
        clip: float,
    ) -> None:
        self._student, self._objective, self._placement = student, objective, placement
        self._processes, self._parameters, self._held, self._clip = processes, parameters, held, clip
        remembered = [student, *filter(None, [objective.modules()])]
        self._statistics = [b for module in remembered for b in module.buffers() if b.is_floating_point()]
        self.micro: int | None = None

    def fit(self, batch: Batch, states: int, memory_bytes: int) -> None:
        """Find how many samples of a batch fit at a time. Leaves gradients and running statistics behind."""
        count = len(batch[1])
        found = fitting(batch, self._backward, self._parameters, states, memory_bytes) or count
        # Pieces are averaged one by one: as many in every process.
        least = self._processes.least(found)
        self.micro = None if least == count else least

    def compute(self, batch: Batch) -> tuple[float, dict[str, float], float]:
        """Loss, its parts, and the norm of the gradients, which are left in the parameters, clipped.

        Of a batch in pieces each is weighted by its samples: for a loss that is a mean over samples that is the loss of
        the batch, but batch-norms take their statistics from the piece. Where the loss is no finite number there are no
        gradients.
        """
        pieces = pieces_of(batch, self.micro)
        total, parts = 0.0, dict[str, float]()
        for piece in pieces:
            share = len(piece[1]) / len(batch[1])
            loss = self._loss(piece)
            value = self._processes.mean(loss.total.detach())
            total += share * value
            for name, part in loss.parts.items():
                parts[name] = parts.get(name, 0.0) + share * float(part)
            if not math.isfinite(value):
                return total, parts, 0.0
            with _explained(piece):
                (loss.total if len(pieces) == 1 else loss.total * share).backward()  # type: ignore[no-untyped-call]
        self._held.gradients()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._processes.average([*gradients, *self._statistics])
        norm = nn.utils.get_total_norm(gradients)
        if self._clip:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        return total, parts, float(norm)

    def _backward(self, batch: Batch) -> None:
        loss = self._loss(batch)
        with _explained(batch):
            loss.total.backward()  # type: ignore[no-untyped-call]

    def _loss(self, batch: Batch) -> Loss:
        with _explained(batch), self._placement.computing(self._student), self._placement.autocast():
            loss = self._objective(self._student, batch)
        if not isinstance(loss, Loss) or not isinstance(loss.total, Tensor):
            raise TaskError(f"an objective must return a Loss with a tensor in it, found {type(loss).__name__}")
        if loss.total.ndim != 0:
            raise TaskError(f"the task's loss must return a scalar tensor, found shape {tuple(loss.total.shape)}")
        return loss


@contextmanager
def _explained(batch: Batch) -> Iterator[None]:
    """What torch raises in a step, as one line that names the inputs."""
    shapes = ", ".join(str(tuple(part.shape)) for part in batch[0])
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"a training step on inputs {shapes} failed: {first_line(error)}") from error
    except IndexError as error:  # cross-entropy on a class that the model doesn't have
        raise TaskError(f"task: train labels are out of range: {error}") from error
