"""Mixtures of inputs, for which only the teacher has an answer.

Between the images that it was trained on, a teacher's answers say more than at them, where they are all but certain.
So a part of each batch becomes mixtures of two of its samples, x <- c x + (1 - c) x', c uniform in [0, 1], and the
student learns what the teacher makes of them; true labels count for the rest of the batch alone. Sources: Zhang et al.
2018, "mixup"; Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent" (mixtures as a way
to match functions).
"""

from __future__ import annotations

import torch

from automl_compress.model.task import Inputs, Task

_SIGNAL_DIMS = 3  # [N, C, L] and more: what has positions; rows of a table may hold codes, which have no mixtures


def mixable(task: Task, inputs: Inputs) -> bool:
    """Whether mixtures of inputs mean something: class scores are learned, from floating-point signals or images."""
    return task.classifies and all(part.is_floating_point() and part.ndim >= _SIGNAL_DIMS for part in inputs)


def mixed(inputs: Inputs, share: float) -> tuple[Inputs, int]:
    """The inputs with their last rows mixed with any others of the batch, and how many first rows are as they were.

    At least two rows stay.
    """
    rows = len(inputs[0])
    clean = max(rows - round(share * rows), min(2, rows))
    other = torch.randperm(rows)[clean:].to(inputs[0].device)
    part_of_own = torch.rand(rows - clean).to(inputs[0].device)
    result = []
    for part in inputs:
        weight = part_of_own.to(part.dtype).reshape(-1, *(1 for _ in part.shape[1:]))
        result.append(torch.cat([part[:clean], torch.lerp(part[other], part[clean:], weight)]))
    return tuple(result), clean
