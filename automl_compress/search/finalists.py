"""From one-shot trials to finished models: measure the best on the device, distil those that fit, keep the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from automl_compress.core.budget import Cost
from automl_compress.core.plan import Plan
from automl_compress.errors import CompressError, InfeasibleError
from automl_compress.hardware.timer import ratio
from automl_compress.search.campaign import Campaign
from automl_compress.search.ladder import SURVIVORS, Candidate, Recovery, short
from automl_compress.search.seeds import MILP, UNIFORM
from automl_compress.techniques.training.log import StepReport
from automl_compress.techniques.training.settings import Training

_CONFIRM = 8
_ROUNDS = 4


def finalists(campaign: Campaign, trials: int, timeout: float | None = None) -> list[Plan]:
    """The best one-shot plans that were measured on the device and are within the budget, best first.

    Where none of the best is, the cost model is corrected and the search goes on. Raises InfeasibleError after some
    rounds of that.
    """
    for number in range(_ROUNDS):
        campaign.explore(trials + number * max(8, trials // 4), timeout)
        if not sum(campaign.trial_counts().values()):
            raise CompressError("the time limit was over before the first trial; give more time, the caches are kept")
        pool = [plan for plan in campaign.ranked(10 * _CONFIRM) if plan.key not in campaign.measured][:_CONFIRM]
        confirm(campaign, pool)
        passed = [plan for plan in campaign.ranked(10 * _CONFIRM) if plan.key in campaign.measured]
        if passed:
            return passed
    raise InfeasibleError(
        f"none of {len(campaign.measured)} plans that were predicted to meet the budget met it when measured",
        nearest=campaign.floors(),
        binding=campaign.binding(),
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
        campaign.measured[plan.key] = measured
        campaign.progress.advance()
        if not budget.met(measured):
            misses.append((measured.latency_us / predicted.latency_us, predicted, measured))
    if len(misses) == len(plans):
        _, predicted, measured = min(misses, key=lambda miss: miss[0])
        campaign.tighten(predicted, measured)


def climb(campaign: Campaign, plans: Sequence[Plan], schedule: Training, recovery: Recovery) -> list[Candidate]:
    """Distil briefly, keep the best, distil fully: the finished candidates, best first."""
    survivors = list(plans[:SURVIVORS])
    if schedule.epochs > 0 and len(survivors) > 1:
        tried = [recover(campaign, plan, "short", short(schedule), recovery) for plan in survivors]
        order = sorted(range(len(tried)), key=lambda i: -tried[i].metric)
        survivors = [survivors[i] for i in order]
    return [recover(campaign, survivors[0], "full", schedule, recovery)]


def recover(campaign: Campaign, plan: Plan, rung: str, schedule: Training, recovery: Recovery) -> Candidate:
    """One recovery with progress."""
    campaign.progress.stage(f"{rung} distillation", None)

    def on_step(report: StepReport) -> None:
        if report.step == 1:
            campaign.progress.stage(report.label, report.steps)
        campaign.progress.advance(1, **report.facts())

    candidate = recovery.recover(plan, rung, schedule, on_step)
    cost = campaign.describe(replace(candidate.plan, kept={}))
    campaign.progress.note(f"{rung} distillation: {candidate.metric:.4f} on validation at {cost}")
    return candidate


def baselines(campaign: Campaign, schedule: Training, recovery: Recovery) -> dict[str, Candidate]:
    """What the search has to beat, recovered like its own finalists: uniform quantization and the table's optimum."""
    plans = {name: plan for name, plan in campaign.seeds().items() if name.startswith(UNIFORM) or name == MILP}
    return {name: recover(campaign, plan, "full", schedule, recovery) for name, plan in plans.items()}


def within_budget(campaign: Campaign, baselines: Mapping[str, Candidate]) -> list[Candidate]:
    """Those that are predicted to meet the budget: should one be best, it is what the user gets."""
    return [c for c in baselines.values() if campaign.fits(c.plan)]
