"""The cheapest good enough model: what is delivered is good enough and measured, and what can't be is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from automl_compress.core.goal import parse_goal
from automl_compress.core.result import Result
from automl_compress.deploy.report import render
from automl_compress.deploy.summary import summarize
from automl_compress.errors import ExportError, InfeasibleError, InputError
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.learning import learn
from automl_compress.search.campaign.settings import Settings, make_settings
from automl_compress.search.delivery import cheapest, directions, outcome
from automl_compress.search.delivery.cheapest import cheapest_model
from automl_compress.search.delivery.front import front_models
from tests.search.campaigns import campaign


def asking(**asked: Any) -> Settings:
    return make_settings("task.py", trials=12, epochs=0, **asked)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with campaign(tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("home"), latency="100%") as opened:
        learn(opened)
        yield opened


@pytest.fixture(scope="module")
def strict(learned: Campaign) -> Result:
    settings = asking(max_drop="2%")
    return outcome.delivered(learned, settings, *cheapest_model(learned, settings))


def test_an_option_that_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match="unknown option 'latncy'"):
        make_settings("task.py", latency="40%", latncy="30%")


def test_what_is_delivered_is_good_enough_and_cheaper(strict: Result) -> None:
    assert strict.status == "met"
    assert strict.original is not None
    assert strict.delivered is not None
    assert strict.delivered.metric >= 0.98 * strict.original.metric
    assert strict.delivered.latency_us < strict.original.latency_us
    assert strict.goal["metric_at_least"] == pytest.approx(0.98 * strict.original.metric)
    assert strict.budget == {}
    before = {s["baseline"]: s for s in strict.standings if s["rung"] == "one-shot"}
    assert {"random", "prune-then-quantize"} <= before.keys()
    assert all(s["search_evaluations"] for s in before.values())


def test_no_evaluated_plan_that_is_good_enough_is_much_cheaper(strict: Result, learned: Campaign) -> None:
    """One-shot trials are evaluated on all validation data here, and nothing is trained."""
    assert strict.delivered is not None
    assert strict.original is not None
    least = 0.98 * strict.original.metric
    for study in learned.studies().values():
        for trial in study.get_trials():
            if trial.state.name == "COMPLETE" and trial.value >= least:
                assert trial.user_attrs["predicted"]["latency"] > 0.85 * strict.delivered.latency_us


def test_a_larger_loss_buys_a_cheaper_model_from_what_is_known(strict: Result, learned: Campaign) -> None:
    settings = asking(max_drop="15%")
    found, verified, _ = cheapest_model(learned, settings)
    assert strict.delivered is not None
    assert found.metric >= 0.85 * verified.original.metric
    assert verified.delivered.latency_us <= strict.delivered.latency_us


def test_the_same_plan_is_evaluated_once_under_all_budgets(strict: Result, learned: Campaign) -> None:
    trials = [t for study in learned.studies().values() for t in study.get_trials() if t.state.name == "COMPLETE"]
    own = [t.user_attrs["plan"] for t in trials if "adopted" not in t.user_attrs and "repeat_of" not in t.user_attrs]
    assert len(own) == len(set(own))
    assert learned.trial_counts()["reused"] > 0


def test_more_than_the_original_has_is_refused_at_once(learned: Campaign) -> None:
    with pytest.raises(InfeasibleError, match="the original itself has") as caught:
        learn(learned, parse_goal(None, "1.5", None))
    assert caught.value.nearest == {"metric": learned.original_metric()}


def test_a_model_that_is_not_sound_is_passed_over(
    strict: Result, learned: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert strict.delivered is not None
    checked: list[str] = []
    sound = directions.verify

    def verify(campaign: Campaign, candidate: directions.Candidate, beaten: object) -> directions.Verified:
        checked.append(candidate.plan.key)
        if len(checked) == 1:
            raise ExportError("the integer kernels saturate")
        return sound(campaign, candidate, {})

    monkeypatch.setattr(directions, "verify", verify)
    found, verified, _ = cheapest_model(learned, asking(max_drop="2%"))
    assert len(checked) == 2
    assert found.plan.key == checked[1]
    assert checked[0] == strict.delivered.plan.key != checked[1]
    assert verified.delivered.metric >= strict.goal["metric_at_least"]
    monkeypatch.setattr(directions, "verify", lambda *_: (_ for _ in ()).throw(ExportError("they saturate")))
    monkeypatch.setattr(cheapest, "DELIVERIES", 1)
    with pytest.raises(ExportError, match=r"rejected.*they saturate"):
        cheapest_model(learned, asking(max_drop="2%"))
    learned.rejected.clear()


def test_where_no_model_is_good_enough_the_nearest_is_named(
    strict: Result, learned: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "original_metric", lambda: 1.0)  # nothing here reaches that
    monkeypatch.setattr(cheapest, "_LOOKS", 1)
    with pytest.raises(InfeasibleError, match="no compressed model") as caught:
        cheapest_model(learned, asking(max_drop="0"))
    assert set(caught.value.nearest) == {"metric", "latency"}
    assert caught.value.nearest["metric"] < 1.0


def test_a_front_gets_better_with_every_dearer_model(learned: Campaign, strict: Result) -> None:
    settings = asking(front=3)
    result = outcome.front(learned, settings, front_models(learned, settings))
    assert result.status == "met"
    assert result.delivered is None
    assert 2 <= len(result.front) <= 3
    points = list(result.front.values())
    assert [p.latency_us for p in points] == sorted(p.latency_us for p in points)
    assert [p.metric for p in points] == sorted({p.metric for p in points})
    for name, figures in result.front.items():
        folder = learned.folder.path / name
        assert (folder / "best.onnx").stat().st_size == figures.size_bytes
        assert {child.name for child in folder.iterdir()} == {
            "best.onnx",
            "best.safetensors",
            "plan.json",
            "layers.json",
        }
        assert figures.test_metric is not None
    assert "uniform-int8" in result.baselines
    at_each = [s for s in result.standings if s["rung"] == "one-shot"]
    assert {s["baseline"] for s in at_each} >= {f"uniform-int8 ({name})" for name in result.front}
    original, uniform = (s for s in result.standings if s["rung"] == "full")
    assert original["text"].startswith("original: ")
    cost = result.baselines["uniform-int8"].latency_us
    as_cheap = [figures.metric for figures in points if figures.latency_us <= cost]
    assert uniform["search_metric"] == max(as_cheap, default=None)
    assert uniform["within_budget"] is bool(as_cheap)
    assert uniform["text"].startswith("uniform-int8: ")
    again = Result.from_json(json.loads(json.dumps(result.to_json())), result.folder)
    assert again.front == result.front
    told = summarize(result.to_json())
    assert told.startswith(f"met: {len(points)} models")
    assert "front/1" in told
    assert "front/1" in render(result, [], plotly_js="")
