"""The repair is the least-squares optimum where nothing else is in play, and never makes its own measure worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.model.trace import trace
from automl_compress.techniques import least_squares
from automl_compress.techniques.least_squares import LayerRepair
from automl_compress.techniques.prune import apply_plan
from automl_compress.techniques.repair import record_targets, repair
from tests.model.networks import INPUT, NETWORKS, make

IMAGES = torch.randn(48, *INPUT[1:], generator=torch.Generator().manual_seed(1))
DATA = torch.randn(300, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to no ridge, and all rows are fitted."""
    monkeypatch.setattr(least_squares, "DAMPING", (1e-10,))
    monkeypatch.setattr(least_squares, "HELD_OUT", 0.0)


def repaired(model: nn.Module, plan: Plan, x: Tensor) -> tuple[nn.Module, dict[str, LayerRepair], Graph]:
    graph = trace(model, (x,))
    small = apply_plan(model, graph, plan).eval()
    return small, repair(small, graph, plan, record_targets(model, graph, (x,))), graph


def chain(hidden: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3)).eval()


def best_fit(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights with a last row of biases, and the squared error that is left."""
    columns = np.hstack([features, np.ones((len(features), 1))])
    solution = np.linalg.lstsq(columns, targets, rcond=None)[0]
    return solution, float(((columns @ solution - targets) ** 2).sum())


def half(graph: Graph) -> Plan:
    return Plan(kept={group.name: tuple(range(0, group.size, 2)) for group in graph.groups})


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kept", [(0, 2, 3), (1, 4), (5,), (0, 1, 2, 3, 4)])
def test_a_consumers_refit_is_the_least_squares_optimum(kept: tuple[int, ...]) -> None:
    model = chain()
    small, _, _ = repaired(model, Plan(kept={"0": kept}), DATA)
    features = torch.tanh(model[0](DATA)).detach().double().numpy()
    wanted, _ = best_fit(features[:, kept], model(DATA).detach().double().numpy())
    np.testing.assert_allclose(small[2].weight.detach().numpy(), wanted[:-1].T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(small[2].bias.detach().numpy(), wanted[-1], rtol=1e-3, atol=1e-4)


class Grouped(nn.Module):
    """A grouped or depthwise convolution that sees the traces of an earlier cut."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.enter, self.mix = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(torch.tanh(self.mix(torch.tanh(self.enter(x)))))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_grouped_and_depthwise_layers_are_fitted_group_by_group(groups: int) -> None:
    torch.manual_seed(0)
    model = Grouped(groups).eval()
    small, found, _ = repaired(model, Plan(kept={"enter": (0, 2, 5)}), IMAGES)
    assert found["grouped"].outcome == "refit"
    with torch.no_grad():
        wanted = model(IMAGES)
        source = torch.tanh(small.mix(torch.tanh(small.enter(IMAGES))))
    width = 8 // groups
    for group in range(groups):
        channels = slice(group * width, (group + 1) * width)
        columns = functional.unfold(source[:, channels], 3, padding=1).transpose(1, 2).flatten(0, 1).double().numpy()
        targets = wanted[:, channels].flatten(2).transpose(1, 2).flatten(0, 1).double().numpy()
        _, least = best_fit(columns, targets)
        error = float((small.grouped(source) - wanted)[:, channels].detach().double().square().sum())
        # The columns are all but dependent, so solutions differ where their errors don't.
        assert least <= error * (1 + 1e-6)
        assert error < 1.002 * least


def test_more_columns_than_rows_give_the_same_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solution from the kernel matrix of the rows is that of the ridge problem."""
    monkeypatch.setattr(least_squares, "DAMPING", (1e-2,))
    monkeypatch.setattr(least_squares, "HELD_OUT", 0.0)
    rows = torch.randn(7, 2, 20, generator=torch.Generator().manual_seed(0))
    wanted = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    problem = least_squares.Problem(rows=rows, wanted=wanted, now=torch.zeros(7, 6), scale=torch.ones(6))
    weight, bias, _ = least_squares.best_change(problem, intercept=True)
    for group in range(2):
        x = np.hstack([rows[:, group].double().numpy(), np.ones((7, 1))])
        ridge = 1e-2 * (x**2).sum() / x.shape[1]
        y = wanted[:, group * 3 : group * 3 + 3].double().numpy()
        solution = np.linalg.solve(x.T @ x + ridge * np.eye(21), x.T @ y)
        np.testing.assert_allclose(weight[group * 3 : group * 3 + 3], solution[:-1].T, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(bias[group * 3 : group * 3 + 3], solution[-1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_where_nothing_was_removed_nothing_changes(name: str) -> None:
    model = make(name)
    graph = trace(model, (IMAGES,))
    plan = Plan(kept={group.name: tuple(range(group.size)) for group in graph.groups})
    same, found, _ = repaired(model, plan, IMAGES)
    assert all(one.outcome == "kept" for one in found.values())
    for key, value in same.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layers_error_grows_on_held_out_rows(name: str) -> None:
    model = make(name)
    _, found, graph = repaired(model, half(trace(model, (IMAGES,))), IMAGES)
    assert all(one.after <= one.before for one in found.values())
    assert bool(found) == bool(graph.groups)


@pytest.mark.parametrize("name", ["ResNet", "Flattened", "Concatenated", "Padded"])
def test_the_whole_network_comes_nearer_to_the_original_on_samples_that_it_was_not_fitted_to(name: str) -> None:
    model = make(name)
    plan = half(trace(model, (IMAGES,)))
    small, _, graph = repaired(model, plan, IMAGES)
    plain = apply_plan(model, graph, plan).eval()
    fresh = torch.randn(64, *INPUT[1:], generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        before, after = (float((each(fresh) - model(fresh)).square().mean()) for each in (plain, small))
    assert after < 0.9 * before


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["ResNet", "Flattened"])
def test_what_was_corrected_on_the_way_is_what_the_repaired_model_computes(name: str) -> None:
    """Biases of layers without one went into the batch-norm behind them, and weights into the model."""
    model = make(name)
    small, found, graph = repaired(model, half(trace(model, (IMAGES,))), IMAGES)
    last = graph.layers[-1].name
    with torch.no_grad():
        error = float((small(IMAGES) - model(IMAGES)).double().square().sum())
    assert error == pytest.approx(found[last].after, rel=1e-3)


class Branch(nn.Module):
    """y + shortcut, in which the shortcut loses information that the branch can bring back."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.branch = nn.Linear(4, 3), nn.Linear(4, 3)
        self.enter = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        lost = torch.tanh(self.enter(x)).unflatten(1, (4, 2)).mean(2)
        return self.shortcut(lost) + self.branch(x)


@pytest.mark.usefixtures("exact")
def test_the_last_layer_of_a_branch_repairs_what_the_shortcut_lost() -> None:
    torch.manual_seed(0)
    model = Branch().eval()
    graph = trace(model, (DATA,))
    small = apply_plan(model, graph, Plan())
    with torch.no_grad():
        small.shortcut.weight.zero_()
    targets = record_targets(model, graph, (DATA,))
    assert targets.of["branch"].reader == "sum"
    found = repair(small, graph, Plan(drop=frozenset({"pretend"})), targets)
    with torch.no_grad():
        rest = (model.shortcut(torch.tanh(model.enter(DATA)).unflatten(1, (4, 2)).mean(2))).double().numpy()
    # The shortcut is refitted first; whatever that leaves, the branch sees as its own.
    assert found["branch"].after <= best_fit(DATA.double().numpy(), rest)[1] + 1e-6


@pytest.mark.usefixtures("exact")
def test_behind_a_rectifier_only_what_it_lets_through_counts() -> None:
    """Linear networks before a ReLU: with the rectifier in view the error of what passes is lower than without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    plan = Plan(kept={"0": (0, 3)})
    graph = trace(model, (DATA,))
    targets = record_targets(model, graph, (DATA,))
    assert targets.of["2"].rectified

    def passed(small: nn.Module) -> float:
        repair(small, graph, plan, targets)
        with torch.no_grad():
            return float((small[:4](DATA) - model[:4](DATA)).double().square().sum())

    aware = passed(apply_plan(model, graph, plan))
    targets.of["2"].whole = True
    assert aware < passed(apply_plan(model, graph, plan))


def test_a_value_that_is_also_read_whole_counts_whole() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(torch.relu(y)) + torch.tanh(y)

    model = Both().eval()
    assert not record_targets(model, trace(model, (DATA,)), (DATA,)).of["a"].rectified


def test_a_layer_that_is_called_twice_is_left_alone() -> None:
    model = make("Tied")
    graph = trace(model, (IMAGES,))
    assert "twice" not in record_targets(model, graph, (IMAGES,)).of


def test_bias_correction_where_a_refit_does_not_generalise() -> None:
    """Random columns say nothing about a constant error: only the constant is taken over."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 1, 200, generator=generator)
    now = torch.randn(80, 3, generator=generator)
    wanted = now + 0.5 + 0.1 * torch.randn(80, 3, generator=generator)
    problem = least_squares.Problem(rows=rows, wanted=wanted, now=now, scale=torch.full((3,), 2.0))
    noise = least_squares.Problem(rows=rows * 1e3, wanted=wanted, now=now, scale=torch.full((3,), 2.0))
    weight, bias, found = least_squares.best_change(noise, intercept=True)
    assert found.outcome == "bias"
    assert not weight.any()
    torch.testing.assert_close(bias, torch.full((3,), 0.25), atol=0.02, rtol=0)
    assert least_squares.best_change(problem, intercept=True)[2].after <= problem.error(now)


def test_the_original_stays_as_it_is_and_blocks_may_be_gone() -> None:
    model = make("ResNet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Plan(kept={"stem": (0, 1, 2), "first.conv1": (0, 1)}, drop=frozenset({"first"}))
    small, found, _ = repaired(model, plan, IMAGES)
    assert not {"first.conv1", "first.conv2"} & set(found)
    assert bool(torch.isfinite(small(IMAGES)).all())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_whose_positions_are_channels_that_were_cut_is_left_alone() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.tokens, self.head = nn.Conv2d(3, 6, 1), nn.Linear(64, 64), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.tokens(self.enter(x).flatten(2))).mean(2))

    torch.manual_seed(0)
    model = Mixer().eval()
    small, found, _ = repaired(model, Plan(kept={"enter": (0, 2, 3)}), IMAGES)
    assert "tokens" not in found
    assert torch.equal(small.tokens.weight, model.tokens.weight)
    assert found["head"].outcome == "refit"
