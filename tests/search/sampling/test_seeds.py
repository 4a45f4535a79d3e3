from __future__ import annotations

from dataclasses import replace

from automl_compress.core.plan import Plan
from automl_compress.search.sampling.seeds import fewest_blocks
from automl_compress.search.table.pricing import uniform_bits
from tests.search.networks import residual, space_of, table_for

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
