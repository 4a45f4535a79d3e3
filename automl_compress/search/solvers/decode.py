"""From a table of estimates and limits to the best plan: quickly by multipliers and local search, exactly by a MILP.

`solve` asks both. The quick answer (`quick.QuickDecoder`) takes milliseconds and is usually the optimum or within a
percent of it; the integer program (`program.Decoder`) improves it, proves that nothing meets the limits, or gives up
where that takes too much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.errors import CompressError
from automl_compress.search.solvers.program import Decoder, Unsolved
from automl_compress.search.solvers.quick import QuickDecoder
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.losses import additive_loss, options_in_force, sparsity_everywhere
from automl_compress.search.table.table import ADDITIVE, AdditiveTable, LayerCost, Solution

__all__ = [
    "AdditiveTable",
    "Decoder",
    "LayerCost",
    "QuickDecoder",
    "Solution",
    "additive_loss",
    "cheapest",
    "next_cheapest",
    "options_in_force",
    "solve",
    "solve_quickly",
]


def solve(space: SearchSpace, graph: Graph, table: AdditiveTable, limits: Mapping[str, float]) -> Plan | None:
    """The plan with the least estimated loss whose cost by the table meets the limits; None if there is none.

    limits   'latency' in microseconds, 'size' in bytes; 'memory' doesn't add up over layers and is left to the cost
             model

    Student widths other than the full one are tried only where sparsity can't take their place: when some group has no
    sparsity to choose, or nothing was found. Where the exact solver gives up, the best plan that is known counts;
    Unsolved is raised if there is none.
    """
    return _best(space, lambda width: _solve_at(space, graph, table, limits, width))


def solve_quickly(space: SearchSpace, graph: Graph, table: AdditiveTable, limits: Mapping[str, float]) -> Plan | None:
    """The same without the exact solver: None where the quick one found none, which proves nothing."""

    def solve_at(width: float) -> list[Solution]:
        found = QuickDecoder(space, graph, table, width=width).solve(table.quality, limits)
        return [] if found is None else [found]

    return _best(space, solve_at)


def _best(space: SearchSpace, solve_at: Callable[[float], list[Solution]]) -> Plan | None:
    widths = student_widths(space)
    found = solve_at(widths[0])
    if not found or not sparsity_everywhere(space):
        found += [s for w in widths[1:] for s in solve_at(w)]
    return min(found, key=lambda s: (s.loss, s.cost.latency_us)).plan if found else None


def excludes(space: SearchSpace, graph: Graph, table: AdditiveTable, limits: Mapping[str, float]) -> bool:
    """Whether it is certain that no plan's cost by the table meets the limits; False where that can't be told."""
    for width in student_widths(space):
        if QuickDecoder(space, graph, table, width=width).solve(table.quality, limits) is not None:
            return False
        exact = Decoder(space, graph, table, width=width)
        try:
            if exact.solve(table.quality, limits) is not None:
                return False
        except Unsolved:
            if not exact.excludes(limits):
                return False
    return True


def cheapest(space: SearchSpace, graph: Graph, table: AdditiveTable, metric: str) -> Plan:
    """The plan, at any student width, that the table gives the lowest 'latency' or 'size' ('memory': as for size)."""
    metric = "size" if metric == "memory" else metric
    found: list[Solution] = []
    for width in student_widths(space):
        try:
            found.append(Decoder(space, graph, table, width=width).cheapest(table.quality, metric))
        except Unsolved:
            found.append(_cheapest_quickly(space, graph, table, metric, width))
    return min(found, key=lambda s: (s.cost.of(metric), s.loss)).plan


def next_cheapest(
    space: SearchSpace, graph: Graph, table: AdditiveTable, metric: str, first: Plan, count: int
) -> list[Plan]:
    """Up to so many plans of `first`'s student in the order of what the table gives them, from the cheapest, which is
    `first`, on; fewer where they can't be listed exactly."""
    found, decoder = [first], Decoder(space, graph, table, width=first.width)
    with suppress(CompressError):  # there are no others, or they are too many for the exact solver
        while len(found) < count:
            found.append(decoder.cheapest(table.quality, metric, found).plan)
    return found


def student_widths(space: SearchSpace) -> list[float]:
    return [float(w) for w in space.options("width")] or [1.0]


def _solve_at(
    space: SearchSpace, graph: Graph, table: AdditiveTable, limits: Mapping[str, float], width: float
) -> list[Solution]:
    quick = QuickDecoder(space, graph, table, width=width).solve(table.quality, limits)
    try:
        exact = Decoder(space, graph, table, width=width).solve(table.quality, limits)
    except Unsolved:
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
