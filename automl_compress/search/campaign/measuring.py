"""Plans measured on the device before anything is trained, and what that says of predictions.

A cost model is learned from plans drawn at random: right on average over the space, and off by several percent, either
way, at the end of it that a budget asks for, with few blocks and few bits. There a search would give up plans that fit,
or propose plans that don't. So predictions are corrected twice, by plans about the budget before the first trial and by
the best ones after the trials: measuring a plan takes seconds, training it takes minutes. Neither latency nor memory
depends on what the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median

from automl_compress.core.budget import Cost, format_metric
from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.errors import InfeasibleError
from automl_compress.hardware.device.timer import ratio
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.sampling.seeds import UNIFORM, fewest_blocks, simple_plans
from automl_compress.search.solvers.feasibility import ERROR, additive_limits
from automl_compress.search.solvers.quick import QuickDecoder
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.table import AdditiveTable

CALIBRATION = "calibration.json"
_NEAR = 1.25  # a plan that is predicted within this factor of the budget says something about it
_SCALES = (0.85, 0.95, 1.05, 1.15)
_FASTEST = 12  # plans that may be measured where the cheapest is predicted to be about the budget
_AT_ONCE = 4
_TELLING = 4  # measured plans that say something about predictions


def calibrate(campaign: Campaign) -> None:
    """Correct predictions of latency by what plans about the budget take, dearer or cheaper, once for each budget.

    A resumed run finds the correction in its folder.
    """
    if campaign.calibrated or "latency" not in campaign.budget.limits or not campaign.device.measures:
        return
    known = campaign.folder.read_json(CALIBRATION) or {}
    if campaign.label not in known:
        limits = additive_limits(campaign.aim, campaign.original)
        plans = about_the_budget(campaign.space, campaign.bench.graph, campaign.table, limits, campaign.predict)
        found = measure(campaign, plans)
        factor = median(measured.latency_us / predicted.latency_us for predicted, measured in found)
        known[campaign.label] = campaign.costs.margins["latency"] * factor
        campaign.folder.write_json(CALIBRATION, known)
    campaign.calibrate(known[campaign.label])


def settle_edge(campaign: Campaign) -> None:
    """Where the fastest plan is predicted to take about what the budget allows, measure the fastest ones: predictions
    err there, and a search would try plan after plan of which none fits.

    The fastest that fits is where the search then starts. Raises InfeasibleError, with what was measured, where none
    does, and what wasn't measured is predicted to be slower still.
    """
    limit = campaign.budget.limits.get("latency")
    if limit is None or not campaign.device.measures:
        return
    if campaign.reach.floors(["latency"])["latency"] * ERROR <= limit:
        return
    known = campaign.measured
    plans = campaign.reach.fastest(_FASTEST)
    predicted = {plan.key: campaign.predict(plan).latency_us for plan in plans}
    while True:
        seen = [plan for plan in plans if plan.key in known]
        fitting = [plan for plan in seen if campaign.budget.met(known[plan.key])]
        if fitting:
            campaign.edge = min(fitting, key=lambda plan: known[plan.key].latency_us)
            return
        # Others may come out as much faster than predicted as the one that did so most.
        ratio = min((known[plan.key].latency_us / predicted[plan.key] for plan in seen), default=0.0)
        waiting = [p for p in plans if p.key not in known and ratio * predicted[p.key] <= limit]
        if not waiting:
            break
        measure(campaign, waiting[:_AT_ONCE])
    lowest = min(known[plan.key].latency_us for plan in seen)
    # What is fast enough, but too large, says nothing of plans that are smaller.
    if lowest > limit and not any(map(campaign.budget.met, known.values())):
        raise InfeasibleError(
            f"the {len(seen)} cheapest plans were measured, and need latency {format_metric('latency', lowest)} or "
            f"more (asked {format_metric('latency', limit)})",
            nearest={**campaign.floors(), "latency": lowest},
            binding=campaign.reach.binding(campaign.budget.limits),
        )


def about_the_budget(
    space: SearchSpace,
    graph: Graph,
    table: AdditiveTable,
    limits: Mapping[str, float],
    predict: Callable[[Plan], Cost],
) -> list[Plan]:
    """Plans of the kinds that searches deliver, predicted to be near the limit on latency: quantized ones with blocks
    removed, and what the table decodes to; where none is near, the nearest. `limits`: of the table, on latency and
    size."""
    low = next((plan for name, plan in simple_plans(space).items() if name.startswith(UNIFORM)), Plan())
    decoder = QuickDecoder(space, graph, table)

    def excess(plan: Plan) -> float:
        return predict(plan).latency_us / limits["latency"]

    plans = [low]
    for scale in _SCALES:
        solution = decoder.solve(table.quality, {metric: scale * limit for metric, limit in limits.items()})
        plans += [solution.plan] if solution is not None else []
        fewest = fewest_blocks(space, table.quality, low, partial(lambda most, plan: excess(plan) / most - 1, scale))
        plans += [fewest] if fewest is not None else []
    distinct = {space.plan_key(plan): plan for plan in plans}
    nearest = sorted(distinct.values(), key=lambda plan: abs(math.log(excess(plan))))
    near = [plan for plan in nearest if 1 / _NEAR <= excess(plan) <= _NEAR]
    return near or nearest[:1]


def confirm(campaign: Campaign, plans: Sequence[Plan]) -> None:
    """Measure plans beside the original: from then on that is their cost. If all miss, or all come out cheaper, correct
    the cost model."""
    pairs = measure(campaign, plans)
    misses = [pair for pair in pairs if not campaign.budget.met(pair[1])]
    if pairs and len(misses) == len(pairs):
        campaign.tighten(*min(misses, key=lambda pair: pair[1].latency_us / pair[0].latency_us))
    elif len(pairs) >= _TELLING:
        campaign.loosen(pairs)


def measure(campaign: Campaign, plans: Sequence[Plan]) -> list[tuple[Cost, Cost]]:
    """(predicted, measured) cost of each plan, beside the original; the search remembers what was measured."""
    if not plans:
        return []
    device, budget = campaign.device, campaign.budget
    what = "measuring plans on the device" if device.measures else "estimating what plans cost"
    campaign.progress.stage(what, len(plans))
    with ExitStack() as files:
        paths = {p.key: files.enter_context(device.saved(campaign.bench.structure(p))) for p in plans}
        with campaign.clock.timing("measuring", units=1 + len(paths)):
            timings = device.compare({"original": campaign.folder.path / "original.onnx", **paths})
        memory = {key: device.memory_bytes(path) for key, path in paths.items()} if "memory" in budget.limits else {}
    pairs = []
    for plan in plans:
        predicted = campaign.predict(plan)
        measured = Cost(
            latency_us=ratio(timings, plan.key, "original") * campaign.original.latency_us,
            size_bytes=predicted.size_bytes,
            memory_bytes=memory.get(plan.key, predicted.memory_bytes),
            provenance=timings[plan.key].provenance,
        )
        campaign.measured.remember(plan, measured)
        campaign.progress.advance()
        pairs.append((predicted, measured))
    return pairs
