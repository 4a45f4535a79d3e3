"""How many channels each group keeps under an additive limit, without any training: from minutes to seconds.

A table of what each width costs in quality is measured at a few anchors for each group (`sensitivity.along_curve`). The
knapsack over the table gives a plan. Because losses don't add up, the table's coefficients are then searched:
perturbed, solved again, and kept if the whole plan measures better beyond doubt (Frantar and Alistarh 2022, "SPDY").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from automl_compress.core.graph import Graph
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.search.evaluation.student import Students
from automl_compress.search.solvers.decode import Decoder
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.sensitivity import ANCHORS, Sensitivity, along_curve, single
from automl_compress.search.table.table import AdditiveTable, LayerCost

_SPREAD = 0.5  # of the perturbed logarithmic coefficients
_SIGNIFICANT = 2.0  # standard errors of the paired difference


def macs_table(graph: Graph, quality: Sensitivity) -> AdditiveTable:
    """The table of a device whose latency is the number of multiply-adds, a microsecond each; sizes of weights."""
    layers = {
        layer.name: {
            (layer.in_channels, layer.out_channels, FULL_BITS): LayerCost(
                latency_us=float(layer.macs), size_bytes=4.0 * layer.params
            )
        }
        for layer in graph.layers
    }
    return AdditiveTable(quality=quality, layers=layers)


def anchored_sensitivity(
    students: Students,
    space: SearchSpace,
    *,
    anchors: Sequence[float] = ANCHORS,
    advance: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Decision and option -> distance from the original: measured for removed blocks and, for channel groups, at the
    options nearest to the `anchors` (sparsities); the others are estimates between and beyond them."""
    result: Sensitivity = {}
    for decision in space.decisions:
        if decision.kind == "sparsity":

            def measure(plan: Plan) -> float:
                advance()
                return _mean(students, plan)

            found = along_curve(students, space, decision, measure, anchors)
            result |= {(decision.name, option): loss for option, loss in found.items()}
        elif decision.kind == "drop":
            for option in decision.options:
                result[decision.name, option] = _mean(students, single(decision, option)) if option else 0.0
                advance()
    return result


def refine(
    students: Students,
    space: SearchSpace,
    table: AdditiveTable,
    limits: Mapping[str, float],
    *,
    rounds: int,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Plan | None:
    """The best by measured distance of the table's optimum and of `rounds` optima for perturbed tables, each starting
    from the best so far; None where no plan meets the limits by the table."""
    decoder = Decoder(space, space.graph, table)
    first = decoder.solve(table.quality, limits)
    if first is None:
        return None
    rng = np.random.default_rng(seed)
    best, errors = first.plan, students.estimate(first.plan)
    factors = dict.fromkeys((decision.name for decision in space.decisions), 1.0)
    tried = {space.plan_key(best)}
    for _ in range(rounds):
        trial = {name: value * float(np.exp(rng.normal(0.0, _SPREAD))) for name, value in factors.items()}
        found = decoder.solve({key: loss * trial.get(key[0], 1.0) for key, loss in table.quality.items()}, limits)
        advance()
        if found is None or space.plan_key(found.plan) in tried:
            continue
        tried.add(space.plan_key(found.plan))
        other = students.estimate(found.plan)
        gain = errors - other
        # On a few hundred samples most differences are noise; the table's optimum must be beaten clearly.
        if gain.mean() > _SIGNIFICANT * gain.std() / np.sqrt(len(gain)):
            best, errors, factors = found.plan, other, trial
    return best


def _mean(students: Students, plan: Plan) -> float:
    return float(students.estimate(plan).mean())
