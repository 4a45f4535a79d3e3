"""From one-shot trials to plans that fit: the best are measured on the device, and a miss corrects the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from automl_compress.core.budget import Cost
from automl_compress.core.plan import Plan
from automl_compress.hardware.timer import ratio
from automl_compress.search.campaign import Campaign
from automl_compress.search.entrants import in_order, variants
from automl_compress.search.seeds import FEWEST_BLOCKS, UNIFORM
from automl_compress.search.study import seed_plans

RELAXED = "relaxed"
_CONFIRM = 8
_ROUNDS = 4
_TRIALS_PER_VARIANT = 8
_RELAXED = 4
_TELLING = 4  # measured plans that say something about predictions


def finalists(campaign: Campaign, trials: int, exploring: float | None = None, *, places: int = 1) -> list[Plan]:
    """The best one-shot plans that were measured on the device and are within the budget, in the order in which they
    are to be trained: so many as there are `places`, and the others.

    exploring  seconds for trials in all, None without a limit

    The last trials are milder variants of the best plans, by what the device's measurements say of predictions. Where
    none of the best is within the budget, the cost model is corrected and the search goes on. Raises InfeasibleError
    after some rounds of that.
    """
    clock = campaign.clock
    until = None if exploring is None else clock.now() + exploring
    for number in range(_ROUNDS):
        wanted = trials + number * max(8, trials // 4)
        kept = min(2 * _RELAXED, trials // _TRIALS_PER_VARIANT)
        _explore(campaign, wanted - kept, until)
        if not sum(campaign.trial_counts().values()):
            clock.refuse("it was over before the first trial", clock.typical("trial") or 1.0)
        confirm(campaign, _unmeasured(campaign))
        if kept:
            _relax(campaign, _ordered(campaign, places)[:_RELAXED], kept)
            _explore(campaign, wanted, until)
            confirm(campaign, _unmeasured(campaign))
        passed = _ordered(campaign, places)
        if passed:
            return passed
    raise campaign.infeasible(
        f"none of {len(campaign.measured)} plans that were predicted to meet the budget met it when measured"
    )


def _explore(campaign: Campaign, trials: int, until: float | None) -> None:
    campaign.explore(trials, None if until is None else max(0.0, until - campaign.clock.now()))


def _unmeasured(campaign: Campaign) -> list[Plan]:
    """What is to be measured: a few plans, in the order in which they would be trained."""
    best = _in_order(campaign, campaign.ranked_figures(10 * _CONFIRM), _CONFIRM)[:_CONFIRM]
    return [plan for plan in best if plan.key not in campaign.measured]


def _relax(campaign: Campaign, plans: Sequence[Plan], count: int) -> None:
    """Queue up to so many milder variants of plans as trials, once for each budget."""
    study, seeds = campaign.study(), campaign.seeds()
    if any(trial.user_attrs.get("label", "").startswith(RELAXED) for trial in study.get_trials(deepcopy=False)):
        return
    low = next((plan.bits for name, plan in seeds.items() if name.startswith(UNIFORM)), {})
    found = variants(campaign.space, plans, campaign.table.quality, low, campaign.fits)[:count]
    seed_plans(study, campaign.space, {f"{RELAXED}-{i}": plan for i, plan in enumerate(found, 1)})


def _ordered(campaign: Campaign, places: int) -> list[Plan]:
    """The measured plans that are within the budget, in the order in which they are to be trained."""
    figures = campaign.ranked_figures(10 * _CONFIRM)
    return _in_order(campaign, [(plan, value) for plan, value in figures if plan.key in campaign.measured], places)


def _in_order(campaign: Campaign, figures: Sequence[tuple[Plan, float]], places: int) -> list[Plan]:
    return in_order(
        campaign.space,
        figures,
        campaign.table.quality,
        error=campaign.bench.standard_error,
        original=campaign.original_sampled_metric(),
        always=[plan for name, plan in campaign.seeds().items() if name == FEWEST_BLOCKS],
        places=places,
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
    misses = [pair for pair in pairs if not budget.met(pair[1])]
    if len(misses) == len(plans):
        campaign.tighten(*min(misses, key=lambda pair: pair[1].latency_us / pair[0].latency_us))
    elif len(pairs) >= _TELLING:
        campaign.loosen(pairs)
