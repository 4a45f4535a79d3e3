"""Which plans are worth training: figures without training don't tell everything about them.

Such a figure errs by more than good plans differ by, so of plans that it can't tell apart the milder one comes first.
It also says little about what training wins back, which isn't the same share of every cut's loss. So plans that remove
different blocks are all tried, unless they lose far more before. And cuts that a budget doesn't need are undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from automl_compress.core.plan import Plan
from automl_compress.search.space.offers import Option
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.losses import additive_loss
from automl_compress.search.table.table import QualityKey

_REFUSED = 60  # predictions of plans that don't fit, for each plan
_FAIR = 2.0
_CUTS = ("sparsity", "drop", "width")


def relaxed(
    space: SearchSpace, plan: Plan, quality: Mapping[QualityKey, float], fits: Callable[[Plan], bool]
) -> Plan | None:
    """`plan` with cuts undone as far as it still fits, those first that lose most by the table; None if it doesn't fit.

    Bit-widths stay as they are.
    """
    if not fits(plan):
        return None
    params, refused = space.params(plan), set[tuple[str, Option]]()
    steps = _undoing(space, params, quality)
    while steps and len(refused) < _REFUSED:
        name, option = steps.pop(0)
        milder = space.plan({**params, name: option})
        if (name, option) in refused or space.plan_key(milder) == space.plan_key(plan):
            continue
        if fits(milder):
            plan, params = milder, space.params(milder)
            steps = _undoing(space, params, quality)
        else:  # it fits even less beside what is undone since
            refused.add((name, option))
    return plan


def _undoing(
    space: SearchSpace, params: Mapping[str, Option], quality: Mapping[QualityKey, float]
) -> list[tuple[str, Option]]:
    """(decision, milder option) for every cut, largest gain first."""
    found = []
    for decision in space.decisions:
        if decision.kind in _CUTS:
            now = params[decision.name]
            for option in decision.options[: decision.options.index(now)]:
                gain = quality.get((decision.name, now), 0.0) - quality.get((decision.name, option), 0.0)
                found.append((gain, decision.name, option))
    found.sort(key=lambda step: -step[0])
    return [(name, option) for _, name, option in found]


def variants(
    space: SearchSpace,
    plans: Sequence[Plan],
    quality: Mapping[QualityKey, float],
    low: Mapping[str, int],
    fits: Callable[[Plan], bool],
) -> list[Plan]:
    """Milder plans than these, each once: with cuts undone, as they are and with every layer in `low` bits, which buys
    room for more."""
    found: dict[str, Plan] = {}
    for plan in plans:
        for start in (plan, replace(plan, bits=dict(low))) if low else (plan,):
            milder = relaxed(space, start, quality, fits)
            if milder is not None:
                found.setdefault(space.plan_key(milder), milder)
    known = {space.plan_key(plan) for plan in plans}
    return [plan for key, plan in found.items() if key not in known]


def in_order(
    space: SearchSpace,
    values: Sequence[tuple[Plan, float]],
    quality: Mapping[QualityKey, float],
    *,
    error: Callable[[float], float],
    original: float = math.inf,
    always: Sequence[Plan] = (),
    places: int = 1,
) -> list[Plan]:
    """Plans with their figures (more is better), in the order in which they are to be trained.

    error     the standard error of a figure: of plans as near to the best as that, the one that loses least by the
              table comes first
    original  the original's figure: that other blocks are removed counts for a plan that loses at most twice as much as
              the best
    always    of these, those that are among the plans are within the first `places`, but not first
    """
    if not values:
        return []
    best = max(value for _, value in values)
    alike = best - error(best)
    near = [plan for plan, value in values if value >= alike]
    near.sort(key=lambda plan: additive_loss(space, plan, quality))
    rest = sorted((entry for entry in values if entry[1] < alike), key=lambda entry: -entry[1])
    ranked = [*near, *(plan for plan, _ in rest)]
    fair = {plan.key for plan, value in values if original - value <= _FAIR * (original - best)}
    first, others, seen = list[Plan](), list[Plan](), set[frozenset[str]]()
    for plan in ranked:
        (first if plan.drop not in seen and plan.key in fair else others).append(plan)
        seen.add(plan.drop)
    ranked = [*first, *others]
    wanted = {plan.key for plan in always}
    late = [plan for plan in ranked[places:] if plan.key in wanted][: max(0, places - 1)]
    kept = [plan for plan in ranked if plan not in late]
    free = max(1, places - len(late))
    return [*kept[:free], *late, *kept[free:]]
