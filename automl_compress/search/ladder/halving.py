"""Successive halving over the rungs of the ladder, as an Optuna study with a pruner.

Each model that enters is a trial; it reports its metric at every rung it reaches, and the pruner ends those that don't
go on. A rung is judged when all that reached it have reported (Jamieson and Talwalkar, 2016), unlike Optuna's own
`SuccessiveHalvingPruner`, which promotes as results come in: with one worker that would train the first model to the
end before the second had begun. Metrics are compared within a rung alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from automl_compress.core.plan import Plan
from automl_compress.errors import FAILURES, TaskError, TrainingError, first_line, passed_over
from automl_compress.search.campaign.timing import Rung
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.sampling.storage import INTERRUPTED

_ROUND = "round"
Train = Callable[[Plan, int], Candidate]


class RungPruner(BasePruner):
    """Ends the trials of a round that are not among the best so many of their rung.

    keep   rung -> how many go on; a rung that isn't there ends nobody
    error  the standard error of a metric
    """

    def __init__(self, keep: Mapping[int, int], error: Callable[[float], float]) -> None:
        self._keep, self._error = dict(keep), error

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial is not among the best of those that reported at its last rung. What is within a standard
        error of the best is as good as that; among equals the earlier trial goes on."""
        step = trial.last_step
        if step is None or step not in self._keep:
            return False
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        beside = [
            other
            for other in study.get_trials(deepcopy=False)
            if step in other.intermediate_values and other.user_attrs.get(_ROUND) == trial.user_attrs.get(_ROUND)
        ]
        values = {other.number: sign * other.intermediate_values[step] for other in beside}
        return trial.number not in best_alike(values, self._error)[: self._keep[step]]


def best_alike(values: Mapping[int, float], error: Callable[[float], float]) -> list[int]:
    """Numbers of models, best first. Those within a standard error of the best are as good as that, and among equals
    the lower number comes first."""
    top = max(values.values(), default=0.0)
    margin = error(abs(top))
    return sorted(values, key=lambda number: (-top if values[number] >= top - margin else -values[number], number))


def halve(
    study: Study,
    plans: Sequence[Plan],
    steps: Sequence[Rung],
    train: Train,
    standard_error: Callable[[float], float] = lambda _: 0.0,
) -> Candidate:
    """Train `plans`, best first, rung by rung; the model that reached the last rung.

    train           the model of a plan, trained for a rung (its index)
    standard_error  of a metric: where a rung can't tell plans apart, the order that they came in counts

    A model whose training fails is a failed trial, and the next one takes its place. Raises TrainingError
    with the last failure where all fail, and what a task's own functions raised as it is.
    """
    _abandoned(study)
    number = 1 + max((t.user_attrs.get(_ROUND, 0) for t in study.get_trials(deepcopy=False)), default=0)
    waiting = list(plans)
    alive: list[tuple[Trial, Plan]] = []
    study.pruner = RungPruner({i: rung.models for i, rung in enumerate(steps[1:])}, standard_error)
    error: Exception | None = None
    for index, rung in enumerate(steps):
        last = index == len(steps) - 1
        reached: list[tuple[Trial, Plan, Candidate]] = []
        while len(reached) < rung.models and (alive or waiting):
            trial, plan = alive.pop(0) if alive else (_enter(study, waiting[0], number), waiting.pop(0))
            try:
                candidate = train(plan, index)
            except FAILURES as failure:
                trial.set_user_attr("reason", passed_over(failure))
                error = failure
                study.tell(trial, state=TrialState.FAIL)
                continue
            trial.report(candidate.metric, index)
            reached.append((trial, plan, candidate))
        if last:
            break
        for trial, _, _ in reached:
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
        alive = [(trial, plan) for trial, plan, _ in reached if not _over(study, trial)]
        alive.sort(key=lambda entry: -_reported(study, entry[0], index))
    if not reached:
        assert error is not None
        if isinstance(error, TaskError):
            raise error
        count = len(plans) - len(waiting)
        raise TrainingError(f"all {count} models failed in training, the last one because: {first_line(error)}")
    trial, _, candidate = reached[0]
    study.tell(trial, candidate.metric)
    return candidate


def _enter(study: Study, plan: Plan, number: int) -> Trial:
    with warnings.catch_warnings():
        # In a database, trials are to have a heartbeat, by which others take them up. These are this process's alone.
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        trial = study.ask()
    trial.set_user_attr(_ROUND, number)
    trial.set_user_attr("plan", plan.key)
    return trial


def _frozen(study: Study, trial: Trial) -> FrozenTrial:
    return next(t for t in study.get_trials(deepcopy=False) if t.number == trial.number)


def _over(study: Study, trial: Trial) -> bool:
    return _frozen(study, trial).state.is_finished()


def _reported(study: Study, trial: Trial, step: int) -> float:
    return _frozen(study, trial).intermediate_values[step]


def _abandoned(study: Study) -> None:
    """End the trials of a process that ended: their models, as far as they got, are in the run folder."""
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        Trial(study, frozen._trial_id).set_user_attr(INTERRUPTED, True)
        study.tell(frozen.number, state=TrialState.FAIL)
