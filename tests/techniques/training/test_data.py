"""Reading training data: what yields too little, too late or nothing is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from automl_compress.errors import TaskError
from tests.techniques.training.support import X, Y, fit, net, task


class Unsized:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[:32], Y[:32]), (X[32:], Y[32:])])


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


def test_loaders_without_a_length_are_counted() -> None:
    assert fit(net(), task(train=Unsized()), epochs=2).images == 128


def test_data_that_fails_or_runs_dry_later_is_named() -> None:
    with pytest.raises(TaskError, match=r"train data raised OSError: gone$"):
        fit(net(), task(train=Fickle(OSError("gone\nand more"))), epochs=9)
    with pytest.raises(TaskError, match="empty: its loader yields no batch; it must yield them all each time"):
        fit(net(), task(train=Fickle([])), epochs=9)


def test_a_pass_that_ends_early_is_said_and_made_up_for() -> None:
    log = fit(net(), task(train=Fickle([(X, Y)])), epochs=3)
    assert log.images == 64 * 6
    assert log.notes == ("a pass over the train data ended after 1 of 2 batches",)


@pytest.mark.parametrize("last", [1, 2])
def test_a_remainder_of_one_sample_is_left_out(last: int) -> None:
    """Batch-norm can't train on a single sample."""
    log = fit(net(), task(train=[(X, Y), (X[:last], Y[:last])]), epochs=2)
    assert log.images == (4 * 64 if last == 1 else 2 * (64 + last))


def test_batches_of_one_sample_throughout_are_trained_on() -> None:
    student = torch.nn.Sequential(torch.nn.Linear(3, 4))
    assert fit(student, task(model=student, train=[(X[i : i + 1], Y[i : i + 1]) for i in range(4)])).images == 12
