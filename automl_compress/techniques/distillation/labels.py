"""Losses on class scores. All take logits [rows, classes] of student and teacher, and return a scalar.

A student that answers like its teacher has loss zero and gradient zero in each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from automl_compress.errors import TaskError
from automl_compress.techniques.distillation.outputs import squared_error

_SMALL = 1e-8


def soft_labels(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened probabilities, times the squared temperature so that gradients keep their size.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network".
    """
    return _divergence(_log_softmax(student, temperature), _log_softmax(teacher, temperature)) * temperature**2


def logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of the logits, each row's mean taken off (which no probability depends on), over the teacher's
    variance.

    Source: Ba, Caruana 2014, "Do Deep Nets Really Need to be Deep?".
    """
    centred = [part - part.mean(dim=1, keepdim=True) for part in (student, teacher)]
    return squared_error(*centred)


def decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, *, target: float, others: float
) -> Tensor:
    """Target class against the rest, and the other classes among themselves, weighed apart, times the squared
    temperature. Labels [rows].

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", eq. 5 and 7.
    """
    binary, rest = decoupled_rows(student, teacher, labels, temperature)
    return (target * binary.mean() + others * rest.mean()) * temperature**2


def decoupled_rows(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The two divergences of each row [rows]: target class against all others, and within the others.

    Their sum, the second times the teacher's probability of the others, is the divergence of all classes. Raises
    TaskError for labels out of range.
    """
    classes = student.shape[1]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        found = low if low < 0 else high
        raise TaskError(
            f"task: train labels must be 0 to {classes - 1} (the model has {classes} outputs), found {found}"
        )
    hit = functional.one_hot(labels, classes).bool()
    logs = [_log_softmax(part, temperature) for part in (student, teacher)]
    pairs = []
    for log in logs:
        rest = torch.logsumexp(log.masked_fill(hit, -torch.inf), dim=1)
        pairs.append(torch.stack([log[hit], rest], dim=1))
    binary = functional.kl_div(pairs[0], pairs[1], reduction="none", log_target=True).sum(1)
    among = [_log_softmax(part[~hit].view(len(part), -1), temperature) for part in (student, teacher)]
    return binary, functional.kl_div(among[0], among[1], reduction="none", log_target=True).sum(1)


def relations(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """One minus the correlation of the softened probabilities, over each row (what a sample is like) and over each
    class (which samples are like it), times the squared temperature.

    Source: Huang et al. 2022, "Knowledge Distillation from a Stronger Teacher", eq. 8 to 10.
    """
    p, q = (functional.softmax(part / temperature, dim=1) for part in (student, teacher))
    between = correlation_distance(p, q)
    within = correlation_distance(p.T, q.T) if len(p) > 1 else torch.zeros_like(between)
    return (between + within) * temperature**2


def correlation_distance(one: Tensor, other: Tensor) -> Tensor:
    """One minus the mean Pearson correlation of the rows of two matrices; scalar. Rows may be scaled and shifted."""
    one, other = (part - part.mean(dim=1, keepdim=True) for part in (one, other))
    # Half of the squared distance of unit vectors, instead of 1 - cosine, which rounding makes different from 0.
    unit = [functional.normalize(part, dim=1, eps=_SMALL) for part in (one, other)]
    return (unit[0] - unit[1]).square().sum(1).mean() / 2


def _log_softmax(scores: Tensor, temperature: float) -> Tensor:
    return functional.log_softmax(scores / temperature, dim=1)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
