"""A loop of the user's own replaces ours, and what it leaves behind is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from automl_compress.errors import TaskError, TrainingError
from automl_compress.model.task import Task, prepare
from automl_compress.techniques.training.own_loop import Work
from tests.techniques.training.support import X, Y, fit, net, task, weights


def plain(work: Work) -> None:
    optimizer = torch.optim.SGD(work.model.parameters(), lr=0.1)
    for batch in work.batches():
        assert work.model.training
        work.before_step()
        optimizer.zero_grad()
        work.objective(work.model, batch).total.backward()
        optimizer.step()
        work.after_step(learning_rate=0.1)


def test_it_trains_and_its_progress_is_told() -> None:
    student, reports = net(), []
    before = weights(student)
    log = fit(student, task(train_loop=plain), epochs=3, on_step=reports.append, label="mine")
    assert not torch.equal(student[0].weight, before["0.weight"])
    assert not student.training
    assert all(parameter.grad is None for parameter in student.parameters())
    assert [report.step for report in reports] == list(range(1, 7))
    assert (log.images, log.label, log.curves.steps, set(log.curves.learning_rates)) == (
        192,
        "mine",
        tuple(range(1, 7)),
        {0.1},
    )


def test_the_same_seed_gives_it_the_same_data() -> None:
    data = torch.utils.data.TensorDataset(X.repeat(9, 1), Y.repeat(9))
    one, other = net(), net()
    for student in (one, other):
        fit(student, prepare(Task(model=net(0), train=data, validation=(X, Y), train_loop=plain)), epochs=1)
    assert torch.equal(one[0].weight, other[0].weight)


def test_masks_hold_and_may_change() -> None:
    student = net()

    def closing(step: int, steps: int) -> dict[str, torch.Tensor] | None:
        return {"0.weight": torch.arange(24).view(8, 3) >= 2 * step}

    fit(student, task(train_loop=plain), epochs=2, masks=closing)
    assert int((student[0].weight == 0).sum()) == 6


def careless(work: Work) -> None:
    with torch.no_grad():
        work.model[0].weight.add_(1)


def exploding(work: Work) -> None:
    with torch.no_grad():
        work.model[0].bias.fill_(float("nan"))


def reshaping(work: Work) -> None:
    work.model[0] = torch.nn.Linear(3, 8, bias=False)


def raising(work: Work) -> None:
    raise OSError("gone\nand more")


@pytest.mark.parametrize(
    ("loop", "what"),
    [
        (careless, r"\(careless\) left weights in 0.weight that a mask removed; call work.after_step"),
        (exploding, r"\(exploding\) left values in 0.bias that are no finite numbers"),
        (reshaping, r"changed the model's parameters"),
        (raising, r"\(raising\) raised OSError: gone$"),
        (lambda work: 0.9, r"returned float; it must train work.model in place"),
        (lambda work: net(), r"returned Sequential"),
    ],
)
def test_what_it_does_wrong_is_one_line(loop: Callable[[Work], Any], what: str) -> None:
    with pytest.raises(TrainingError, match=what):
        fit(net(), task(train_loop=loop), masks={"0.weight": torch.arange(24).view(8, 3) >= 2})


def test_that_it_changed_nothing_is_said() -> None:
    def idle(work: Work) -> None:
        pass

    assert [note for note in fit(net(), task(train_loop=idle)).notes if "(idle) left the model as it was" in note]
    assert not fit(net(), task(train_loop=plain)).notes


def test_a_loop_that_is_none_is_refused() -> None:
    with pytest.raises(TaskError, match="train_loop must be callable, found str"):
        task(train_loop="mine")
