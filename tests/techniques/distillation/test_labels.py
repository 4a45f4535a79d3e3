"""Losses on class scores: what each is blind to and comes to, and that a perfect student has nothing to learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from automl_compress.errors import TaskError
from automl_compress.techniques.distillation.labels import (
    correlation_distance,
    decoupled,
    decoupled_rows,
    logits,
    relations,
    soft_labels,
)

GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = torch.randn(2, 16, 5, generator=GENERATOR)
LABELS = torch.arange(16) % 5
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "soft": lambda s, t: soft_labels(s, t, 4.0),
    "logit": logits,
    "dkd": lambda s, t: decoupled(s, t, LABELS, 4.0, target=1.0, others=8.0),
    "dist": lambda s, t: relations(s, t, 4.0),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student = TEACHER.clone().requires_grad_()
    value = loss(student, TEACHER)
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


@every_loss
def test_any_other_student_has_a_positive_loss_that_a_small_step_lowers(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    student = STUDENT.clone().requires_grad_()
    value = loss(student, TEACHER)
    value.backward()
    assert student.grad is not None
    step = 1e-2 / float(student.grad.norm())
    assert float(value.detach()) > float(loss(student.detach() - step * student.grad, TEACHER)) > 0


@every_loss
def test_a_constant_added_to_all_classes_of_a_row_changes_nothing(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    shift = torch.randn(16, 1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(STUDENT + shift, TEACHER), loss(STUDENT, TEACHER), rtol=1e-4, atol=1e-5)


def test_soft_labels_scale_with_the_temperature_as_they_should() -> None:
    # Scores and temperature scaled alike leave the probabilities; only the factor in front grows.
    torch.testing.assert_close(soft_labels(3 * STUDENT, 3 * TEACHER, 6.0), 9 * soft_labels(STUDENT, TEACHER, 2.0))
    # At a high temperature they become squared error of centred logits over twice the classes (Hinton et al., eq. 4).
    centred = [part - part.mean(1, keepdim=True) for part in (STUDENT, TEACHER)]
    limit = (centred[0] - centred[1]).square().sum(1).mean() / (2 * 5)
    torch.testing.assert_close(soft_labels(STUDENT.double(), TEACHER.double(), 1e3).float(), limit, rtol=5e-3, atol=0)


def test_the_decoupled_parts_add_up_to_soft_labels() -> None:
    temperature = 3.0
    binary, within = decoupled_rows(STUDENT, TEACHER, LABELS, temperature)
    others = 1 - torch.softmax(TEACHER / temperature, 1)[torch.arange(16), LABELS]
    together = (binary + others * within).mean() * temperature**2
    torch.testing.assert_close(together, soft_labels(STUDENT, TEACHER, temperature))


def test_the_target_class_alone_is_blind_to_the_order_of_the_others() -> None:
    hit = functional.one_hot(LABELS, 5).bool()
    reordered = STUDENT.clone()
    reordered[~hit] = STUDENT[~hit].view(16, 4).flip(1).flatten()
    before, after = (decoupled_rows(student, TEACHER, LABELS, 2.0) for student in (STUDENT, reordered))
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_relations_are_blind_to_scale_and_offset_of_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    one, other = torch.rand(2, 6, 5, generator=generator)
    scale, offset = torch.rand(2, 6, 1, generator=generator) + 0.5
    torch.testing.assert_close(correlation_distance(scale * one + offset, other), correlation_distance(one, other))
    assert float(correlation_distance(one, 3 * one + 1)) == pytest.approx(0, abs=1e-6)
    assert float(correlation_distance(one, -one)) == pytest.approx(2, rel=1e-5)
    torch.testing.assert_close(
        correlation_distance(one, other),
        1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(one, other, strict=True)]).mean(),
    )


def test_relations_of_a_single_row_are_those_of_its_classes() -> None:
    p, q = (torch.softmax(part[:1] / 2, 1) for part in (STUDENT, TEACHER))
    torch.testing.assert_close(relations(STUDENT[:1], TEACHER[:1], 2.0), 4 * correlation_distance(p, q))


def test_the_logit_loss_has_no_unit() -> None:
    torch.testing.assert_close(logits(5 * STUDENT, 5 * TEACHER), logits(STUDENT, TEACHER))


def test_the_decoupled_loss_names_labels_out_of_range() -> None:
    with pytest.raises(TaskError, match=r"0 to 4.*found 7"):
        decoupled(STUDENT, TEACHER, LABELS.clamp_min(0) + 3, 4.0, target=1.0, others=8.0)


def test_two_classes_leave_nothing_among_the_others() -> None:
    binary, within = decoupled_rows(STUDENT[:, :2], TEACHER[:, :2], LABELS % 2, 1.0)
    assert float(within.abs().max()) == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(binary.mean(), soft_labels(STUDENT[:, :2], TEACHER[:, :2], 1.0))
