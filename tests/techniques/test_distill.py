"""Training: repeatable, stopped where the loss stops being a number, and untouched where nothing may be touched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.errors import TaskError, TrainingError
from automl_compress.model.task import Task, prepare
from automl_compress.techniques.distill import Schedule, distill
from automl_compress.techniques.distillation.objective import Distillation
from tests import tiny

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 3, generator=GENERATOR), torch.arange(64) % 4


def net(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def task(**changes: Any) -> Task:
    parts: dict[str, Any] = {"model": net(0), "train": [(X[:32], Y[:32]), (X[32:], Y[32:])], "validation": (X, Y)}
    return prepare(Task(**{**parts, **changes}))


def train(student: nn.Module, ready: Task | None = None, **options: Any) -> tuple[nn.Module, Any]:
    seed = options.pop("seed", 0)
    on_step = options.pop("on_step", None)
    ready = ready or task()
    return student, distill(
        student, Distillation(ready, ready.model), ready, Schedule(**options), seed=seed, on_step=on_step
    )


def test_the_same_seed_makes_the_same_student() -> None:
    shuffled = prepare(Task(model=net(0), train=(X, Y), validation=(X, Y)))
    one, other, third = (train(net(), shuffled, epochs=2, seed=seed)[0].state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[key], other[key]) for key in one)
    ready = prepare(
        Task(model=net(0), train=torch.utils.data.TensorDataset(X.repeat(9, 1), Y.repeat(9)), validation=(X, Y))
    )
    one, third = (train(net(), ready, epochs=1, seed=seed)[0].state_dict() for seed in (5, 6))
    assert any(not torch.equal(one[key], third[key]) for key in one)


def test_the_student_comes_nearer_to_the_teacher() -> None:
    ready = prepare(tiny.task())
    torch.manual_seed(3)
    student = tiny.Net(8)
    _, log = train(student, ready, epochs=12, learning_rate=0.1)
    assert log.losses[-1] < log.losses[0] / 2
    images, classes = tiny.split(400, 2)
    with torch.no_grad():
        assert float((student(images).argmax(1) == classes).float().mean()) > 0.7


def test_the_teacher_is_not_touched_and_the_student_is_left_ready_to_use() -> None:
    ready = prepare(tiny.task())
    before = {key: value.clone() for key, value in ready.model.state_dict().items()}
    student, _ = train(tiny.Net(8), ready, epochs=0.5)
    assert all(torch.equal(value, before[key]) for key, value in ready.model.state_dict().items())
    assert all(parameter.grad is None for parameter in ready.model.parameters())
    assert not student.training
    assert all(parameter.is_contiguous() for parameter in student.parameters())


def test_frozen_parameters_stay_as_they_are() -> None:
    student = net()
    for parameter in student[0].parameters():
        parameter.requires_grad_(False)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    train(student, epochs=2)
    assert torch.equal(student[0].weight, before["0.weight"])
    assert not torch.equal(student[3].weight, before["3.weight"])


def test_a_wholly_frozen_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(TrainingError, match=r"requires_grad.*--epochs 0"):
        train(net().requires_grad_(False))


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 1), (1, 2), (1.5, 3), (3, 6), (0.01, 1)])
def test_a_fraction_of_an_epoch_is_a_fraction_of_its_batches(epochs: float, steps: int) -> None:
    seen: list[tuple[int, int]] = []
    _, log = train(net(), epochs=epochs, on_step=lambda step, total, loss, pace: seen.append((step, total)))
    assert seen == [(i + 1, steps) for i in range(steps)]
    assert log.images == 32 * steps
    assert 0 < len(log.losses) <= 10


def test_loaders_without_a_length_are_counted() -> None:
    class Unsized:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter([(X[:32], Y[:32]), (X[32:], Y[32:])])

    _, log = train(net(), task(train=Unsized()), epochs=2)
    assert log.images == 128


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_stops_being_a_number_ends_the_training(bad: float) -> None:
    calls = [0]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        return functional.cross_entropy(outputs, targets) * (bad if calls[0] == 3 else 1)

    with pytest.raises(TrainingError, match=r"step 3 of 6.*learning rate"):
        train(net(), task(loss=loss), epochs=3)


def test_labels_out_of_range_that_turn_up_late_are_named() -> None:
    late = task(train=[(X, Y), (X, Y + 100)])
    with pytest.raises(TaskError, match="out of range"):
        train(net(), late, epochs=1)


class Fickle:
    """Readable when it is checked, not when it is needed."""

    def __init__(self, later: Any) -> None:
        self.later, self.reads = later, 0

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.reads += 1
        if self.reads > 2:
            if isinstance(self.later, Exception):
                raise self.later
            return iter(self.later)
        return iter([(X, Y)])


def test_data_that_fails_or_runs_dry_later_is_named() -> None:
    with pytest.raises(TrainingError, match="train data raised OSError: gone"):
        train(net(), task(train=Fickle(OSError("gone"))), epochs=9)
    with pytest.raises(TaskError, match="empty"):
        train(net(), task(train=Fickle([])), epochs=9)


def test_masked_weights_stay_zero_through_training_and_the_others_learn() -> None:
    student = net()
    mask = torch.rand(student[0].weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    before = student[0].weight.detach().clone()
    seen: list[bool] = []
    ready = task()

    def check(*_: object) -> None:
        seen.append(bool((student[0].weight[~mask] == 0).all()))

    objective = Distillation(ready, ready.model)
    distill(student, objective, ready, Schedule(epochs=3), masks={"0.weight": mask}, on_step=check)
    assert len(seen) > 2
    assert all(seen)
    assert bool((student[0].weight[mask] != before[mask]).all())
    free = net()
    distill(free, objective, ready, Schedule(epochs=3))
    assert bool((free[0].weight != 0).all())
