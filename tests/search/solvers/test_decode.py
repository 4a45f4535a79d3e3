from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.search.solvers.decode import (
    AdditiveTable,
    Decoder,
    QuickDecoder,
    additive_loss,
    cheapest,
    options_in_force,
    solve,
    solve_quickly,
)
from automl_compress.search.solvers.listing import cheapest_first
from automl_compress.search.space.rules import SpaceFile
from automl_compress.search.space.space import SearchSpace, resolve
from tests.search.networks import NATIVE, concatenated, depthwise, every_plan, residual, space_of, table_for


def within(table: AdditiveTable, graph: Graph, plan: Plan, limits: dict[str, float]) -> bool:
    cost = table.plan_cost(graph, plan)
    return all(cost.of(metric) <= limit for metric, limit in limits.items())


def best_by_hand(space: SearchSpace, graph: Graph, table: AdditiveTable, limits: dict[str, float]) -> float | None:
    plans = [plan for plan in every_plan(space) if within(table, graph, plan, limits)]
    return min((additive_loss(space, plan, table.quality) for plan in plans), default=None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.25, 0.4, 0.7])
def test_the_decoder_finds_what_trying_every_plan_finds(seed: int, share: float) -> None:
    graph = residual(blocks=1 + seed % 2, size=6)
    space = space_of(graph, sparsity=[0.5], width=[1.0, 0.5])
    table = table_for(space, graph, seed)
    whole = table.plan_cost(graph, Plan())
    limits = {"latency": whole.latency_us * share, "size": whole.size_bytes * (share + 0.1 * (seed % 3))}
    expected = best_by_hand(space, graph, table, limits)
    found = Decoder(space, graph, table).solve(table.quality, limits, gap=0.0)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.loss == pytest.approx(expected, rel=1e-3)
        assert within(table, graph, found.plan, limits)


def test_a_block_inside_of_a_removed_one_costs_and_loses_nothing() -> None:
    graph = residual(blocks=2, size=6)
    inner = graph.block["b1"]
    outer = replace(inner, name="outer", layers=("b0.conv1", "b0.conv2", *inner.layers))
    layers = tuple(replace(x, blocks=(*x.blocks, "outer")) if x.name in outer.layers else x for x in graph.layers)
    graph = replace(graph, layers=layers, blocks=(*graph.blocks, outer))
    space = space_of(graph, sparsity=[0.5])
    for seed in range(3):
        table = table_for(space, graph, seed)
        limits = {"latency": table.plan_cost(graph, Plan()).latency_us * 0.4}
        found = Decoder(space, graph, table).solve(table.quality, limits, gap=0.0)
        assert found is not None
        assert found.loss == pytest.approx(best_by_hand(space, graph, table, limits), rel=1e-3)


def test_a_depthwise_layer_keeps_the_same_channels_on_both_sides() -> None:
    graph = depthwise()
    space = space_of(graph, sparsity=[0.25, 0.5, 0.75])
    table = table_for(space, graph, 1)
    limits = {"latency": table.plan_cost(graph, Plan()).latency_us * 0.5}
    found = Decoder(space, graph, table).solve(table.quality, limits, gap=0.0)
    assert found is not None
    assert found.loss == pytest.approx(best_by_hand(space, graph, table, limits), rel=1e-3)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_layer_after_a_concatenation_is_priced_by_its_total(share: float) -> None:
    graph = concatenated()
    space = space_of(graph, sparsity=[0.25, 0.5, 0.75])
    table = table_for(space, graph, 3)
    limits = {"latency": table.plan_cost(graph, Plan()).latency_us * share}
    found = Decoder(space, graph, table).solve(table.quality, limits, gap=0.0)
    assert found is not None
    assert found.loss == pytest.approx(best_by_hand(space, graph, table, limits), rel=1e-3)


def test_many_totals_are_rounded_up_and_stay_within_the_limit() -> None:
    graph = concatenated(size=64)
    space = space_of(graph, sparsity=[i / 16 + 0.01 * (i % 3) for i in range(1, 15)])
    table = table_for(space, graph, 3, rough=0.0)
    for share in (0.3, 0.6):
        limits = {"latency": table.plan_cost(graph, Plan()).latency_us * share}
        found = Decoder(space, graph, table).solve(table.quality, limits, gap=0.0)
        best = best_by_hand(space, graph, table, limits)
        assert found is not None
        assert best is not None
        assert within(table, graph, found.plan, limits)
        assert found.loss <= best * 1.1


def test_limits_that_nothing_meets_have_no_plan() -> None:
    graph = residual()
    space = space_of(graph)
    table = table_for(space, graph)
    floor = table.plan_cost(graph, cheapest(space, graph, table, "latency")).latency_us
    assert solve(space, graph, table, {"latency": floor * 0.99}) is None
    assert solve(space, graph, table, {"latency": 1e-3}) is None
    found = solve(space, graph, table, {"latency": floor * 1.001})
    assert found is not None
    assert within(table, graph, found, {"latency": floor * 1.001})


def test_a_width_is_chosen_where_no_sparsity_is_offered() -> None:
    graph = residual()
    file = SpaceFile.model_validate(
        {"name": "widths", "width": [1.0, 0.5, 0.25], "rules": [{"match": {"kind": "layer"}, "bits": [8, 32]}]}
    )
    space = resolve(file, graph, NATIVE)
    table = table_for(space, graph)
    limits = {"size": table.plan_cost(graph, Plan(bits={x.name: 8 for x in graph.layers})).size_bytes * 0.6}
    found = solve(space, graph, table, limits)
    assert found is not None
    assert found.width < 1
    assert ("width", found.width) in options_in_force(space, found)


@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_what_a_width_loses_counts_where_no_sparsity_is_offered(share: float) -> None:
    graph = residual()
    rules = [{"match": {"kind": "block"}, "drop": True}]
    space = resolve(SpaceFile.model_validate({"name": "w", "width": [1.0, 0.5, 0.25], "rules": rules}), graph, NATIVE)
    table = table_for(space, graph)
    limits = {"latency": table.plan_cost(graph, Plan()).latency_us * share}
    plans = [plan for w in (1.0, 0.5, 0.25) for plan in every_plan(space, w) if within(table, graph, plan, limits)]
    least = min(additive_loss(space, plan, table.quality) for plan in plans)
    for found in (solve(space, graph, table, limits), solve_quickly(space, graph, table, limits)):
        assert found is not None
        assert additive_loss(space, found, table.quality) == pytest.approx(least)


def test_the_cheapest_plan_is_the_cheapest_of_all() -> None:
    graph = residual(blocks=1, size=6)
    space = space_of(graph, sparsity=[0.5, 0.75])
    table = table_for(space, graph, 4)
    plans = [plan for width in (1.0, 0.5) for plan in every_plan(space, width)]
    for metric in ("latency", "size"):
        lowest = min(table.plan_cost(graph, plan).of(metric) for plan in plans)
        found = table.plan_cost(graph, cheapest(space, graph, table, metric)).of(metric)
        assert found == pytest.approx(lowest, rel=1e-5)


def test_all_plans_of_a_small_space_are_listed_from_cheap_to_dear() -> None:
    graph = residual(blocks=1, size=6)
    space = space_of(graph, sparsity=[0.5])
    table = table_for(space, graph)
    decoder = QuickDecoder(space, graph, table)
    limits = {"latency": 0.6 * table.plan_cost(graph, Plan()).latency_us, "size": 100.0}
    states, shares = cheapest_first(decoder, decoder.limits(limits))
    plans = [decoder.arrays.plan(states, row) for row in range(len(states))]
    assert {space.identity(plan) for plan in plans} == {space.identity(plan) for plan in every_plan(space)}
    assert len({space.identity(plan) for plan in plans}) == len(plans)
    costs = [table.plan_cost(graph, plan) for plan in plans]
    assert shares.tolist() == pytest.approx([max(c.of(m) / limit for m, limit in limits.items()) for c in costs])
    assert shares.tolist() == sorted(shares)


def test_of_a_large_space_the_cheap_end_is_listed() -> None:
    """As far as it goes, nothing is passed over: every plan but a listed one is dearer than the first of these."""
    graph = residual(blocks=3)
    space = space_of(graph)
    table = table_for(space, graph, 3)
    decoder = QuickDecoder(space, graph, table)
    states, shares = cheapest_first(decoder, decoder.limits({"latency": 1.0}))
    assert Decoder(space, graph, table).solve(table.quality, {"latency": 0.999 * shares[0]}) is None
    listed, rng = set(decoder.arrays.digests(states)), np.random.default_rng(0)
    few = states.take(rng.integers(24, size=200))
    changes = rng.integers(decoder.neighbours.count, size=(200, 2))
    possible = np.isfinite(decoder.neighbours.changes(few, decoder.arrays.losses([{}] * 200)).loss)
    changes = np.where(np.take_along_axis(possible, changes, axis=1), changes, -1)
    others = decoder.neighbours.apply(few, changes)
    costs = decoder.arrays.costs(others)[:, 0]
    for digest, cost in zip(decoder.arrays.digests(others), costs, strict=True):
        assert digest in listed or cost >= shares[24]


def test_a_block_that_always_goes_is_removed() -> None:
    graph = residual()
    rules = [{"match": {"kind": "block", "name": "b0"}, "drop": "always"}, {"match": {"kind": "layer"}, "bits": 8}]
    space = resolve(SpaceFile.model_validate({"name": "fixed", "rules": rules}), graph, NATIVE)
    assert not space.decisions
    table = table_for(space, graph)
    plan = solve(space, graph, table, {})
    assert plan is not None
    assert plan.drop == {"b0"}
    assert set(plan.bits.values()) == {8}


def test_equal_losses_are_decided_for_the_cheaper_plan() -> None:
    graph = residual()
    space = space_of(graph)
    table = replace(table_for(space, graph, rough=0.0), quality={})
    found = Decoder(space, graph, table).solve({}, {})
    assert found is not None
    lowest = table.plan_cost(graph, cheapest(replace(space, decisions=space.decisions[1:]), graph, table, "latency"))
    assert found.cost.latency_us == pytest.approx(lowest.latency_us, rel=0.01)


def test_a_missing_shape_is_scaled_from_the_nearest_one() -> None:
    graph = residual()
    table = table_for(space_of(graph), graph)
    known = table.cost("head", (8, 10, 8))
    assert table.cost("head", (6, 10, 8)).size_bytes == pytest.approx(known.size_bytes * 6 / 8)
