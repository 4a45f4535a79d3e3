"""Which channels of a group matter: one function a criterion, each from a model and a group to one score a channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from automl_compress.core.graph import ChannelGroup
from automl_compress.errors import SpaceError

Criterion = Callable[[nn.Module, ChannelGroup], Tensor]


def _magnitude(model: nn.Module, group: ChannelGroup, order: int) -> Tensor:
    """Norm of each channel's filters, averaged over the producing layers after each was divided by its mean, so that no
    layer outweighs another by scale alone (Li et al. 2017 for one layer, Fang et al. 2023 for coupled ones)."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    total = torch.zeros(group.size, dtype=torch.float64)
    for place in group.places:
        if place.role != "producer":
            continue
        weight = tensors[place.tensor].detach().cpu().double().movedim(place.dim, 0).flatten(1)
        norms = weight.norm(p=order, dim=1)
        score = torch.stack([norms[list(positions)].sum() for positions in place.positions])
        total += score / score.mean().clamp_min(1e-12)
    return total


def l1(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Sum of absolute weights of each channel's filters [group size]."""
    return _magnitude(model, group, 1)


def l2(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Euclidean norm of each channel's filters [group size]."""
    return _magnitude(model, group, 2)


CRITERIA: dict[str, Criterion] = {"l1": l1, "l2": l2}


def criterion(name: str) -> Criterion:
    """The criterion of that name. Raises SpaceError for an unknown one."""
    if name not in CRITERIA:
        raise SpaceError(f"importance {name!r} is unknown; choose one of {', '.join(CRITERIA)}")
    return CRITERIA[name]
