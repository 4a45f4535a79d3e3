"""Structured pruning: a plan's channel counts become channels, and the model is cut to them.

Student width is the same cut applied everywhere, with the teacher's most important channels kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.errors import PlanError
from automl_compress.model.surgery import cut
from automl_compress.techniques.evidence import Evidence
from automl_compress.techniques.importance import CRITERIA, FALLBACK, Criterion


class Ranking:
    """The channels of every group from most to least important, computed once for a model.

    scores       group name -> a score for each channel, higher for those that stay
    substituted  groups that the criterion has nothing to say about; they are ranked by the L2 norm of their filters
    """

    def __init__(self, evidence: Evidence, importance: Criterion) -> None:
        self.scores: dict[str, Tensor] = {}
        self.substituted: list[str] = []
        self._order: dict[str, list[int]] = {}
        for group in evidence.graph.groups:
            scores = importance(evidence, group)
            if scores is None:
                self.substituted.append(group.name)
                scores = CRITERIA[FALLBACK](evidence, group)
                assert scores is not None
            self.scores[group.name] = scores
            # A stable sort, so that equal scores give the same plan on every machine.
            self._order[group.name] = torch.argsort(scores, descending=True, stable=True).tolist()

    def best(self, group: str, count: int) -> tuple[int, ...]:
        """The `count` most important channels of a group, ascending by index."""
        return tuple(sorted(self._order[group][:count]))


def select_channels(graph: Graph, plan: Plan, ranking: Ranking | None) -> Plan:
    """The plan with `kept` filled in for every group that loses channels. A plan that has `kept` stays as it is.

    Without a ranking it is the first channels: for a model of which only the shape counts.
    """
    if plan.kept:
        return plan
    kept = {}
    for group in graph.groups:
        count = plan.kept_count(group.name, group.size)
        if count < group.size:
            kept[group.name] = tuple(range(count)) if ranking is None else ranking.best(group.name, count)
    return replace(plan, kept=kept)


def prune_by(
    graph: Graph,
    scores: Mapping[str, Tensor],
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    across_groups: bool = False,
    keep_at_least: int = 1,
) -> Plan:
    """A plan that removes the channels with the lowest scores, at full student width.

    ratio           fraction to remove: of each group, or, `across_groups`, of all channels together
    threshold       instead: remove every channel that scores below it
    across_groups   compare channels of different groups; the criterion must be comparable across groups for that
    keep_at_least   channels that every group keeps, its best ones

    Raises PlanError unless exactly one of ratio (from 0 to below 1) and threshold is given.
    """
    if (ratio is None) == (threshold is None):
        raise PlanError("pruning needs a ratio or a threshold, and not both")
    if ratio is not None and not 0 <= ratio < 1:
        raise PlanError(f"pruning ratio must be in [0, 1), found {ratio:g}; 1 would remove everything")
    gone: dict[str, int] = {}
    if threshold is not None:
        gone = {group.name: int((scores[group.name] < threshold).sum()) for group in graph.groups}
    elif ratio is not None and across_groups:
        everything = sorted(
            (float(score), group.name) for group in graph.groups for score in scores[group.name].tolist()
        )
        for _, name in everything[: round(ratio * len(everything))]:
            gone[name] = gone.get(name, 0) + 1
    elif ratio is not None:
        gone = {group.name: round(ratio * group.size) for group in graph.groups}
    kept, sparsity = {}, {}
    for group in graph.groups:
        count = max(min(keep_at_least, group.size), group.size - gone.get(group.name, 0))
        if count < group.size:
            best = torch.argsort(scores[group.name], descending=True, stable=True)[:count].tolist()
            kept[group.name] = tuple(sorted(best))
            sparsity[group.name] = 1 - count / group.size
    return Plan(sparsity=sparsity, kept=kept)


def apply_plan(model: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """A smaller copy of `model`: channels removed and blocks dropped as a plan with selected channels says.

    Bit-widths are not applied here; quantization works on the exported model. Raises PlanError for another model's
    plan.
    """
    plan.check(graph)
    return cut(model, graph, kept=plan.kept, drop=plan.drop)
