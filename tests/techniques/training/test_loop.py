"""The training loop: repeatable, undone where it diverges, and untouched where nothing may be touched."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.errors import TaskError, TrainingError
from automl_compress.model.task import Batch, Task, prepare
from automl_compress.techniques.objective import Loss
from tests import tiny
from tests.techniques.training.support import X, Y, fit, net, same, score, task, weights


def test_the_same_seed_makes_the_same_student_whatever_was_drawn_before() -> None:
    ready = prepare(
        Task(model=net(0), train=torch.utils.data.TensorDataset(X.repeat(9, 1), Y.repeat(9)), validation=(X, Y))
    )
    students = []
    for seed, draws in ((5, 0), (5, 3), (6, 0)):
        students.append(net())
        torch.rand(draws)
        fit(students[-1], ready, epochs=1, seed=seed)
    assert same(students[0], students[1])
    assert not same(students[0], students[2])


def test_random_states_outside_are_left_as_they_were() -> None:
    ready = task()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    student = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    torch.manual_seed(4)
    fit(student, ready, epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_training_lowers_the_loss() -> None:
    ready = prepare(tiny.task())
    torch.manual_seed(3)
    student = tiny.Net(8)
    log = fit(student, ready, epochs=12, learning_rate=0.1)
    assert log.losses[-1] < log.losses[0] / 2
    images, classes = tiny.split(400, 2)
    with torch.no_grad():
        assert float((student(images).argmax(1) == classes).float().mean()) > 0.7


def test_the_student_is_left_ready_to_use() -> None:
    student = tiny.Net(8)
    fit(student, prepare(tiny.task()), epochs=0.5)
    assert not student.training
    assert all(parameter.is_contiguous() and parameter.grad is None for parameter in student.parameters())


def test_frozen_parameters_stay_as_they_are() -> None:
    student = net()
    student[0].requires_grad_(False)
    before = weights(student)
    fit(student, epochs=2)
    assert torch.equal(student[0].weight, before["0.weight"])
    assert not torch.equal(student[4].weight, before["4.weight"])


def test_a_wholly_frozen_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(TrainingError, match=r"requires_grad.*--epochs 0"):
        fit(net().requires_grad_(False))


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 1), (1, 2), (1.5, 3), (3, 6), (0.01, 1)])
def test_a_fraction_of_an_epoch_is_a_fraction_of_its_batches(epochs: float, steps: int) -> None:
    seen: list[tuple[int, int]] = []
    log = fit(net(), epochs=epochs, on_step=lambda report: seen.append((report.step, report.steps)))
    assert seen == [(i + 1, steps) for i in range(steps)]
    assert log.images == 32 * steps
    assert log.curves.steps == tuple(range(1, steps + 1))


def test_masked_weights_stay_zero_through_training_and_the_others_learn() -> None:
    student = net()
    mask = torch.rand(student[0].weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    before = student[0].weight.detach().clone()
    seen: list[bool] = []
    fit(
        student,
        epochs=3,
        average=0.9,
        masks={"0.weight": mask},
        on_step=lambda _: seen.append(bool((student[0].weight[~mask] == 0).all())),
    )
    assert len(seen) == 6
    assert all(seen)
    assert bool((student[0].weight[~mask] == 0).all())
    assert bool((student[0].weight[mask] != before[mask]).all())
    free = net()
    fit(free, epochs=3)
    assert bool((free[0].weight != 0).all())


class Adapted:
    """An objective that trains a module of its own."""

    def __init__(self) -> None:
        torch.manual_seed(9)
        self.adapter = nn.Linear(4, 4)

    def __call__(self, student: nn.Module, batch: Batch) -> Loss:
        hint = functional.mse_loss(self.adapter(student(*batch[0])), functional.one_hot(batch[1], 4).float())
        return Loss(total=hint, parts={"hint": hint.detach()})

    def modules(self) -> nn.Module:
        return self.adapter

    def memory(self) -> None:
        return None


def test_what_the_objective_trains_itself_is_trained_and_its_parts_are_reported() -> None:
    objective, reports = Adapted(), []
    before = weights(objective.adapter)
    fit(net(), objective=objective, epochs=2, on_step=reports.append, label="hints")
    assert not torch.equal(objective.adapter.weight, before["weight"])
    assert all(report.parts == {"hint": pytest.approx(report.loss)} for report in reports)
    assert {report.label for report in reports} == {"hints"}


def test_progress_tells_pace_and_time_left_by_its_clock() -> None:
    now, reports = [0.0], []

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    fit(net(), epochs=2, on_step=reports.append, clock=clock)
    assert [report.seconds_left for report in reports] == pytest.approx([3.0, 2.0, 1.0, 0.0])
    assert all(report.images_per_second == pytest.approx(32.0) for report in reports)
    assert reports[0].facts() == {"loss": round(reports[0].loss, 4), "images_per_second": 32}


def test_the_best_weights_on_validation_are_delivered() -> None:
    values = iter([0.1, 0.9, 0.3, 0.2])
    kept: list[dict[str, Tensor]] = []

    def validate(model: nn.Module) -> float:
        assert not model.training
        kept.append(weights(model))
        return next(values)

    student = net()
    log = fit(student, epochs=4, validate=validate)
    assert all(torch.equal(value, kept[1][name]) for name, value in student.state_dict().items())
    assert (log.metric, log.delivered) == (0.9, "best")
    assert log.curves.metrics == ((2, 0.1), (4, 0.9), (6, 0.3), (8, 0.2))
    values = iter([0.1, 0.9, 0.3, 0.2])
    log = fit(student, epochs=4, validate=validate, deliver="last")
    assert all(torch.equal(value, kept[-1][name]) for name, value in student.state_dict().items())
    assert (log.metric, log.delivered) == (0.2, "last")


def test_training_stops_when_validation_finds_nothing_better() -> None:
    values = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    log = fit(net(), epochs=5, patience=2, validate=lambda _: next(values))
    assert log.curves.steps[-1] == 8
    assert log.metric == 0.5
    assert any("stopped at step 8 of 10" in note for note in log.notes)


def test_a_metric_that_is_no_number_is_refused() -> None:
    with pytest.raises(TaskError, match="metric on validation data is NaN"):
        fit(net(), epochs=1, validate=lambda _: math.nan)


def test_the_average_is_delivered_where_it_is_better_or_asked_for() -> None:
    plain, averaged = net(), net()
    fit(plain, epochs=4, learning_rate=0.3)
    log = fit(averaged, epochs=4, learning_rate=0.3, average=0.5, deliver="average")
    assert log.delivered == "average"
    assert not same(plain, averaged)
    # Validation that likes nothing but one of them decides.
    wanted = weights(averaged)

    def likes_average(model: nn.Module) -> float:
        return float(all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items()))

    chosen = net()
    log = fit(chosen, epochs=4, learning_rate=0.3, average=0.5, validate=likes_average)
    assert (log.delivered, log.metric) == ("average", 1.0)
    assert same(chosen, averaged)
    wanted = weights(plain)
    chosen = net()
    log = fit(chosen, epochs=4, learning_rate=0.3, average=0.5, validate=likes_average)
    assert (log.delivered, log.metric) == ("last", 1.0)
    assert same(chosen, plain)


def test_validating_changes_nothing_about_the_training() -> None:
    one, other = net(), net()
    fit(one, epochs=3, average=0.9, deliver="last")

    def drawing(model: nn.Module) -> float:
        return score(model) + float(torch.rand(1))

    fit(other, epochs=3, average=0.9, deliver="last", validate=drawing, validate_every=0.5)
    assert same(one, other)


def loss_that_is(bad: float, *steps: int) -> Any:
    calls = [0]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        return functional.cross_entropy(outputs, targets) * (bad if calls[0] in steps else 1)

    return loss


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_taken_back_counted_and_slows_the_rest(bad: float) -> None:
    student, reports = net(), []
    before = weights(student)
    ready = replace(task(), loss=loss_that_is(bad, 1))
    log = fit(student, ready, epochs=0.5)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert (log.rollbacks, log.images) == (1, 0)
    log = fit(
        student, replace(task(), loss=loss_that_is(bad, 3)), epochs=3, schedule="constant", on_step=reports.append
    )
    assert [report.learning_rate for report in reports] == [0.02, 0.02, 0.02, 0.01, 0.01, 0.01]
    assert [report.rollbacks for report in reports] == [0, 0, 1, 1, 1, 1]
    assert any(f"step 3 of 6 the loss became {bad}: rolled back" in note for note in log.notes)


def test_a_training_that_keeps_diverging_is_given_up() -> None:
    with pytest.raises(TrainingError, match=r"step 3 of 6 the loss became nan, after 2 rollbacks.*learning rate"):
        fit(net(), replace(task(), loss=loss_that_is(math.nan, 1, 2, 3)), epochs=3, rollbacks=2)


def test_a_loss_far_above_its_median_for_several_steps_is_taken_back() -> None:
    log = fit(net(), replace(task(), loss=loss_that_is(1000.0, *range(30, 35))), epochs=40)
    assert log.rollbacks == 1
    assert "the loss rose to" in log.notes[0]
    assert fit(net(), replace(task(), loss=loss_that_is(1000.0, 30, 31, 33, 34)), epochs=40).rollbacks == 0


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    ready = replace(task(), loss=lambda o, t: functional.cross_entropy(o, t, reduction="none"))
    with pytest.raises(TaskError, match=r"scalar.*\(32,\)"):
        fit(net(), ready)


def test_labels_out_of_range_that_turn_up_late_are_named() -> None:
    with pytest.raises(TaskError, match="out of range"):
        fit(net(), task(train=[(X, Y), (X, Y + 100)]), epochs=1)


def test_batches_of_another_shape_are_named() -> None:
    with pytest.raises(TrainingError, match=r"inputs \(64, 5\) failed"):
        fit(net(), task(train=[(X, Y), (torch.zeros(64, 5), Y)]), epochs=1)
