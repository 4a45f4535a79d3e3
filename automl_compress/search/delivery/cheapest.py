"""The cheapest model that is good enough, by the means of the search for the best one within budgets.

At a few budgets between the cheapest plan and the original, one-shot trials show how quality falls with cost. Then a
budget is aimed at that is just enough (`edge.py`), its best model recovered, and so on until the edge is known to a few
percent. Trials, measurements and recovered models count under every budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from automl_compress.core.budget import format_metric
from automl_compress.core.goal import Goal
from automl_compress.errors import InfeasibleError
from automl_compress.search.campaign.baselines import Baselines, beside_own
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.settings import Settings
from automl_compress.search.delivery.directions import DELIVERIES, Found, none_left, verified_or_rejected
from automl_compress.search.delivery.edge import Edge
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.ladder.climb import Climber, within_budget
from automl_compress.search.ladder.finalists import finalists
from automl_compress.search.sampling.study import evaluated

_SCANNED = 4
_FEWEST_TRIALS = 6
_LOOKS = 4
_WIDE = 1.1
_MORE_LOOKS = 2  # after a finished model turned out not to be deliverable


def cheapest_model(campaign: Campaign, settings: Settings) -> Found:
    """The model with the least of what is to be minimised among those that are good enough and within the budgets.

    Raises InfeasibleError, with the nearest that was found, where no compressed model is good enough.
    """
    goal, original = settings.goal, campaign.original_metric()
    assert goal is not None
    asked, what = goal.least_metric(original), goal.minimise
    most = campaign.original.of(what)
    lowest, highest = campaign.first_floors()[what] / most, campaign.budget.limits[what] / most
    hunt = _Hunt(
        campaign=campaign,
        climber=Climber(campaign, settings),
        trials=int(settings.options["trials"]),
        what=what,
        edge=Edge(low=min(lowest, highest), high=highest, allowed=original - asked),
    )
    hunt.scan()
    for attempt in range(DELIVERIES):
        hunt.narrow(_MORE_LOOKS if attempt else _LOOKS)
        if not hunt.edge.good:
            break
        beaten = hunt.baselines()
        best = hunt.edge.good[0]
        verified = verified_or_rejected(campaign, best, beaten.candidates)
        if verified is not None:
            own = next((c for c in hunt.edge.good if any(c is found for found in hunt.own)), best)
            verified = replace(verified, notes=(*verified.notes, *hunt.edge_notes()))
            return best, verified, beside_own(beaten, campaign, best, own)
        hunt.edge.forget(best)
    raise hunt.failure(goal, asked)


@dataclass
class _Hunt:
    """One search for the edge, and what it works with."""

    campaign: Campaign
    climber: Climber
    trials: int
    what: str
    edge: Edge
    looks: int = 0
    own: list[Candidate] = field(default_factory=list)

    def scan(self) -> None:
        """A few trials at each of some budgets: how the loss falls with the cost."""
        shares = [float(share) for share in np.geomspace(self.edge.low, self.edge.high, _SCANNED + 1)[1:]]
        trials = max(_FEWEST_TRIALS, self.trials // (2 * _SCANNED))
        wanted = self.trials // 2 + sum(self._leg(share).trials_left(trials) for share in shares)
        exploring = self.climber.allot(wanted, baselines=self._beside, looks=_LOOKS).exploring
        for share in shares:
            part = None if exploring is None else exploring / (2 * _SCANNED)
            self._leg(share).explore(trials, part)
        self.edge.lost = self._one_shot_losses()
        if self.climber.schedule.epochs == 0:
            self.edge.left_over = [1.0]  # nothing wins any of it back

    def narrow(self, looks: int) -> None:
        """Look at budgets, the next one where the last ones say, until the edge is known or that many were seen."""
        for left in range(looks, 0, -1):
            share = self.edge.next()
            if share is None:
                return
            if self.looks and not self.climber.time_for_another():
                known = f"the edge is known to {self.edge.high / self.edge.low - 1:.0%}"
                self.campaign.clock.cuts.append(f"time for {self.looks} looks at budgets; {known}")
                return
            self.campaign.progress.note(f"looking for the best model at {share:.1%} of the original's {self.what}")
            self.looks += 1
            try:
                self._look(share, left)
            except InfeasibleError:
                self.edge.nothing_at(share)

    def _look(self, share: float, looks: int) -> None:
        leg, trials = self._leg(share), max(_FEWEST_TRIALS, self.trials // (2 * _LOOKS))
        ahead = self.climber.allot(leg.trials_left(trials), baselines=self._beside, looks=looks)
        exploring = None if ahead.exploring is None else ahead.exploring / looks
        plans = finalists(leg, trials, exploring, places=ahead.rungs[0].models)
        allotment = self.climber.allot(0, baselines=self._beside, looks=looks)
        found = [self.climber.climb(leg, plans, allotment)]
        self.own += found
        if self.looks == 1:
            simple = self.climber.baselines(self.campaign, allotment)
            found += within_budget(self.campaign, simple)
        self.edge.lost = self._one_shot_losses()
        self._add(found, at=share)

    def baselines(self) -> Baselines:
        """The baselines at the cost of the cheapest good model, which they are to be compared with."""
        leg = self._leg(self._share(self.edge.good[0]))
        beaten = self.climber.compare(leg, self.climber.allot(0, baselines=self.climber.beside(leg)))
        self._add(within_budget(self.campaign, beaten.trained))
        return beaten

    def edge_notes(self) -> list[str]:
        """That something cheaper may be good enough, where there was no look at what lies between."""
        low, high = self.edge.low, self.edge.high
        if high / low < _WIDE:
            return []
        return [
            f"between {low:.1%} of the original's {self.what}, where nothing good enough was found, and {high:.1%} "
            "nothing was looked at: more --trials or another --seed may find a cheaper model"
        ]

    def failure(self, goal: Goal, asked: float) -> Exception:
        """What to raise where nothing can be delivered, with the nearest that was found."""
        if self.edge.good or self.campaign.rejected:
            return none_left(self.campaign, DELIVERIES)
        nearest: dict[str, float] = {}
        if self.edge.found:
            share, _, best = min(self.edge.found, key=lambda entry: entry[:2][::-1])
            nearest = {"metric": best.metric, self.what: share * self.campaign.original.of(self.what)}
        return InfeasibleError(
            f"no compressed model has a metric of {format_metric('metric', asked)} on validation ({goal.text}); allow "
            "a larger loss, or more --epochs or --trials",
            nearest=nearest,
        )

    def _add(self, found: list[Candidate], *, at: float | None = None) -> None:
        original = self.campaign.original_metric()
        for candidate in found:
            share = self._share(candidate)
            self.edge.add(candidate, share, original - candidate.metric, at=share if at is None else at)

    @property
    def _beside(self) -> int:
        return self.climber.beside(self.campaign)

    def _leg(self, share: float) -> Campaign:
        return self.campaign.leg(self.what, share)

    def _share(self, candidate: Candidate) -> float:
        cost = self.campaign.cost(replace(candidate.plan, kept={}))
        return cost.of(self.what) / self.campaign.original.of(self.what)

    def _one_shot_losses(self) -> list[tuple[float, float]]:
        """(share of the original's figure, loss of metric beside the original on the same samples) of all trials."""
        campaign, top = self.campaign, self.campaign.original_sampled_metric()
        return sorted(
            (cost[self.what] / campaign.original.of(self.what), max(0.0, top - value))
            for study in campaign.studies().values()
            for cost, value in evaluated(study)
            if all(cost[metric] <= limit for metric, limit in campaign.budget.limits.items())
        )
