"""Structured pruning: a plan's channel counts become channels, and the model is cut to them.

Student width is the same cut applied everywhere, with the teacher's most important channels kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.model.surgery import cut
from automl_compress.techniques.importance import Criterion


class Ranking:
    """The channels of every group from most to least important, computed once for a model."""

    def __init__(self, model: nn.Module, graph: Graph, importance: Criterion) -> None:
        self._order: dict[str, list[int]] = {}
        for group in graph.groups:
            scores = importance(model, group)
            # A stable sort, so that equal scores give the same plan on every machine.
            self._order[group.name] = torch.argsort(scores, descending=True, stable=True).tolist()

    def best(self, group: str, count: int) -> tuple[int, ...]:
        """The `count` most important channels of a group, ascending by index."""
        return tuple(sorted(self._order[group][:count]))


def select_channels(graph: Graph, plan: Plan, ranking: Ranking) -> Plan:
    """The plan with `kept` filled in for every group that loses channels. A plan that has `kept` stays as it is."""
    if plan.kept:
        return plan
    kept = {}
    for group in graph.groups:
        count = plan.kept_count(group.name, group.size)
        if count < group.size:
            kept[group.name] = ranking.best(group.name, count)
    return replace(plan, kept=kept)


def apply_plan(model: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """A smaller copy of `model`: channels removed and blocks dropped as a plan with selected channels says.

    Bit-widths are not applied here; quantization works on the exported model. Raises PlanError for another model's
    plan.
    """
    plan.check(graph)
    return cut(model, graph, kept=plan.kept, drop=plan.drop)
