from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from automl_compress.core.budget import Budget, Cost
from automl_compress.core.plan import Plan
from automl_compress.errors import CompressError, DeviceError, InputError, Interrupted, RunFolderError
from automl_compress.search.sampling.sampler import BudgetSampler
from automl_compress.search.sampling.storage import (
    JOURNAL,
    join_study,
    open_study,
    requeue_dead,
    this_worker,
    worker_is_dead,
)
from automl_compress.search.sampling.study import (
    Objective,
    best_feasible,
    ranked,
    run_trials,
    seed_plans,
    trial_counts,
)
from automl_compress.search.solvers.decode import Decoder, additive_loss
from tests.search.networks import additive_cost, residual, space_of, table_for

GRAPH = residual(blocks=2)
SPACE = space_of(GRAPH)
TABLE = table_for(SPACE, GRAPH, 2)
DEAD = f"{socket.gethostname()}:999999999:1.00"


def predict(plan: Plan) -> Cost:
    return additive_cost(TABLE, GRAPH, plan)


BUDGET = Budget(limits={"latency": predict(Plan()).latency_us * 0.5})


class Evaluations:
    """Counts what is evaluated; `fail` may raise for the n-th evaluation."""

    def __init__(self, fail: Callable[[int], float | None] = lambda n: None) -> None:
        self.plans: list[str] = []
        self._fail = fail

    def __call__(self, plan: Plan) -> float:
        self.plans.append(SPACE.plan_key(plan))
        forced = self._fail(len(self.plans))
        return -additive_loss(SPACE, plan, TABLE.quality) if forced is None else forced


def objective(evaluate: Callable[[Plan], float] | None = None) -> Objective:
    return Objective(space=SPACE, budget=BUDGET, predict=predict, evaluate=evaluate or Evaluations())


def ours() -> BudgetSampler:
    return BudgetSampler(space=SPACE, decoder=Decoder(SPACE, GRAPH, TABLE), limits=BUDGET, predict=predict, seed=0)


def opened(folder: Path, sampler: optuna.samplers.BaseSampler | None = None) -> Study:
    return open_study(folder, "test", sampler or ours(), fingerprint={"graph": GRAPH.fingerprint})


def raises(error: BaseException, when: Callable[[int], bool]) -> Callable[[int], float | None]:
    def fail(n: int) -> float | None:
        if when(n):
            raise error
        return None

    return fail


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    evaluate = Evaluations()
    assert run_trials(opened(tmp_path), objective(evaluate), 4) == "trials"
    assert run_trials(opened(tmp_path), objective(evaluate), 9) == "trials"
    assert run_trials(opened(tmp_path), objective(evaluate), 9) == "trials"
    assert len(evaluate.plans) == len(set(evaluate.plans)) == 9
    (tmp_path / "whole").mkdir()
    run_trials(opened(tmp_path / "whole"), objective(), 9)
    assert [t.params for t in opened(tmp_path).trials] == [t.params for t in opened(tmp_path / "whole").trials]


def test_a_killed_run_resumes_with_the_trial_in_flight_and_repeats_none(tmp_path: Path) -> None:
    study = opened(tmp_path)
    evaluate = Evaluations()
    run_trials(study, objective(evaluate), 3)
    dying = study.ask()
    dying.set_user_attr("worker", DEAD)
    plan = SPACE.plan({d.name: dying.suggest_categorical(d.name, d.options) for d in SPACE.decisions})
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code":5,"torn')

    resumed = opened(tmp_path)
    run_trials(resumed, objective(evaluate), 6)
    states = [t.state for t in resumed.trials]
    assert states[3] == TrialState.FAIL
    assert resumed.trials[3].user_attrs["reason"] == "its worker ended"
    assert SPACE.plan_key(SPACE.plan(resumed.trials[4].params)) == SPACE.plan_key(plan)
    assert len(evaluate.plans) == len(set(evaluate.plans)) == 6
    assert trial_counts(resumed)["complete"] == 6
    assert trial_counts(resumed)["interrupted"] == 1
    assert requeue_dead(resumed) == 0


def test_the_trial_of_a_live_worker_is_left_alone_and_counts(tmp_path: Path) -> None:
    study = opened(tmp_path)
    trial = study.ask()
    trial.set_user_attr("worker", this_worker())
    assert run_trials(study, objective(), 3) == "trials"
    counts = trial_counts(study)
    assert (counts["complete"], counts["running"]) == (2, 1)


def test_a_trial_that_nobody_claimed_is_given_up_after_a_minute(tmp_path: Path) -> None:
    study = opened(tmp_path)
    study.ask()
    assert requeue_dead(study) == 0
    assert requeue_dead(study, now=lambda: datetime.now() + timedelta(seconds=61)) == 1
    assert trial_counts(study)["waiting"] == 0


def test_a_worker_is_dead_when_its_process_is() -> None:
    host, pid, started = this_worker().rsplit(":", 2)
    assert not worker_is_dead(this_worker())
    assert worker_is_dead(DEAD)
    assert worker_is_dead(f"{host}:{pid}:{float(started) - 100:.2f}")
    assert not worker_is_dead("another-host:1:1.00")


def test_an_interrupt_keeps_the_trial_for_the_next_run(tmp_path: Path) -> None:
    study = opened(tmp_path)
    with pytest.raises(Interrupted):
        run_trials(study, objective(Evaluations(raises(KeyboardInterrupt(), lambda n: n == 3))), 5)
    counts = trial_counts(study)
    assert (counts["complete"], counts["interrupted"], counts["waiting"]) == (2, 1, 1)
    run_trials(opened(tmp_path), objective(), 5)
    trials = opened(tmp_path).trials
    assert trials[2].user_attrs["reason"] == "interrupted"
    assert trials[3].params == trials[2].params
    assert trial_counts(study)["complete"] == 5


@pytest.mark.parametrize("error", [DeviceError("the device is gone"), RuntimeError("out of memory"), MemoryError()])
def test_a_trial_that_fails_is_recorded_with_its_reason(tmp_path: Path, error: Exception) -> None:
    study = opened(tmp_path)
    run_trials(study, objective(Evaluations(raises(error, lambda n: n == 2))), 4)
    assert trial_counts(study)["failed"] == 1
    assert study.trials[1].user_attrs["reason"] == (str(error) or "MemoryError")


def test_what_no_other_plan_would_do_better_ends_the_run_and_keeps_the_trial(tmp_path: Path) -> None:
    study = opened(tmp_path)
    with pytest.raises(RunFolderError, match="gone"):
        run_trials(study, objective(Evaluations(raises(RunFolderError("gone"), lambda n: n == 3))), 5)
    counts = trial_counts(study)
    assert (counts["complete"], counts["failed"], counts["waiting"]) == (2, 0, 1)
    run_trials(opened(tmp_path), objective(), 5)
    assert trial_counts(study)["complete"] == 5


def test_a_metric_that_is_not_a_number_fails_the_trial(tmp_path: Path) -> None:
    study = opened(tmp_path)
    run_trials(study, objective(Evaluations(lambda n: float("nan") if n == 1 else None)), 3)
    assert study.trials[0].state == TrialState.FAIL
    assert "not a number" in study.trials[0].user_attrs["reason"]


def test_many_failures_end_the_run(tmp_path: Path) -> None:
    study = opened(tmp_path)
    with pytest.raises(CompressError, match="6 of 10 trials failed, the last one because: no"):
        run_trials(study, objective(Evaluations(raises(RuntimeError("no"), lambda n: n > 4))), 50)


def test_a_defect_of_the_program_is_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        run_trials(opened(tmp_path), objective(Evaluations(raises(TypeError("bug"), lambda n: True))), 3)


def test_infeasible_plans_are_never_evaluated_but_constrained(tmp_path: Path) -> None:
    study = opened(tmp_path, optuna.samplers.RandomSampler(seed=1))
    evaluate = Evaluations()
    run_trials(study, objective(evaluate), 30)
    counts = trial_counts(study)
    assert counts["infeasible"] > 0
    assert counts["complete"] + counts["infeasible"] == 30
    assert all(set(t.constraints) == {"latency"} for t in study.trials)
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED]
    assert not {t.user_attrs["plan"] for t in pruned} & set(evaluate.plans)
    assert all("above the budget" in t.user_attrs["reason"] for t in pruned)


def test_a_plan_is_evaluated_once_however_it_is_written(tmp_path: Path) -> None:
    study = opened(tmp_path)
    evaluate = Evaluations()
    params = SPACE.params(SPACE.plan({"drop.b0": True, "drop.b1": True}))
    study.enqueue_trial(params)
    study.enqueue_trial({**params, "bits.b0.conv1": 8})
    run_trials(study, objective(evaluate), 2)
    assert len(evaluate.plans) == 1
    assert study.trials[1].user_attrs["repeat_of"] == 0
    assert study.trials[1].value == study.trials[0].value
    assert [t.number for t in ranked(study, 5)] == [0]


def test_a_seed_that_was_too_dear_is_tried_again_once_it_is_known_to_fit(tmp_path: Path) -> None:
    """Under the label that it had, once, and only if it fits; others stay as they are."""
    plans = {"whole": SPACE.plan({}), "dear": SPACE.plan({"drop.b0": True}), "small": SPACE.plan({"drop.b1": True})}
    study, pessimistic = opened(tmp_path), 10.0

    def priced(factor: float) -> Objective:
        price = lambda plan: additive_cost(TABLE, GRAPH, plan, overhead=factor)  # noqa: E731
        return replace(objective(), budget=Budget(limits={"latency": predict(plans["dear"]).latency_us}), price=price)

    seed_plans(study, SPACE, plans)
    run_trials(study, priced(pessimistic), 3)
    assert trial_counts(study)["infeasible"] == 3
    for _ in range(2):
        seed_plans(study, SPACE, plans, lambda plan: max(priced(1.0).excess(plan).values()) <= 0)
        run_trials(study, priced(1.0), 3 + trial_counts(study)["waiting"])
    again = [trial for trial in study.trials if trial.number >= 3]
    fitting = [name for name, plan in plans.items() if max(priced(1.0).excess(plan).values()) <= 0]
    assert "dear" in fitting
    assert "whole" not in fitting
    assert sorted(trial.user_attrs["label"] for trial in again) == sorted(fitting)
    assert all(trial.state == TrialState.COMPLETE for trial in again)


def test_what_counts_as_a_plan_s_cost_is_not_recorded_as_its_prediction(tmp_path: Path) -> None:
    study = opened(tmp_path)
    cheap = Cost(latency_us=1e-3, size_bytes=1.0, memory_bytes=1.0, provenance="measured")
    study.enqueue_trial(SPACE.params(SPACE.plan({})))
    run_trials(study, replace(objective(), price=lambda plan: cheap), 1)
    assert study.trials[0].state == TrialState.COMPLETE
    assert study.trials[0].user_attrs["predicted"]["latency"] == predict(Plan()).latency_us


def test_trials_end_where_nothing_that_is_proposed_fits_any_more(tmp_path: Path) -> None:
    """Whatever was asked for by name doesn't count, nor what came before a plan that fits."""
    study, tight = opened(tmp_path), replace(objective(), budget=Budget(limits={"latency": 1e-3}))
    seed_plans(study, SPACE, {"whole": SPACE.plan({}), "small": SPACE.plan({"drop.b1": True})})
    assert run_trials(study, tight, 30, refusals=3) == "exhausted"
    assert trial_counts(study)["infeasible"] == 5
    assert run_trials(study, objective(), 12, refusals=3) == "trials"


def test_a_trial_whose_end_another_worker_told_first_ends_nobody(tmp_path: Path) -> None:
    study = opened(tmp_path)

    def told_meanwhile(plan: Plan) -> float:
        (running,) = study.get_trials(states=(TrialState.RUNNING,))
        study.tell(running.number, 0.5)
        return 0.5

    assert run_trials(study, replace(objective(), evaluate=told_meanwhile, budget=Budget(limits={})), 2) == "trials"
    assert [trial.value for trial in study.trials] == [0.5, 0.5]


def test_time_ends_a_run_between_trials(tmp_path: Path) -> None:
    ticks = iter(range(0, 1000, 10))
    study = opened(tmp_path)
    assert run_trials(study, objective(), None, timeout=25, clock=lambda: float(next(ticks))) == "time"
    assert trial_counts(study)["complete"] == 2


def test_callbacks_see_every_finished_trial(tmp_path: Path) -> None:
    seen: list[tuple[int, TrialState]] = []

    def callback(study: Study, trial: FrozenTrial) -> None:
        seen.append((trial.number, trial.state))

    run_trials(opened(tmp_path), objective(), 3, callbacks=[callback])
    assert seen == [(n, TrialState.COMPLETE) for n in range(3)]


@pytest.mark.parametrize("other", [{"graph": "other"}, {"graph": GRAPH.fingerprint, "budget": "new"}])
def test_a_study_of_something_else_is_refused(tmp_path: Path, other: dict[str, str]) -> None:
    run_trials(opened(tmp_path), objective(), 1)
    with pytest.raises(RunFolderError, match=r"belongs to another (graph|budget)"):
        open_study(tmp_path, "test", ours(), fingerprint=other)
    with pytest.raises(RunFolderError, match="maximizes"):
        open_study(tmp_path, "test", ours(), directions=["minimize"])


@pytest.mark.parametrize("content", [b'{"op_code": 0}\nnot json\n{"op_code": 1}\n', b"\x00\xff\n\n"])
def test_a_damaged_journal_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / JOURNAL).write_bytes(content)
    with pytest.raises(RunFolderError, match=r"damaged"):
        opened(tmp_path)


def test_a_journal_cut_at_any_byte_opens(tmp_path: Path) -> None:
    run_trials(opened(tmp_path), objective(), 2)
    whole = (tmp_path / JOURNAL).read_bytes()
    lines = whole.splitlines(keepends=True)
    assert all(json.loads(line) for line in lines)
    for cut in range(1, 60, 7):
        (tmp_path / JOURNAL).write_bytes(whole[:-cut])
        assert len(opened(tmp_path).trials) == 2


def test_workers_join_a_study_in_another_storage(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/study.db", f"journal://{tmp_path}/shared.journal", str(tmp_path / "x.journal")):
        evaluate = Evaluations()
        first = open_study(url, "shared", ours())
        seed_plans(first, SPACE, {"small": SPACE.plan({"drop.b0": True, "drop.b1": True})})
        run_trials(first, objective(evaluate), 2)
        run_trials(join_study(url, "shared", ours()), objective(evaluate), 4)
        assert len(set(evaluate.plans)) == 4
        assert first.trials[0].user_attrs["label"] == "small"
        with pytest.raises(RunFolderError, match="no study 'other'; it has: shared"):
            join_study(url, "other", ours())


def test_a_database_gives_the_trial_of_a_silent_worker_to_another(tmp_path: Path) -> None:
    study = open_study(f"sqlite:///{tmp_path}/study.db", "test", ours())
    with pytest.warns(UserWarning, match="Heartbeat of storage"):
        silent = study.ask()
    silent.set_user_attr("worker", "another-host:1:1.00")
    params = {d.name: silent.suggest_categorical(d.name, d.options) for d in SPACE.decisions}
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("INSERT INTO trial_heartbeats (trial_id, heartbeat) VALUES (1, '2020-01-01 00:00:00')")
    database.close()
    assert run_trials(study, objective(), 3) == "trials"
    counts = trial_counts(study)
    assert (counts["complete"], counts["interrupted"], counts["failed"]) == (3, 1, 0)
    assert study.trials[1].user_attrs["requeued_from"] == 0
    assert any(t.params == params and t.state == TrialState.COMPLETE for t in study.trials)


def test_a_storage_that_cannot_be_opened_is_an_error_without_the_password() -> None:
    for url in ("postgresql://me:secret@nowhere:1/x", "nonsense://me:secret@x"):
        with pytest.raises(InputError, match="can't be opened") as caught:
            open_study(url, "test", ours())
        assert "secret" not in str(caught.value)


def test_the_best_come_first_and_differ(tmp_path: Path) -> None:
    study = opened(tmp_path)
    run_trials(study, objective(), 12)
    best = best_feasible(study)
    top = ranked(study, 4)
    assert best is not None
    assert top[0].number == best.number
    assert best.value == max(t.value for t in study.trials if t.value is not None)
    distances = [sum(a.params[k] != b.params[k] for k in a.params) for i, a in enumerate(top) for b in top[:i]]
    assert min(distances) >= 2
    assert len(ranked(study, 100)) == 12
