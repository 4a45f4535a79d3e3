"""The student that a task makes of its own."""

from __future__ import annotations

import torch
from torch import nn

from automl_compress.errors import TaskError, TrainingError, raised
from automl_compress.model.task import Task
from automl_compress.model.trace import exported
from automl_compress.recovery.students import WIDTHS, require_own
from automl_compress.techniques.distillation.outputs import answers, require_match


def make_student(task: Task, width: float, seed: int) -> nn.Module:
    """The task's own student at a width, untrained; the same seed makes the same one.

    Raises TaskError where `student(width)` fails, has nothing to train, or doesn't answer as the model does.
    """
    require_own(task.student)
    assert task.student is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            student = task.student(width)
        except Exception as error:
            raise TaskError(f"task: student({width:g}) raised {raised(error)}") from error
    if not isinstance(student, nn.Module):
        raise TaskError(f"task: student({width:g}) must return a torch.nn.Module, found {type(student).__name__}")
    student, name = student.cpu().float(), f"student({width:g})"
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise TaskError(f"task: {name} has nothing to train: no parameter of it requires gradients")
    mine, models = answers(student, task, name), answers(task.model, task, "the model")
    try:
        require_match(mine, models)
    except TrainingError as error:
        raise TaskError(f"task: {name}: {error}") from error
    return student


def require_exportable(task: Task, seed: int) -> None:
    """Raise TaskError where the task's widest or narrowest student can't be made, or torch can't export it."""
    for width in (WIDTHS[0], WIDTHS[-1]):
        student = make_student(task, width, seed)
        try:
            exported(student.eval(), task.example_inputs)
        except TaskError as error:
            raise TaskError(f"task: student({width:g}): {error}") from error
