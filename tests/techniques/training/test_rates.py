"""Schedules are torch's where torch has them, and weights alone decay."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from automl_compress.errors import InputError
from automl_compress.techniques.training.averaging import Average
from automl_compress.techniques.training.optimizers import make_optimizer, set_rate
from automl_compress.techniques.training.rates import momentum, rate
from automl_compress.techniques.training.settings import ADAMW_RATE, Resources, Training, parse_training


@pytest.mark.parametrize("steps", [2, 3, 7, 100])
@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
def test_one_cycle_is_torchs(steps: int, optimizer: Any) -> None:
    training = Training(optimizer=optimizer, learning_rate=0.3)
    model = nn.Linear(2, 2)
    theirs, ours = make_optimizer(model, None, training), make_optimizer(model, None, training)
    schedule = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.3, total_steps=steps)
    for step in range(steps):
        set_rate(ours, rate(training, step, steps), momentum(training, step, steps))
        for one, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert one["lr"] == pytest.approx(other["lr"])
            assert one.get("momentum") == pytest.approx(other.get("momentum"))
            assert one.get("betas") == pytest.approx(other.get("betas"))
        theirs.step()
        if step < steps - 1:
            schedule.step()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warm_up", [None, 0.2])
def test_the_rate_rises_to_its_peak_and_then_falls_or_stays(schedule: Any, warm_up: float | None) -> None:
    training = Training(schedule=schedule, warm_up=warm_up, learning_rate=1.0)
    rates = [rate(training, step, 50) for step in range(50)]
    peak = rates.index(1.0)
    assert peak == (9 if warm_up else 0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == (sorted(rates[peak:], reverse=True) if schedule == "cosine" else [1.0] * (50 - peak))
    assert 0 < rates[-1] < 0.01 or schedule == "constant"
    assert all(momentum(training, step, 50) == training.momentum for step in range(50))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.norm = nn.Embedding(5, 4), nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4)
        self.bias, self.tied = nn.Parameter(torch.zeros(2, 2)), nn.Linear(4, 5)
        self.tied.weight = self.words.weight


@pytest.mark.parametrize("embeddings", [True, False])
def test_norms_and_biases_never_decay_and_embeddings_as_wanted(embeddings: bool) -> None:
    model = Scaled()
    groups = make_optimizer(model, None, Training(decay_embeddings=embeddings)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    expected = {id(model.mix.weight)} | ({id(model.words.weight)} if embeddings else set())
    assert {p for p, by in decay.items() if by == 5e-4} == expected
    assert set(decay.values()) == {5e-4, 0.0}
    assert len(decay) == len(list(model.parameters()))


def test_the_average_is_what_its_recursion_says() -> None:
    model = nn.Linear(1, 1)
    average, expected = Average(model, 0.5), model.weight.detach().clone()
    for step in range(1, 30):
        nn.init.constant_(model.weight, float(step))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        torch.testing.assert_close(average.state["weight"], expected)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"optimizer": "adam"}, "optimizer must be one of muon, sgd, adamw, found 'adam'"),
        ({"epochs": -1.0}, "epochs must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"average": 1.0}, "average must be at least 0 and below 1"),
        ({"warm_up": 1.0}, "warm_up"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"deliver": "average"}, "deliver must be another"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        Training(**settings)


def test_settings_are_read_as_they_are_written() -> None:
    text = "optimizer=sgd, learning_rate=1e-2,patience=2,decay_embeddings=false,schedule=cosine,warm_up=none"
    assert parse_training(text, epochs=2) == Training(
        epochs=2, optimizer="sgd", learning_rate=0.01, patience=2, decay_embeddings=False, schedule="cosine"
    )
    assert parse_training("", epochs=1) == Training(epochs=1)
    assert parse_training("optimizer=adamw", epochs=1).learning_rate == ADAMW_RATE


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optimiser=sgd", "patience, rollbacks; did you mean optimizer?"),
        ("epochs=3", "unknown setting 'epochs'; there are: optimizer, learning_rate"),
        ("clip", "clip must be a number, found ''"),
        ("patience=1.5", "patience must be a whole number, found '1.5'"),
        ("decay_embeddings=1", "decay_embeddings must be true or false, found '1'"),
        ("optimizer=adam", "optimizer must be one of muon, sgd, adamw, found 'adam'; did you mean adamw?"),
        ("learning_rate=inf", "learning_rate must be above 0"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(text: str, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        parse_training(text, epochs=1)


def test_resources_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="micro_batch must be at least 1"):
        Resources(micro_batch=0)
    with pytest.raises(InputError, match="precision must be one of auto, float32, bfloat16"):
        Resources(precision="float16")  # type: ignore[arg-type]
