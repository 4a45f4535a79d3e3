"""A model's outputs as named tensors, whatever container they come in, and those of two models side by side."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from automl_compress.errors import TrainingError
from automl_compress.model.outputs import checked_forward
from automl_compress.model.task import Task

# Keys under which Hugging Face's models return more than their answer.
_INSIDE = {
    "loss",
    "hidden_states",
    "attentions",
    "cross_attentions",
    "past_key_values",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "encoder_attentions",
    "decoder_hidden_states",
    "decoder_attentions",
}
_MASK = "attention_mask"
IGNORED = -100  # the class number that torch's cross-entropy leaves out


def named_tensors(outputs: Any) -> dict[str, Tensor]:
    """The floating-point tensors among outputs: a tensor, tuples, mappings (Hugging Face's ModelOutput is one) and
    dataclasses of them. Left out is whatever else there is (None, numbers), and what tells of a model's inside."""
    found = {name or "output": value for name, value in _walk(outputs, "") if value.is_floating_point()}
    return {name: value for name, value in found.items() if name.partition("[")[0].partition(".")[0] not in _INSIDE}


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _walk(part, f"{name}.{key}" if name else str(key))
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _walk(getattr(value, entry.name), f"{name}.{entry.name}" if name else entry.name)
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from _walk(part, f"{name}[{index}]" if name else f"output {index}")


def answers(network: nn.Module, task: Task, who: str) -> dict[str, Tensor]:
    """The named outputs of a network for the task's example input. Raises TaskError where it fails."""
    return named_tensors(checked_forward(network, task.example_inputs, "the example input", who=who))


def require_match(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    """Raise TrainingError unless both have the same outputs in the same shapes."""
    shapes = [{name: tuple(value.shape) for name, value in outputs.items()} for outputs in (student, teacher)]
    if shapes[0] == shapes[1]:
        if not shapes[0]:
            raise TrainingError("teacher and student have no floating-point output to compare; distil with 'task'")
        return
    names = [name for name in {**shapes[1], **shapes[0]} if shapes[0].get(name) != shapes[1].get(name)]
    told = "; ".join(f"{name}: {_told(shapes[1].get(name))} and {_told(shapes[0].get(name))}" for name in names[:3])
    raise TrainingError(f"teacher and student outputs differ in shape: {told}; both must return the same")


def matched(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The teacher's outputs by the student's names. Of a single one the name doesn't matter: one network may return a
    tensor, the other a dictionary. Raises TrainingError unless both have the same."""
    if len(student) == len(teacher) == 1:
        teacher = dict(zip(student, teacher.values(), strict=True))
    require_match(student, teacher)
    return teacher


def _told(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(shape)


def padding_input(model: nn.Module) -> int | None:
    """Which of a model's inputs says what isn't padding (1) and what is (0), by tokens [N, T]: the argument of its
    forward that is called `attention_mask`, as Hugging Face's models have it. None where there is none."""
    names = list(inspect.signature(model.forward).parameters)
    return names.index(_MASK) if _MASK in names else None


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassRows:
    """Class scores of student and teacher, a row a decision: [rows, classes]; `labels` [rows] where they are known."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None


def class_dim(scores: Tensor, targets: Tensor) -> int | None:
    """The dimension of classes where the targets are class numbers that fit the scores: one per sample [N, C], per
    token [N, T, C], or per position [N, C, ...]. None for anything else, such as a regression."""
    if targets.is_floating_point() or targets.is_complex() or scores.ndim != targets.ndim + 1:
        return None
    for dim in (scores.ndim - 1, 1):
        rest = (*scores.shape[:dim], *scores.shape[dim + 1 :])
        if scores.shape[dim] > 1 and rest == targets.shape:
            return dim
    return None


def class_rows(
    student: Tensor, teacher: Tensor, targets: Tensor | None, dim: int, counted: Tensor | None = None
) -> ClassRows:
    """Scores as rows of classes, without decisions that don't count.

    targets  class numbers in the shape of the scores without `dim`; rows of class -100 are left out
    counted  which positions [N, T] aren't padding; for scores [N, T, C]

    Raises TrainingError where nothing is left.
    """
    rows = [part.movedim(dim, -1).flatten(0, -2).float() for part in (student, teacher)]
    labels = None if targets is None else targets.flatten().long()
    keep = None if labels is None or not bool((labels == IGNORED).any()) else labels != IGNORED
    if counted is not None and student.ndim == 3 and counted.shape == student.shape[:2]:
        keep = counted.flatten().bool() if keep is None else keep & counted.flatten().bool()
    if keep is not None:
        if not bool(keep.any()):
            raise TrainingError("a batch has only ignored targets and padding: there is nothing to learn from it")
        rows = [part[keep] for part in rows]
        labels = None if labels is None else labels[keep]
    return ClassRows(student=rows[0], teacher=rows[1], labels=labels)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the teacher's variance, so that it has no unit; scalar."""
    scale = variance(teacher) if teacher.numel() > 1 else teacher.float().square().mean()
    error: Tensor = _MeanSquare.apply(student, teacher)  # type: ignore[no-untyped-call]
    return error / scale.clamp_min(1e-6)


def variance(value: Tensor) -> Tensor:
    """Of all numbers of a tensor, in float32 at least."""
    mean = _wide(_rows(value).sum(1)).sum() / value.numel()
    return sum_of_squares(value - mean) / (value.numel() - 1)


def sum_of_squares(value: Tensor) -> Tensor:
    """In float32 at least.

    Of bfloat16, kernels that hand out float32 make a copy of everything first, which takes ten times as long as adding
    up. So each sample's norm is taken as they hand it out, rounded to bfloat16, which evens out over samples.
    """
    return _wide(torch.linalg.vector_norm(_rows(value), dim=1)).square().sum()


def _rows(value: Tensor) -> Tensor:
    """A row for each sample, its numbers in the order in which they lie in memory."""
    if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
        value = value.movedim(1, -1)
    return value.reshape(len(value) if value.ndim else 1, -1)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


class _MeanSquare(torch.autograd.Function):
    """Mean squared difference in float32, without a copy in another precision: features are large."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        difference = student - teacher
        ctx.save_for_backward(difference)
        return sum_of_squares(difference) / max(1, difference.numel())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * gradient / max(1, difference.numel())), None
