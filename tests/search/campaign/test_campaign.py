"""A campaign learns the device once, keeps its word about the budget, and says what can't be reached."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from automl_compress.core.budget import Budget, Cost
from automl_compress.core.plan import Plan
from automl_compress.deploy.run_folder import RunFolder
from automl_compress.errors import InfeasibleError, InputError
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.learning import learn
from automl_compress.search.campaign.measured import MeasuredCosts
from automl_compress.search.campaign.opening import told_of_teaching
from automl_compress.search.campaign.timing import Clock
from automl_compress.search.sampling.study import trial_counts
from automl_compress.search.solvers.feasibility import require_feasible
from tests.search.campaigns import campaign
from tests.tiny import ready


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One device profile for all tests here: only the first campaign measures."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Campaign]:
    """A campaign before its first trial; for tests that only ask."""
    with campaign(tmp_path_factory.mktemp("run"), home, latency="60%", size="60%") as opened:
        learn(opened)
        yield opened


def test_budgets_in_percent_are_shares_of_the_measured_original(learned: Campaign) -> None:
    path = learned.folder.path / "original.onnx"
    assert learned.original.size_bytes == path.stat().st_size
    assert learned.original.provenance == "measured"
    assert learned.budget.limits["latency"] == pytest.approx(0.6 * learned.original.latency_us)
    assert learned.budget.limits["size"] == pytest.approx(0.6 * learned.original.size_bytes)


def test_the_search_aims_within_the_budget(learned: Campaign) -> None:
    for metric, limit in learned.budget.limits.items():
        assert 0.9 * limit < learned.aim.limits[metric] <= limit


def test_the_originals_prediction_is_its_measurement_but_for_the_correction_about_the_budget(learned: Campaign) -> None:
    predicted = learned.predict(Plan())
    wanted = learned.costs.margins["latency"] * learned.original.latency_us
    assert predicted.latency_us == pytest.approx(wanted, rel=1e-6)
    assert predicted.size_bytes == learned.original.size_bytes


def test_predictions_are_near_what_is_measured(learned: Campaign, tmp_path: Path) -> None:
    plans = {**learned.seeds(), "dropped": Plan(drop=frozenset({"block"}))}
    for name, plan in plans.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(learned.bench.structure(plan).SerializeToString())
        measured = learned.device.compare({name: path})[name].median_us
        assert learned.predict(plan).latency_us == pytest.approx(measured, rel=0.1)
        assert learned.predict(plan).size_bytes == path.stat().st_size


def test_seeds_are_plans_of_the_space_and_the_optimum_is_within_the_aim(learned: Campaign) -> None:
    seeds = learned.seeds()
    assert seeds["original"].key == Plan().key
    assert {"uniform-int8", "milp", "width-0.5"} <= set(seeds)
    assert set(seeds["uniform-int8"].bits.values()) == {8}
    assert learned.aim.met(learned.predict(seeds["milp"]))
    assert learned.seeds() == seeds
    for name, plan in seeds.items():
        if name != "uniform-int8":  # an option that the device runs no faster may have been taken from the space
            learned.space.plan(learned.space.params(plan))


def test_floors_lie_below_the_budget_and_are_reachable_figures(learned: Campaign) -> None:
    for metric, floor in learned.floors().items():
        assert 0 < floor <= learned.budget.limits[metric]


def test_binding_layers_are_layers(learned: Campaign) -> None:
    assert 0 < len(learned.reach.binding(learned.budget.limits)) <= 3
    assert set(learned.reach.binding(learned.budget.limits)) <= set(learned.bench.graph.layer)


def test_every_option_has_a_price_in_quality(learned: Campaign) -> None:
    for decision in learned.space.decisions:
        assert {option for name, option in learned.table.quality if name == decision.name} >= set(decision.options)
    assert all(loss >= 0 for loss in learned.table.quality.values())


@pytest.mark.parametrize("limits", [{"latency": "1%"}, {"size": "1%"}, {"latency": "90%", "size": "100B"}])
def test_what_can_not_be_reached_is_said_before_any_trial(tmp_path: Path, home: Path, limits: dict[str, str]) -> None:
    with campaign(tmp_path / "run", home, **limits) as opened:
        with pytest.raises(InfeasibleError) as caught:
            learn(opened)
        over = [m for m, nearest in caught.value.nearest.items() if nearest > opened.budget.limits[m]]
        assert over
        assert set(caught.value.nearest) == set(limits)
        assert caught.value.binding
        assert not opened.has_study
        assert not (opened.folder.path / "sensitivity.jsonl").exists()


def test_what_was_measured_within_a_budget_is_not_refused_by_a_prediction(tmp_path: Path, learned: Campaign) -> None:
    budget, plan = Budget(limits={"latency": 1.0}), Plan(width=0.5)
    with pytest.raises(InfeasibleError):
        require_feasible(learned.reach, budget, budget, learned.original)
    fast = replace(learned.predict(plan), latency_us=0.5, provenance="measured")
    require_feasible(learned.reach, budget, budget, learned.original, [fast])


def test_what_views_are_worth_is_found_out_once_for_a_run_folder(tmp_path: Path) -> None:
    shown: list[int] = []

    def same(images: Tensor) -> Tensor:
        shown.append(len(images))
        return images

    task = replace(ready(), views=(same,))
    with RunFolder(tmp_path / "run", {"run": "same"}) as folder:
        first, count = told_of_teaching(folder, task), len(shown)
        assert first
        assert count
        assert told_of_teaching(folder, task) == first
        assert len(shown) == count
        assert told_of_teaching(folder, ready()) == ""


def test_measured_costs_outlive_the_process_and_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    costs = MeasuredCosts()
    costs.load(path)
    cost = Cost(latency_us=3.0, size_bytes=100, memory_bytes=200, provenance="measured")
    costs.remember(Plan(width=0.5), cost)
    path.write_bytes(path.read_bytes() + b'{"plan": "abc", "laten')
    costs.remember(Plan(width=0.25), cost)
    again = MeasuredCosts()
    again.load(path)
    assert again == {Plan(width=0.5).key: cost, Plan(width=0.25).key: cost}


def test_a_second_campaign_with_the_profile_measures_kernels_no_more(
    tmp_path: Path, home: Path, learned: Campaign
) -> None:
    profile = learned.device.profile.path
    before = profile.read_bytes()
    with campaign(tmp_path / "run", home, latency="60%", size="60%") as second:
        learn(second)
        assert second.device.requests["trace"] == 0
        assert second.device.requests["compare"] == 1, "the original, which is measured anew"
        assert second.seeds() == learned.seeds()
        assert second.table.quality == pytest.approx(learned.table.quality)
    assert profile.read_bytes() == before


def test_a_resumed_campaign_finds_its_original_its_space_and_its_trials(tmp_path: Path, home: Path) -> None:
    with campaign(tmp_path / "run", home, latency="70%") as first:
        learn(first)
        first.explore(6)
        original, space, counts = first.original, first.space, trial_counts(first.study())
        seeds = first.seeds()
    with campaign(tmp_path / "run", home, latency="70%") as second:
        learn(second)
        assert second.original == original
        assert second.space.fingerprint == space.fingerprint
        assert second.seeds() == seeds
        assert trial_counts(second.study()) == counts
        assert second.device.requests["compare"] == 0
        second.explore(6)
        assert trial_counts(second.study()) == counts, "the trials that were asked for are there"
        second.explore(9)
        states = [trial.state.name for trial in second.study().get_trials() if trial.state.is_finished()]
        assert len(states) >= 9
        keys = [t.user_attrs["plan"] for t in second.study().get_trials() if t.state.name == "COMPLETE"]
        repeats = [t for t in second.study().get_trials() if "repeat_of" in t.user_attrs]
        assert len(keys) - len(repeats) == len(set(keys))
        assert all(second.aim.met(second.predict(plan)) for plan, _ in second.ranked_figures(9))


def test_where_the_table_has_no_plan_within_the_budget_no_seed_is_called_its_optimum(learned: Campaign) -> None:
    first = learned.leg("latency", 0.01)
    again = copy(first)
    assert "milp" not in first.seeds()
    assert first.folder.file("milp-latency-1.0pct.json").read_text() == "null\n"
    again.table = None  # type: ignore[assignment]  # what the file says isn't solved for again
    assert again._first_optimum() is None


def test_learning_the_device_ends_with_the_time_limit_and_goes_on_from_there(tmp_path: Path) -> None:
    """The clock is over after the third trace; only what was in hand then is finished."""
    with campaign(tmp_path / "run", tmp_path / "home", latency="70%") as first:
        traces = first.device.requests
        first.clock = Clock(deadline=10.0, now=lambda: 100.0 if traces["trace"] >= 3 else 0.0)
        with pytest.raises(InputError, match="too short: it was over while the device was measured"):
            learn(first)
        assert traces["trace"] == 3
    with campaign(tmp_path / "run", tmp_path / "home", latency="70%") as second:
        learn(second)
        resumed = second.device.requests["trace"]
    with campaign(tmp_path / "whole", tmp_path / "other", latency="70%") as whole:
        learn(whole)
        assert resumed <= whole.device.requests["trace"] - 3


def test_tightening_makes_every_prediction_dearer(tmp_path: Path, home: Path) -> None:
    with campaign(tmp_path / "run", home, latency="70%") as opened:
        learn(opened)
        plan = Plan(width=0.5)
        before, other = opened.predict(plan), opened.predict(Plan(drop=frozenset({"block"})))
        opened.tighten(before, replace(before, latency_us=before.latency_us * 1.2))
        assert opened.predict(plan).latency_us == pytest.approx(before.latency_us * 1.2)
        assert opened.predict(Plan(drop=frozenset({"block"}))).latency_us == pytest.approx(other.latency_us * 1.2)
        assert opened.predict(plan).size_bytes == before.size_bytes
        opened.tighten(opened.predict(plan), before)
        assert opened.predict(plan).latency_us == pytest.approx(before.latency_us * 1.2), "a cheaper one is ignored"


def test_a_search_whose_models_all_come_out_cheaper_has_room_for_more(tmp_path: Path, home: Path) -> None:
    with campaign(tmp_path / "run", home, latency="70%") as opened:
        learn(opened)
        plans = [Plan(width=0.5), Plan(drop=frozenset({"block"}))]
        before = [opened.predict(plan) for plan in plans]
        measured = [replace(cost, latency_us=cost.latency_us * f) for cost, f in zip(before, (0.9, 0.95), strict=True)]
        opened.loosen(list(zip(before, measured, strict=True)))
        for plan, cost in zip(plans, before, strict=True):
            assert opened.predict(plan).latency_us == pytest.approx(0.95 * cost.latency_us)
        opened.loosen([(cost, replace(cost, latency_us=1.01 * cost.latency_us)) for cost in before])
        assert opened.predict(plans[0]).latency_us == pytest.approx(0.95 * before[0].latency_us), "one was dearer"


def test_a_plan_that_was_measured_within_the_budget_is_tried_whatever_is_predicted(tmp_path: Path, home: Path) -> None:
    """Also one that was refused before it was measured, or that was evaluated under a looser budget."""
    with campaign(tmp_path / "run", home, latency="70%") as opened:
        learn(opened)
        opened.calibrate(4 * opened.costs.margins["latency"])
        opened.explore(4)
        plan, known = Plan(drop=frozenset({"block"})), trial_counts(opened.study())
        assert not opened.fits(plan)
        assert known["infeasible"] > 0
        limit = opened.budget.limits["latency"]
        refused = [t for t in opened.study().get_trials() if t.user_attrs.get("label") == "uniform-int8"]
        uniform = opened.space.plan(refused[0].params)
        measured = replace(opened.predict(plan), provenance="measured")
        for one in (plan, uniform):
            opened.measured.remember(one, replace(measured, latency_us=limit))
            assert opened.fits(one), "at the budget, not only below what predictions are held against"
            opened.measured.remember(one, replace(measured, latency_us=1.001 * limit))
            assert not opened.fits(one)
            opened.measured.remember(one, replace(measured, latency_us=0.99 * limit))
        opened.explore(sum(known.values()) + 3)
        states = [t.state.name for t in opened.study().get_trials() if t.user_attrs.get("label") == "uniform-int8"]
        assert states == ["PRUNED", "COMPLETE"]
        assert uniform.key in {found.key for found, _ in opened.ranked_figures(9)}


def test_what_was_evaluated_under_a_looser_budget_counts_once_it_fits(tmp_path: Path, home: Path) -> None:
    with campaign(tmp_path / "run", home, latency="100%") as opened:
        learn(opened)
        opened.leg("latency", 0.9).explore(6)
        tight = opened.leg("latency", 0.5)
        margin = opened.costs.margins["latency"]
        opened.calibrate(10 * margin)
        assert tight.ranked_figures(9) == []
        opened.calibrate(margin)
        assert tight.ranked_figures(9)
        assert all(tight.fits(plan) for plan, _ in tight.ranked_figures(9))


def test_a_resumed_run_has_only_the_trials_ahead_that_it_has_not_made(tmp_path: Path, home: Path) -> None:
    with campaign(tmp_path / "run", home, latency="100%") as first:
        learn(first)
        assert first.trials_left(7) == 7
        first.explore(3)
        assert first.trials_left(7) == 4
        first.leg("latency", 0.9).explore(5)
        floors = first.first_floors()
    with campaign(tmp_path / "run", home, latency="100%") as second:
        learn(second)
        assert second.trials_left(7) == 4
        assert second.trials_left(2) == 0
        assert not second.has_study, "looking doesn't begin it"
        assert second.leg("latency", 0.9).trials_left(7) == 2
        assert second.leg("latency", 0.8).trials_left(7) == 7
        second.measured.remember(Plan(), replace(second.original, latency_us=0.1))
        assert second.first_floors() == floors, "what was measured since doesn't move the budgets of a front"
