"""Knowledge distillation: the student learns the teacher's soft labels beside the true ones.

Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network". For tasks with a loss of their own
the teacher's outputs are matched by squared error instead of softened probabilities.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.errors import CompressError, TaskError, TrainingError
from automl_compress.model.task import Batch, Task


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the student is trained.

    epochs         passes over the training data; a fraction stops within a pass
    learning_rate  peak of the one-cycle schedule (SGD, Nesterov momentum 0.9)
    weight_decay   on weights of two and more dimensions only; biases and norms are exempt
    temperature    softens teacher and student alike
    soft_share     weight of the teacher's labels; the rest goes to the true labels
    clip           largest gradient norm
    """

    epochs: float = 3.0
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    temperature: float = 6.0
    soft_share: float = 0.9
    clip: float = 5.0


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """What a training run took: mean loss by tenth of the run, images seen, seconds."""

    losses: tuple[float, ...]
    images: int
    seconds: float


Step = Callable[[int, int, float, float], None]  # step, steps, loss, images per second


def distillation_loss(task: Task, student: Any, teacher: Any, targets: Tensor, schedule: Schedule) -> Tensor:
    """Soft labels at a temperature plus the task's own loss; scalar. Outputs [N, classes] for classification."""
    if _shape(student) != _shape(teacher):
        raise TrainingError(f"teacher and student outputs differ in shape: {_shape(teacher)} and {_shape(student)}")
    if task.classifies:
        t = schedule.temperature
        soft = functional.kl_div(
            functional.log_softmax(student / t, dim=1),
            functional.log_softmax(teacher / t, dim=1),
            reduction="batchmean",
            log_target=True,
        ) * (t * t)
    else:
        soft = _match(student, teacher)
    hard = task.loss_of(student, targets)
    if hard.ndim != 0:
        raise TaskError(f"the task's loss must return a scalar tensor, found shape {tuple(hard.shape)}")
    return schedule.soft_share * soft + (1 - schedule.soft_share) * hard


def distill(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    schedule: Schedule,
    *,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
    on_step: Step | None = None,
) -> TrainingLog:
    """Train `student` in place against `teacher` (frozen, eval). Raises TrainingError when the loss stops being finite.

    masks: parameter name -> which of its weights train; the others are zero before and after every step. The same
    seed, data order and thread count give the same student.
    """
    torch.manual_seed(seed)
    teacher = teacher.eval()
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
        loss = _gradient(student, teacher, task, inputs, targets, schedule)
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


def _gradient(
    student: nn.Module, teacher: nn.Module, task: Task, inputs: tuple[Tensor, ...], targets: Tensor, schedule: Schedule
) -> float:
    student.zero_grad(set_to_none=True)
    try:
        with torch.no_grad():
            soft = teacher(*inputs)
        loss = distillation_loss(task, student(*inputs), soft, targets, schedule)
        loss.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in inputs)
        first = str(error).partition("\n")[0]
        raise TrainingError(f"a training step on inputs {shapes} failed: {first}") from error
    except IndexError as error:  # cross-entropy on a class that the model doesn't have
        raise TaskError(f"task: train labels are out of range: {error}") from error
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


def _match(student: Any, teacher: Any) -> Tensor:
    if isinstance(student, Tensor):
        scale: Tensor = teacher.float().var().clamp_min(1e-6)
        return functional.mse_loss(student, teacher) / scale
    parts = [_match(a, b) for a, b in zip(student, teacher, strict=True)]
    return torch.stack(parts).mean()


def _shape(outputs: Any) -> Any:
    return tuple(outputs.shape) if isinstance(outputs, Tensor) else [_shape(part) for part in outputs]


def _tenths(losses: list[float]) -> tuple[float, ...]:
    size = max(1, -(-len(losses) // 10))
    return tuple(sum(part) / len(part) for part in (losses[i : i + size] for i in range(0, len(losses), size)))
