"""Balanced losses pull a student equally hard, whatever their scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automl_compress.techniques.distillation.balance import STEPS, Balance


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(4, generator=generator)) for _ in range(2)]


def test_the_weighted_gradients_have_the_units_length() -> None:
    one, other = trained = parameters()
    balance = Balance(["steep", "flat"])
    for _ in range(STEPS):
        assert balance.measuring
        losses = {"steep": 1000 * (one * other).sum(), "flat": 0.01 * one.square().sum()}
        balance.measure(3 * other.sum(), losses, trained)
    assert not balance.measuring
    for name, ratio in balance.ratios().items():
        gradients = torch.autograd.grad(losses[name] * ratio, trained, allow_unused=True, retain_graph=True)
        norm = torch.cat([g for g in gradients if g is not None]).norm()
        assert float(norm) == pytest.approx(3 * 2, rel=1e-4)  # the unit's: four numbers of 3


def test_a_loss_without_gradient_keeps_its_weight() -> None:
    trained = parameters()
    balance = Balance(["constant", "other"])
    balance.measure(trained[0].sum() * 0, {"constant": torch.zeros(()), "other": trained[1].sum()}, trained)
    assert balance.ratios() == {"constant": 1.0, "other": 1.0}


def test_what_was_measured_is_part_of_the_state() -> None:
    trained = parameters()
    balance, again = Balance(["one"]), Balance(["one"])
    balance.measure(trained[0].sum(), {"one": 5 * trained[0].sum()}, trained)
    again.load_state_dict(balance.state_dict())
    assert again.ratios() == balance.ratios() == {"one": pytest.approx(0.2)}
