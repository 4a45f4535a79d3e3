"""Width and bits of a layer together: what is measured of them, and that every decoder counts it alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.solvers.decode import AdditiveTable, Decoder, QuickDecoder, additive_loss
from automl_compress.search.solvers.moves import Neighbours
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.arrays import TableArrays
from automl_compress.search.table.pricing import random_plan
from automl_compress.search.table.sensitivity import joint_options, measure_joint
from tests.search.networks import concatenated, depthwise, every_plan, residual, space_of, table_for

NETWORKS = {"residual": residual(blocks=3), "depthwise": depthwise(16), "concatenated": concatenated()}


def with_joint(graph: Graph, table: AdditiveTable, seed: int) -> AdditiveTable:
    """A joint effect for most of the layers, in either direction."""
    rng = np.random.default_rng(seed)
    return replace(table, joint={x.name: float(rng.uniform(-1, 3)) for x in graph.layers if rng.random() < 0.8})


def loss_of(space: SearchSpace, table: AdditiveTable, plan: Plan) -> float:
    return additive_loss(space, plan, table.quality) + table.joint_loss(space.graph, plan, table.quality)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.4, 0.55, 0.7])
def test_both_decoders_find_what_trying_every_plan_finds(seed: int, share: float) -> None:
    graph = residual(blocks=1 + seed % 2, size=6)
    space = space_of(graph, sparsity=[0.5], width=[1.0])
    table = with_joint(graph, table_for(space, graph, seed), seed)
    limits = {"latency": table.plan_cost(graph, Plan()).latency_us * share}
    fitting = [plan for plan in every_plan(space) if table.plan_cost(graph, plan).latency_us <= limits["latency"]]
    expected = min(loss_of(space, table, plan) for plan in fitting)
    exact = Decoder(space, graph, table).solve(table.quality, limits, gap=0.0)
    quick = QuickDecoder(space, graph, table).solve(table.quality, limits)
    assert exact is not None
    assert quick is not None
    for found in (exact, quick):
        assert found.loss == pytest.approx(loss_of(space, table, found.plan))
    assert exact.loss == pytest.approx(expected, rel=1e-3)
    assert quick.loss == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", NETWORKS)
def test_arrays_and_their_changes_count_what_the_table_counts(name: str) -> None:
    graph = NETWORKS[name]
    space = space_of(graph, sparsity=[0.25, 0.5, 0.75])
    table = with_joint(graph, table_for(space, graph, 1), 1)
    arrays, rng = TableArrays(space, graph, table), np.random.default_rng(0)
    plans = [random_plan(space, rng, drop_share=0.3) for _ in range(6)]
    states = arrays.states(plans)
    losses = arrays.losses([table.quality] * len(plans))
    loss, _ = arrays.total(states, losses)
    assert loss == pytest.approx([loss_of(space, table, plan) for plan in plans])
    neighbours = Neighbours(arrays)
    changes = neighbours.changes(states, losses)
    possible = np.argwhere(np.isfinite(changes.loss))
    for row, change in possible[:: max(1, len(possible) // 60)]:
        after = neighbours.apply(states.take([row]), np.array([[change]]))
        expected = loss_of(space, table, arrays.plan(after)) - loss[row]
        assert changes.loss[row, change] == pytest.approx(expected, abs=1e-9)


class Scripted:
    """Stands for a workbench whose models' distances are a formula: `change` is what bits lose more, cut."""

    def __init__(self, quality: Mapping[tuple[str, object], float], change: float) -> None:
        self.quality, self.change, self.judged = quality, change, 0

    def student(self, plan: Plan) -> tuple[None, Plan]:
        return None, plan

    def export(self, model: None, plan: Plan) -> Plan:
        return plan

    def distortion(self, plan: Plan) -> float:
        self.judged += 1
        cut = sum(self.quality[f"sparsity.{group}", value] for group, value in plan.sparsity.items())
        # Repaired models are judged a little differently from the table of single options.
        bits = sum(self.quality[f"bits.{name}", value] for name, value in plan.bits.items())
        return 0.7 * cut + bits * (1.0 + self.change)


def scripted_case(change: float) -> tuple[SearchSpace, AdditiveTable, Scripted, Workbench]:
    graph = residual(blocks=2, size=8)
    space = space_of(graph, sparsity=[0.25, 0.5, 0.75])
    table = table_for(space, graph, 3)
    bench = Scripted(cast(Mapping[tuple[str, object], float], table.quality), change)
    return space, table, bench, cast(Workbench, bench)


@pytest.mark.parametrize("change", [-0.2, 0.0, 0.6])
def test_the_measured_combinations_are_reproduced_and_never_measured_twice(change: float, tmp_path: Path) -> None:
    space, table, bench, workbench = scripted_case(change)
    file = tmp_path / "file.jsonl"
    joint = measure_joint(workbench, space, table.quality, file)
    measured = joint_options(space, table.quality)
    assert {name for name, *_ in measured} == set(joint)
    assert joint
    made = bench.judged
    assert made == 2 * len(measured)
    assert measure_joint(workbench, space, table.quality, file) == joint
    assert bench.judged == made
    together = replace(table, joint=joint)
    for name, bits, group, option in measured:
        plan = Plan(sparsity={group: float(option)}, bits={name: bits})
        alone = table.quality[f"bits.{name}", bits]
        assert together.joint_loss(space.graph, plan, table.quality) == pytest.approx(change * alone)
        assert together.joint_loss(space.graph, Plan(bits={name: bits}), table.quality) == 0


def test_an_implausible_measurement_makes_no_loss_negative() -> None:
    space, table, _, workbench = scripted_case(-50.0)
    together = replace(table, joint=measure_joint(workbench, space, table.quality))
    for plan in list(every_plan(space_of(space.graph, sparsity=[0.75], width=[1.0])))[:200]:
        assert loss_of(space, together, plan) >= 0


def test_nothing_is_measured_where_no_layer_can_have_fewer_bits() -> None:
    space, table, bench, workbench = scripted_case(0.5)
    wide = replace(space, decisions=tuple(d for d in space.decisions if d.kind != "bits"))
    assert measure_joint(workbench, wide, table.quality) == {}
    assert bench.judged == 0
