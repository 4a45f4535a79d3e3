"""Running a study: each trial is a plan that is priced first, and evaluated only if its prediction meets the budget.

Everything that a trial decided and what came of it is in the study, so that a run that was stopped, killed, or joined
by other processes goes on from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from automl_compress.core.budget import METRICS, Budget, Cost
from automl_compress.core.plan import Plan
from automl_compress.errors import FAILURES, CompressError, Interrupted, PlanError, TrainingError, ends_all, first_line
from automl_compress.search.sampling.sampler import trial_plan
from automl_compress.search.sampling.storage import (
    INTERRUPTED,
    interrupted,
    requeue,
    requeue_dead,
    this_worker,
    worker_is_dead,
)
from automl_compress.search.sampling.trials import refused
from automl_compress.search.space.space import SearchSpace

Stopped = Literal["trials", "time", "exhausted"]
Callback = Callable[[Study, FrozenTrial], None]
Value = float | Sequence[float]
ADOPTED = "adopted"
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a trial does with its plan.

    predict   the cost model
    evaluate  the plan's quality in the study's direction; one number per direction
    price     what the plan counts as against the budget, which decides whether it is evaluated at all; None: as
              predicted
    """

    space: SearchSpace
    budget: Budget
    predict: Callable[[Plan], Cost]
    evaluate: Callable[[Plan], Value]
    price: Callable[[Plan], Cost] | None = None

    def excess(self, plan: Plan) -> dict[str, float]:
        """Metric -> by what share the plan is over the budget, by what is known today; 0 or less where it is within."""
        return self.budget.constraints((self.price or self.predict)(plan))

    def __call__(self, trial: optuna.Trial) -> Sequence[float]:
        """Propose, predict, constrain, evaluate what is feasible and new. Constraints come before any early end."""
        trial.set_user_attr("worker", this_worker())
        choices: dict[str, Any] = {d.name: trial.suggest_categorical(d.name, d.options) for d in self.space.decisions}
        plan = self.space.plan(choices)
        cost, constraints = self.predict(plan), self.excess(plan)
        for metric, excess in constraints.items():
            if math.isnan(excess):
                raise CompressError(f"the predicted {metric} is not a number")
            trial.set_constraint(metric, excess)
        key = self.space.plan_key(plan)
        trial.set_user_attr("plan", key)
        trial.set_user_attr("predicted", {metric: cost.of(metric) for metric in METRICS})
        if any(value > 0 for value in constraints.values()):
            worst = max(constraints, key=lambda metric: constraints[metric])
            trial.set_user_attr("reason", f"predicted {worst} is {constraints[worst]:.1%} above the budget")
            raise optuna.TrialPruned
        earlier = _evaluated(trial.study, key, trial.number)
        if earlier is not None:
            trial.set_user_attr("repeat_of", earlier.number)
            if earlier.state == TrialState.PRUNED:
                raise optuna.TrialPruned
            return [float(v) for v in earlier.values]
        value = self.evaluate(plan)
        numbers: Sequence[float] = value if isinstance(value, Sequence) else (value,)
        if any(math.isnan(number) for number in numbers):
            raise TrainingError("the metric is not a number: training diverged")
        return [float(number) for number in numbers]


def run_trials(
    study: Study,
    objective: Objective,
    n_trials: int | None,
    *,
    timeout: float | None = None,
    callbacks: Iterable[Callback] = (),
    failure_share: float = 0.5,
    repeats: int = 20,
    refusals: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    is_dead: Callable[[str], bool] = worker_is_dead,
) -> Stopped:
    """Run trials until the study has `n_trials` finished ones over all runs and workers, or the time is over.

    Counted are completed, infeasible and failed trials; interrupted ones are run again. Returns why it stopped:
    'exhausted' after as many `repeats`, plans that were evaluated before, in a row, or `refusals`, proposed plans that
    are over the budget. A trial that fails is recorded with its reason; CompressError when, of at least ten trials,
    more than `failure_share` failed. Interrupted on Ctrl-C, with the trial in flight back in the queue. `timeout` is in
    seconds; the trial in flight is finished.
    """
    begun, repeated, too_dear = clock(), 0, 0
    callbacks = tuple(callbacks)
    while True:
        requeue_dead(study, is_dead=is_dead)
        if n_trials is not None and _claimed(study, is_dead) >= n_trials:
            return "trials"
        if timeout is not None and clock() - begun >= timeout:
            return "time"
        if repeated >= repeats or too_dear >= refusals:
            return "exhausted"
        trial = _one_trial(study, objective)
        repeated = repeated + 1 if "repeat_of" in trial.user_attrs else 0
        too_dear = too_dear + 1 if refused(trial) and "label" not in trial.user_attrs else 0
        _check_failures(study, failure_share)
        for callback in callbacks:
            callback(study, trial)


def _one_trial(study: Study, objective: Objective) -> FrozenTrial:
    numbers: list[int] = []
    fatal: list[Exception] = []

    def run(trial: optuna.Trial) -> Sequence[float]:
        numbers.append(trial.number)
        try:
            return objective(trial)
        except KeyboardInterrupt:
            trial.set_user_attr(INTERRUPTED, True)
            trial.set_user_attr("reason", "interrupted")
            raise
        except FAILURES as error:
            trial.set_user_attr("reason", first_line(error))
            if ends_all(error):
                trial.set_user_attr(INTERRUPTED, True)
                fatal.append(error)
            raise

    try:
        # `optimize` rather than ask and tell: it keeps the heartbeat of a trial in a database.
        study.optimize(run, n_trials=1, catch=FAILURES)
    except KeyboardInterrupt:
        if numbers:
            requeue(study, _trial(study, numbers[0]))
        raise Interrupted("interrupted: the same command goes on from here") from None
    except ValueError:
        # SQLite locks no rows: two workers may get one waiting trial, and the other one has told its end by now.
        if not numbers or not _trial(study, numbers[0]).state.is_finished():
            raise
    if fatal:
        requeue(study, _trial(study, numbers[0]))
        raise fatal[0]
    return _trial(study, numbers[0])


def _trial(study: Study, number: int) -> FrozenTrial:
    return next(t for t in study.get_trials(deepcopy=False) if t.number == number)


def _evaluated(study: Study, key: str, number: int) -> FrozenTrial | None:
    """The trial that evaluated this plan, if any did, within this budget or another."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        if trial.number != number and trial.user_attrs.get("plan") == key and not refused(trial):
            return trial
    return None


def _feasible(trial: FrozenTrial) -> bool:
    return bool(trial.constraints) and all(value <= 0 for value in trial.constraints.values())


def _counted(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The finished trials, without those that were interrupted and take place again, or were adopted."""
    trials = list(trials)
    gone = interrupted(trials)
    return [t for t in trials if t.state in _FINISHED and t.number not in gone and ADOPTED not in t.user_attrs]


def finished_trials(study: Study | None) -> int:
    """How many trials a study has of those that were asked for; 0 without a study."""
    return 0 if study is None else len(_counted(study.get_trials(deepcopy=False)))


def _claimed(study: Study, is_dead: Callable[[str], bool]) -> int:
    """Finished trials, and those that a live worker has in hand."""
    trials = study.get_trials(deepcopy=False)
    running = [t for t in trials if t.state == TrialState.RUNNING and "worker" in t.user_attrs]
    return len(_counted(trials)) + sum(not is_dead(t.user_attrs["worker"]) for t in running)


def _check_failures(study: Study, share: float) -> None:
    counted = _counted(study.get_trials(deepcopy=False))
    failed = [t for t in counted if t.state == TrialState.FAIL]
    if len(counted) >= 10 and len(failed) > share * len(counted):
        reason = failed[-1].user_attrs.get("reason", failed[-1].system_attrs.get("fail_reason", "unknown"))
        raise CompressError(f"{len(failed)} of {len(counted)} trials failed, the last one because: {reason}")


def seed_plans(
    study: Study, space: SearchSpace, plans: Mapping[str, Plan], fits: Callable[[Plan], bool] = lambda plan: False
) -> tuple[str, ...]:
    """Queue plans to be tried first, each under its label ('original', 'uniform-int8', 'milp', ...).

    Does nothing for a label that the study has, or a plan that is queued or was tried. Returns the labels of plans that
    the space can't express.

    fits  whether a plan that was refused as too dear is within the budget by what is known by now: then it is tried
          again, under the label that it had
    """
    trials = [(t, trial_plan(space, t)) for t in study.get_trials(deepcopy=False)]
    labelled = [(t, plan) for t, plan in trials if plan is not None and "label" in t.user_attrs and refused(t)]
    again = {t.number: (t.user_attrs["label"], plan) for t, plan in labelled if fits(plan)}
    standing = [(t, plan) for t, plan in trials if t.number not in again]
    labels = {t.user_attrs["label"] for t, _ in standing if "label" in t.user_attrs}
    keys = {space.plan_key(plan) for _, plan in standing if plan is not None}
    impossible = []
    for label, plan in (*plans.items(), *again.values()):
        if label in labels:
            continue
        try:
            params = space.params(plan)
        except PlanError:
            impossible.append(label)
            continue
        if space.plan_key(plan) not in keys:
            study.enqueue_trial(dict(params), user_attrs={"label": label}, skip_if_exists=not again)
            keys.add(space.plan_key(plan))
            labels.add(label)
    return tuple(impossible)


def adopt_trials(study: Study, objective: Objective, found: Iterable[tuple[Plan, float]]) -> int:
    """Copy what was evaluated under other budgets into a study that has no trial yet; returns how many were copied.

    Each plan is held against this study's budget by its predicted cost; the sampler learns from all of them. They don't
    count as trials of this study. Plans that the space can't express are left out.
    """
    if study.get_trials(deepcopy=False):
        return 0
    keys: set[str] = set()
    for plan, value in found:
        key = objective.space.plan_key(plan)
        if key in keys:
            continue
        try:
            params = dict(objective.space.params(plan))
        except PlanError:
            continue
        keys.add(key)
        cost = objective.predict(plan)
        study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=dict(objective.space.distributions()),
                value=value,
                constraints=objective.excess(plan),
                user_attrs={
                    ADOPTED: True,
                    "plan": key,
                    "predicted": {metric: cost.of(metric) for metric in METRICS},
                },
            )
        )
    return len(keys)


def evaluated(study: Study) -> list[tuple[dict[str, float], float]]:
    """(predicted cost by metric, value) of every plan that was evaluated, under this budget or another."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [(trial.user_attrs["predicted"], float(trial.values[0])) for trial in done]


def evaluated_plans(study: Study, space: SearchSpace) -> list[tuple[Plan, float]]:
    """The plans that this study itself evaluated, with their values."""
    done = [
        (trial_plan(space, trial), float(trial.values[0]))
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if ADOPTED not in trial.user_attrs and "repeat_of" not in trial.user_attrs
    ]
    return [(plan, value) for plan, value in done if plan is not None]


def best_feasible(study: Study) -> FrozenTrial | None:
    """The completed trial with the best value among those that meet the budget as predicted; None if there is none."""
    return next((trial for trial in _best_first(study) if _feasible(trial)), None)


def trial_counts(study: Study) -> dict[str, int]:
    """How the trials ended: complete, infeasible, pruned, failed, interrupted; and running, waiting. 'reused' are those
    that were run under other budgets, where there are any."""
    counts = dict.fromkeys(("complete", "infeasible", "pruned", "failed", INTERRUPTED, "running", "waiting"), 0)
    for _, state in trial_states(study):
        counts[state] = counts.get(state, 0) + 1
    return counts


def trial_states(study: Study) -> Iterator[tuple[FrozenTrial, str]]:
    """Every trial with how it ended, in the words of `trial_counts`."""
    trials = study.get_trials(deepcopy=False)
    gone = interrupted(trials)
    for trial in trials:
        if ADOPTED in trial.user_attrs:
            yield trial, "reused"
        elif trial.state == TrialState.PRUNED:
            yield trial, "pruned" if _feasible(trial) else "infeasible"
        elif trial.state == TrialState.FAIL:
            yield trial, INTERRUPTED if trial.number in gone else "failed"
        else:
            yield trial, trial.state.name.lower()


def ranked(
    study: Study, k: int, *, apart: int = 2, fits: Callable[[FrozenTrial], bool] = _feasible
) -> list[FrozenTrial]:
    """Up to `k` trials that are within the budget, best first, that differ from each other in at least `apart`
    parameters. Where there aren't enough such trials, the best of the others follow.

    fits  whether a trial's plan is within the budget: by default as it was when it was tried
    """
    candidates = [trial for trial in _best_first(study) if fits(trial)]
    picked: list[FrozenTrial] = []
    for trial in candidates:
        if len(picked) < k and all(_distance(trial, other) >= apart for other in picked):
            picked.append(trial)
    others = [t for t in candidates if t not in picked]
    return picked + others[: max(0, k - len(picked))]


def _best_first(study: Study) -> list[FrozenTrial]:
    sign = 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(
        (t for t in trials if "repeat_of" not in t.user_attrs),
        key=lambda t: (-sign * float(t.values[0]), t.number),
    )


def _distance(one: FrozenTrial, other: FrozenTrial) -> int:
    return sum(one.params.get(name) != other.params.get(name) for name in one.params.keys() | other.params.keys())
