"""The refit is the least-squares optimum, and elimination takes the cheapest channel each time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.model.trace import trace
from automl_compress.techniques import reconstruct
from automl_compress.techniques.prune import apply_plan
from automl_compress.techniques.reconstruct import collect_grams, elimination_scores, refit
from tests.model.networks import INPUT, NETWORKS, make


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


@pytest.mark.parametrize("name", NETWORKS)
def test_with_all_channels_kept_the_refit_changes_nothing(name: str) -> None:
    model = make(name)
    graph = trace(model, batches(1)[0])
    grams = collect_grams(model, graph, batches())
    plan = Plan(kept={group.name: tuple(range(group.size)) for group in graph.groups})
    same = apply_plan(model, graph, plan)
    refit(same, model, graph, plan, grams)
    # The ridge that keeps dead channels invertible shows up on both sides of the equation, so it cancels here.
    for key, value in same.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-4, atol=1e-4)


def test_a_gram_matrix_is_the_sum_over_inputs_with_a_one() -> None:
    model = chain()
    graph = trace(model, (DATA,))
    grams = collect_grams(model, graph, [(DATA[:50],), (DATA[50:],)])
    rows = torch.cat([torch.tanh(model[0](DATA)), torch.ones(len(DATA), 1)], dim=1).detach()
    assert set(grams) == {"2"}
    torch.testing.assert_close(grams["2"].matrix, (rows.T @ rows).double(), rtol=1e-5, atol=1e-4)


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
    torch.testing.assert_close(grams["first.conv2"].matrix[:-1, :-1], rows.T @ rows, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kept", [(0, 2, 3), (1, 4), (5,), (0, 1, 2, 3, 4)])
def test_the_refit_is_the_least_squares_optimum(kept: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "_DAMPING", 1e-9)
    model = chain()
    graph = trace(model, (DATA,))
    plan = Plan(kept={"0": kept})
    small = apply_plan(model, graph, plan)
    refit(small, model, graph, plan, collect_grams(model, graph, [(DATA,)]))
    features = torch.tanh(model[0](DATA)).detach().numpy().astype(np.float64)
    wanted, _ = best_fit(features[:, kept], model(DATA).detach().numpy())
    np.testing.assert_allclose(small[2].weight.detach().numpy(), wanted[:-1].T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(small[2].bias.detach().numpy(), wanted[-1], rtol=1e-3, atol=1e-4)


def test_the_ridge_costs_next_to_nothing() -> None:
    model = chain()
    graph = trace(model, (DATA,))
    plan = Plan(kept={"0": (0, 2, 3)})
    small, plain = apply_plan(model, graph, plan), apply_plan(model, graph, plan)
    refit(small, model, graph, plan, collect_grams(model, graph, [(DATA,)]))
    features = torch.tanh(model[0](DATA)).detach().numpy().astype(np.float64)
    _, least = best_fit(features[:, [0, 2, 3]], model(DATA).detach().numpy())
    error, unrepaired = (float(((m(DATA) - model(DATA)) ** 2).sum().detach()) for m in (small, plain))
    assert least <= error * 1.001
    assert error < 1.01 * least
    assert error < 0.9 * unrepaired


@pytest.mark.parametrize("name", ["ResNet", "Flattened", "Concatenated"])
def test_the_refit_brings_a_convolutional_network_nearer_to_the_original(name: str) -> None:
    model = make(name)
    graph = trace(model, batches(1)[0])
    group = graph.group[{"ResNet": "first.conv1", "Flattened": "conv", "Concatenated": "left"}[name]]
    plan = Plan(kept={group.name: tuple(range(group.size - 1))})
    plain, repaired = apply_plan(model, graph, plan), apply_plan(model, graph, plan)
    refit(repaired, model, graph, plan, collect_grams(model, graph, batches()))
    before, after = (
        sum(float(((m(*x) - model(*x)) ** 2).mean().detach()) for x in batches()) for m in (plain, repaired)
    )
    if name == "Concatenated":  # its consumer is a depthwise convolution, which is left as it is
        assert after <= before
    else:
        assert after < before


@pytest.mark.parametrize("seed", range(3))
def test_elimination_takes_the_channel_that_a_refit_misses_least(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "_DAMPING", 1e-9)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    graph = trace(model, (DATA,))
    scores = elimination_scores(model, graph.group["0"], graph, collect_grams(model, graph, [(DATA,)]))
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
    scores = elimination_scores(model, graph.group["0"], graph, collect_grams(model, graph, [(DATA,)]))
    assert scores is not None
    assert set(scores.argsort()[:2].tolist()) == {2, 4}


def test_scores_are_a_complete_order() -> None:
    model = make("ResNet")
    graph = trace(model, batches(1)[0])
    grams = collect_grams(model, graph, batches())
    for group in graph.groups:
        scores = elimination_scores(model, group, graph, grams)
        assert scores is not None
        assert sorted(scores.tolist()) == list(range(group.size))


def test_layers_that_are_too_large_or_grouped_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Concatenated")
    graph = trace(model, batches(1)[0])
    grams = collect_grams(model, graph, batches(1))
    assert "depthwise" not in grams
    monkeypatch.setattr(reconstruct, "MAX_COLUMNS", 0)
    assert collect_grams(model, graph, batches(1)) == {}
    assert elimination_scores(model, graph.group["out"], graph, {}) is None


def test_layers_of_removed_blocks_and_the_original_stay_as_they_are() -> None:
    model = make("ResNet")
    graph: Graph = trace(model, batches(1)[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Plan(kept={"stem": (0, 1, 2), "first.conv1": (0, 1)}, drop=frozenset({"first"}))
    small = apply_plan(model, graph, plan)
    refit(small, model, graph, plan, collect_grams(model, graph, batches()))
    assert bool(torch.isfinite(small(*batches(1)[0])).all())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibration_leaves_no_hooks_behind() -> None:
    model = make("ResNet")
    graph = trace(model, batches(1)[0])
    with pytest.raises(RuntimeError):
        collect_grams(model, graph, [(torch.zeros(1, 99, 8, 8),)])
    assert not any(module._forward_pre_hooks for module in model.modules())
