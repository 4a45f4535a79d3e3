"""The plans that every search starts from, and that it has to beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.pricing import plain_bits, uniform_bits
from automl_compress.search.table.table import QualityKey

ORIGINAL = "original"
MILP = "milp"
UNIFORM = "uniform-int"
FEWEST_BLOCKS = "fewest-blocks"
CHEAPEST = "cheapest"
_SCALES = (0.6, 1.4)
_STEPS = 7
_SOLVED = 3
_STEP_BACK = 0.98


def first_plans(
    space: SearchSpace, quality: Mapping[QualityKey, float], excess: Callable[[Plan], float], milp: Plan | None
) -> dict[str, Plan]:
    """Label -> plan: all that a search starts from, the most promising first, as trials may be few. `excess`: of
    `fewest_blocks`; `milp`: the table's optimum, where there is one."""
    plans = simple_plans(space)
    quantized = next((plan for name, plan in plans.items() if name.startswith(UNIFORM)), Plan())
    best = {MILP: milp, FEWEST_BLOCKS: fewest_blocks(space, quality, quantized, excess)}
    first = {name: plan for name, plan in plans.items() if name == ORIGINAL or name.startswith(UNIFORM)}
    return first | {name: plan for name, plan in best.items() if plan is not None} | plans


def simple_plans(space: SearchSpace) -> dict[str, Plan]:
    """Label -> plan: the original, uniform quantization, every other bit-width throughout, each student width with
    uniform quantization."""
    result = {ORIGINAL: Plan()}
    bits = plain_bits(space)
    quantized = uniform_bits(space, bits) if bits is not None else Plan()
    if bits is not None:
        result[f"{UNIFORM}{bits}"] = quantized
    offered = {int(option) for d in space.decisions if d.kind == "bits" for option in d.options}
    for other in sorted(offered - {bits, FULL_BITS}, reverse=True):
        result[f"all-{other}-bits"] = uniform_bits(space, other)
    widths = (float(o) for d in space.decisions if d.kind == "width" for o in d.options if o != 1)
    return result | {f"width-{width:g}": replace(quantized, width=width) for width in widths}


def loosest_optimum(
    estimate: Callable[[float], Plan | None], solve: Callable[[float], Plan | None], fits: Callable[[Plan], bool]
) -> Plan | None:
    """The optimum for the loosest limits whose plan still fits the budget; None if none does.

    Both give the best plan of the additive table for the limits times a scale: `estimate` in milliseconds and nearly
    the best one, `solve` exactly. `fits` asks the cost model. The table's sums are estimates, so the limits that they
    are held against are moved, by bisection with the quick answers; the exact one is asked once, and again a little
    below where the cost model finds its plan too dear.
    """
    low, high = _SCALES
    best: Plan | None = None
    for _ in range(_STEPS):
        scale = (low + high) / 2
        plan = estimate(scale)
        if plan is not None and not fits(plan):
            high = scale
        else:
            low, best = scale, plan or best
    for _ in range(_SOLVED):
        exact = solve(low)
        if exact is None or fits(exact):
            return exact or best
        low *= _STEP_BACK
    return best


def fewest_blocks(
    space: SearchSpace, quality: Mapping[QualityKey, float], start: Plan, excess: Callable[[Plan], float]
) -> Plan | None:
    """`start` without as few blocks as make it fit, and of these those that cost little in quality alone; None if no
    number of blocks is enough.

    excess  by what share a plan is predicted to be over its budget: it fits at 0 or less

    The plan that somebody would make by hand. Where evaluations without training can't tell plans apart it is the
    mildest of them, since nothing else was touched.
    """
    removable = [d for d in space.decisions if d.kind == "drop" and True in d.options]
    loss = {d.target: quality.get((d.name, True), math.inf) for d in removable}

    def without(blocks: Iterable[str]) -> float:
        return excess(replace(start, drop=start.drop | set(blocks)))

    alone = {block: without([block]) for block in loss}
    by_saving = sorted(loss, key=lambda block: (alone[block], loss[block], block))
    count = next((n for n in range(1, len(loss) + 1) if without(by_saving[:n]) <= 0), None)
    if count is None:
        return None
    gone = set(by_saving[:count])
    mildest = sorted(loss, key=lambda block: (loss[block], block))
    for block in reversed(mildest):
        milder = (other for other in mildest if loss[other] < loss[block] and other not in gone)
        if block in gone:
            gone = next((trial for other in milder if without(trial := gone - {block} | {other}) <= 0), gone)
    return replace(start, drop=start.drop | gone)
