"""Baselines are evaluated as often as was allowed and never twice; whether the search beat them is said as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from automl_compress.core.budget import Budget
from automl_compress.core.goal import parse_goal
from automl_compress.core.plan import Plan
from automl_compress.core.result import Figures
from automl_compress.errors import InputError
from automl_compress.search.campaign.baselines import CLASSIC, RANDOM, Baselines, Rival, check_effort, compare, searched
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.learning import learn
from automl_compress.search.delivery.deliver import Verified
from automl_compress.search.delivery.standings import full_standings, one_shot_standings
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.ladder.ladder import FULL, UNTRAINED, Recovery
from automl_compress.techniques.training.settings import Training
from tests.search.campaigns import campaign


def recoverer(opened: Campaign) -> Callable[[Plan, bool], Candidate]:
    recovery = Recovery(opened.bench, opened.folder)
    return lambda plan, trained: recovery.recover(plan, FULL if trained else UNTRAINED, Training(epochs=0))


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    """A campaign after its one-shot trials."""
    home = tmp_path_factory.mktemp("home")
    with campaign(tmp_path_factory.mktemp("run"), home, latency="55%", size="60%") as opened:
        learn(opened)
        opened.explore(10)
        yield opened


def test_searched_baselines_get_as_many_evaluations_as_the_search_at_most(
    tried: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = compare(tried, "quick", recoverer(tried))
    rivals = {rival.name: rival for rival in quick.rivals}
    assert set(rivals) == {"uniform-int8", "milp", RANDOM, CLASSIC}
    assert len(quick.search) == len(searched(tried)) >= 4
    for name in (RANDOM, CLASSIC):
        rival = rivals[name]
        assert rival.plan is not None
        assert 1 <= rival.evaluations <= 4
        assert tried.aim.met(tried.predict(rival.plan))
        assert rival.metric == tried.bench.one_shot(rival.plan)
    assert quick.candidates.keys() == rivals.keys()

    monkeypatch.setattr(tried.bench, "one_shot", lambda plan: pytest.fail("evaluated twice"))
    assert compare(tried, "quick", recoverer(tried)) == quick


def test_nothing_is_evaluated_or_recovered_where_that_was_not_wanted(
    tried: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tried.bench, "one_shot", lambda plan: pytest.fail("evaluated"))
    found = compare(tried, "none", lambda plan, trained: pytest.fail("recovered"))
    assert not found.candidates
    assert {rival.name for rival in found.rivals} == {"uniform-int8", "milp"}


def test_what_is_trained_depends_on_the_effort_and_on_the_time(tried: Campaign) -> None:
    trained: dict[str, bool] = {}
    recover = recoverer(tried)

    def watched(plan: Plan, train: bool) -> Candidate:
        trained[plan.key] = train
        return recover(plan, train)

    quick = compare(tried, "quick", watched)
    worth: dict[str, bool] = {}  # by plan: what is trained for one baseline is trained for all that come to it
    for rival in quick.rivals:
        assert rival.plan is not None
        good = rival.fits and (not rival.is_searched or rival.metric > max(quick.search))  # type: ignore[operator]
        worth[rival.plan.key] = worth.get(rival.plan.key, False) or good
    assert trained == worth
    assert quick.distilled == {r.name for r in quick.rivals if r.plan is not None and worth[r.plan.key]}
    assert compare(tried, "quick", watched, may_train=False).distilled == frozenset()
    stopped = compare(tried, "quick", watched, stop=lambda: True)
    assert not stopped.candidates


def test_only_three_efforts_are_known() -> None:
    for mode in ("quick", "full", "none"):
        check_effort(mode)
    with pytest.raises(InputError, match="unknown baselines 'all': use one of quick, full, none"):
        check_effort("all")


def test_the_search_is_compared_after_as_many_evaluations() -> None:
    some = Plan(width=0.5)
    found = Baselines(
        search=(0.5, 0.7, 0.9),
        rivals=(
            Rival(name="milp", plan=some, metric=0.8),
            Rival(name=RANDOM, plan=some, metric=0.8, evaluations=2),
            Rival(name=CLASSIC, plan=None, evaluations=3, fits=False),
            Rival(name="uniform-int8", plan=some, fits=False),
        ),
    )
    milp, random, classic, uniform = one_shot_standings(found)
    assert (milp.beaten, milp.search_metric, milp.search_evaluations) == (True, 0.9, 3)
    assert (random.beaten, random.search_metric, random.search_evaluations) == (False, 0.7, 2)
    assert (classic.beaten, uniform.beaten) == (None, None)
    assert random.text == "random: 0.8000 (best of 2), the search 0.7000 (best of 2): not beaten"
    assert classic.text == f"{CLASSIC}: none of the 3 plans that were evaluated is within the budget"
    assert uniform.text == "uniform-int8: over the budget, no rival"


def figures(metric: float, latency: float, plan: Plan | None = None) -> Figures:
    return Figures(metric=metric, latency_us=latency, size_bytes=1000, memory_bytes=5000, plan=plan)


def verified(**models: Figures) -> Verified:
    return Verified(
        original=figures(0.95, 100.0),
        delivered=figures(0.9, 40.0, Plan(width=0.5)),
        baselines=models,
        budget=Budget(limits={"latency": 45.0}),
        layers=(),
        notes=(),
    )


def test_the_delivered_model_stands_beside_what_was_trained_like_it() -> None:
    models = {
        "better": figures(0.91, 44.0, Plan(width=0.6)),
        "equal": figures(0.9, 44.0, Plan(width=0.7)),
        "worse": figures(0.8, 30.0, Plan(width=0.4)),
        "dear": figures(0.94, 46.0, Plan(width=0.9)),
        "same": figures(0.9, 45.1, Plan(width=0.5)),
        "untrained": figures(0.1, 40.0, Plan(width=0.3)),
    }
    found = Baselines(distilled=frozenset(models) - {"untrained"})
    rows = {row.baseline: row for row in full_standings(found, verified(**models))}
    assert {name: row.beaten for name, row in rows.items()} == {
        "original": None, "better": False, "equal": False, "worse": True, "dear": None, "same": False,
    }  # fmt: skip
    assert rows["worse"].text == "worse: 0.8000 trained, the delivered model 0.9000: beaten"
    assert "it is the delivered model: not beaten" in rows["same"].text
    assert all(row.rung == "full" for row in rows.values())


def test_where_a_baseline_is_delivered_the_search_has_not_beaten_others_by_it() -> None:
    models = {
        "delivered": figures(0.9, 40.0, Plan(width=0.5)),
        "middling": figures(0.87, 44.0, Plan(width=0.7)),
        "worst": figures(0.85, 44.0, Plan(width=0.6)),
    }
    found = Baselines(distilled=frozenset(models), own=figures(0.86, 42.0, Plan(width=0.4)))
    rows = {row.baseline: row for row in full_standings(found, verified(**models))}
    assert {name: row.beaten for name, row in rows.items()} == {
        "original": None, "delivered": False, "middling": False, "worst": True,
    }  # fmt: skip
    assert rows["worst"].text == "worst: 0.8500 trained, the search's own model 0.8600: beaten"
    assert rows["worst"].search_metric == 0.86


def test_for_the_cheapest_model_the_cost_of_good_enough_ones_counts() -> None:
    goal = parse_goal(None, "0.88", "latency")
    models = {
        "cheaper": figures(0.89, 35.0, Plan(width=0.4)),
        "dearer": figures(0.93, 44.0, Plan(width=0.6)),
        "worse": figures(0.87, 20.0, Plan(width=0.3)),
    }
    found = full_standings(Baselines(distilled=frozenset(models)), verified(**models), goal)
    assert {row.baseline: row.beaten for row in found} == {
        "original": None, "cheaper": False, "dearer": True, "worse": None,
    }  # fmt: skip


def test_an_unmeasured_search_beats_nobody() -> None:
    found = Baselines(rivals=(replace(Rival(name="milp", plan=Plan(), metric=0.8)),))
    (row,) = one_shot_standings(found)
    assert row.beaten is None
    assert row.text == "milp: not evaluated"


def test_a_run_folder_keeps_evaluations_though_a_line_was_cut(tried: Campaign, tmp_path: Path) -> None:
    before = compare(tried, "quick", recoverer(tried))
    file = tried.folder.file("baselines.jsonl")
    file.write_text(file.read_text()[:-5])
    assert compare(tried, "quick", recoverer(tried)) == before
    assert all(line.startswith("{") for line in file.read_text().splitlines())
