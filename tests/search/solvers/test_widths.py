"""Widths under a limit: within it, never clearly worse than the table's optimum, and estimated where not measured."""

from __future__ import annotations

import numpy as np
import pytest

from automl_compress.core.plan import Plan
from automl_compress.search.solvers import widths
from automl_compress.search.solvers.decode import Decoder
from automl_compress.search.solvers.widths import anchored_sensitivity, macs_table, refine
from automl_compress.search.space.rules import SpaceFile
from automl_compress.search.space.space import SearchSpace, resolve
from automl_compress.search.table.sensitivity import single
from tests.search import campaigns
from tests.search.evaluation.test_student import students

RULES = [
    {"match": {"kind": "channel-group"}, "sparsity": [i / 8 for i in range(8)]},
    {"match": {"kind": "block"}, "drop": True},
]


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return resolve(SpaceFile.model_validate({"name": "some", "rules": RULES}), campaigns.graph(), {})


def test_the_tables_cost_of_the_original_are_its_multiply_adds() -> None:
    graph = campaigns.graph()
    cost = macs_table(graph, {}).plan_cost(graph, Plan())
    assert cost.latency_us == graph.macs
    layer = graph.layer["block.conv1"]
    half = macs_table(graph, {}).plan_cost(graph, Plan(sparsity={"block.conv1": 0.5})).latency_us
    assert half == graph.macs - layer.macs / 2 - graph.layer["block.conv2"].macs / 2


def test_anchors_are_measured_and_the_rest_grows_with_what_is_removed(space: SearchSpace) -> None:
    made = students("obs")
    found = anchored_sensitivity(made, space, anchors=(0.5,))
    for decision in space.decisions:
        losses = [found[decision.name, option] for option in decision.options]
        assert losses[0] == 0
        assert losses == sorted(losses)
        if decision.kind == "sparsity":
            measured = float(made.estimate(single(decision, 0.5)).mean())
            assert found[decision.name, 0.5] == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_plan_is_within_the_limit_and_not_worse_than_the_tables_optimum(space: SearchSpace, share: float) -> None:
    made = students("obs")
    graph = campaigns.graph()
    table = macs_table(graph, anchored_sensitivity(made, space, anchors=(0.5,)))
    limits = {"latency": share * graph.macs}
    plan = refine(made, space, table, limits, rounds=4)
    again = refine(made, space, table, limits, rounds=4)
    assert plan is not None
    assert again is not None
    assert plan.key == again.key
    assert table.plan_cost(graph, plan).latency_us <= limits["latency"]
    first = Decoder(space, graph, table).solve(table.quality, limits)
    assert first is not None
    assert made.estimate(plan).mean() <= made.estimate(first.plan).mean()


def test_a_difference_within_the_noise_changes_nothing(space: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    made = students("l2")
    graph = campaigns.graph()
    table = macs_table(graph, anchored_sensitivity(made, space, anchors=(0.5,)))
    limits = {"latency": 0.5 * graph.macs}
    noise = np.random.default_rng(0)
    monkeypatch.setattr(made, "estimate", lambda plan: noise.normal(size=200))
    monkeypatch.setattr(widths, "_SIGNIFICANT", 5.0)
    plan = refine(made, space, table, limits, rounds=4)
    first = Decoder(space, graph, table).solve(table.quality, limits)
    assert plan is not None
    assert first is not None
    assert plan.key == first.plan.key


def test_a_limit_that_nothing_meets_gives_no_plan(space: SearchSpace) -> None:
    table = macs_table(campaigns.graph(), {})
    assert refine(students("l2"), space, table, {"latency": 1.0}, rounds=1) is None
