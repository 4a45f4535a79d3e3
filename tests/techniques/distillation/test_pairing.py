"""Features of a cut student are its teacher's, channel by channel; of a removed block nothing is asked."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.model.task import Task
from automl_compress.model.trace import trace
from automl_compress.techniques.distillation.features import layer_inputs, same_channels
from automl_compress.techniques.distillation.losses import parse_losses
from automl_compress.techniques.distillation.objective import Distillation
from automl_compress.techniques.distillation.pairing import pair_by_resolution, pair_layers
from automl_compress.techniques.prune import apply_plan
from tests.model import architectures, networks

X = torch.randn(networks.INPUT, generator=torch.Generator().manual_seed(0))
TRACED: dict[str, tuple[nn.Module, Graph]] = {}


def traced(name: str) -> tuple[nn.Module, Graph]:
    if name not in TRACED:
        model = networks.make(name)
        TRACED[name] = (model, trace(model, (X,)))
    return TRACED[name]


def some(graph: Graph, seed: int) -> Plan:
    """A plan that keeps a random part of every group."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in graph.groups:
        count = int(torch.randint(1, group.size + 1, (1,), generator=generator))
        kept[group.name] = tuple(sorted(torch.randperm(group.size, generator=generator)[:count].tolist()))
    return Plan(kept=kept)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["ResNet", "Flattened", "Concatenated", "Padded", "Tied"])
def test_a_students_channels_are_its_teachers_kept_ones(name: str, seed: int) -> None:
    """Where nobody reads what was removed, both compute the same, so that features must agree number by number."""
    model, graph = traced(name)
    plan = some(graph, seed)
    student = apply_plan(model, graph, plan)
    gone = {g.name: [c for c in range(g.size) if c not in plan.kept[g.name]] for g in graph.groups}
    teacher = networks.silenced(model, graph, gone)
    pairs = pair_layers(graph, plan, model)
    assert pairs
    with torch.no_grad(), layer_inputs(student, [p.student for p in pairs]) as mine:
        student(X)
    with torch.no_grad(), layer_inputs(teacher, [p.teacher for p in pairs]) as wanted:
        teacher(X)
    for pair in pairs:
        torch.testing.assert_close(mine[pair.student], same_channels(pair, wanted[pair.teacher]), rtol=1e-4, atol=1e-5)


def test_layers_of_removed_blocks_are_left_out_and_the_next_reads_the_whole() -> None:
    model, graph = traced("ResNet")
    [block] = [block for block in graph.blocks if "first.conv1" in block.layers]
    pairs = pair_layers(graph, Plan(drop=frozenset({block.name})), model)
    assert pairs
    assert not {pair.student for pair in pairs} & set(block.layers)
    with torch.no_grad(), layer_inputs(model, ["second.conv1"]) as wanted:
        model(X)
    silent = copy.deepcopy(model)
    nn.init.zeros_(silent.first.bn2.weight)
    nn.init.zeros_(silent.first.bn2.bias)
    student = apply_plan(model, graph, Plan(drop=frozenset({block.name})))
    with torch.no_grad(), layer_inputs(student, ["second.conv1"]) as mine:
        student(X)
    with torch.no_grad(), layer_inputs(silent, ["second.conv1"]) as shortcut:
        silent(X)
    torch.testing.assert_close(mine["second.conv1"], shortcut["second.conv1"])
    assert not torch.allclose(mine["second.conv1"], wanted["second.conv1"])


def test_half_of_what_each_resolution_has_is_compared_and_the_models_input_never() -> None:
    model, graph = traced("ResNet")
    pairs = pair_layers(graph, Plan(), model)
    assert [pair.student for pair in pairs][-1] == "head"
    assert "stem" not in {pair.student for pair in pairs}
    there = Counter(layer.input_shape[2:] for layer in graph.layers if layer.name != "stem")
    found = Counter(graph.layer[pair.student].input_shape[2:] for pair in pairs)
    assert found == {resolution: -(-count // 2) for resolution, count in there.items()}
    assert len(found) == 2
    assert all(pair.channels is None for pair in pairs)


def test_tokens_are_compared_along_the_depth() -> None:
    model, x = architectures.make("Transformer")
    graph = trace(model, (x,))
    plan = some(graph, 1)
    pairs = pair_layers(graph, plan, model)
    student = apply_plan(model, graph, plan)
    with torch.no_grad(), layer_inputs(student, [pair.student for pair in pairs]) as mine:
        student(x)
    with torch.no_grad(), layer_inputs(model, [pair.teacher for pair in pairs]) as wanted:
        model(x)
    for pair in pairs:
        assert pair.channel_dim == -1
        assert mine[pair.student].shape == same_channels(pair, wanted[pair.teacher]).shape


def test_convolutions_in_groups_are_compared_only_where_their_input_is_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 5, 1)).eval()
    graph = trace(model, (X,))
    assert {"2", "3"} >= {pair.student for pair in pair_layers(graph, Plan(), model)} > set()
    for seed in range(4):
        plan = some(graph, seed)
        student = apply_plan(model, graph, plan)
        pairs = pair_layers(graph, plan, model)
        with torch.no_grad(), layer_inputs(student, [pair.student for pair in pairs]) as mine:
            student(X)
        for pair in pairs:
            width = mine[pair.student].shape[1]
            assert width == (graph.layer[pair.student].in_channels if pair.channels is None else len(pair.channels))


def test_another_architecture_is_paired_by_resolution_through_adapters() -> None:
    model, graph = traced("ResNet")
    torch.manual_seed(0)
    other = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    other.append(nn.Linear(6, 5))
    pairs = pair_by_resolution(trace(other.eval(), (X,)), graph, other, model)
    assert [(p.student, p.teacher, p.channel_dim, p.widths) for p in pairs] == [
        ("1", "second.project", 1, (5, 8)),
        ("4", "head", -1, (6, 12)),
    ]


@pytest.mark.parametrize("name", architectures.MODELS)
def test_models_as_users_write_them_learn_features(name: str) -> None:
    """Zero for a copy of the teacher, and a finite pull for a student that was cut anyhow."""
    model, x = architectures.make(name)
    graph = trace(model, (x,))
    task = Task(model=model, train=None, validation=None, loss=lambda o, t: o.sum() * 0, metric=lambda o, t: 0.0)
    for plan, near in ((Plan(), True), (some(graph, 2), False)):
        student, pairs = apply_plan(model, graph, plan).eval(), pair_layers(graph, plan, model)
        has_positions = any(len(graph.layer[pair.teacher].input_shape) > 2 for pair in pairs)
        losses = parse_losses("soft=1+features=1+task=0" + ("+attention=1" if has_positions else ""))
        wanted = Distillation(task, model, losses, pairs)
        loss = wanted(student, ((x,), torch.zeros(len(x))))
        loss.total.backward()
        assert all(float(part) == pytest.approx(0, abs=1e-5) for part in loss.parts.values()) is near
        assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
