"""Half go on at every rung, only their own rung decides, and a training that fails ends nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from automl_compress.core.plan import Plan
from automl_compress.errors import Interrupted, StorageError, TaskError, TrainingError
from automl_compress.search.campaign.account import ladder_rows
from automl_compress.search.campaign.timing import rungs
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.ladder.halving import best_alike, halve

PLANS = [Plan(width=w) for w in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
STEPS = rungs(27, 8)


@pytest.fixture
def study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(direction="maximize")


def trainer(metric: Callable[[Plan, int], float]) -> tuple[Callable[[Plan, int], Candidate], list[tuple[float, int]]]:
    seen: list[tuple[float, int]] = []

    def train(plan: Plan, rung: int) -> Candidate:
        seen.append((plan.width, rung))
        return Candidate(
            plan=plan, ranges={}, metric=metric(plan, rung), weights=Path(), onnx=Path(), training=(), seconds=0.0
        )

    return train, seen


def test_the_better_half_goes_on(study: optuna.Study) -> None:
    train, seen = trainer(lambda plan, rung: plan.width)
    assert halve(study, PLANS, STEPS, train).plan.width == 0.8
    by_rung = [sorted(width for width, rung in seen if rung == r) for r in range(4)]
    assert by_rung == [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.8], [0.7, 0.8], [0.8]]
    states = [trial.state for trial in study.get_trials()]
    assert states.count(TrialState.COMPLETE) == 1
    assert states.count(TrialState.PRUNED) == 7
    assert study.best_value == 0.8


def test_a_rungs_metrics_are_compared_with_each_other_alone(study: optuna.Study) -> None:
    """Every later rung is worse than the ones before; the order turns round at the second."""
    train, seen = trainer(lambda plan, rung: plan.width if rung == 0 else -rung - plan.width)
    assert halve(study, PLANS, STEPS, train).plan.width == 0.5
    assert {width for width, rung in seen if rung == 2} == {0.5, 0.6}


def test_what_a_rung_can_not_tell_apart_goes_on_in_the_order_it_came_in(study: optuna.Study) -> None:
    train, seen = trainer(lambda plan, rung: plan.width)
    assert halve(study, PLANS, STEPS, train, lambda _: 0.25).plan.width == 0.6
    assert {width for width, rung in seen if rung == 1} == {0.5, 0.6, 0.7, 0.8}
    assert {width for width, rung in seen if rung == 2} == {0.6, 0.7}
    assert best_alike({3: 0.8, 1: 0.7, 2: 0.9}, lambda _: 0.1) == [2, 3, 1]
    assert best_alike({3: 0.8, 1: 0.7, 2: 0.9}, lambda _: 0.11) == [2, 3, 1]
    assert best_alike({}, lambda _: 0.0) == []


def test_a_second_round_is_not_held_against_the_first(study: optuna.Study) -> None:
    train, _ = trainer(lambda plan, rung: plan.width)
    halve(study, PLANS, STEPS, train)
    assert halve(study, PLANS[:4], rungs(9, 4), train).plan.width == 0.4


@pytest.mark.parametrize(
    "error",
    [TaskError("the metric is NaN"), TrainingError("diverged"), RuntimeError("can't allocate memory"), MemoryError()],
)
def test_a_training_that_fails_is_recorded_and_the_next_takes_its_place(study: optuna.Study, error: Exception) -> None:
    def metric(plan: Plan, rung: int) -> float:
        if plan.width in (0.3, 0.8):
            raise error
        return plan.width

    train, seen = trainer(metric)
    assert halve(study, PLANS, STEPS, train).plan.width == 1.0
    assert len({width for width, rung in seen if rung == 0}) == 10
    failed = [trial for trial in study.get_trials() if trial.state == TrialState.FAIL]
    assert len(failed) == 2
    assert all("reason" in trial.user_attrs for trial in failed)


def test_a_plan_that_enters_again_has_one_row_in_the_account(study: optuna.Study) -> None:
    train, _ = trainer(lambda plan, rung: plan.width)
    for _ in range(2):
        halve(study, PLANS[:4], rungs(3, 4), train)
    account: Any = SimpleNamespace(recovery_studies=lambda: {"": study})
    rows = ladder_rows(account)
    assert sorted(row["plan"] for row in rows) == sorted(plan.key for plan in PLANS[:4])
    assert sum(row["state"] == "complete" for row in rows) == 1


def test_where_all_fail_the_last_failure_is_raised(study: optuna.Study) -> None:
    def metric(plan: Plan, rung: int) -> float:
        raise TrainingError(f"diverged at {plan.width}")

    with pytest.raises(TrainingError, match=r"diverged at 1"):
        halve(study, PLANS, STEPS, trainer(metric)[0])


@pytest.mark.parametrize("error", [StorageError("the disk is full"), Interrupted("stopped"), KeyboardInterrupt()])
def test_what_no_other_plan_would_mend_ends_it(study: optuna.Study, error: BaseException) -> None:
    def metric(plan: Plan, rung: int) -> float:
        raise error

    train, seen = trainer(metric)
    with pytest.raises(type(error)):
        halve(study, PLANS, STEPS, train)
    assert len(seen) == 1
    whole, _ = trainer(lambda plan, rung: plan.width)
    assert halve(study, PLANS, STEPS, whole).plan.width == 0.8, "what a stop left running counts no more"
