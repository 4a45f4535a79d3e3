"""Muon: a weight matrix steps in all directions by as much, not in the few that have the largest gradients.

The momentum of a matrix is replaced by the nearest matrix whose singular values are all 1. Here the step's size is a
share of the weight's own norm, so that one learning rate suits layers of any width and scale. In a few hundred steps
that wins back more than SGD does of a network that much was cut from, and as much of others (`benchmarks/RESULTS.md`).

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; You et al. 2017, "Large batch
training of convolutional networks" (steps relative to the weight's norm).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A matrix moves by this share of the learning rate, times its norm: then a rate that suits SGD suits both.
_SHARE_OF_NORM = 0.5
# Weights that start at zero have no norm: they move as if each row had this one.
_SMALLEST_ROW = 0.01
# Coefficients and number of Newton-Schulz steps (Jordan et al. 2024): singular values come out between 0.7 and 1.2.
_COEFFICIENTS, _STEPS = (3.4445, -4.7750, 2.0315), 5
_TINY = 1e-12


class Muon(torch.optim.Optimizer):
    """Steps groups of parameters that have `matrices` above 0 by Muon, and the others by SGD with Nesterov momentum.

    matrices  of how many matrices, one below the other, each weight of the group consists: its first dimension is cut
              into so many parts, the other dimensions are the columns. 1 for a dense layer, as many as the convolution
              has groups
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "matrices": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Muon takes no closure: it steps once along the gradients that are there")
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if group["matrices"]:
                    direction = self._nesterov(weight, weight.grad, group["momentum"])
                    weight.mul_(1 - rate * decay)
                    weight.sub_(_relative(direction, weight, group["matrices"]), alpha=rate * _SHARE_OF_NORM)
                else:
                    gradient = weight.grad.add(weight, alpha=decay) if decay else weight.grad
                    weight.sub_(self._nesterov(weight, gradient, group["momentum"]), alpha=rate)

    def _nesterov(self, weight: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        if not momentum:
            return gradient
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum_buffer"].mul_(momentum).add_(gradient)
        return gradient.add(buffer, alpha=momentum)


def _relative(direction: Tensor, weight: Tensor, matrices: int) -> Tensor:
    """The direction with equal singular values, and of each matrix about as large as that of the weight."""
    rows = len(weight) // matrices
    size = weight.reshape(matrices, -1).norm(dim=1).clamp(min=_SMALLEST_ROW * rows**0.5)
    step = orthogonal(direction.reshape(matrices, rows, -1))
    rank = min(step.shape[1:])
    scaled: Tensor = step * (size / rank**0.5)[:, None, None]
    return scaled.reshape(weight.shape)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with the same singular vectors, and singular values of about 1; zeros stay zeros."""
    size = matrices.flatten(1).norm(dim=1).clamp(min=_TINY)
    found: Tensor = matrices / size[:, None, None]
    if min(found.shape[1:]) == 1:
        return found
    wide = found if found.shape[1] <= found.shape[2] else found.mT
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if found.shape[1] <= found.shape[2] else wide.mT
