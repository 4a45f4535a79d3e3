"""How many channels each group keeps under an additive limit, without any training: from minutes to seconds.

A table of what each width costs in quality is measured at a few anchors for each group and interpolated along the curve
that the elimination of its channels has (squared error against channels removed; both are convex and start at 0). The
knapsack over the table gives a plan. Because losses don't add up, the table's coefficients are then searched:
perturbed, solved again, and kept if the whole plan measures better beyond doubt (Frantar and Alistarh 2022, "SPDY").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from automl_compress.core.graph import Graph
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.search.decode import Decoder
from automl_compress.search.sensitivity import Sensitivity, single
from automl_compress.search.space import Decision, SearchSpace
from automl_compress.search.student import Students
from automl_compress.search.table import AdditiveTable, LayerCost

ANCHORS = (0.375, 0.75)
_SPREAD = 0.5  # of the perturbed logarithmic coefficients
_LEAST = 1e-12
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
            result |= _along_curve(students, space, decision, anchors, advance)
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


def _along_curve(
    students: Students,
    space: SearchSpace,
    decision: Decision,
    anchors: Sequence[float],
    advance: Callable[[], None],
) -> Sensitivity:
    size = space.graph.group[decision.target].size
    kept = {option: Plan(sparsity={"": float(option)}).kept_count("", size) for option in decision.options}
    curve = {option: _curve(students, decision.target, size, count) for option, count in kept.items()}
    cut = [option for option in decision.options if kept[option] < size]
    points = sorted({min(cut, key=lambda option: abs(float(option) - anchor)) for anchor in anchors}) if cut else []
    ratios = []
    for option in points:
        ratios.append(max(0.0, _mean(students, single(decision, option))) / max(curve[option], _LEAST))
        advance()
    result: Sensitivity = {}
    most = 0.0
    for option in decision.options:
        ratio = float(np.interp(float(option), [float(p) for p in points], ratios)) if points else 0.0
        # More channels removed never count as less lost: small differences are noise of few samples.
        most = max(most, ratio * curve[option])
        result[decision.name, option] = most
    return result


def _mean(students: Students, plan: Plan) -> float:
    return float(students.estimate(plan).mean())


def _curve(students: Students, group: str, size: int, kept: int) -> float:
    """The error that elimination has counted when so many channels are left; the square of the fraction removed where
    there is no such count."""
    losses = students.evidence.eliminations.get(group)
    if kept == size:
        return 0.0
    return float(losses.sort().values[size - kept - 1]) if losses is not None else (1 - kept / size) ** 2
