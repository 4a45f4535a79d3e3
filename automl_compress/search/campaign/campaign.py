"""The state of one search, and its trials: what is searched for, what is known, and what was tried.

`learning` fills in what is known before the first trial; what follows the trials (`finalists`, `climb`, `deliver`) asks
and corrects it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial

import optuna
import optuna.trial

from automl_compress.core.budget import Budget, Cost, Limit, share_of
from automl_compress.core.plan import Plan
from automl_compress.core.result import Figures
from automl_compress.deploy.run_folder import RunFolder
from automl_compress.errors import InfeasibleError
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.prediction.cost import CostModel
from automl_compress.progress import Progress
from automl_compress.search.campaign.measured import MeasuredCosts
from automl_compress.search.campaign.timing import Clock
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.sampling.sampler import make_sampler, proposes_what_fits
from automl_compress.search.sampling.seeds import CHEAPEST, first_plans, loosest_optimum
from automl_compress.search.sampling.storage import known_study, open_study
from automl_compress.search.sampling.study import (
    Objective,
    Stopped,
    adopt_trials,
    best_feasible,
    evaluated_plans,
    finished_trials,
    ranked,
    run_trials,
    seed_plans,
    trial_counts,
)
from automl_compress.search.solvers.decode import Decoder
from automl_compress.search.solvers.feasibility import Reach, additive_limits
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.forecast import Forecast
from automl_compress.search.table.table import AdditiveTable

# The search aims a little below a budget: a prediction errs by a percent or two, and a miss costs a distillation.
AIM = {"latency": 0.985, "memory": 0.97}
_REFUSALS = 5  # plans over the budget in a row, each the best of dozens that were asked for, until trials end
STUDY = "one-shot"
SENSITIVITY, SPACE, MEASURED, FLOORS = "sensitivity.jsonl", "space.json", "measured.jsonl", "floors.json"


@dataclass
class Campaign:
    """`limits` are the budgets as written, `budget` what they come to beside the original.

    forecast, original, budget, table    what `learning.learn` finds out
    measured  plan -> its cost as measured; `rejected`: plan -> why its finished model can't be delivered
    borrowed  plans that an earlier run of the same model evaluated, with their one-shot metrics
    max_failed    share of trials that may fail
    clock     the time limit, and what things take
    legs      the same search under other budgets (see `leg`), by label; shared by all of them
    calibrated, edge    whether `measuring` corrected predictions; the cheapest plan that fits, where hardly any does
    """

    bench: Workbench
    space: SearchSpace
    device: Device
    limits: Mapping[str, Limit]
    folder: RunFolder
    progress: Progress
    identity: Mapping[str, str]
    seed: int = 0
    sampler: str = "budget"
    storage: str | None = None
    forecast: Forecast = field(init=False)
    original: Cost = field(init=False)
    budget: Budget = field(init=False)
    table: AdditiveTable = field(init=False)
    measured: MeasuredCosts = field(default_factory=MeasuredCosts)
    rejected: dict[str, str] = field(default_factory=dict)
    borrowed: tuple[tuple[Plan, float], ...] = ()
    max_failed: float = 0.5
    legs: dict[str, Campaign] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    label: str = ""
    _study: optuna.Study | None = None
    _recovery: optuna.Study | None = None
    calibrated: bool = False
    edge: Plan | None = None
    _begun: bool = False
    _reach: Reach | None = None
    _seeds: Mapping[str, Plan] | None = None

    def leg(self, metric: str, share: float) -> Campaign:
        """The same search with one budget set to a share of the original's figure, with a study of its own.

        What was learned, measured, rejected and evaluated is shared.
        """
        limit = share_of(metric, round(share, 3))
        label = f"{metric} {limit.text}"
        if label not in self.legs:
            leg = copy(self)
            leg.limits, leg.label = {**self.limits, metric: limit}, label
            leg._study, leg._recovery, leg._seeds, leg._begun, leg.calibrated = None, None, None, False, False
            leg.budget, leg.edge = Budget.resolve(leg.limits, self.original), None
            self.legs[label] = leg
        return self.legs[label]

    def explore(self, trials: int, timeout: float | None = None) -> Stopped:
        """One-shot trials until the study holds so many, `timeout` seconds are over, or no others are found to fit."""
        study = self.study()
        seed_plans(study, self.space, self.seeds(), self.fits)
        self.progress.stage("one-shot trials", trials, seconds=timeout)
        self.progress.advance(finished_trials(study))

        def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            counts = {k: v for k, v in trial_counts(study).items() if v and k in ("failed", "infeasible")}
            self.progress.advance(1, **counts)
            best = best_feasible(study)
            if best is not None and best.number == trial.number:
                self.progress.best(best.value or 0.0, self.describe(self.space.plan(best.params)))

        refusals = _REFUSALS if proposes_what_fits(self.sampler) else math.inf
        run = partial(run_trials, callbacks=[after], failure_share=self.max_failed, refusals=refusals)
        return run(study, self._objective(), trials, timeout=timeout)

    def study(self) -> optuna.Study:
        """The one-shot study, in the run folder or in the storage that was named."""
        if self._study is None:
            sampler = make_sampler(
                self.sampler,
                space=self.space,
                decoder=Decoder(self.space, self.bench.graph, self.table),
                limits=self.aim,
                predict=self.price,
                original=self.original_sampled_metric(),
                seed=self.seed,
            )
            self._study = open_study(
                self.storage or self.folder.path, self.study_title, sampler, fingerprint=self.identity
            )
            self._begun = True
            adopt_trials(self._study, self._objective(), self.evaluated_elsewhere())
            if self.storage and "space" not in self._study.user_attrs:
                self._study.set_user_attr("space", self.folder.read_json(SPACE))
        return self._study

    def trials_left(self, trials: int) -> int:
        """How many of so many one-shot trials are still to be made, beside those in the study."""
        known = self._study or known_study(self.storage or self.folder.path, self.study_title)
        return max(0, trials - finished_trials(known))

    def evaluated_elsewhere(self) -> list[tuple[Plan, float]]:
        """Plans that were evaluated under other budgets, in this run or in one that it started from."""
        studies = [leg.study() for leg in self.legs.values() if leg.label != self.label and leg.has_study]
        return [*self.borrowed, *(found for study in studies for found in evaluated_plans(study, self.space))]

    def _objective(self) -> Objective:
        return Objective(
            space=self.space, budget=self.aim, predict=self.predict, evaluate=self.evaluate, price=self.price
        )

    def evaluate(self, plan: Plan) -> float:
        """The plan's one-shot metric."""
        with self.clock.timing("trial"):
            return self.bench.one_shot(plan)

    def recovery_study(self) -> optuna.Study:
        """The study of what is distilled, rung by rung, beside the one-shot study."""
        if self._recovery is None:
            self._recovery = open_study(
                self.storage or self.folder.path,
                f"{self.study_title} recovery",
                optuna.samplers.RandomSampler(seed=self.seed),
                fingerprint=self.identity,
            )
        return self._recovery

    def seeds(self) -> Mapping[str, Plan]:
        """The plans that every search starts from, by label, as they were before any trial."""
        if self._seeds is None:
            self._seeds = first_plans(self.space, self.table.quality, self._excess, self._first_optimum())
        return self._seeds if self.edge is None else {CHEAPEST: self.edge, **self._seeds}

    def _first_optimum(self) -> Plan | None:
        """The table's optimum as it was before any trial; None where it had none within the budget."""
        name = f"milp-{self.label.replace(' ', '-').replace('%', 'pct')}.json" if self.label else "milp.json"
        if not self.folder.file(name).exists():
            limits = additive_limits(self.aim, self.original)
            found = loosest_optimum(partial(self.reach.estimate, limits), partial(self.reach.solve, limits), self.fits)
            self.folder.write_json(name, None if found is None else found.to_json(self.bench.graph))
        known = self.folder.read_json(name)
        return None if known is None else Plan.from_json(known, self.bench.graph)

    def calibrate(self, margin: float) -> None:
        """Raise later predictions of latency by this factor, or lower them, whatever they were raised by before."""
        self.costs.margins["latency"] = margin
        self.forecast.forget()
        self.calibrated, self._seeds = True, None  # chosen by the old predictions

    def tighten(self, predicted: Cost, measured: Cost) -> None:
        """A model came out dearer than predicted: correct the cost model, and forget what it said before."""
        self.costs.tighten(predicted, measured)
        self.forecast.forget()

    def loosen(self, pairs: Sequence[tuple[Cost, Cost]]) -> None:
        """Models of (predicted, measured) cost came out cheaper than predicted, all of them: there is room for more."""
        self.costs.loosen(pairs)
        self.forecast.forget()

    @property
    def costs(self) -> CostModel:
        return self.forecast.costs

    def infeasible(self, message: str) -> InfeasibleError:
        """An error with the nearest figures that the space reaches, and the layers that bind."""
        return InfeasibleError(message, nearest=self.floors(), binding=self.reach.binding(self.budget.limits))

    def floors(self) -> dict[str, float]:
        """Metric -> the lowest figure that the space reaches as predicted, or that was measured, for each budget."""
        predicted, known = self.reach.floors(self.budget.limits), self.measured.values()
        return {m: min([floor, *(cost.of(m) for cost in known)]) for m, floor in predicted.items()}

    def first_floors(self) -> dict[str, float]:
        """As they were before any trial: what a run spreads its budgets over, also when it is resumed."""
        known = self.folder.read_json(FLOORS)
        if known is None:
            known = self.floors()
            self.folder.write_json(FLOORS, known)
        return dict(known)

    @property
    def reach(self) -> Reach:
        """Made once for a table, since it remembers what it solved."""
        if self._reach is None or self._reach.table is not self.table or self._reach.space is not self.space:
            self._reach = Reach(space=self.space, graph=self.bench.graph, table=self.table, predict=self.predict)
        return self._reach

    def describe(self, plan: Plan) -> str:
        cost = self.cost(plan)
        share = cost.latency_us / self.original.latency_us
        how = "measured" if cost.provenance == "measured" else "predicted"
        return f"{share:.3f} of the latency, {cost.size_bytes / 1e3:.0f} KB ({how})"

    def cost(self, plan: Plan) -> Cost:
        """The plan's measured cost where it was measured, else the predicted one."""
        return self.measured.get(plan.key) or self.predict(plan)

    def predict(self, plan: Plan) -> Cost:
        return self.forecast.predict(plan)

    def price(self, plan: Plan) -> Cost:
        """What the plan counts as against `aim`: as predicted, or as far below it as measured below the budget."""
        known = self.measured.get(plan.key)
        if known is None:
            return self.predict(plan)
        return replace(
            known, latency_us=known.latency_us * AIM["latency"], memory_bytes=known.memory_bytes * AIM["memory"]
        )

    def fits(self, plan: Plan) -> bool:
        """Whether the plan meets the budget: as measured, or as predicted with some room for the prediction's error.
        A plan whose finished model was rejected doesn't."""
        return self._excess(plan) <= 0

    def _excess(self, plan: Plan) -> float:
        """By what share the plan is over the budget that it is furthest over; 0 or less where it fits."""
        if plan.key in self.rejected:
            return math.inf
        return max(self.aim.constraints(self.price(plan)).values(), default=0.0)

    @property
    def aim(self) -> Budget:
        """The budget that the search holds its predictions against."""
        return self.budget.scaled(AIM)

    @property
    def has_study(self) -> bool:
        """Whether the search got as far as its first trial."""
        return self._begun

    def trial_counts(self) -> dict[str, int]:
        """How the trials ended, under all budgets together where there are several."""
        counts = dict[str, int]()
        for study in self.studies().values():
            for state, count in trial_counts(study).items():
                counts[state] = counts.get(state, 0) + count
        return counts

    def studies(self) -> dict[str, optuna.Study]:
        """Label of the budget ('' for the search's own) -> its study, of those that got as far as a study."""
        return {campaign.label: campaign.study() for campaign in self._campaigns if campaign.has_study}

    def recovery_studies(self) -> dict[str, optuna.Study]:
        """The same of what was distilled."""
        return {c.label: c.recovery_study() for c in self._campaigns if c._recovery is not None}

    @property
    def _campaigns(self) -> list[Campaign]:
        return [self] if self.label else [self, *self.legs.values()]

    def original_figures(self) -> Figures:
        """The original as measured at the start."""
        return Figures(
            metric=self.original_metric(),
            latency_us=self.original.latency_us,
            size_bytes=int(self.original.size_bytes),
            memory_bytes=int(self.original.memory_bytes),
            provenance=self.original.provenance,
        )

    def original_metric(self) -> float:
        """The original's validation metric, measured once for a run folder."""
        known = self.folder.read_json("original-metric.json")
        if known is None:
            with self.clock.timing("metric"):
                known = {"metric": self.bench.metric(self.bench.original, "validation")}
            self.folder.write_json("original-metric.json", known)
        return float(known["metric"])

    def original_sampled_metric(self) -> float:
        """The original's metric on the validation samples of one-shot trials."""
        return self.bench.original_one_shot

    def ranked_figures(self, count: int) -> list[tuple[Plan, float]]:
        """Plans of finished trials with their one-shot metrics, best first, that are within the budget by what is known
        today."""
        found = ranked(self.study(), count, fits=lambda trial: self.fits(self.space.plan(trial.params)))
        return [(self.space.plan(trial.params), float(trial.values[0])) for trial in found]

    @staticmethod
    def study_name(identity: Mapping[str, str], *, shared: bool) -> str:
        """In a storage that others use, too, a name that only the same search arrives at."""
        digest = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:12]
        return f"{STUDY}-{digest}" if shared else STUDY

    @property
    def study_title(self) -> str:
        """What the one-shot study is called in its storage."""
        return f"{self.study_name(self.identity, shared=bool(self.storage))} {self.label}".strip()
