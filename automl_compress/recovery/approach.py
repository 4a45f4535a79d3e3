"""The way from a whole model to a plan: how much of the plan is in force after a share of the way.

Source of the cubic schedule: Zhu and Gupta 2017, "To prune, or not to prune", equation 1: much is removed at first,
when there is much to spare, and less and less toward the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from automl_compress.core.graph import ChannelGroup, Graph
from automl_compress.core.masks import NO_MASK, parse_mask
from automl_compress.core.plan import Plan

Shape = Callable[[float], float]


def cubic(way: float) -> float:
    """How much of the plan is in force after a share of the way, 0 to 1."""
    return 1 - (1 - min(max(way, 0.0), 1.0)) ** 3


def plan_at(plan: Plan, graph: Graph, share: float, order: Mapping[str, list[int]]) -> Plan:
    """The plan when this share of it is in force: nothing at 0, the plan itself at 1.

    order  group -> the channels that the plan removes, those first that go first. What was removed at a smaller share
           is removed at a larger one.
    """
    if share >= 1:
        return plan
    kept = {}
    for name, channels in order.items():
        gone = set(channels[: math.floor(share * len(channels) + 1e-9)])
        if gone:
            kept[name] = tuple(c for c in range(graph.group[name].size) if c not in gone)
    drop = sorted(plan.drop)[: math.floor(share * len(plan.drop) + 1e-9)]
    masks = {layer: eased(text, share) for layer, text in plan.masks.items()}
    return replace(plan, width=1.0, sparsity={}, kept=kept, drop=frozenset(drop), masks=masks)


def eased(mask: str, share: float) -> str:
    """A mask that takes a share of what `mask` takes; patterns keep their M, thresholds are lowered."""
    if mask == NO_MASK or share <= 0:
        return NO_MASK
    found = parse_mask(mask)
    row = " by row" if found.by_row else ""
    if found.kind == "pattern":
        kept = found.of - math.floor(share * (found.of - found.kept) + 1e-9)
        return NO_MASK if kept == found.of else f"{kept}:{found.of}"
    value = f"{found.value * share:.6f}"
    if not float(value):
        return NO_MASK
    return f"<{value}{row}" if found.kind == "threshold" else f"{value}{row}"


def removal_order(model: nn.Module, graph: Graph, plan: Plan) -> dict[str, list[int]]:
    """Group -> the channels that the plan removes, those with the smallest weights first; `model` has full size."""
    order = {}
    for name, kept in plan.kept.items():
        sizes, stay = channel_norms(model, graph.group[name]), set(kept)
        order[name] = sorted((c for c in range(len(sizes)) if c not in stay), key=lambda c: (float(sizes[c]), c))
    return order


def channel_norms(model: nn.Module, group: ChannelGroup) -> Tensor:
    """The L2 norm [channels] of each channel's weights where it is made, over all places."""
    state = model.state_dict()
    total = torch.zeros(group.size, dtype=torch.float64)
    for place in group.places:
        value = state.get(place.tensor)
        if place.role != "producer" or value is None or not value.is_floating_point():
            continue
        squares = value.detach().double().cpu().square().movedim(place.dim, 0).flatten(1).sum(1)
        for channel, positions in enumerate(place.positions):
            total[channel] += squares[list(positions)].sum()
    return total.sqrt()
