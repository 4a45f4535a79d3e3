"""Gram matrices are those of what layers read, and elimination takes the cheapest channel each time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from automl_compress.core.graph import ChannelGroup, Place
from automl_compress.model.trace import trace
from automl_compress.techniques import reconstruct
from automl_compress.techniques.reconstruct import collect_grams, eliminate, elimination_losses
from tests.model.networks import INPUT, make


def batches(count: int = 3) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, *INPUT[1:], generator=generator),) for _ in range(count)]


def chain(hidden: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3)).eval()
    # Channels that say partly the same, so that refitting pays.
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0] + 0.1 * model[0].weight[1]
    return model


DATA = torch.randn(200, 4, generator=torch.Generator().manual_seed(2))


def best_fit(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights with a last row of biases, and the squared error that is left."""
    columns = np.hstack([features, np.ones((len(features), 1))])
    solution = np.linalg.lstsq(columns, targets, rcond=None)[0]
    return solution, float(((columns @ solution - targets) ** 2).sum())


def test_a_gram_matrix_is_the_sum_over_inputs_with_a_one() -> None:
    model = chain()
    graph = trace(model, (DATA,))
    grams = collect_grams(model, graph, [(DATA[:50],), (DATA[50:],)])
    rows = torch.cat([torch.tanh(model[0](DATA)), torch.ones(len(DATA), 1)], dim=1).detach()
    assert set(grams) == {"2"}
    torch.testing.assert_close(grams["2"][0].matrix[0], (rows.T @ rows).double(), rtol=1e-5, atol=1e-4)


def test_a_convolutions_gram_matrix_counts_every_position() -> None:
    model = make("ResNet")
    graph = trace(model, batches(1)[0])
    (x,) = batches(1)[0]
    seen: list[Tensor] = []
    handle = model.first.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    grams = collect_grams(model, graph, [(x,)])
    handle.remove()
    padded = torch.nn.functional.pad(seen[0], (1, 1, 1, 1)).double()
    rows = torch.stack(
        [
            padded[n, :, i : i + 3, j : j + 3].flatten()
            for n, i, j in itertools.product(range(len(padded)), range(8), range(8))
        ]
    )
    torch.testing.assert_close(grams["first.conv2"][0].matrix[0, :-1, :-1], rows.T @ rows, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_elimination_takes_the_channel_that_a_refit_misses_least(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "_DAMPING", 1e-9)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    graph = trace(model, (DATA,))
    scores = eliminate(model, graph.group["0"], graph, collect_grams(model, graph, [(DATA,)]))
    assert scores is not None
    features = torch.tanh(model[0](DATA)).detach().numpy().astype(np.float64)
    targets, left, order = model(DATA).detach().numpy(), list(range(5)), []
    while len(left) > 1:
        errors = {c: best_fit(features[:, [k for k in left if k != c]], targets)[1] for c in left}
        order.append(min(errors, key=errors.__getitem__))
        left.remove(order[-1])
    assert scores.argsort().tolist() == [*order, *left]


def test_a_channel_that_says_nothing_goes_first_and_one_that_nobody_reads_as_well() -> None:
    model = chain()
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 0, 0
        model[2].weight[:, 2] = 0
    graph = trace(model, (DATA,))
    scores = eliminate(model, graph.group["0"], graph, collect_grams(model, graph, [(DATA,)]))
    assert scores is not None
    assert set(scores.argsort()[:2].tolist()) == {2, 4}


def test_scores_are_a_complete_order() -> None:
    model = make("ResNet")
    graph = trace(model, batches(1)[0])
    grams = collect_grams(model, graph, batches())
    for group in graph.groups:
        scores = eliminate(model, group, graph, grams)
        assert scores is not None
        assert len(set(scores.tolist())) == group.size


@pytest.mark.parametrize("limit", [20, 37, 72])
def test_large_layers_get_a_matrix_for_each_part_of_their_channels(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("ResNet")
    graph = trace(model, batches(1)[0])
    whole = collect_grams(model, graph, batches(1))["first.conv2"]
    monkeypatch.setattr(reconstruct, "MAX_COLUMNS", limit)
    parts = collect_grams(model, graph, batches(1))["first.conv2"]
    assert sorted(column for part in parts for column in part.columns) == list(whole[0].columns)
    for part in parts:
        assert len(part.columns) <= limit
        assert len(part.columns) % 9 == 0
        index = torch.tensor([*part.columns, -1])
        torch.testing.assert_close(part.matrix[0], whole[0].matrix[0][index][:, index], rtol=1e-5, atol=1e-3)
    losses = elimination_losses(model, graph, batches())["first.conv1"]
    assert losses is not None
    assert bool((losses > 0).all())


def test_what_is_uncorrelated_is_ranked_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts drop only the correlation between them: without any, the order is that of the whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Identity(), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6))
    x = torch.randn(64, 6)
    x = torch.linalg.qr(x - x.mean(0)).Q
    graph = trace(model, (x,))
    whole = elimination_losses(model, graph, [(x,)])["0"]
    monkeypatch.setattr(reconstruct, "MAX_COLUMNS", 2)
    parts = elimination_losses(model, graph, [(x,)])["0"]
    assert whole is not None
    assert parts is not None
    assert whole.argsort().tolist() == parts.argsort().tolist()


def test_passes_within_the_memory_limit_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("ResNet")
    graph = trace(model, batches(1)[0])
    whole = elimination_losses(model, graph, batches())
    monkeypatch.setattr(reconstruct, "MAX_BYTES", 1)
    for name, losses in elimination_losses(model, graph, batches()).items():
        torch.testing.assert_close(losses, whole[name])


def test_a_grouped_consumer_has_a_matrix_for_each_of_its_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)).eval()
    x = batches(1)[0]
    graph = trace(model, x)
    layer = replace(graph.layer["2"], in_groups=("0",), in_axis=1, out_axis=0)
    # Channels of both convolution groups at the same position stay or go together.
    positions = tuple((p,) for p in range(4))
    places = (Place(tensor="2.weight", dim=1, positions=positions, role="consumer"),)
    group = ChannelGroup(name="0", size=4, places=places, producers=("0",), consumers=("2",))
    graph = replace(graph, layers=(graph.layers[0], layer), groups=(group,))
    grams = collect_grams(model, graph, [x])
    assert grams["2"][0].matrix.shape == (2, 37, 37)
    rows = torch.nn.functional.unfold(model[:2](x[0])[:, 4:], 3).transpose(1, 2).flatten(0, 1).detach().double()
    torch.testing.assert_close(grams["2"][0].matrix[1, :-1, :-1], rows.T @ rows, rtol=1e-4, atol=1e-3)
    losses = elimination_losses(model, graph, [x])["0"]
    assert losses is not None
    assert sorted(losses.argsort().tolist()) == [0, 1, 2, 3]


def test_a_group_without_a_consumer_that_was_seen_has_no_losses() -> None:
    model = chain()
    graph = trace(model, (DATA,))
    assert eliminate(model, graph.group["0"], graph, {}) is None


def test_a_failing_calibration_leaves_nothing_behind() -> None:
    model = make("ResNet")
    graph = trace(model, batches(1)[0])
    with pytest.raises(RuntimeError):
        collect_grams(model, graph, [(torch.zeros(1, 99, 8, 8),)])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.is_tensor(model(batches(1)[0][0]))
