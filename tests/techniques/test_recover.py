"""Recalibrated batch-norms carry the exact statistics of the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from automl_compress.techniques.recover import recalibrate_batch_norm
from tests.model.networks import INPUT, make


def batches(count: int = 4, size: int = 8) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(size, *INPUT[1:], generator=generator),) for _ in range(count)]


def test_statistics_are_the_mean_and_the_mean_of_variances_of_the_batches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    assert recalibrate_batch_norm(model, batches())
    features = [model[0](x).detach().transpose(0, 1).flatten(1) for (x,) in batches()]
    torch.testing.assert_close(model[1].running_mean, torch.stack([f.mean(1) for f in features]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([f.var(1) for f in features]).mean(0))


def test_one_batch_is_normalised_exactly() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, eps=1e-12)).eval()
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 7 + 3
    recalibrate_batch_norm(model, [(x,)])
    y = model(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(y.var(0), torch.ones(5), rtol=1e-4, atol=1e-4)


def test_what_came_before_is_forgotten_and_repeating_changes_nothing() -> None:
    one, other = make("ResNet"), make("ResNet")
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(1e3)
            module.running_var.fill_(1e3)
    for model in (one, other, other):
        recalibrate_batch_norm(model, batches())
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key])


def test_only_statistics_change() -> None:
    model = make("ResNet").train()
    model.first.bn1.momentum = 0.3
    before = {name: value.clone() for name, value in model.named_parameters()}
    recalibrate_batch_norm(model, batches())
    assert model.training
    assert model.first.bn1.momentum == 0.3
    assert model.first.bn2.momentum == 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_dropout_stays_off_while_statistics_are_taken() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.9), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    recalibrate_batch_norm(model, batches())
    once = model[2].running_var.clone()
    recalibrate_batch_norm(model, batches())
    assert torch.equal(once, model[2].running_var)


def test_models_without_running_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    assert not recalibrate_batch_norm(model, (batch for batch in ()))
    assert not recalibrate_batch_norm(nn.Linear(3, 4), iter(()))


def test_the_mode_is_restored_when_the_data_fails() -> None:
    model = make("ResNet")
    try:
        recalibrate_batch_norm(model, [(torch.zeros(1, 99, 8, 8),)])
    except RuntimeError:
        assert not model.training
        assert not model.first.bn1.training
        assert model.first.bn1.momentum == 0.1
    else:
        raise AssertionError("a batch of another shape was accepted")
