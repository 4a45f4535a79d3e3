from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import optuna
import pytest

from automl_compress.core.budget import Budget, Cost
from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.errors import InputError, TrainingError
from automl_compress.search.sampling.fitting import Fitting
from automl_compress.search.sampling.sampler import BudgetSampler, OrdinalSampler, make_sampler
from automl_compress.search.sampling.study import Objective, best_feasible, run_trials, seed_plans
from automl_compress.search.solvers.decode import Decoder, additive_loss
from automl_compress.search.space.rules import SpaceFile
from automl_compress.search.space.space import SearchSpace, resolve
from automl_compress.search.table.pricing import random_plan
from automl_compress.search.table.table import AdditiveTable
from tests.search.networks import NATIVE, additive_cost, every_plan, residual, space_of, table_for

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Bench:
    """A network with a table, a device on which all takes longer than the table says, and hidden true losses."""

    def __init__(self, *, share: float = 0.45, wrong: float = 0.0, metrics: str = "latency size") -> None:
        self.graph: Graph = residual(blocks=3)
        self.space: SearchSpace = space_of(self.graph)
        self.table: AdditiveTable = table_for(self.space, self.graph, 5)
        rng = np.random.default_rng(1)
        self.truth = {k: v * float(np.exp(rng.normal(0, wrong))) for k, v in self.table.quality.items()}
        self.overhead = 1.2
        whole = self.predict(Plan())
        self.budget = Budget(limits={m: whole.of(m) * share for m in metrics.split()})

    def predict(self, plan: Plan) -> Cost:
        # Mixed precision costs more than the table's sums say, as on a real device.
        borders = len({plan.layer_bits(layer.name) for layer in self.graph.layers}) - 1
        return additive_cost(self.table, self.graph, plan, overhead=self.overhead + 0.1 * borders)

    def metric(self, plan: Plan) -> float:
        return 1.0 - 0.01 * additive_loss(self.space, plan, self.truth)

    def sampler(self, seed: int = 0, predict: Callable[[Plan], Cost] | None = None) -> BudgetSampler:
        decoder = Decoder(self.space, self.graph, self.table)
        return BudgetSampler(
            space=self.space, decoder=decoder, limits=self.budget, predict=predict or self.predict, seed=seed
        )

    def named(self, name: str) -> optuna.samplers.BaseSampler:
        decoder = Decoder(self.space, self.graph, self.table)
        return make_sampler(name, space=self.space, decoder=decoder, limits=self.budget, predict=self.predict, seed=0)

    def objective(self) -> Objective:
        return Objective(space=self.space, budget=self.budget, predict=self.predict, evaluate=self.metric)

    def run(self, n: int, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
        study = optuna.create_study(direction="maximize", sampler=sampler)
        run_trials(study, self.objective(), n)
        return study


@pytest.mark.parametrize("metrics", ["latency", "size", "latency size", "latency memory", "memory"])
def test_every_proposal_meets_the_budget_and_none_is_made_twice(metrics: str) -> None:
    bench = Bench(metrics=metrics)
    study = bench.run(25, bench.sampler())
    plans = [bench.space.plan(t.params) for t in study.trials]
    assert all(bench.budget.met(bench.predict(plan)) for plan in plans)
    assert len({bench.space.plan_key(plan) for plan in plans}) == len(plans)
    assert all(set(t.constraints) == set(bench.budget.limits) for t in study.trials)


def test_proposals_use_what_the_budget_allows() -> None:
    bench = Bench(metrics="latency")
    study = bench.run(15, bench.sampler())
    used = [bench.predict(bench.space.plan(t.params)).latency_us / bench.budget.limits["latency"] for t in study.trials]
    assert float(np.median(used)) > 0.9


def test_every_plan_that_fits_after_a_correction_can_be_proposed_though_it_was_refused_before() -> None:
    """In a space so small that all of it is tried: what was refused by predictions that were too high is evaluated,
    nothing twice, and nothing that is still too dear."""
    bench = Bench(metrics="latency", share=0.7)
    chosen = tuple(d for d in bench.space.decisions if d.kind == "drop")
    bench.space = replace(bench.space, decisions=chosen, fixed={})
    right, plans = bench.overhead, every_plan(bench.space)
    middle = float(np.median([bench.predict(plan).latency_us for plan in plans]))
    bench.budget = Budget(limits={"latency": middle})
    bench.overhead = 1.5 * right
    study = optuna.create_study(direction="maximize", sampler=bench.sampler())
    for plan in plans:
        study.enqueue_trial(bench.space.params(plan))
    run_trials(study, bench.objective(), len(plans))
    refused = [bench.space.plan(t.params) for t in study.trials if t.state.name == "PRUNED"]
    bench.overhead = right
    wrongly = {bench.space.plan_key(plan) for plan in refused if bench.budget.met(bench.predict(plan))}
    assert 0 < len(wrongly) < len(refused)
    run_trials(study, bench.objective(), len(plans) + len(wrongly))
    again = [t for t in study.trials if t.number >= len(plans)]
    assert {t.user_attrs["plan"] for t in again} == wrongly
    assert all(t.state.name == "COMPLETE" and "repeat_of" not in t.user_attrs for t in again)


def test_a_seed_decides_everything() -> None:
    bench = Bench()
    one, same, other = (bench.run(12, bench.sampler(seed)) for seed in (3, 3, 4))
    assert [t.params for t in one.trials] == [t.params for t in same.trials]
    assert [t.params for t in one.trials] != [t.params for t in other.trials]


@pytest.mark.parametrize("name", ["budget", "tpe", "nsga2", "random", "random:project"])
def test_a_new_sampler_goes_on_as_the_old_one_would_have(name: str) -> None:
    bench = Bench()
    whole = bench.run(12, bench.named(name))
    study = bench.run(6, bench.named(name))
    study.sampler = bench.named(name)
    run_trials(study, bench.objective(), 12)
    assert [t.params for t in study.trials] == [t.params for t in whole.trials]


def test_it_beats_the_table_where_the_table_is_wrong_and_random_search() -> None:
    bench = Bench(wrong=0.8)
    decoder = Decoder(bench.space, bench.graph, bench.table)
    scaled = {m: v / (bench.overhead + 0.1) for m, v in bench.budget.limits.items()}
    milp = decoder.solve(bench.table.quality, scaled)
    assert milp is not None
    found = best_feasible(bench.run(40, bench.sampler()))
    assert found is not None
    assert found.value is not None
    assert found.value > bench.metric(milp.plan)
    by_chance = best_feasible(bench.run(40, optuna.samplers.RandomSampler(seed=0)))
    assert by_chance is None or found.value > (by_chance.value or 0.0)


def test_a_space_that_is_used_up_ends_the_search() -> None:
    bench = Bench()
    bench.graph = residual(blocks=0, size=4, stem=2)
    bench.space = space_of(bench.graph, sparsity=[0.5], width=[1.0])
    bench.table = table_for(bench.space, bench.graph)
    bench.budget = Budget(limits={"latency": bench.predict(Plan()).latency_us * 2})
    study = optuna.create_study(direction="maximize", sampler=bench.sampler())
    assert run_trials(study, bench.objective(), 500, repeats=2) == "exhausted"
    new = [t for t in study.trials if "repeat_of" not in t.user_attrs]
    assert len(new) == 2 ** len(bench.space.decisions)


def test_where_nothing_fits_the_nearest_plan_is_proposed_and_not_evaluated() -> None:
    bench = Bench(share=0.001)
    asked: set[str] = set()

    def predict(plan: Plan) -> Cost:
        asked.add(bench.space.plan_key(plan))
        return bench.predict(plan)

    study = bench.run(3, bench.sampler(predict=predict))
    assert all(t.state == optuna.trial.TrialState.PRUNED for t in study.trials)
    assert len(asked) < 3 * 40, "each prediction may take the runtime a while"
    assert best_feasible(study) is None


def test_seeds_come_first_and_are_learned_from() -> None:
    bench = Bench()
    study = optuna.create_study(direction="maximize", sampler=bench.sampler())
    halved = bench.space.plan({"width": 0.5})
    assert seed_plans(study, bench.space, {"original": Plan(), "width-0.5": halved, "odd": Plan(width=0.3)}) == ("odd",)
    assert seed_plans(study, bench.space, {"original": Plan(), "width-0.5": halved}) == ()
    run_trials(study, bench.objective(), 5)
    assert [t.user_attrs.get("label") for t in study.trials[:3]] == ["original", "width-0.5", None]
    assert bench.space.plan(study.trials[1].params).key == halved.key


def test_failed_trials_are_learned_from_and_never_proposed_again() -> None:
    bench = Bench()
    whole = bench.objective()

    def fragile(plan: Plan) -> float:
        if "b1" in plan.drop:
            raise TrainingError("the metric is not a number: training diverged")
        return bench.metric(plan)

    study = optuna.create_study(direction="maximize", sampler=bench.sampler())
    run_trials(study, replace(whole, evaluate=fragile), 40, failure_share=0.9)
    failed = [t for t in study.trials if t.state == optuna.trial.TrialState.FAIL]
    keys = [bench.space.plan_key(bench.space.plan(t.params)) for t in study.trials]
    assert len(set(keys)) == len(keys)
    assert failed
    early = sum(t.number < 20 for t in failed)
    assert len(failed) - early < early


def test_a_study_without_sparsity_searches_over_student_widths() -> None:
    bench = Bench(share=0.6, metrics="latency")
    rules = [{"match": {"kind": "layer"}, "bits": [8, 32]}]
    file = SpaceFile.model_validate({"name": "widths", "width": [1.0, 0.75, 0.5], "rules": rules})
    bench.space = resolve(file, bench.graph, NATIVE)
    bench.table = table_for(bench.space, bench.graph, 2)
    bench.truth = dict(bench.table.quality)
    study = bench.run(15, bench.sampler())
    assert all(t.state == optuna.trial.TrialState.COMPLETE for t in study.trials)
    assert len({t.params["width"] for t in study.trials}) > 1


@pytest.mark.parametrize("name", ["tpe", "nsga2", "random"])
def test_projected_plans_meet_the_budget(name: str) -> None:
    bench = Bench()
    study = bench.run(14, bench.named(f"{name}:project"))
    assert all(t.state == optuna.trial.TrialState.COMPLETE for t in study.trials)


def test_the_nearest_plan_within_the_budget_keeps_what_it_can() -> None:
    bench = Bench(metrics="latency")
    fitting = Fitting(bench.space, Decoder(bench.space, bench.graph, bench.table), bench.budget, bench.predict)
    rng = np.random.default_rng(0)
    kept, drawn = [], []
    for _ in range(6):
        plan = random_plan(bench.space, rng, drop_share=0.2)
        other = random_plan(bench.space, rng, drop_share=0.2)
        near = fitting.nearest(plan)
        assert bench.budget.met(bench.predict(near))
        assert fitting.nearest(near) == near
        params = bench.space.params(plan)
        kept.append(sum(bench.space.params(near)[name] == value for name, value in params.items()))
        drawn.append(sum(bench.space.params(other)[name] == value for name, value in params.items()))
    assert sum(kept) > 1.3 * sum(drawn)


def test_numbers_stand_for_options_where_a_sampler_knows_numbers_only() -> None:
    bench = Bench()
    seen: list[int] = []

    class Middle(optuna.samplers.RandomSampler):
        """Proposes 0.6 for everything, and counts what it was told of."""

        def sample_independent(self, study: object, trial: object, name: str, distribution: object) -> float:
            seen.append(len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))))  # type: ignore[attr-defined]
            return 0.6

    study = bench.run(4, OrdinalSampler(Middle))
    for trial in study.trials[1:]:
        assert all(trial.params[d.name] == d.options[int(0.6 * len(d.options))] for d in bench.space.decisions)
    assert max(seen) >= 1


@pytest.mark.parametrize("name", ["cmaes", "cmaes:project"])
def test_evolution_of_numbers(name: str) -> None:
    bench = Bench()
    assert len(bench.run(12, bench.named(name)).trials) == 12


@pytest.mark.parametrize("name", ["tpe", "nsga2", "random"])
def test_samplers_of_optuna_run_with_the_same_constraints(name: str) -> None:
    bench = Bench()
    study = bench.run(8, bench.named(name))
    assert all(list(t.constraints) == ["latency", "size"] for t in study.trials)


def test_an_unknown_sampler_is_an_error() -> None:
    bench = Bench()
    decoder = Decoder(bench.space, bench.graph, bench.table)
    with pytest.raises(InputError, match="use one of budget"):
        make_sampler("best", space=bench.space, decoder=decoder, limits=bench.budget, predict=bench.predict, seed=0)
