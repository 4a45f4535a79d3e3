"""Variants show the device what the space can reach, and the table's sums are what was measured."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from automl_compress.core.plan import Plan
from automl_compress.hardware.device.kernels import Kernel
from automl_compress.model.surgery import cut
from automl_compress.model.trace import trace
from automl_compress.search.table.pricing import (
    additive_table,
    computed_bits,
    covering_plans,
    layer_bytes,
    random_plan,
    uniform_bits,
    weight_bytes,
)
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS
from tests.search import campaigns, networks

GRAPH = networks.residual()
SPACE = networks.space_of(GRAPH)


def shapes(plan: Plan) -> set[tuple[str, int, int, int]]:
    return {(GRAPH.layer[name].key, *widths, plan.layer_bits(name)) for name, widths in plan.widths(GRAPH).items()}


def test_every_shape_at_full_student_width_is_shown() -> None:
    seen = set().union(*(shapes(plan) for plan in covering_plans(SPACE, GRAPH)))
    for layer in GRAPH.layers:
        for inputs in _widths(layer.in_groups, layer, "in"):
            for outputs in _widths(layer.out_groups, layer, "out"):
                for bits in SPACE.options(f"bits.{layer.name}"):
                    assert (layer.key, inputs, outputs, bits) in seen


def _widths(groups, layer, side):  # type: ignore[no-untyped-def]
    if not groups:
        return [layer.in_channels if side == "in" else layer.out_channels]
    size = GRAPH.group[groups[0]].size
    kept = {
        Plan(sparsity={groups[0]: float(s)}).kept_count(groups[0], size) for s in SPACE.options(f"sparsity.{groups[0]}")
    }
    return [GRAPH.width(layer, side, {groups[0]: count}) for count in kept]


def test_the_first_variant_is_the_original_and_the_second_wholly_quantized() -> None:
    first, second, *others = covering_plans(SPACE, GRAPH)
    assert first.key == Plan().key
    assert second == uniform_bits(SPACE, 8)
    assert set(second.bits) == set(GRAPH.layer)
    assert len({plan.key for plan in others}) > 1


def test_the_same_seed_gives_the_same_variants_and_the_limit_holds() -> None:
    assert covering_plans(SPACE, GRAPH, seed=3) == covering_plans(SPACE, GRAPH, seed=3)
    assert covering_plans(SPACE, GRAPH, seed=3) != covering_plans(SPACE, GRAPH, seed=4)
    assert len(covering_plans(SPACE, GRAPH, limit=5)) == 5


def test_random_plans_are_plans_of_the_space_at_full_width() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        plan = random_plan(SPACE, rng, drop_share=0.5)
        assert plan.width == 1.0
        assert SPACE.identity(SPACE.plan(SPACE.params(plan))) == SPACE.identity(plan)
    assert not any(random_plan(SPACE, rng, drop_share=0.0).drop for _ in range(10))


def kernels(plan: Plan) -> list[Kernel]:
    """Two kernels a layer, and one that belongs to none."""
    result = [Kernel(key="none", op="Softmax", layer=None, mean_us=5.0)]
    for name, (inputs, outputs) in plan.widths(GRAPH).items():
        cost = inputs * outputs * plan.layer_bits(name) / 32
        result += [
            Kernel(key=f"{name}{i}", op="Conv", layer=name, mean_us=cost * share) for i, share in ((0, 0.9), (1, 0.1))
        ]
    return result


def test_the_tables_sums_are_the_variants_latencies() -> None:
    plans = covering_plans(SPACE, GRAPH)
    executed = [kernels(plan) for plan in plans]
    totals = [sum(kernel.mean_us or 0 for kernel in found) for found in executed]
    table = additive_table(GRAPH, plans, executed, totals, 50_000, {})
    for plan, total in zip(plans, totals, strict=True):
        assert table.plan_cost(GRAPH, plan).latency_us == pytest.approx(total)
    assert table.fixed.latency_us == pytest.approx(5.0)
    assert table.plan_cost(GRAPH, Plan()).size_bytes == pytest.approx(50_000)


def test_a_correction_of_the_total_is_spread_over_the_layers() -> None:
    plan = Plan()
    found = kernels(plan)
    total = 2 * sum(kernel.mean_us or 0 for kernel in found)
    table = additive_table(GRAPH, [plan], [found], [total], 0, {})
    assert table.plan_cost(GRAPH, plan).latency_us == pytest.approx(total)


def test_a_layers_bytes_are_those_of_its_initializers() -> None:
    bench = campaigns.bench()
    for plan in (Plan(), Plan(sparsity={"block.conv1": 0.5, "down": 0.5})):
        sizes = {i.name: len(i.raw_data) for i in bench.structure(plan).graph.initializer}
        for name, widths in plan.widths(bench.graph).items():
            found = sizes[f"{name}.weight"] + sizes.get(f"{name}.bias", 0)
            assert layer_bytes(bench.graph.layer[name], (*widths, 32)) == pytest.approx(found, abs=4 * widths[1])


def test_what_is_left_of_convolutions_in_groups_and_transposed_ones_is_counted_exactly() -> None:
    grouped, transposed = nn.Conv2d(8, 12, 3, groups=4), nn.ConvTranspose2d(12, 6, 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), grouped, transposed, nn.Flatten(), nn.Linear(6 * 49, 5)).eval()
    graph = trace(model, (torch.zeros(1, 3, 8, 8),))
    sizes = {group.name: group.size for group in graph.groups}
    assert sorted(sizes.values()) == [2, 3, 4, 6]
    for counts in itertools.product(*(sorted({1, size - 1, size}) for size in sizes.values())):
        plan = Plan(kept={name: tuple(range(count)) for name, count in zip(sizes, counts, strict=True)})
        small = cut(model, graph, kept=plan.kept)
        assert plan.widths(graph)["1"] == (small[1].in_channels, small[1].out_channels)
        assert weight_bytes(graph, plan) == 4 * sum(parameter.numel() for parameter in small.parameters())
    assert weight_bytes(graph, Plan(bits={"2": 8})) == weight_bytes(graph, Plan()), "it has no integer kernel"


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_what_quantization_saves_in_the_table_it_saves_in_the_file(bits: int) -> None:
    bench = campaigns.bench()
    uniform = Plan(bits=dict.fromkeys(bench.graph.layer, bits))
    full, low = (bench.structure(plan).ByteSize() for plan in (Plan(), uniform))
    saved = sum(
        layer_bytes(layer, (layer.in_channels, layer.out_channels, 32))
        - layer_bytes(layer, (layer.in_channels, layer.out_channels, bits))
        for layer in bench.graph.layers
    )
    assert saved == pytest.approx(full - low, rel=0.15)


def test_bits_that_one_kernel_computes_are_measured_once_and_weigh_what_they_weigh() -> None:
    assert [computed_bits("conv", bits, DEFAULT_EXECUTIONS) for bits in (2, 4, 8, 16, 32)] == [8, 8, 8, 32, 32]
    assert [computed_bits("linear", bits, DEFAULT_EXECUTIONS) for bits in (2, 4, 8, 16, 32)] == [2, 4, 8, 32, 32]
    plans = [Plan(), uniform_bits(SPACE, 8)]
    executed = [kernels(plan) for plan in plans]
    offered = dict.fromkeys(GRAPH.layer, (2, 4, 8, 16, 32))
    table = additive_table(GRAPH, plans, executed, [1000.0, 400.0], 50_000, {}, widths=offered)
    layer = GRAPH.layer["b0.conv1"]
    costs = {bits: table.cost("b0.conv1", (layer.in_channels, layer.out_channels, bits)) for bits in (2, 4, 8, 16, 32)}
    assert costs[2].latency_us == costs[4].latency_us == costs[8].latency_us < costs[16].latency_us
    assert costs[16].latency_us == costs[32].latency_us
    assert costs[2].size_bytes < costs[4].size_bytes < costs[8].size_bytes < costs[16].size_bytes < costs[32].size_bytes
