"""Several models in one run, from cheap to good: what a budget buys, before one is chosen.

One search for each of some budgets between the cheapest plan and the original. They share what was learned of the
device and of the options, what trials evaluated, and what was measured. A model that is no better than a cheaper one is
left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from automl_compress.errors import InfeasibleError
from automl_compress.search.campaign.baselines import Baselines, find_rivals
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.settings import Settings
from automl_compress.search.delivery.deliver import Verified
from automl_compress.search.delivery.directions import verified_or_rejected
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.ladder.climb import Climber, baseline_plans, within_budget
from automl_compress.search.ladder.finalists import finalists

_FEWEST_TRIALS = 8
_TRIES = 2


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model of the front with its verified figures.

    share   the budget that it was searched under
    beaten  what there is to beat at that budget
    """

    share: float
    candidate: Candidate
    verified: Verified
    beaten: Baselines


def front_models(campaign: Campaign, settings: Settings) -> list[Point]:
    """The models, cheapest first; each is better than all that are cheaper, and measured with the baselines.

    Raises InfeasibleError where there is none.
    """
    front = settings.front
    assert front is not None
    what, climber = front.minimise, Climber(campaign, settings)
    trials = max(_FEWEST_TRIALS, int(settings.options["trials"]) // front.points)
    beside = len(baseline_plans(campaign, optimum=False))
    shares = _shares(campaign, what, front.points)
    wanted = sum(campaign.leg(what, share).trials_left(trials) for share in shares)
    allotment = climber.allot(wanted, baselines=beside, looks=front.points)
    beaten = climber.baselines(campaign, allotment)
    points: list[Point] = []
    for number, share in enumerate(shares):
        left = front.points - number
        if points and not climber.time_for_another():
            campaign.clock.cuts.append(f"time for {number} of {front.points} models of the front")
            break
        campaign.progress.note(f"model {number + 1} of {front.points}: at most {share:.1%} of the original's {what}")
        leg = campaign.leg(what, share)
        try:
            for _ in range(_TRIES):
                wanted = sum(campaign.leg(what, later).trials_left(trials) for later in shares[number:])
                ahead = climber.allot(wanted, baselines=0, looks=left)
                exploring = None if ahead.exploring is None else ahead.exploring / left
                plans = finalists(leg, trials, exploring, places=ahead.rungs[0].models)
                finished = climber.climb(leg, plans, climber.allot(0, baselines=0, looks=left))
                best = max([finished, *within_budget(leg, beaten)], key=lambda candidate: candidate.metric)
                verified = verified_or_rejected(leg, best, beaten)
                if verified is not None:
                    found = rivals_of(leg, climber, beaten)
                    points.append(Point(share=share, candidate=best, verified=verified, beaten=found))
                    break
        except InfeasibleError as error:
            campaign.progress.note(f"no model at {share:.1%}: {error}")
    if not points:
        raise campaign.infeasible("no model of the front met its budget")
    return not_dominated(points, what)


def rivals_of(leg: Campaign, climber: Climber, trained: Mapping[str, Candidate]) -> Baselines:
    """What there is to beat at one budget, evaluated as `--baselines` says; of it `trained` was trained."""
    found = find_rivals(leg, climber.effort, lambda: not climber.time_for_another())
    return replace(found, candidates=trained, distilled=frozenset(trained))


def not_dominated(points: list[Point], what: str) -> list[Point]:
    """Those that are better than everything as cheap or cheaper, cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.verified.cost.of(what), -p.verified.delivered.metric)):
        if not kept or point.verified.delivered.metric > kept[-1].verified.delivered.metric:
            kept.append(point)
    return kept


def _shares(campaign: Campaign, what: str, count: int) -> list[float]:
    """Budgets in equal ratios between the cheapest plan and the most that is allowed, both left out; dearest first."""
    whole = campaign.original.of(what)
    low, high = campaign.first_floors()[what] / whole, campaign.budget.limits[what] / whole
    return [float(share) for share in np.geomspace(min(low, high), high, count + 2)[-2:0:-1]]
