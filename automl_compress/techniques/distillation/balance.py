"""Weights between losses whose scales have nothing in common.

A loss counts by the gradient that it gives the student. During the first steps the norm of each loss's gradient is
measured beside that of plain soft labels, and its weight is the ratio: then every mixture moves the student as far as
soft labels would, and a learning rate that is good for one is good for all. Source: the observation that gradient norms
should be comparable, Chen et al. 2018, "GradNorm"; measured once at the start instead of learned along the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

STEPS = 4
_SMALLEST, _LARGEST = 1e-4, 1e4
_NOTHING = 1e-12


class Balance(nn.Module):
    """Remembers the gradient norms of the first steps; its state belongs to a checkpoint."""

    squares: Tensor
    unit: Tensor
    seen: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("squares", torch.zeros(len(self.names), dtype=torch.float64))
        self.register_buffer("unit", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @property
    def measuring(self) -> bool:
        """Whether the next step's gradients are still to be measured."""
        return bool(self.names) and int(self.seen) < STEPS

    def measure(self, unit: Tensor, losses: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> None:
        """Add one batch: the gradients of `unit` and of each named loss with respect to the student's parameters."""
        self.unit += squared_norm(unit, parameters)
        for index, name in enumerate(self.names):
            self.squares[index] += squared_norm(losses[name], parameters)
        self.seen += 1

    def ratios(self) -> dict[str, float]:
        """Loss -> what it must be multiplied by to weigh as much as the unit; 1 where either has no gradient."""
        found = {}
        for name, square in zip(self.names, self.squares.tolist(), strict=True):
            ratio = 1.0
            if square > _NOTHING and float(self.unit) > _NOTHING:
                ratio = (float(self.unit) / square) ** 0.5
            found[name] = min(max(ratio, _SMALLEST), _LARGEST)
        return found


def squared_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Of a loss's gradient with respect to parameters, those included that it doesn't depend on; float64 scalar."""
    if not loss.requires_grad:
        return torch.zeros((), dtype=torch.float64)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum().cpu() if squares else torch.zeros((), dtype=torch.float64)
