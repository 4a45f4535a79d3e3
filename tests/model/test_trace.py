"""Tracing: what may be cut can be, what may not is named; a cut model equals the one that ignores the channels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from automl_compress.core.graph import Graph
from automl_compress.errors import TaskError
from automl_compress.model.surgery import cut
from automl_compress.model.trace import trace

from .networks import INPUT, NETWORKS, make, silenced


def traced(name: str) -> tuple[nn.Module, Graph, Tensor]:
    model, x = make(name), torch.randn(INPUT, generator=torch.Generator().manual_seed(1))
    return model, trace(model, (x,)), x


@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_can_be_cut_to_any_size_and_equals_the_silenced_original(name: str) -> None:
    model, graph, x = traced(name)
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        kept, gone = {}, {}
        for group in graph.groups:
            order = torch.randperm(group.size, generator=generator).tolist()
            count = int(torch.randint(1, group.size + 1, (1,), generator=generator))
            kept[group.name], gone[group.name] = sorted(order[:count]), sorted(order[count:])
        small = cut(model, graph, kept=kept)
        torch.testing.assert_close(small(x), silenced(model, graph, gone)(x), rtol=1e-3, atol=1e-4)
        assert type(small) is type(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the original was modified"


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("ResNet", {"stem": 8, "first.conv1": 8, "second.conv1": 12, "second.conv2": 12}),
        ("Flattened", {"conv": 6, "hidden": 10}),
        ("Concatenated", {"left": 4, "right": 6, "squeeze": 3, "out": 7}),
        ("Padded", {"stem": 8, "inner": 6}),
        ("HardWired", {"free": 6}),
        ("Tied", {"enter": 8}),
        ("Odd", {}),
    ],
)
def test_groups_are_found(name: str, groups: dict[str, int]) -> None:
    graph = traced(name)[1]
    assert {group.name: group.size for group in graph.groups} == groups


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("Padded", "outer", "code fixes"),
        ("HardWired", "conv", "code fixes"),
        ("Odd", "conv", "cummax in the model is not understood"),
        ("ResNet", "head", "output"),
    ],
)
def test_what_is_left_whole_is_named_with_the_reason(name: str, layer: str, reason: str) -> None:
    reasons = {entry.layer: entry.reason for entry in traced(name)[1].frozen}
    assert reason in reasons[layer]


def test_a_flattened_channel_has_all_its_columns() -> None:
    model, graph, _ = traced("Flattened")
    small = cut(model, graph, kept={"conv": [0, 5]})
    assert small.hidden.weight.shape == (10, 2 * 16)
    assert small.hidden.in_features == 32
    assert small.norm.num_features == 2
    torch.testing.assert_close(small.hidden.weight[:, 16:], model.hidden.weight[:, 5 * 16 :])


def test_tied_parameters_stay_one() -> None:
    model, graph, x = traced("Tied")
    small = cut(model, graph, kept={"enter": [1, 2, 7]})
    assert small.twice.weight.shape == (3, 3)
    assert small(x).shape == (2, 5)


def test_residual_branches_can_be_removed_and_leave_the_shortcut() -> None:
    model, graph, x = traced("ResNet")
    assert set(graph.block) == {"first", "second"}
    small = cut(model, graph, kept={}, drop=["first", "second"])
    stem = model.stem(x).relu()
    torch.testing.assert_close(small(x), model.head(model.second.project(stem).relu().mean((2, 3))))


def test_a_removed_branch_follows_the_width_of_its_shortcut() -> None:
    model, graph, x = traced("ResNet")
    assert cut(model, graph, kept={"second.conv2": [0, 3, 4], "stem": [1, 2]}, drop=["first", "second"])(x).shape == (
        2,
        5,
    )


def test_layers_carry_shapes_and_multiply_adds_worked_out_by_hand() -> None:
    graph = traced("ResNet")[1]
    stem = graph.layer["stem"]
    assert (stem.input_shape, stem.output_shape) == ((1, 3, 8, 8), (1, 8, 8, 8))
    assert stem.macs == 3 * 8 * 9 * 64
    assert graph.layer["head"].macs == 12 * 5
    assert stem.params == 3 * 8 * 9 + 8
    assert graph.layer["first.conv1"].blocks == ("first",)


def test_the_fingerprint_knows_structure_and_not_weights() -> None:
    x = torch.zeros(INPUT)
    assert trace(make("ResNet", seed=1), (x,)).fingerprint == trace(make("ResNet", seed=2), (x,)).fingerprint
    assert traced("ResNet")[1].fingerprint != traced("Padded")[1].fingerprint


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_exported_is_refused_in_one_line() -> None:
    with pytest.raises(TaskError, match=r"can't be exported, at test_trace.py:\d+ in forward") as caught:
        trace(Branching(), (torch.ones(INPUT),))
    assert "\n" not in str(caught.value)
