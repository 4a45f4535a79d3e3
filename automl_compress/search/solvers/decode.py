"""From a table of estimates and limits to the best plan: quickly by multipliers and local search, exactly by a MILP.

`solve` asks both. The quick answer (`quick.QuickDecoder`) takes milliseconds and is usually the optimum or within a
percent of it; the integer program (`program.Decoder`) improves it, proves that nothing meets the limits, or gives up
where that takes too much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.search.solvers.listing import cheapest_first
from automl_compress.search.solvers.program import Decoder, Unsolved
from automl_compress.search.solvers.quick import QuickDecoder
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.losses import additive_loss, options_in_force, sparsity_everywhere
from automl_compress.search.table.table import AdditiveTable, LayerCost, Solution

_EQUAL = 1e-9

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
    """The plan, at any student width, that is found to have the lowest 'latency' or 'size' by the table ('memory': as
    for size), the one with the lower loss among equals."""
    metric = "size" if metric == "memory" else metric
    found: list[tuple[float, float, Plan]] = []
    for width in student_widths(space):
        decoder = QuickDecoder(space, graph, table, width=width)
        states, costs = cheapest_first(decoder, decoder.limits({metric: 1.0}))
        equal = states.take(np.flatnonzero(costs <= costs[0] * (1 + _EQUAL)))
        loss, _ = decoder.arrays.total(equal, decoder.arrays.losses([table.quality] * len(equal)))
        best = int(loss.argmin())
        found.append((float(costs[0]), float(loss[best]), decoder.arrays.plan(equal, best)))
    return min(found, key=lambda entry: entry[:2])[2]


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
