"""Muon turns a matrix in all directions alike and by a share of its norm; what is no matrix steps by SGD."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automl_compress.techniques.training.muon import Muon, orthogonal
from automl_compress.techniques.training.optimizers import make_optimizer
from automl_compress.techniques.training.settings import Training

RATE, SHARE = 0.1, 0.05  # of the norm that a matrix moves by


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 30), (2, 30, 4), (5, 1, 9)])
def test_directions_become_alike_and_stay_where_they_are(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    given = torch.randn(shape)
    u, values, vt = torch.linalg.svd(orthogonal(1000 * given), full_matrices=False)
    assert bool(((values > 0.6) & (values < 1.3)).all())
    before = torch.linalg.svd(given, full_matrices=False)
    torch.testing.assert_close(u @ vt, before.U @ before.Vh, atol=0.02, rtol=0)


def test_of_nothing_comes_nothing() -> None:
    assert not orthogonal(torch.zeros(2, 3, 4)).any()


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("gradient", [1e-6, 1.0, 1e6])
def test_a_step_is_a_share_of_the_weights_norm_whatever_the_gradients_is(scale: float, gradient: float) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(scale * torch.randn(8, 3, 3, 3))
    before = weight.detach().clone()
    weight.grad = gradient * torch.randn_like(weight)
    Muon([{"params": [weight], "matrices": 1}], lr=RATE, momentum=0.9).step()
    moved = float((weight.detach() - before).norm() / before.norm())
    assert 0.6 * SHARE < moved < 1.3 * SHARE


def test_each_group_of_a_convolution_is_a_matrix_of_its_own() -> None:
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(6, 4, 3, 3))
    parts = [nn.Parameter(part.detach().clone()) for part in whole.chunk(3)]
    whole.grad = torch.randn_like(whole)
    for part, gradient in zip(parts, whole.grad.chunk(3), strict=True):
        part.grad = gradient.clone()
    for weights, matrices in (([whole], 3), (parts, 1)):
        Muon([{"params": weights, "matrices": matrices}], lr=RATE, momentum=0.9).step()
    torch.testing.assert_close(whole.detach(), torch.cat([part.detach() for part in parts]))


def test_weights_that_are_zero_can_leave_zero() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    weight.grad = torch.eye(4)
    Muon([{"params": [weight], "matrices": 1}], lr=RATE, momentum=0.0).step()
    assert bool((weight.diagonal() < 0).all())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_is_no_matrix_steps_as_torchs_sgd(momentum: float) -> None:
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    ours = Muon([{"params": [mine], "weight_decay": 0.1}], lr=RATE, momentum=momentum)
    torchs = torch.optim.SGD([theirs], lr=RATE, momentum=momentum, nesterov=momentum > 0, weight_decay=0.1)
    for _ in range(4):
        mine.grad = torch.randn(5)
        theirs.grad = mine.grad.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(mine, theirs)


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.words, self.after = nn.Linear(4, 5), nn.Embedding(5, 4), nn.Linear(4, 5)
        self.before.weight = self.after.weight = self.words.weight
        self.mixer, self.spread = nn.Conv1d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.attention, self.norm = nn.MultiheadAttention(4, 2, add_bias_kv=True), nn.LayerNorm([2, 4])
        self.places = nn.Parameter(torch.randn(1, 3, 4))


def test_convolutions_linear_layers_and_attention_have_matrices() -> None:
    model, others = Many(), nn.Linear(2, 2)
    optimizer = make_optimizer(model, others, Training(optimizer="muon"))
    matrices = {id(p): group["matrices"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert {name: matrices[id(p)] for name, p in names.items() if matrices[id(p)]} == {
        "mixer.weight": 2,
        "spread.weight": 2,
        "attention.in_proj_weight": 3,
        "attention.out_proj.weight": 1,
    }
    assert len(matrices) == len(names) + 2
    for parameter in (*names.values(), *others.parameters()):
        parameter.grad = torch.randn_like(parameter)
    before = {name: p.detach().clone() for name, p in names.items()}
    optimizer.step()
    assert all(bool((p != before[name]).any()) for name, p in names.items())


def test_it_learns_a_map_that_gradients_see_badly() -> None:
    """A least-squares problem whose inputs differ a thousandfold in scale: SGD at its best rate is left behind."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 16) * torch.logspace(0, -3, 16)
    wanted = inputs @ torch.randn(16, 16)

    def left(optimizer: str, rate: float) -> float:
        torch.manual_seed(1)
        model = nn.Linear(16, 16, bias=False)
        steps = make_optimizer(model, None, Training(optimizer=optimizer, learning_rate=rate))  # type: ignore[arg-type]
        for step in range(200):
            for group in steps.param_groups:
                group["lr"] = rate * (1 - step / 200)
            steps.zero_grad()
            (model(inputs) - wanted).square().mean().backward()
            steps.step()
        return (model(inputs) - wanted).square().mean().item()

    assert left("muon", 0.2) < min(left("sgd", rate) for rate in (0.02, 0.2, 2.0)) / 2
