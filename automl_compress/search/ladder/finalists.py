"""From one-shot trials to plans that fit: the best are measured on the device, and a miss corrects the cost model."""

from __future__ import annotations

from collections.abc import Sequence

from automl_compress.core.plan import Plan
from automl_compress.errors import TrainingError
from automl_compress.search.campaign.account import failures
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.measuring import calibrate, confirm, settle_edge
from automl_compress.search.ladder.entrants import in_order, variants
from automl_compress.search.sampling.seeds import FEWEST_BLOCKS, UNIFORM
from automl_compress.search.sampling.study import Stopped, seed_plans

RELAXED = "relaxed"
_CONFIRM = 8
_ROUNDS = 4
_TRIALS_PER_VARIANT = 8
_RELAXED = 4


def finalists(campaign: Campaign, trials: int, exploring: float | None = None, *, places: int = 1) -> list[Plan]:
    """The best one-shot plans that were measured on the device and are within the budget, in the order in which they
    are to be trained: so many as there are `places`, and the others.

    exploring  seconds for trials in all, None without a limit

    The last trials are milder variants of the best plans, by what the device's measurements say of predictions. Where
    none of the best is within the budget, the cost model is corrected and the search goes on. Raises InfeasibleError
    after some rounds of that.
    """
    calibrate(campaign)
    settle_edge(campaign)
    clock = campaign.clock
    until = None if exploring is None else clock.now() + exploring
    for number in range(_ROUNDS):
        wanted = trials + number * max(8, trials // 4)
        kept = min(2 * _RELAXED, trials // _TRIALS_PER_VARIANT)
        stopped = _explore(campaign, wanted - kept, until)
        if not sum(campaign.trial_counts().values()):
            clock.refuse("it was over before the first trial", clock.typical("trial") or 1.0)
        unmeasured = _unmeasured(campaign)
        confirm(campaign, unmeasured)
        if kept:
            _relax(campaign, _ordered(campaign, places)[:_RELAXED], kept)
            _explore(campaign, wanted, until)
            confirm(campaign, _unmeasured(campaign))
        passed = _ordered(campaign, places)
        if passed:
            return passed
        if stopped == "exhausted" and not unmeasured:
            break  # nothing was learned by which more trials would find more
    counts = campaign.trial_counts()
    if counts["failed"] and not counts["complete"]:
        raise TrainingError(f"no plan within the budget could be evaluated: {'; '.join(failures(campaign))}")
    if not counts["complete"]:
        raise campaign.infeasible(
            f"none of {sum(counts.values())} plans that were tried is predicted to meet the budget"
        )
    raise campaign.infeasible(
        f"none of {len(campaign.measured)} plans that were predicted to meet the budget met it when measured"
    )


def _explore(campaign: Campaign, trials: int, until: float | None) -> Stopped:
    return campaign.explore(trials, None if until is None else max(0.0, until - campaign.clock.now()))


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
