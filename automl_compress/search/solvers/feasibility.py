"""How cheap plans can get, known before the search: whether a budget can be met, and what binds where it can't."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from automl_compress.core.budget import Budget, Cost, format_metric
from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.errors import InfeasibleError
from automl_compress.search.solvers.decode import cheapest, excludes, solve, solve_quickly, student_widths
from automl_compress.search.solvers.listing import cheapest_first
from automl_compress.search.solvers.program import Unsolved
from automl_compress.search.solvers.quick import QuickDecoder
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.table import ADDITIVE, AdditiveTable

_REACH = 1.03  # an estimate this far above a limit is not yet proof that the limit can't be met
ERROR = 1.5  # by so much may predictions be off for the fastest plans; within it, measuring has the last word
_BINDING = 3


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a space reaches by the additive table, and by the cost model that `predict` asks.

    What was solved is remembered: an optimum takes seconds where there are hundreds of decisions.
    """

    space: SearchSpace
    graph: Graph
    table: AdditiveTable
    predict: Callable[[Plan], Cost]
    _solved: dict[tuple[tuple[str, float], ...], Plan | None] = field(default_factory=dict)
    _lowest: dict[str, Plan] = field(default_factory=dict)

    def floors(self, metrics: Iterable[str]) -> dict[str, float]:
        """Metric -> the lowest predicted figure of any plan that the table suggests as cheapest."""
        found = {}
        for metric in metrics:
            plan = self._cheapest(metric)
            found[metric] = min(self.predict(other).of(metric) for other in (plan, *self._narrowest(plan)))
        return found

    def fastest(self, count: int) -> list[Plan]:
        """So many of the plans with the lowest latency by the table, at any student width, each once, from what is
        predicted to be fastest on."""
        limits = np.array([1.0 if metric == "latency" else np.inf for metric in ADDITIVE])
        entries: list[tuple[float, Plan]] = []
        for width in student_widths(self.space):
            decoder = QuickDecoder(self.space, self.graph, self.table, width=width)
            states, latencies = cheapest_first(decoder, limits)
            entries += [(latencies[row], decoder.arrays.plan(states, row)) for row in range(min(count, len(states)))]
        entries.sort(key=lambda entry: entry[0])
        cheap = [self._cheapest("latency"), *(plan for _, plan in entries)]
        plans = {self.space.plan_key(plan): plan for plan in cheap}
        return sorted(list(plans.values())[:count], key=lambda plan: self.predict(plan).latency_us)

    def binding(self, metrics: Iterable[str]) -> tuple[str, ...]:
        """The layers that take most of the cheapest plan's latency (or size, where latency isn't limited)."""
        metric = "latency" if "latency" in metrics else "size"
        plan = self._cheapest(metric)
        costs = {
            name: self.table.cost(name, (*widths, plan.layer_bits(name))).of(metric)
            for name, widths in plan.widths(self.graph).items()
        }
        return tuple(sorted(costs, key=lambda name: -costs[name])[:_BINDING])

    def solve(self, limits: Mapping[str, float], scale: float = 1.0) -> Plan | None:
        """The table's optimum within limits on latency and size, each times `scale`; None: no plan was found."""
        key = tuple(sorted((metric, limit * scale) for metric, limit in limits.items()))
        if key not in self._solved:
            self._solved[key] = None
            with suppress(Unsolved):
                self._solved[key] = solve(self.space, self.graph, self.table, dict(key))
        return self._solved[key]

    def estimate(self, limits: Mapping[str, float], scale: float = 1.0) -> Plan | None:
        """The same in milliseconds: nearly the optimum."""
        return solve_quickly(self.space, self.graph, self.table, {m: limit * scale for m, limit in limits.items()})

    def excludes(self, limits: Mapping[str, float]) -> bool:
        """Whether it is certain that no plan meets the limits by the table."""
        return excludes(self.space, self.graph, self.table, limits)

    def _cheapest(self, metric: str) -> Plan:
        metric = "size" if metric == "memory" else metric
        if metric not in self._lowest:
            self._lowest[metric] = cheapest(self.space, self.graph, self.table, metric)
        return self._lowest[metric]

    def _narrowest(self, plan: Plan) -> list[Plan]:
        widths = [float(o) for d in self.space.decisions if d.kind == "width" for o in d.options]
        return [replace(plan, width=min(widths))] if widths else []


def additive_limits(aim: Budget, original: Cost) -> dict[str, float]:
    """The limits that the additive table can be held against; memory follows the file's size."""
    limits = {metric: limit for metric, limit in aim.limits.items() if metric != "memory"}
    if "memory" in aim.limits:
        share = aim.limits["memory"] / max(original.memory_bytes, 1.0)
        limits["size"] = min(limits.get("size", float("inf")), share * original.size_bytes)
    return limits


def require_feasible(
    reach: Reach, aim: Budget, budget: Budget, original: Cost, measured: Iterable[Cost] = (), *, settled: bool = False
) -> None:
    """Raise InfeasibleError where even the cheapest plan is over a budget, or no plan meets all of them together.

    A prediction proves nothing where a `measured` plan is within the budget. `settled`: what the fastest plans take is
    measured afterwards where predictions leave that open.
    """
    if any(budget.met(cost) for cost in measured):
        return
    floors = reach.floors(budget.limits)
    slack = dict.fromkeys(floors, _REACH) | ({"latency": ERROR} if settled else {})
    over = {metric: floor for metric, floor in floors.items() if floor > budget.limits[metric] * slack[metric]}
    loosened = {metric: limit * slack.get(metric, _REACH) for metric, limit in additive_limits(aim, original).items()}
    if not over and not reach.excludes(loosened):
        return
    nearest = {metric: max(f, budget.limits[metric]) if metric not in over else f for metric, f in floors.items()}
    what = ", ".join(
        f"{metric} {format_metric(metric, floor)} (asked {format_metric(metric, budget.limits[metric])})"
        for metric, floor in (over or floors).items()
    )
    how = "the cheapest reachable model needs" if over else "the budgets can't be met together; each alone reaches"
    raise InfeasibleError(f"{how} {what}", nearest=nearest, binding=reach.binding(budget.limits))
