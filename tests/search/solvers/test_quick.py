"""The quick decoder against the exact one, on random tables over networks of every kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from automl_compress.core.graph import ChannelGroup, Graph, Layer, Place
from automl_compress.core.plan import Plan
from automl_compress.search.solvers import program
from automl_compress.search.solvers.decode import AdditiveTable, Decoder, QuickDecoder, additive_loss, excludes, solve
from automl_compress.search.solvers.listing import cheapest_first
from automl_compress.search.solvers.moves import Neighbours
from automl_compress.search.solvers.program import Unsolved
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.arrays import TableArrays
from automl_compress.search.table.pricing import random_plan
from tests.search.networks import concatenated, depthwise, every_plan, residual, space_of, table_for

Case = tuple[Graph, SearchSpace, AdditiveTable]


def nested() -> Graph:
    """Three residual blocks, and a removable part that holds the last two of them and a layer of its own."""
    graph = residual(blocks=3, size=6)
    inner = ("b1.conv1", "b1.conv2", "b2.conv1", "b2.conv2")
    outer = replace(graph.block["b1"], name="outer", layers=(*inner, "widen"))
    layers = tuple(replace(x, blocks=(*x.blocks, "outer")) if x.name in outer.layers else x for x in graph.layers)
    return replace(graph, layers=layers, blocks=(*graph.blocks, outer))


def attention(heads: int = 4, columns: int = 4) -> Graph:
    """Two projections around heads, of which either heads or their columns may go, then a second pair of layers."""
    size = heads * columns

    def linear(name: str, inputs: int, outputs: int, **links: object) -> Layer:
        return Layer(
            name=name, kind="linear", weight=f"{name}.weight", bias=None, in_channels=inputs, out_channels=outputs,
            input_shape=(1, inputs), output_shape=(1, outputs), params=inputs * outputs, macs=inputs * outputs, **links,
        )  # fmt: skip

    def group(name: str, positions: tuple[tuple[int, ...], ...], producer: str, consumer: str) -> ChannelGroup:
        return ChannelGroup(
            name=name, size=len(positions), producers=(producer,), consumers=(consumer,),
            places=(
                Place(tensor=f"{producer}.weight", dim=0, positions=positions, role="producer"),
                Place(tensor=f"{consumer}.weight", dim=1, positions=positions, role="consumer"),
            ),
        )  # fmt: skip

    both = ("heads", "columns")
    layers = (
        linear("value", 8, size, out_groups=both),
        linear("out", size, 8, in_groups=both),
        linear("up", 8, 12, out_groups=("hidden",)),
        linear("down", 12, 8, in_groups=("hidden",)),
    )
    by_head = tuple(tuple(range(h * columns, (h + 1) * columns)) for h in range(heads))
    by_column = tuple(tuple(range(c, size, columns)) for c in range(columns))
    groups = (
        group("heads", by_head, "value", "out"),
        group("columns", by_column, "value", "out"),
        group("hidden", tuple((c,) for c in range(12)), "up", "down"),
    )
    return Graph(layers=layers, groups=groups, blocks=(), input_shapes=((1, 8),))


NETWORKS = {
    "residual": residual(blocks=5),
    "deep": residual(blocks=12, size=16),
    "nested": nested(),
    "depthwise": depthwise(16),
    "concatenated": concatenated(),
    "attention": attention(),
}


def case(name: str, seed: int) -> Case:
    graph = NETWORKS[name]
    space = space_of(graph, sparsity=[0.25, 0.5, 0.75])
    return graph, space, table_for(space, graph, seed)


def limits_of(graph: Graph, table: AdditiveTable, share: float, metrics: str) -> dict[str, float]:
    whole = table.plan_cost(graph, Plan())
    both = {"latency": whole.latency_us * share, "size": whole.size_bytes * (share - 0.05)}
    return {metric: both[metric] for metric in metrics.split()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("metrics", ["latency", "latency size"])
def test_it_finds_a_plan_wherever_there_is_one_and_nearly_the_best(name: str, metrics: str) -> None:
    gaps = []
    for seed in range(2):
        graph, space, table = case(name, seed)
        quick, exact = QuickDecoder(space, graph, table), Decoder(space, graph, table)
        for share in (0.15, 0.3, 0.5, 0.8):
            limits = limits_of(graph, table, share, metrics)
            found, best = quick.solve(table.quality, limits), exact.solve(table.quality, limits)
            assert (found is None) == (best is None)
            if found is None or best is None:
                continue
            cost = table.plan_cost(graph, found.plan)
            assert all(cost.of(metric) <= limit * (1 + 1e-9) for metric, limit in limits.items())
            assert found.loss == pytest.approx(additive_loss(space, found.plan, table.quality))
            gaps.append(found.loss / best.loss - 1)
    assert min(gaps) > -1e-3
    assert float(np.mean(gaps)) < 0.001
    assert max(gaps) < 0.02


@pytest.mark.parametrize("name", NETWORKS)
def test_arrays_price_plans_as_the_table_does(name: str) -> None:
    graph, space, table = case(name, 1)
    arrays, rng = TableArrays(space, graph, table), np.random.default_rng(0)
    plans = [random_plan(space, rng, drop_share=0.3) for _ in range(40)]
    plans = [plan for plan in plans if not _both_ways(graph, plan)]
    states = arrays.states(plans)
    loss, cost = arrays.total(states, arrays.losses([table.quality] * len(plans)))
    digests = arrays.digests(states)
    for row, plan in enumerate(plans):
        assert loss[row] == pytest.approx(additive_loss(space, plan, table.quality))
        expected = table.plan_cost(graph, plan)
        assert cost[row] == pytest.approx([expected.latency_us, expected.size_bytes])
        assert space.plan_key(arrays.plan(states, row)) == space.plan_key(plan)
        same = [space.plan_key(other) == space.plan_key(plan) for other in plans]
        assert [digest == digests[row] for digest in digests] == same


@pytest.mark.parametrize("name", NETWORKS)
def test_every_single_change_does_what_it_says(name: str) -> None:
    graph, space, table = case(name, 2)
    arrays = TableArrays(space, graph, table)
    neighbours, rng = Neighbours(arrays), np.random.default_rng(1)
    states = arrays.states([random_plan(space, rng, drop_share=0.3) for _ in range(6)])
    losses = arrays.losses([table.quality] * len(states))
    changes = neighbours.changes(states, losses)
    loss, cost = arrays.total(states, losses)
    possible = np.argwhere(np.isfinite(changes.loss))
    assert len(possible) > 20
    for row, change in possible[rng.permutation(len(possible))[:60]]:
        after = neighbours.apply(states.take([row]), np.array([[change]]))
        new_loss, new_cost = arrays.total(after, losses.take([row]))
        assert new_loss[0] - loss[row] == pytest.approx(changes.loss[row, change], abs=1e-9)
        assert new_cost[0] - cost[row] == pytest.approx(changes.cost[row, :, change])
        assert arrays.digests(after) != arrays.digests(states.take([row]))


def test_neighbours_are_plans_of_the_space_though_there_are_few() -> None:
    graph = residual(blocks=1)
    space = space_of(graph)
    bits = [d for d in space.decisions if d.kind == "bits"]
    others = {d.name: d.options[0] for d in space.decisions if d.kind != "bits"}
    space = replace(space, decisions=(replace(bits[0], options=(32, 8, 4)), *bits[1:]), fixed=others)
    table = table_for(space_of(graph), graph)
    arrays = TableArrays(space, graph, table)
    losses, limits, prices = arrays.losses([table.quality]), np.full((1, 2), np.inf), np.ones((1, 2))
    start = arrays.states([Plan()])
    found = Neighbours(arrays).around(start, losses, limits, prices, paired=48, count=60)
    assert len({arrays.plan(found, row).key for row in range(len(found))}) > len(bits)


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_ways_to_narrow_the_same_layer_multiply_with_the_width_of_a_student(width: float) -> None:
    graph, space, table = case("attention", 0)
    limits = limits_of(graph, table, 0.3, "latency")
    plans = [plan for plan in every_plan(space, width) if not _both_ways(graph, plan)]
    costs = [table.plan_cost(graph, plan).latency_us for plan in plans]
    fitting = [plan for plan, cost in zip(plans, costs, strict=True) if cost <= limits["latency"]]
    exact = Decoder(space, graph, table, width=width).solve(table.quality, limits)
    quick = QuickDecoder(space, graph, table, width=width).solve(table.quality, limits)
    assert exact is not None
    assert quick is not None
    best = min(additive_loss(space, plan, table.quality) for plan in fitting)
    assert exact.loss == pytest.approx(best)
    assert quick.loss == pytest.approx(best, rel=0.02)
    decoder = QuickDecoder(space, graph, table, width=width)
    assert cheapest_first(decoder, decoder.limits({"latency": 1.0}))[1][0] == pytest.approx(min(costs))


def test_the_same_question_has_the_same_answer() -> None:
    graph, space, table = case("deep", 3)
    limits = limits_of(graph, table, 0.4, "latency size")
    one, other = (QuickDecoder(space, graph, table).solve(table.quality, limits) for _ in range(2))
    assert one == other


def test_widths_that_are_priced_roughly_stay_within_the_limit() -> None:
    graph = concatenated(size=256)
    space = space_of(graph, sparsity=[round((i / 15) ** 1.7, 3) for i in range(1, 15)])
    table = table_for(space, graph, 3, rough=0.0)
    quick = QuickDecoder(space, graph, table)
    assert not quick.arrays.exact
    for share in (0.3, 0.6):
        limits = limits_of(graph, table, share, "latency")
        found = quick.solve(table.quality, limits)
        assert found is not None
        assert found.cost.latency_us <= limits["latency"]


def test_blocks_that_always_go_and_options_that_are_fixed() -> None:
    graph, space, table = case("residual", 0)
    fixed = replace(
        space,
        decisions=tuple(d for d in space.decisions if d.name not in ("drop.b0", "bits.head")),
        fixed={"drop.b0": True, "bits.head": 8},
    )
    found = QuickDecoder(fixed, graph, table).solve(table.quality, {"latency": 1e9})
    assert found is not None
    assert found.plan.drop == {"b0"}
    assert found.plan.bits == {"head": 8}


def test_the_quick_plan_stands_in_where_a_program_is_too_large_to_be_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, space, table = case("residual", 0)
    monkeypatch.setattr(program, "_COLUMNS", 10)
    limits = limits_of(graph, table, 0.5, "latency")
    plan = solve(space, graph, table, limits)
    assert plan is not None
    assert table.plan_cost(graph, plan).latency_us <= limits["latency"]
    with pytest.raises(Unsolved, match="too many"):
        solve(space, graph, table, {"latency": 1e-3})
    assert excludes(space, graph, table, {"latency": 1e-3})
    assert not excludes(space, graph, table, limits)
    exact = Decoder(space, graph, table).solve(table.quality, limits, exhaustive=True)
    assert exact is not None
    assert exact.loss <= QuickDecoder(space, graph, table).solve(table.quality, limits).loss  # type: ignore[union-attr]


def _both_ways(graph: Graph, plan: Plan) -> bool:
    narrowed = {name for name, share in plan.sparsity.items() if share}
    return any(graph.alternatives[name] & narrowed for name in narrowed)
