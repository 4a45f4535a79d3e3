"""Rivals meet the budget, come out the same from the same seed, and are evaluated no more often than was allowed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest

from automl_compress.core.budget import Budget
from automl_compress.core.plan import Plan
from automl_compress.search.sampling.rivals import Market, classic_space, prune_then_quantize, random_feasible
from automl_compress.search.solvers.decode import additive_loss
from automl_compress.search.space.space import SearchSpace
from tests.search.networks import additive_cost, residual, space_of, table_for
from tests.search.space.test_space import made

GRAPH = residual(blocks=2)


def market(share: float, *, seed: int = 0, space: SearchSpace | None = None, overhead: float = 1.05) -> Market:
    space = space or space_of(GRAPH)
    table = table_for(space, GRAPH)
    original = table.plan_cost(GRAPH, Plan())
    limits = {"latency": share * original.latency_us, "size": 0.9 * original.size_bytes}
    return Market(
        space=space,
        graph=GRAPH,
        table=table,
        limits=limits,
        budget=Budget(limits=limits),
        predict=lambda plan: additive_cost(table, GRAPH, plan, overhead=overhead),
        seed=seed,
    )


def quality(given: Market) -> Callable[[Plan], float]:
    return lambda plan: 1.0 - 0.01 * additive_loss(given.space, plan, given.table.quality)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_random_plans_meet_the_budget_and_differ(share: float) -> None:
    given = market(share)
    plans = list(islice(random_feasible(given), 20))
    assert len({given.space.plan_key(plan) for plan in plans}) == len(plans) == 20
    assert all(given.budget.met(given.predict(plan)) for plan in plans)
    for plan in plans:
        assert given.space.plan(given.space.params(plan)).key == plan.key


def test_random_plans_depend_on_the_seed_alone() -> None:
    def keys(seed: int) -> list[str]:
        return [plan.key for plan in islice(random_feasible(market(0.5, seed=seed)), 6)]

    assert keys(1) == keys(1) != keys(2)


def test_where_nothing_fits_there_is_no_random_plan() -> None:
    assert list(random_feasible(market(0.001))) == []


def test_the_classic_route_quantizes_alike_what_was_pruned_in_32_bits() -> None:
    given = market(0.4)
    judged: list[Plan] = []

    def evaluate(plan: Plan) -> float:
        judged.append(plan)
        return quality(given)(plan)

    plan, metric, count = prune_then_quantize(given, 8, evaluate)
    assert plan is not None
    assert count == len(judged) == 8
    assert all(not other.bits for other in judged[:-1])
    assert judged[-1] == plan
    assert metric == quality(given)(plan)
    assert set(plan.bits) == {layer.name for layer in GRAPH.layers}
    assert set(plan.bits.values()) == {8}
    assert given.budget.met(given.predict(plan))
    best = max(quality(given)(other) for other in judged[:-1])
    assert quality(given)(Plan(**{**vars(plan), "bits": {}})) == best


def test_the_classic_route_says_when_nothing_fits() -> None:
    assert prune_then_quantize(market(0.001), 4, lambda plan: 1.0)[:2] == (None, None)


def test_without_pruning_there_is_no_classic_route() -> None:
    space = made(GRAPH, {"match": {"kind": "layer"}, "bits": [8, 32]})
    assert classic_space(space) is None
    assert prune_then_quantize(market(0.5, space=space), 4, lambda plan: 1.0) == (None, None, 0)


def test_it_stops_when_it_is_told_to() -> None:
    given = market(0.5)
    seen: list[Plan] = []
    plan, _, count = prune_then_quantize(given, 8, lambda p: seen.append(p) or 0.5, stop=lambda: len(seen) >= 2)  # type: ignore[func-returns-value]
    assert plan is not None
    assert count == 3, "the quantized model of the best so far"
