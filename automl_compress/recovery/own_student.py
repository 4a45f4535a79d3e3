"""The student that a task makes of its own."""

from __future__ import annotations

import torch
from torch import nn

from automl_compress.errors import TaskError, raised
from automl_compress.model.task import Task
from automl_compress.recovery.students import require_own
from automl_compress.techniques.distillation.outputs import answers, require_match


def make_student(task: Task, width: float, seed: int) -> nn.Module:
    """The task's own student at a width, untrained; the same seed makes the same one.

    Raises TaskError where `student(width)` fails, or doesn't answer as the teacher does.
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
    student = student.cpu().float()
    require_match(answers(student, task, f"student({width:g})"), answers(task.model, task, "the model"))
    return student
