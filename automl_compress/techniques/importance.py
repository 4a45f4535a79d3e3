"""Which channels of a group matter: a criterion is one function from evidence and a group to a score for each channel.

A new one is a function here and its name in CRITERIA. Within a group scores only have to be in the right order; to rank
channels across groups they must mean the same everywhere, which is said of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from automl_compress.core.graph import ChannelGroup
from automl_compress.errors import SpaceError, did_you_mean
from automl_compress.techniques.evidence import Evidence

Criterion = Callable[[Evidence, ChannelGroup], Tensor | None]
FALLBACK = "l2"


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


def l1(evidence: Evidence, group: ChannelGroup) -> Tensor:
    """Sum of absolute weights of each channel's filters [group size], relative to the group's mean."""
    return _magnitude(evidence.model, group, 1)


def l2(evidence: Evidence, group: ChannelGroup) -> Tensor:
    """Euclidean norm of each channel's filters [group size], relative to the group's mean."""
    return _magnitude(evidence.model, group, 2)


def batch_norm(evidence: Evidence, group: ChannelGroup) -> Tensor | None:
    """Absolute scale of the batch-norms on a channel [group size], averaged over them (Liu et al. 2017, "network
    slimming"); None for channels without one. Comparable across groups."""
    norms = {
        f"{name}.weight": m for name, m in evidence.model.named_modules() if isinstance(m, _BatchNorm) and m.affine
    }
    found = []
    for place in group.places:
        if place.tensor in norms:
            scale = norms[place.tensor].weight.detach().double().abs()
            found.append(torch.stack([scale[list(positions)].mean() for positions in place.positions]))
    return torch.stack(found).mean(dim=0) if found else None


def taylor(evidence: Evidence, group: ChannelGroup) -> Tensor | None:
    """Mean over samples of |dL/dm|, m a factor on the channel: what its removal changes the loss by to first order
    (Molchanov et al. 2017) [group size], in units of the loss, comparable across groups."""
    gradients = evidence.gate_gradients[group.name]
    return None if gradients is None else gradients.abs().mean(dim=0)


def fisher(evidence: Evidence, group: ChannelGroup) -> Tensor | None:
    """Mean over samples of (dL/dm)^2 / 2: the same to second order, with the empirical Fisher information for the
    Hessian (Theis et al. 2018, Liu et al. 2021) [group size], in units of the loss, comparable across groups."""
    gradients = evidence.gate_gradients[group.name]
    return None if gradients is None else gradients.square().mean(dim=0) / 2


def obs(evidence: Evidence, group: ChannelGroup) -> Tensor | None:
    """Optimal brain surgeon: channels are eliminated one by one, each time the one that is missed least after the best
    least-squares refit of the layers that read it; the score is the squared error so far [group size]. In units of the
    consumers' outputs, so comparable within a group only."""
    return evidence.eliminations[group.name]


def random(evidence: Evidence, group: ChannelGroup) -> Tensor:
    """The baseline: a seeded random order [group size], independent of the other groups."""
    index = [each.name for each in evidence.graph.groups].index(group.name)
    generator = torch.Generator().manual_seed(evidence.seed * 1_000_003 + index)
    return torch.rand(group.size, generator=generator, dtype=torch.float64)


CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "batch-norm": batch_norm,
    "taylor": taylor,
    "fisher": fisher,
    "obs": obs,
    "random": random,
}


def criterion(name: str) -> Criterion:
    """The criterion of that name. Raises SpaceError for an unknown one."""
    if name not in CRITERIA:
        raise SpaceError(
            f"importance {name!r} is unknown; choose one of {', '.join(CRITERIA)}{did_you_mean(name, CRITERIA)}"
        )
    return CRITERIA[name]
