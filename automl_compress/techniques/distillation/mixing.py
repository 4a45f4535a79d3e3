"""Mixtures of inputs, for which only the teacher has an answer.

Between the images that it was trained on, a teacher's answers say more than at them, where they are all but certain.
So a part of each batch becomes mixtures of two of its samples, and the student learns what the teacher makes of them;
true labels count for the rest of the batch alone. Of a share c of the one and 1 - c of the other, c uniform in [0, 1],

* half are blended, c x + (1 - c) x' everywhere,
* half are pasted: x, but x' inside of a box with 1 - c of the area (a stretch of a signal).

What is pasted looks like the data in all but the box's edges, what is blended lies between them. What mixtures are
worth is in `benchmarks/RESULTS.md`. Sources: Zhang et al. 2018, "mixup"; Yun et al. 2019, "CutMix"; Beyer et al.
2022, "Knowledge distillation: A good teacher is patient and consistent" (mixtures as a way to match functions).
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    own = torch.rand(rows - clean)
    corner = torch.rand(rows - clean, max(part.ndim for part in inputs) - 2)
    result = []
    for part in inputs:
        weight = shares_of_own(own, corner, tuple(part.shape[2:])).to(part.device, part.dtype)
        result.append(torch.cat([part[:clean], torch.lerp(part[other], part[clean:], weight)]))
    return tuple(result), clean


def shares_of_own(own: Tensor, corner: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """How much of each mixture is its first sample, by position: [rows, 1, *sizes] in [0, 1].

    own     each mixture's mean share [rows]; the first half of the rows is pasted, the other half blended
    corner  where the box lies in each dimension, 0 at the beginning to 1 at the end [rows, at least as many as sizes]
    """
    pasted = len(own) // 2
    inside = torch.ones(pasted, 1, *sizes, dtype=torch.bool)
    for dim, size in enumerate(sizes):
        length = ((1 - own[:pasted]) ** (1 / len(sizes)) * size).round()
        begin = (corner[:pasted, dim] * (size - length)).round()
        position = torch.arange(size)
        along = (position >= begin[:, None]) & (position < (begin + length)[:, None])
        inside &= along.reshape(pasted, 1, *(size if d == dim else 1 for d in range(len(sizes))))
    blended = own[pasted:].reshape(-1, 1, *(1 for _ in sizes)).expand(-1, 1, *sizes)
    return torch.cat([(~inside).to(own.dtype), blended])
