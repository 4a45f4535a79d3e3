from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from automl_compress.core.plan import Plan
from automl_compress.search.sampling.seeds import fewest_blocks, loosest_optimum
from automl_compress.search.solvers import feasibility
from automl_compress.search.solvers.decode import additive_loss, solve
from automl_compress.search.solvers.feasibility import Reach
from automl_compress.search.table.pricing import uniform_bits
from tests.search.networks import additive_cost, residual, space_of, table_for

GRAPH = residual(blocks=4)
SPACE = space_of(GRAPH)
LOSSES = {("drop.b0", True): 0.3, ("drop.b1", True): 0.1, ("drop.b2", True): 0.2, ("drop.b3", True): 9.0}
QUALITY = {**table_for(SPACE, GRAPH, 1).quality, **LOSSES}


def test_the_blocks_that_cost_least_go_first_and_no_more_than_needed() -> None:
    start = uniform_bits(SPACE, 8)
    for needed, gone in enumerate(({"b1"}, {"b1", "b2"}, {"b0", "b1", "b2"}, {"b0", "b1", "b2", "b3"}), start=1):
        found = fewest_blocks(SPACE, QUALITY, start, lambda plan, n=needed: n - len(plan.drop))
        assert found is not None
        assert found.drop == gone
        assert replace(found, drop=frozenset()) == start, "nothing else is touched"


def test_fewer_blocks_come_before_cheaper_ones_and_of_as_many_the_cheaper() -> None:
    saved = {"b0": 2, "b1": 1, "b2": 2, "b3": 1}
    for needed, gone in ((1, {"b1"}), (2, {"b2"}), (3, {"b1", "b2"}), (4, {"b0", "b2"}), (5, {"b0", "b1", "b2"})):
        found = fewest_blocks(SPACE, QUALITY, Plan(), lambda plan, n=needed: n - sum(saved[b] for b in plan.drop))
        assert found is not None
        assert found.drop == gone


def test_where_no_number_of_blocks_is_enough_there_is_no_such_plan() -> None:
    assert fewest_blocks(SPACE, QUALITY, Plan(), lambda plan: 1.0) is None
    without = replace(SPACE, decisions=tuple(d for d in SPACE.decisions if d.kind != "drop"))
    assert fewest_blocks(without, QUALITY, Plan(), lambda plan: 0.0) is None


@pytest.mark.parametrize("overhead", [0.8, 1.0, 1.25])
@pytest.mark.parametrize("seed", range(4))
def test_the_table_s_optimum_is_found_with_one_exact_solution_or_three(overhead: float, seed: int) -> None:
    """It fits by the cost model, which differs from the table, and is as good as bisecting exactly would find."""
    table = table_for(SPACE, GRAPH, seed)
    predict = partial(additive_cost, table, GRAPH, overhead=overhead)
    limits = {"latency": 0.5 * predict(Plan()).latency_us}
    reach = Reach(space=SPACE, graph=GRAPH, table=table, predict=predict)
    asked: list[float] = []

    def exactly(scale: float) -> Plan | None:
        asked.append(scale)
        return reach.solve(limits, scale)

    def fits(plan: Plan) -> bool:
        return predict(plan).latency_us <= limits["latency"]

    found = loosest_optimum(partial(reach.estimate, limits), exactly, fits)
    assert found is not None
    assert fits(found)
    assert len(asked) <= 3
    best = solve(SPACE, GRAPH, table, {"latency": limits["latency"] / overhead})
    assert best is not None
    tighter = solve(SPACE, GRAPH, table, {"latency": 0.97 * limits["latency"] / overhead})
    assert tighter is not None
    worst = additive_loss(SPACE, tighter, table.quality)
    assert additive_loss(SPACE, best, table.quality) <= additive_loss(SPACE, found, table.quality) <= worst


def test_what_was_solved_for_a_table_is_not_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def counting(name: str) -> Callable[..., Plan | None]:
        original = getattr(feasibility, name)

        def call(*given: object) -> Plan | None:
            counted.append(name)
            return original(*given)

        return call

    for name in ("solve", "cheapest"):
        monkeypatch.setattr(feasibility, name, counting(name))
    table = table_for(SPACE, GRAPH, 1)
    reach = Reach(space=SPACE, graph=GRAPH, table=table, predict=partial(additive_cost, table, GRAPH))
    limits = {"latency": 0.5 * additive_cost(table, GRAPH, Plan()).latency_us}
    for _ in range(3):
        assert reach.solve(limits) == reach.solve(dict(limits)) is not None
        reach.floors(["latency"])
        reach.binding(["latency"])
    assert sorted(counted) == ["cheapest", "solve"]
