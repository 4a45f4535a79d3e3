"""Rules carry channels through operators: a cut that they allow never changes what the rest computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.model.rules import RULES
from automl_compress.model.shapes import matching_runs
from automl_compress.model.surgery import cut
from automl_compress.model.trace import analyse, trace

from .networks import silenced

SHAPES = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=4)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@given(SHAPES, st.randoms(use_true_random=False))
def test_runs_cover_both_shapes_in_order_with_equal_products(parts: list[list[int]], random: object) -> None:
    before = [size for part in parts for size in part]
    after = [math.prod(part) for part in parts]
    runs = matching_runs(before, after)
    assert [dim for old, _ in runs for dim in old] == list(range(len(before)))
    assert [dim for _, new in runs for dim in new] == list(range(len(after)))
    for old, new in runs:
        assert math.prod(before[d] for d in old) == math.prod(after[d] for d in new)


@given(st.lists(st.integers(2, 5), min_size=1, max_size=5))
def test_a_shape_matches_itself_dimension_by_dimension(shape: list[int]) -> None:
    assert matching_runs(shape, shape) == [([i], [i]) for i in range(len(shape))]


@pytest.mark.parametrize(
    ("before", "after", "runs"),
    [
        ((2, 8, 4, 4), (2, 128), [([0], [0]), ([1, 2, 3], [1])]),
        ((2, 128), (2, 8, 16), [([0], [0]), ([1], [1, 2])]),
        ((6, 4), (4, 6), [([0, 1], [0, 1])]),
        ((2, 3), (2, 3, 1), [([0], [0]), ([1], [1]), ([], [2])]),
        ((2, 3, 1, 1), (2, 3), [([0], [0]), ([1], [1]), ([2], []), ([3], [])]),
    ],
)
def test_runs_are_the_shortest(
    before: tuple[int, ...], after: tuple[int, ...], runs: list[tuple[list[int], list[int]]]
) -> None:
    assert matching_runs(before, after) == runs


class Between(nn.Module):
    """A convolution, the operation, and a consumer of as many features as come out of it."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.operation = operation
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.LazyLinear(5)
        self(X)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self.conv(x)))


CARRIES = {
    "relu, mean": lambda x: functional.relu(x).mean((2, 3)),
    "pool, flatten": lambda x: functional.avg_pool2d(x, 4).flatten(1),
    "permute": lambda x: x.permute(0, 2, 3, 1).amax((1, 2)),
    "squeeze": lambda x: functional.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "unsqueeze, expand": lambda x: x.mean((2, 3)).unsqueeze(1).expand(-1, 4, -1),
    "slice positions": lambda x: x[:, :, 1:5, ::2].mean((2, 3)),
    "pad positions": lambda x: functional.pad(x, (1, 1, 2, 2)).amax((2, 3)),
    "broadcast over positions": lambda x: (x * 2 + x.mean(3, keepdim=True)).mean((2, 3)),
    "gate": lambda x: (x * torch.sigmoid(x.mean((2, 3), keepdim=True))).mean((2, 3)),
    "transpose": lambda x: x.flatten(2).transpose(1, 2).amax(1),
    "flip channels": lambda x: x.flip(1).mean((2, 3)),
    "instance norm": lambda x: functional.instance_norm(x).amax((2, 3)),
    "einsum": lambda x: torch.einsum("bchw,hk->bck", x, torch.ones(8, 2)).amax(2),
    "stack": lambda x: torch.stack([x, x.relu()], dim=1).amax(1).mean((2, 3)),
    "roll positions": lambda x: x.roll((1, 2), (2, 3)).amax((2, 3)),
}
STATISTICS = {
    "softmax over channels": lambda x: torch.softmax(x, dim=1).mean((2, 3)),
    "cumulative sum": lambda x: x.cumsum(1).mean((2, 3)),
    "layer norm": lambda x: (lambda y: functional.layer_norm(y, y.shape[1:]))(x.mean((2, 3))),
    "RMS norm by hand": lambda x: (lambda y: y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6))(x.mean((2, 3))),
    "spatial gate": lambda x: (x * torch.sigmoid(torch.cat([x.mean(1, True), x.amax(1, True)], 1).sum(1, True))).mean(
        (2, 3)
    ),
    "unit length": lambda x: functional.normalize(x.mean((2, 3)), dim=-1),
}
FREEZES = {
    "split channels": lambda x: x.reshape(-1, 2, 3, 64).amax(1).mean(-1),
    "slice channels": lambda x: x[:, 1:5].mean((2, 3)),
    "layer norm over a number": lambda x: functional.layer_norm(x.mean((2, 3)), (6,)),
    "pad by a number": lambda x: functional.pad(x, (0, 0, 0, 0, 1, 2)).roll(1, 1).mean((2, 3)),
    "channels meet positions": lambda x: (x[..., :6, 0] + x[..., :6, 0].transpose(1, 2)).mean(2),
}


@pytest.mark.parametrize("operation", CARRIES.values(), ids=CARRIES.keys())
def test_a_carried_channel_can_be_cut_without_changing_the_rest(operation: Callable[[Tensor], Tensor]) -> None:
    model = Between(operation).eval()
    graph = trace(model, (X,))
    assert [(group.name, group.size) for group in graph.groups] == [("conv", 6)]
    small = cut(model, graph, kept={"conv": [0, 3, 4]})
    reference = silenced(model, graph, {"conv": [1, 2, 5]})
    torch.testing.assert_close(small(X), reference(X), rtol=1e-4, atol=1e-5)
    assert small.conv.out_channels == 3


@pytest.mark.parametrize("operation", FREEZES.values(), ids=FREEZES.keys())
def test_what_mixes_channels_freezes_them_and_says_why(operation: Callable[[Tensor], Tensor]) -> None:
    graph = trace(Between(operation).eval(), (X,))
    assert graph.groups == ()
    assert any(entry.layer == "conv" and entry.reason for entry in graph.frozen)


@pytest.mark.parametrize("operation", STATISTICS.values(), ids=STATISTICS.keys())
def test_statistics_over_channels_are_over_those_that_stay(operation: Callable[[Tensor], Tensor]) -> None:
    model = Between(operation).eval()
    analysis = analyse(model, (X,))
    assert [(group.name, group.size) for group in analysis.graph.groups] == [("conv", 6)]
    small = cut(model, analysis.graph, kept={"conv": [0, 3, 4]})
    torch.testing.assert_close(small(X), operation(model.conv(X)[:, [0, 3, 4]]) @ small.head.weight.T + small.head.bias)


def test_convolutions_in_groups_lose_whole_groups_or_channels_of_each() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Flatten(), nn.Linear(12 * 36, 5)).eval()
    graph = trace(model, (X,))
    assert sorted(group.size for group in graph.groups) == [2, 3, 4]
    by_size = {group.size: group.name for group in graph.groups}
    kept = {by_size[2]: [1], by_size[3]: [0, 2], by_size[4]: [0, 3]}
    small = cut(model, graph, kept=kept)
    assert (small[1].groups, small[1].in_channels, small[1].out_channels) == (2, 2, 4)
    whole, part = model[1](model[0](X)), small[1](small[0](X))
    rows = [0, 2, 9, 11]
    weight = model[1].weight[rows][:, [1]]
    by_hand = functional.conv2d(model[0](X)[:, [1, 7]], weight, model[1].bias[rows], groups=2)
    torch.testing.assert_close(part, by_hand)
    assert whole.shape[1] == 12


def test_a_transposed_convolution_ties_like_a_convolution() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 7, 3), nn.ReLU(), nn.Conv2d(7, 5, 8), nn.Flatten())
    model = nn.Sequential(*layers).eval()
    graph = trace(model, (X,))
    assert {group.name: group.size for group in graph.groups} == {"0": 6, "1": 7}
    small = cut(model, graph, kept={"0": [0, 5], "1": [1, 2, 6]})
    reference = silenced(model, graph, {"0": [1, 2, 3, 4], "1": [0, 3, 4, 5]})
    torch.testing.assert_close(small(X), reference(X), rtol=1e-4, atol=1e-5)


def test_every_rule_is_callable() -> None:
    assert all(callable(rule) for rule in RULES.values())
