"""From plans that fit to finished models: who is distilled for how long, and who goes on.

What is distilled is planned by `timing` and promoted by `halving`. What training and finishing take is remembered, and
a training that turns out too slow for the time limit begins anew with as many epochs as there is time for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from automl_compress.core.plan import Plan
from automl_compress.errors import FAILURES, passed_over
from automl_compress.search.campaign.baselines import Baselines, compare
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.settings import Settings
from automl_compress.search.campaign.timing import SHARES, Allotment, Costs, TooShort, allot, least, rungs, unlimited
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.ladder.halving import halve
from automl_compress.search.ladder.ladder import FULL, UNTRAINED, Recovery
from automl_compress.search.sampling.seeds import MILP, UNIFORM
from automl_compress.techniques.training.data import batches_in
from automl_compress.techniques.training.log import OnStep, StepReport, shown_by
from automl_compress.techniques.training.settings import Training

_STEPS = 4  # of a training that is only timed
_FORESEEN = 12  # steps after which a training's end is foreseen
_RESTARTS = 2
_TRIALS_PER_FINISH = 3


class _TooSlow(Exception):
    """A training would not end in time. `epochs`: as many as there is time for."""

    def __init__(self, epochs: float) -> None:
        super().__init__(epochs)
        self.epochs = epochs


class Climber:
    """Recovers plans of one run: holds what is the same for all of them."""

    def __init__(self, campaign: Campaign, settings: Settings) -> None:
        self.campaign, self.schedule, self.effort = campaign, settings.schedule, settings.baselines
        self.recovery = Recovery(campaign.bench, campaign.folder, settings.losses, settings.recovery)
        self._begun = False

    def allot(self, trials: int, *, baselines: int, looks: int = 1) -> Allotment:
        """What of the search fits into the time that is left; all of it without a limit.

        Raises InputError if nothing does when the first is asked for; later there are trials, and an untrained model of
        the best is worth more than a limit kept to the second.
        """
        clock, epochs = self.campaign.clock, self.schedule.epochs
        left = clock.left
        if left is None:
            return unlimited(epochs)
        costs = self._costs()
        try:
            found = allot(left, costs, epochs=epochs, baselines=baselines, trials=trials, looks=looks)
        except TooShort as short:
            if not self._begun:
                clock.refuse(str(short), short.missing)
            found = least(epochs)
        self._begun = True
        return found

    def _tell(self, cut: str) -> None:
        """What was cut short, once."""
        if cut not in self.campaign.clock.cuts:
            self.campaign.clock.cuts.append(cut)
            self.campaign.progress.note(f"the time limit leaves {cut}")

    def time_for_another(self) -> bool:
        """Whether a model more could be finished, if it were only repaired."""
        left = self.campaign.clock.left
        if left is None:
            return True
        costs = self._costs()
        return costs.ladder(rungs(0.0, 1)) + costs.delivery(1) <= left

    def climb(self, campaign: Campaign, plans: Sequence[Plan], allotment: Allotment) -> Candidate:
        """Distil the best plans briefly, the better half for longer, and so on; the one that was distilled fully."""
        steps = allotment.rungs
        for cut in allotment.cut:
            self._tell(cut)

        def train(plan: Plan, rung: int) -> Candidate:
            name = FULL if rung == len(steps) - 1 else f"rung-{rung + 1}"
            return self.recover(campaign, plan, name, steps[rung].epochs)

        error = partial(campaign.bench.standard_error, whole=True)
        return halve(campaign.recovery_study(), plans, steps, train, error)

    def baselines(self, campaign: Campaign, allotment: Allotment) -> dict[str, Candidate]:
        """What one would do without a search, recovered like its models: uniform quantization."""
        plans, found = baseline_plans(campaign, optimum=False), dict[str, Candidate]()
        for name, plan in plans.items():
            if not self.time_for_another():
                self._tell(f"{len(found)} of {len(plans)} baselines to compare with")
                break
            try:
                found[name] = self.recover(campaign, plan, FULL, allotment.baseline_epochs)
            except FAILURES as failure:
                campaign.progress.note(f"the baseline {name} failed: {passed_over(failure)}")
        return found

    def compare(self, campaign: Campaign, allotment: Allotment) -> Baselines:
        """All that the search has to beat, evaluated and trained as `--baselines` says."""

        def recover_beside(plan: Plan, trained: bool) -> Candidate:
            epochs = allotment.baseline_epochs if trained else 0.0
            return self.recover(campaign, plan, FULL if trained else UNTRAINED, epochs)

        found = compare(
            campaign,
            self.effort,
            recover_beside,
            may_train=allotment.baseline_epochs == allotment.epochs,
            stop=lambda: not self.time_for_another(),
        )
        possible = sum(rival.plan is not None for rival in found.rivals)
        if self.effort != "none" and len(found.candidates) < possible:
            self._tell(f"{len(found.candidates)} of {possible} baselines to compare with")
        return found

    def beside(self, campaign: Campaign) -> int:
        """How many models are finished only to compare with; what is searched for that is left out without time."""
        return 0 if self.effort == "none" else len(baseline_plans(campaign))

    def recover(self, campaign: Campaign, plan: Plan, rung: str, epochs: float) -> Candidate:
        """One recovery with progress, within the time limit."""
        clock, schedule = campaign.clock, replace(self.schedule, epochs=epochs)
        for attempt in range(_RESTARTS + 1):
            begun, known = clock.now(), self.recovery.has(plan, rung, schedule)
            last = attempt == _RESTARTS
            try:
                found = self.recovery.recover(plan, rung, schedule, self._on_step(schedule, rung, guarded=not last))
                break
            except _TooSlow as slow:
                schedule = replace(schedule, epochs=0.0 if attempt == _RESTARTS - 1 else slow.epochs)
                self._tell(f"{schedule.epochs:.2g} instead of {epochs:g} epochs for a model: training became slower")
        if not known:
            clock.record("finishing", max(0.0, clock.now() - begun - found.seconds))
            if rung != FULL and schedule.epochs:
                clock.record("epoch", found.seconds / schedule.epochs)
        cost = campaign.describe(replace(found.plan, kept={}))
        what = f"{schedule.epochs:g} epochs" if schedule.epochs else "repaired"
        answers = f"; {self.recovery.cache.words}" if self.recovery.cache.hits else ""
        campaign.progress.note(f"{what}: {found.metric:.4f} on validation at {cost}{answers}")
        return found

    def _on_step(self, schedule: Training, rung: str, *, guarded: bool) -> OnStep:
        """Shows every step; ends a training of which the time limit wouldn't leave what is to follow."""
        show, clock = shown_by(self.campaign.progress), self.campaign.clock
        guarded = guarded and clock.left is not None
        after = self._costs().delivery(1) if guarded else 0.0
        label = self.recovery.label(rung)

        def on_step(report: StepReport) -> None:
            show(report)
            if not guarded or report.label != label or not _FORESEEN <= report.step < report.steps:
                return
            room = (clock.left or 0.0) - after
            if report.seconds_left > room:
                pace = report.seconds_left / (report.steps - report.step)
                possible = schedule.epochs * max(0.0, room) / (pace * report.steps)
                fitting = [share * schedule.epochs for share in SHARES if share * schedule.epochs <= possible]
                raise _TooSlow(max(fitting, default=0.0))

        return on_step

    def _costs(self) -> Costs:
        """What things take here, as seen so far; what was not seen yet is tried."""
        campaign, clock = self.campaign, self.campaign.clock
        if clock.typical("trial") is None:
            campaign.evaluate(min(campaign.seeds().values(), key=lambda plan: campaign.predict(plan).latency_us))
        if clock.typical("epoch") is None:
            clock.record("epoch", self._epoch_seconds() if self.schedule.epochs else 0.0)
        campaign.original_metric()
        trial = clock.typical("trial") or 0.0
        metric = clock.typical("metric") or trial
        return Costs(
            trial=trial,
            epoch=clock.typical("epoch") or 0.0,
            finishing=clock.typical("finishing") or _TRIALS_PER_FINISH * (trial + metric),
            measuring=clock.typical("measuring") or trial,
        )

    def _epoch_seconds(self) -> float:
        """What an epoch takes, from some steps with the original; the first ones are not counted."""
        clock = self.campaign.clock
        times = [clock.now()]
        self.recovery.time_steps(_STEPS, self.schedule, lambda _: times.append(clock.now()))
        if len(times) > 2:
            del times[0]
        else:  # a loop of the user's own tells nothing of its steps
            times = [*times, *[clock.now()] * (_STEPS + 1 - len(times))]
        return batches_in(self.campaign.bench.task) * (times[-1] - times[0]) / (len(times) - 1)


def baseline_plans(campaign: Campaign, *, optimum: bool = True) -> dict[str, Plan]:
    """The plans that are finished to compare with, by name."""
    seeds = campaign.seeds().items()
    return {name: plan for name, plan in seeds if name.startswith(UNIFORM) or (optimum and name == MILP)}


def within_budget(campaign: Campaign, baselines: Mapping[str, Candidate]) -> list[Candidate]:
    """Those that are predicted to meet the budget: should one be best, it is what the user gets."""
    return [c for c in baselines.values() if campaign.fits(c.plan)]
