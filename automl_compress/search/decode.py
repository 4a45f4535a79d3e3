"""From a table of estimates and limits to the best plan: quickly by multipliers and local search, exactly by a MILP.

`solve` asks both. The quick answer (`quick.QuickDecoder`) takes milliseconds and is usually the optimum or within a
percent of it; the integer program (`program.Decoder`) improves it, proves that nothing meets the limits, or runs out of
its time, as it does with hundreds of decisions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.search.losses import additive_loss, options_in_force, sparsity_everywhere
from automl_compress.search.program import Decoder, NoPlanInTime
from automl_compress.search.quick import QuickDecoder
from automl_compress.search.space import SearchSpace
from automl_compress.search.table import ADDITIVE, AdditiveTable, LayerCost, Solution

__all__ = [
    "AdditiveTable",
    "Decoder",
    "LayerCost",
    "QuickDecoder",
    "Solution",
    "additive_loss",
    "cheapest",
    "options_in_force",
    "solve",
]

_SECONDS = 5.0


def solve(
    space: SearchSpace, graph: Graph, table: AdditiveTable, limits: Mapping[str, float], *, seconds: float = _SECONDS
) -> Plan | None:
    """The plan with the least estimated loss whose cost by the table meets the limits; None if there is none.

    limits   'latency' in microseconds, 'size' in bytes; 'memory' doesn't add up over layers and is left to the cost
             model
    seconds  for the exact solver, at each student width; when they are over, the best plan that is known counts

    Student widths other than the full one are tried only where sparsity can't take their place: when some group has no
    sparsity to choose, or nothing was found. Raises NoPlanInTime if the time passes before anything is found or
    excluded.
    """
    widths = student_widths(space)
    found = _solve_at(space, graph, table, limits, widths[0], seconds)
    if not found or not sparsity_everywhere(space):
        found += [s for w in widths[1:] for s in _solve_at(space, graph, table, limits, w, seconds)]
    return min(found, key=lambda s: (s.loss, s.cost.latency_us)).plan if found else None


def cheapest(space: SearchSpace, graph: Graph, table: AdditiveTable, metric: str) -> Plan:
    """The plan, at any student width, that the table gives the lowest 'latency' or 'size' ('memory': as for size)."""
    metric = "size" if metric == "memory" else metric
    found: list[Solution] = []
    for width in student_widths(space):
        try:
            found.append(Decoder(space, graph, table, width=width).cheapest(table.quality, metric))
        except NoPlanInTime:
            found.append(_cheapest_quickly(space, graph, table, metric, width))
    return min(found, key=lambda s: (s.cost.of(metric), s.loss)).plan


def student_widths(space: SearchSpace) -> list[float]:
    return [float(w) for w in space.options("width")] or [1.0]


def _solve_at(
    space: SearchSpace, graph: Graph, table: AdditiveTable, limits: Mapping[str, float], width: float, seconds: float
) -> list[Solution]:
    quick = QuickDecoder(space, graph, table, width=width).solve(table.quality, limits)
    try:
        exact = Decoder(space, graph, table, width=width).solve(table.quality, limits, time_limit_s=seconds)
    except NoPlanInTime:
        if quick is None:
            raise
        exact = None
    return [s for s in (exact, quick) if s is not None]


def _cheapest_quickly(space: SearchSpace, graph: Graph, table: AdditiveTable, metric: str, width: float) -> Solution:
    quick = QuickDecoder(space, graph, table, width=width)
    states = quick.descent.cheapest(ADDITIVE.index(metric))
    plan = quick.arrays.plan(states)
    loss, _ = quick.arrays.total(states, quick.arrays.losses([table.quality]))
    return Solution(plan=plan, loss=float(np.sum(loss)), cost=table.plan_cost(graph, plan), gap=float("inf"))
