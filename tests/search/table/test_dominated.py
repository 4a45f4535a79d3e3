"""What a device makes pointless is taken out and named, with figures; what may have its use stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from automl_compress.core.budget import Cost, Provenance
from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.search.table.dominated import drop_dominated, is_about_bits
from automl_compress.search.table.table import AdditiveTable, LayerCost
from tests.search.networks import residual
from tests.search.space.test_space import made


def _staircase(graph: Graph) -> AdditiveTable:
    """8 outputs are as fast as 6, and 4 are faster; sizes follow the channels."""
    step = {8: 10.0, 6: 12.0, 4: 5.0, 2: 5.0}
    shapes = itertools.product((8, 6, 4, 2), (8, 6, 4, 2), (8, 32))
    costs = {(i, o, b): LayerCost(latency_us=step[i] * step[o], size_bytes=i * o * b) for i, o, b in shapes}
    return AdditiveTable(layers={layer.name: costs for layer in graph.layers})


def test_a_sparsity_that_is_nowhere_cheaper_is_taken_out() -> None:
    graph = residual()
    space = made(graph, {"match": {"kind": "channel-group", "name": "b*"}, "sparsity": [0.25, 0.5, 0.75]})
    reduced = drop_dominated(space, graph, _staircase(graph), metrics=["latency"])
    assert reduced.decision["sparsity.b0.conv1"].options == (0.0, 0.5)
    assert reduced.notes[:2] == (
        "b0.conv1, b1.conv1: 6 channels are not faster here than 8 "
        "(32 bits: 240.0 us against 200.0; estimated): not offered",
        "b0.conv1, b1.conv1: 2 channels are not faster here than 4 "
        "(32 bits: 100.0 us against 100.0; estimated): not offered",
    )


def test_nothing_is_dominated_while_size_or_memory_counts() -> None:
    graph = residual()
    space = made(graph, {"match": {"kind": "channel-group", "name": "b*"}, "sparsity": [0.25, 0.5, 0.75]})
    assert drop_dominated(space, graph, _staircase(graph)).decisions == space.decisions
    assert drop_dominated(space, graph, _staircase(graph), metrics=["latency", "memory"]).decisions == space.decisions


def test_an_option_that_pays_at_one_bit_width_stays() -> None:
    graph = residual()
    space = made(
        graph,
        {"match": {"kind": "channel-group", "name": "b*"}, "sparsity": [0.25]},
        {"match": {"kind": "layer"}, "bits": [8, 32]},
    )
    table = _staircase(graph)
    cheap = {k: replace(c, latency_us=1.0) if k[2] == 32 and k[0] == 6 else c for k, c in table.layers["stem"].items()}
    table = replace(table, layers={**table.layers, "b0.conv2": cheap, "b1.conv2": cheap})
    reduced = drop_dominated(space, graph, table, metrics=["latency"])
    assert reduced.decision["sparsity.b0.conv1"].options == (0.0, 0.25)


def _measured(table: AdditiveTable, how: Provenance = "measured") -> AdditiveTable:
    return replace(table, sources={name: dict.fromkeys(shapes, how) for name, shapes in table.layers.items()})


def _slow_integers(table: AdditiveTable, *layers: str) -> AdditiveTable:
    """Eight bits take twice as long in these layers and half as long in others."""
    factors = {name: {8: 2.0 if name in layers else 0.5, 32: 1.0} for name in table.layers}
    costs = {
        name: {k: replace(cost, latency_us=cost.latency_us * factors[name][k[2]]) for k, cost in shapes.items()}
        for name, shapes in table.layers.items()
    }
    return replace(table, layers=costs)


def _sum_of(table: AdditiveTable, graph: Graph, *, border_us: float = 0.0) -> Callable[[Plan], Cost]:
    """Latency of a plan by the table, and of each layer whose bit-width differs from its predecessor's."""

    def predict(plan: Plan) -> Cost:
        bits = [plan.layer_bits(layer.name) for layer in graph.layers]
        borders = sum(a != b for a, b in itertools.pairwise(bits))
        latency = table.plan_cost(graph, plan).latency_us + border_us * borders
        return Cost(latency_us=latency, size_bytes=0, memory_bytes=0)

    return predict


BITS = {"match": {"kind": "layer"}, "bits": [8, 32]}


def test_a_bit_width_that_is_slower_at_every_width_is_taken_out_with_its_figures() -> None:
    graph = residual()
    space = made(graph, BITS)
    table = _measured(_slow_integers(_staircase(graph), "b0.conv1"))
    reduced = drop_dominated(space, graph, table, metrics=["latency"], predict=_sum_of(table, graph))
    assert reduced.fixed["bits.b0.conv1"] == 32
    assert {d.target for d in space.decisions} - {d.target for d in reduced.decisions} == {"b0.conv1"}
    [note] = [note for note in reduced.notes if is_about_bits(note, "b0.conv1")]
    assert note == (
        "b0.conv1: 8 bits are slower here than 32 at every width (200.0 us against 100.0 with all channels; "
        "from measured kernels): not offered"
    )


def test_a_bit_width_that_saves_borders_stays() -> None:
    graph = residual()
    space = made(graph, BITS)
    table = _slow_integers(_staircase(graph), "b0.conv1")
    dear = _sum_of(table, graph, border_us=1000.0)
    assert drop_dominated(space, graph, table, metrics=["latency"], predict=dear).decisions == space.decisions


@pytest.mark.parametrize("metrics", [["latency", "size"], ["size"], ["latency", "memory"]])
def test_bit_widths_stay_where_they_make_the_model_smaller(metrics: list[str]) -> None:
    graph = residual()
    space = made(graph, BITS)
    table = _slow_integers(_staircase(graph), "b0.conv1")
    reduced = drop_dominated(space, graph, table, metrics=metrics, predict=_sum_of(table, graph))
    assert reduced.decisions == space.decisions


def test_a_bit_width_that_pays_at_one_width_stays() -> None:
    graph = residual()
    space = made(graph, BITS, {"match": {"kind": "channel-group", "name": "b0*"}, "sparsity": [0.5]})
    table = _slow_integers(_staircase(graph), "b0.conv1")
    fast = {k: replace(c, latency_us=1.0) if k == (8, 4, 8) else c for k, c in table.layers["b0.conv1"].items()}
    table = replace(table, layers={**table.layers, "b0.conv1": fast})
    reduced = drop_dominated(space, graph, table, metrics=["latency"], predict=_sum_of(table, graph))
    assert reduced.decision["bits.b0.conv1"].options == (32, 8)


@pytest.mark.parametrize(("how", "said"), [("measured", "from measured kernels"), ("estimated", "estimated")])
def test_what_is_slower_in_one_combination_is_said_though_it_stays(how: Provenance, said: str) -> None:
    graph = residual()
    space = made(graph, BITS, {"match": {"kind": "channel-group", "name": "b0*"}, "sparsity": [0.25]})
    table = _staircase(graph)
    steep = {k: replace(c, latency_us=430.0) if k[1:] == (6, 8) else c for k, c in table.layers["b0.conv1"].items()}
    fast = {k: replace(c, latency_us=1.0) if k[0] == 6 else c for k, c in table.layers["b0.conv2"].items()}
    table = _measured(replace(table, layers={**table.layers, "b0.conv1": steep, "b0.conv2": fast}), how)
    reduced = drop_dominated(space, graph, table, metrics=["latency", "size"])
    assert reduced.decisions == space.decisions
    wanted = f"b0.conv1: 8 bits with 6 channels is slower here (430.0 us) than with 8 (100.0 us; {said})"
    assert reduced.notes[0] == wanted


def test_the_clearest_findings_come_first_and_the_rest_is_counted() -> None:
    graph = residual(blocks=10)
    space = made(graph, {"match": {"kind": "channel-group"}, "sparsity": [0.25]})
    layers = dict(_staircase(graph).layers)
    for i in range(10):
        steep = LayerCost(latency_us=200.0 + i)
        layers[f"b{i}.conv1"] = {k: steep if k[1] == 6 else c for k, c in layers[f"b{i}.conv1"].items()}
        cheap = LayerCost(latency_us=1.0)
        layers[f"b{i}.conv2"] = {k: cheap if k[0] == 6 else c for k, c in layers[f"b{i}.conv2"].items()}
    notes = drop_dominated(space, graph, AdditiveTable(layers=layers)).notes
    assert len(notes) == 9
    assert notes[0].startswith("b9.conv1: 32 bits with 6 channels is slower here (209.0 us)")
    assert notes[-1] == "and 2 more like it"
