"""Outputs in whatever container: named, compared, and turned into rows without padding."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from automl_compress.errors import TrainingError
from automl_compress.techniques.distillation.outputs import (
    class_dim,
    class_rows,
    matched,
    named_tensors,
    require_match,
    squared_error,
)

A, B = torch.zeros(2, 3), torch.ones(2, 5)
Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Answer:
    logits: Tensor
    boxes: Tensor | None = None


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (A, ["output"]),
        ((A, B), ["output 0", "output 1"]),
        ([A, (B, A)], ["output 0", "output 1[0]", "output 1[1]"]),
        ({"logits": A, "boxes": B}, ["logits", "boxes"]),
        (OrderedDict(logits=A, past=(None, 3), mask=torch.ones(2, dtype=torch.long)), ["logits"]),
        (Answer(A), ["logits"]),
        (Answer(A, B), ["logits", "boxes"]),
        (Pair(A, B), ["output 0", "output 1"]),
    ],
)
def test_tensors_are_found_and_named_in_any_container(outputs: Any, names: list[str]) -> None:
    assert list(named_tensors(outputs)) == names


def test_what_a_models_inside_returns_is_not_an_answer() -> None:
    assert list(named_tensors({"loss": torch.zeros(()), "logits": A, "hidden_states": (A, B), "attentions": (B,)})) == [
        "logits"
    ]


@pytest.mark.parametrize(
    ("student", "teacher", "told"),
    [
        (A, B, r"output: \(2, 5\) and \(2, 3\)"),
        ((A,), (A, B), r"output 1: \(2, 5\) and none"),
        ({"logits": A}, Answer(B), r"logits: \(2, 5\) and \(2, 3\)"),
        ((A, B), {"logits": A}, r"logits: \(2, 3\) and none; output 0: none and \(2, 3\)"),
        (None, {}, "no floating-point output"),
    ],
)
def test_outputs_that_differ_are_named_with_both_shapes(student: Any, teacher: Any, told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        require_match(named_tensors(student), named_tensors(teacher))


def test_equal_outputs_match_across_containers() -> None:
    require_match(named_tensors({"logits": A}), named_tensors(Answer(A)))


def test_of_a_single_output_the_name_does_not_matter() -> None:
    assert matched(named_tensors(A), named_tensors({"logits": A})) == {"output": A}
    with pytest.raises(TrainingError, match=r"output: \(2, 5\) and \(2, 3\)"):
        matched(named_tensors(A), named_tensors({"logits": B}))
    with pytest.raises(TrainingError, match="output 0: none and"):
        matched(named_tensors((A, B)), named_tensors({"logits": A}))


@pytest.mark.parametrize(
    ("scores", "targets", "dim"),
    [
        ((8, 3), (8,), 1),
        ((8, 6, 3), (8, 6), 2),
        ((8, 3, 6), (8, 6), 1),
        ((8, 3, 4, 4), (8, 4, 4), 1),
        ((8, 1), (8,), None),
        ((8, 3), (8, 3), None),
        ((8, 3), (9,), None),
    ],
)
def test_class_scores_are_told_from_other_outputs(
    scores: tuple[int, ...], targets: tuple[int, ...], dim: int | None
) -> None:
    assert class_dim(torch.zeros(scores), torch.zeros(targets, dtype=torch.long)) == dim
    assert class_dim(torch.zeros(scores), torch.zeros(targets)) is None


def test_rows_leave_out_padding_and_ignored_targets() -> None:
    scores = torch.arange(24.0).view(2, 3, 4)
    targets = torch.tensor([[0, -100, 1], [2, 3, 0]])
    rows = class_rows(scores, scores + 1, targets, 2, torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 1, 2]
    assert torch.equal(rows.student, scores.flatten(0, 1)[[0, 2, 3]])
    assert torch.equal(rows.teacher, rows.student + 1)
    with pytest.raises(TrainingError, match="nothing to learn"):
        class_rows(scores, scores, torch.full((2, 3), -100), 2)


def test_positions_of_a_picture_become_rows_of_its_classes() -> None:
    scores = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    rows = class_rows(scores, scores, torch.zeros(2, 4, 5, dtype=torch.long), 1)
    assert rows.student.shape == (40, 3)
    assert torch.equal(rows.student[7], scores[0, :, 1, 2])


def test_squared_error_has_no_unit_and_bears_constant_outputs() -> None:
    one, other = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(squared_error(one, other), ((one - other) ** 2).mean() / other.var())
    torch.testing.assert_close(squared_error(7 * one, 7 * other), squared_error(one, other))
    assert torch.isfinite(squared_error(torch.ones(1, 1), torch.zeros(1, 1)))
