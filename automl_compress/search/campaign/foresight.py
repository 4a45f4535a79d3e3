"""The first answer to a budget, before anything is tried: what the caches and the cost model say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from automl_compress.core.budget import METRICS, Cost, format_metric
from automl_compress.core.plan import Plan
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.sampling.seeds import MILP


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """A plan that is predicted to be within the budgets.

    cost      predicted, or measured where the plan was measured before
    one_shot  its metric on validation samples without training; None where it wasn't evaluated
    original  the original's cost; `budget`: metric -> microseconds or bytes
    """

    plan: Plan
    cost: Cost
    one_shot: float | None
    original: Cost
    budget: Mapping[str, float]

    @property
    def text(self) -> str:
        """One line for people."""
        share = self.cost.latency_us / self.original.latency_us
        how = "measured" if self.cost.provenance == "measured" else "predicted"
        figures = ", ".join(f"{metric} {format_metric(metric, self.cost.of(metric))}" for metric in METRICS)
        metric = "not evaluated yet" if self.one_shot is None else f"{self.one_shot:.4f} without training"
        return f"the best plan that is known: {figures} ({how}; {share:.3f} of the latency), {metric}"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "automl-compress/foreseen",
            "version": 1,
            "budget": dict(self.budget),
            "original": {metric: self.original.of(metric) for metric in METRICS},
            "cost": {metric: self.cost.of(metric) for metric in METRICS},
            "provenance": self.cost.provenance,
            "one_shot_metric": self.one_shot,
            "plan": self.plan.to_json(),
        }


def foresee(campaign: Campaign) -> Foreseen:
    """The best evaluated plan that is within the budgets, else the optimum of the table of estimates.

    After `Campaign.learn`. Raises InfeasibleError where neither is within the budgets.
    """
    best = next(iter(campaign.ranked_figures(1)), None)
    plan = best[0] if best is not None else campaign.seeds().get(MILP)
    if plan is None:
        raise campaign.infeasible("no known plan is predicted to be within the budgets; trials may find one")
    return Foreseen(
        plan=plan,
        cost=campaign.cost(plan),
        one_shot=best[1] if best is not None else None,
        original=campaign.original,
        budget=campaign.budget.limits,
    )
