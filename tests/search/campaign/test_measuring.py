"""What plans take on the device corrects what others are predicted to take, about the budget and either way."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from automl_compress.core.plan import Plan
from automl_compress.errors import InfeasibleError
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.learning import learn
from automl_compress.search.campaign.measuring import CALIBRATION, about_the_budget, calibrate, measure
from automl_compress.search.solvers.feasibility import additive_limits
from tests.search.campaigns import campaign

LIMIT = "45%"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One device profile for all tests here: only the first campaign measures."""
    return tmp_path_factory.mktemp("home")


def about(opened: Campaign) -> list[Plan]:
    limits = additive_limits(opened.aim, opened.original)
    return about_the_budget(opened.space, opened.bench.graph, opened.table, limits, opened.predict)


def ratio(opened: Campaign) -> float:
    """Predicted over measured latency of plans about the budget."""
    return median(p.latency_us / m.latency_us for p, m in measure(opened, about(opened)))


@pytest.mark.parametrize("wrong", [0.9, 1.1])
def test_predictions_that_are_wrong_about_the_budget_are_right_afterwards(
    tmp_path: Path, home: Path, wrong: float
) -> None:
    with campaign(tmp_path / "run", home, latency=LIMIT) as opened:
        learn(opened)
        calibrate(opened)
        opened.calibrate(wrong * opened.costs.margins["latency"])
        seeds = opened.seeds()
        assert ratio(opened) == pytest.approx(wrong, abs=0.03)
        (opened.folder.path / CALIBRATION).unlink()
        opened.calibrated = False
        calibrate(opened)
        assert ratio(opened) == pytest.approx(1.0, abs=0.03)
        fewest, before = opened.seeds()["fewest-blocks"], seeds["fewest-blocks"]
        assert opened.fits(fewest)
        assert len(fewest.drop) <= len(before.drop) if wrong > 1 else len(fewest.drop) >= len(before.drop)


def test_plans_about_the_budget_are_near_it_and_differ(tmp_path: Path, home: Path) -> None:
    with campaign(tmp_path / "run", home, latency=LIMIT) as opened:
        learn(opened)
        calibrate(opened)
        plans, limit = about(opened), opened.aim.limits["latency"]
        assert len({opened.space.plan_key(plan) for plan in plans}) == len(plans) > 1
        assert len(plans) == 1 or all(limit / 1.25 <= opened.predict(plan).latency_us <= 1.25 * limit for plan in plans)
        assert {plan.key for plan in plans} & set(opened.measured), "what calibrated was measured, and remembered"


def test_each_budget_is_calibrated_once_and_a_resumed_run_measures_nothing(tmp_path: Path, home: Path) -> None:
    plan = Plan(width=0.5)
    with campaign(tmp_path / "run", home, latency=LIMIT) as first:
        learn(first)
        calibrate(first)
        asked = first.device.requests["compare"]
        calibrate(first)
        assert first.device.requests["compare"] == asked
        leg = first.leg("latency", 0.4)
        calibrate(leg)
        assert first.device.requests["compare"] == asked + 1
        calibrate(first.leg("latency", 0.4))
        assert first.device.requests["compare"] == asked + 1
        predicted = leg.predict(plan)
    with campaign(tmp_path / "run", home, latency=LIMIT) as second:
        learn(second)
        calibrate(second)
        leg = second.leg("latency", 0.4)
        calibrate(leg)
        assert leg.predict(plan) == predicted
        assert second.device.requests["compare"] == 0


@pytest.mark.parametrize("share", [0.9, 0.995, 1.0, 1.01])
def test_a_budget_about_the_floor_is_settled_by_measuring_before_anything_is_tried(
    tmp_path: Path, home: Path, share: float
) -> None:
    """Refused with what was measured where none of the cheapest plans fits; else the cheapest is where trials begin."""
    with campaign(tmp_path / "first", home, latency="100%") as looked:
        learn(looked)
        floor, plans = looked.floors()["latency"], looked.reach.fastest(4)
        found = [measured.latency_us for _, measured in measure(looked, plans)]
    limit = share * floor
    with campaign(tmp_path / "run", home, latency=f"{limit:.4f}us") as opened:
        if min(found) > limit:
            with pytest.raises(
                InfeasibleError, match=r"reachable|cheapest plans were measured, and need latency"
            ) as no:
                learn(opened)
            assert no.value.binding
            assert limit < no.value.nearest["latency"]
            assert not (opened.folder.path / "sensitivity.jsonl").exists()
            assert opened.device.requests["compare"] <= 2
            return
        learn(opened)
        assert opened.edge is not None
        assert opened.budget.met(opened.cost(opened.edge))
        opened.explore(1)
        trials = [t for t in opened.study().get_trials() if t.user_attrs.get("label") == "cheapest"]
        assert [trial.state.name for trial in trials] == ["COMPLETE"]


def test_a_budget_well_above_the_floor_is_settled_without_measuring(tmp_path: Path, home: Path) -> None:
    with campaign(tmp_path / "run", home, latency="70%") as opened:
        learn(opened)
        assert opened.edge is None
        assert not opened.measured


def test_without_a_budget_on_latency_nothing_is_measured(tmp_path: Path, home: Path) -> None:
    with campaign(tmp_path / "run", home, size=LIMIT) as opened:
        learn(opened)
        calibrate(opened)
        assert not opened.measured
