"""Trains a student for an objective: SGD at a one-cycle rate, weights that a mask removed held at zero."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from automl_compress.errors import CompressError, TaskError, TrainingError
from automl_compress.model.task import Batch, Task
from automl_compress.techniques.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the student is trained.

    epochs         passes over the training data; a fraction stops within a pass
    learning_rate  peak of the one-cycle schedule (SGD, Nesterov momentum 0.9)
    weight_decay   on weights of two and more dimensions only; biases and norms are exempt
    clip           largest gradient norm
    """

    epochs: float = 3.0
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    clip: float = 5.0


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """What a training run took: mean loss by tenth of the run, images seen, seconds."""

    losses: tuple[float, ...]
    images: int
    seconds: float


Step = Callable[[int, int, float, float], None]  # step, steps, loss, images per second


def distill(
    student: nn.Module,
    objective: Objective,
    task: Task,
    schedule: Schedule,
    *,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
    on_step: Step | None = None,
) -> TrainingLog:
    """Train `student` in place for `objective`. Raises TrainingError when the loss stops being finite.

    masks: parameter name -> which of its weights train; the others are zero before and after every step. The same
    seed, data order and thread count give the same student.
    """
    torch.manual_seed(seed)
    channels_last = any(p.ndim == 4 for p in student.parameters())
    if channels_last:
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    student.train()
    steps = max(1, round(schedule.epochs * _steps_per_epoch(task)))
    optimizer = torch.optim.SGD(
        _parameter_groups(student, schedule.weight_decay), lr=schedule.learning_rate, momentum=0.9, nesterov=True
    )
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=schedule.learning_rate, total_steps=max(2, steps))
    held = _held(student, masks or {})
    losses: list[float] = []
    images, start = 0, time.perf_counter()
    for number, (inputs, targets) in enumerate(_endless(task, steps)):
        if channels_last:
            inputs = tuple(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs)
        loss = _gradient(student, objective, (inputs, targets))
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} at step {number + 1} of {steps}; lower the learning rate "
                f"(now {schedule.learning_rate:g}) or check the data"
            )
        for parameter, mask in held:
            if parameter.grad is not None:  # not a part of the norm that is clipped
                parameter.grad.mul_(mask)
        nn.utils.clip_grad_norm_(student.parameters(), schedule.clip)
        optimizer.step()
        for parameter, mask in held:
            parameter.data.mul_(mask)
        rates.step()
        losses.append(loss)
        images += len(targets)
        if on_step:
            on_step(number + 1, steps, loss, images / (time.perf_counter() - start))
    student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    student.eval()
    return TrainingLog(losses=_tenths(losses), images=images, seconds=time.perf_counter() - start)


def _gradient(student: nn.Module, objective: Objective, batch: Batch) -> float:
    student.zero_grad(set_to_none=True)
    try:
        loss = objective(student, batch).total
        loss.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in batch[0])
        first = str(error).partition("\n")[0]
        raise TrainingError(f"a training step on inputs {shapes} failed: {first}") from error
    return float(loss.detach())


def _held(student: nn.Module, masks: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    stored = dict(student.named_parameters(remove_duplicate=False))
    pairs = [(stored[name], mask.to(stored[name].dtype)) for name, mask in masks.items()]
    for parameter, mask in pairs:
        parameter.data.mul_(mask)
    return pairs


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError(
            "the model has no trainable parameter: every requires_grad is False; unfreeze some to recover "
            "accuracy, or ask for --epochs 0"
        )
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _steps_per_epoch(task: Task) -> int:
    try:
        return len(task.train)
    except TypeError:
        return sum(1 for _ in task.batches("train"))


def _endless(task: Task, steps: int) -> Iterator[Batch]:
    done = 0
    while done < steps:
        before = done
        try:
            for batch in task.batches("train"):
                if len(batch[1]) == 1 and done:
                    continue  # the remainder of a pass: batch-norm can't train on a single sample
                yield batch
                done += 1
                if done == steps:
                    return
        except CompressError:
            raise
        except Exception as error:
            raise TrainingError(f"reading train data raised {type(error).__name__}: {error}") from error
        if done == before:
            raise TaskError("task: train data is empty: its loader yields no batch")


def _tenths(losses: list[float]) -> tuple[float, ...]:
    size = max(1, -(-len(losses) // 10))
    return tuple(sum(part) / len(part) for part in (losses[i : i + size] for i in range(0, len(losses), size)))
