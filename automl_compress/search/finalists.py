"""From one-shot trials to plans that fit: the best are measured on the device, and a miss corrects the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from automl_compress.core.budget import Cost
from automl_compress.core.plan import Plan
from automl_compress.hardware.timer import ratio
from automl_compress.search.campaign import Campaign

_CONFIRM = 8
_ROUNDS = 4


def finalists(campaign: Campaign, trials: int, exploring: float | None = None) -> list[Plan]:
    """The best one-shot plans that were measured on the device and are within the budget, best first.

    exploring  seconds for trials in all, None without a limit

    Where none of the best is within the budget, the cost model is corrected and the search goes on. Raises
    InfeasibleError after some rounds of that.
    """
    clock = campaign.clock
    until = None if exploring is None else clock.now() + exploring
    for number in range(_ROUNDS):
        left = None if until is None else max(0.0, until - clock.now())
        campaign.explore(trials + number * max(8, trials // 4), left)
        if not sum(campaign.trial_counts().values()):
            clock.refuse("it was over before the first trial", clock.typical("trial") or 1.0)
        pool = [plan for plan in campaign.ranked(10 * _CONFIRM) if plan.key not in campaign.measured][:_CONFIRM]
        confirm(campaign, pool)
        passed = [plan for plan in campaign.ranked(10 * _CONFIRM) if plan.key in campaign.measured]
        if passed:
            return passed
    raise campaign.infeasible(
        f"none of {len(campaign.measured)} plans that were predicted to meet the budget met it when measured"
    )


def confirm(campaign: Campaign, plans: Sequence[Plan]) -> None:
    """Measure plans beside the original: from then on that is their cost. If all miss, correct the cost model.

    Neither latency nor memory depends on what the weights are, so this is known before anything is trained.
    """
    if not plans:
        return
    device, budget = campaign.device, campaign.budget
    what = "measuring the best plans on the device" if device.measures else "estimating the best plans' cost"
    campaign.progress.stage(what, len(plans))
    with ExitStack() as files:
        paths = {p.key: files.enter_context(device.saved(campaign.bench.structure(p))) for p in plans}
        with campaign.clock.timing("measuring", units=1 + len(paths)):
            timings = device.compare({"original": campaign.folder.path / "original.onnx", **paths})
        memory = {key: device.memory_bytes(path) for key, path in paths.items()} if "memory" in budget.limits else {}
    misses = []
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
        if not budget.met(measured):
            misses.append((measured.latency_us / predicted.latency_us, predicted, measured))
    if len(misses) == len(plans):
        _, predicted, measured = min(misses, key=lambda miss: miss[0])
        campaign.tighten(predicted, measured)
