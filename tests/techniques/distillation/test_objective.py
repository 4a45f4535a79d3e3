"""The objective of a student: named losses over whatever a model returns, weighed as asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.errors import TaskError, TrainingError
from automl_compress.model.task import Task, prepare
from automl_compress.techniques.distillation.balance import STEPS
from automl_compress.techniques.distillation.losses import LABEL_LOSSES, Losses, parse_losses
from automl_compress.techniques.distillation.objective import Distillation

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 3, generator=GENERATOR), torch.arange(64) % 4
BATCH = ((X,), Y)


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))


class Fixed(nn.Module):
    """Answers whatever it is asked with what it was given."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *_: Tensor) -> Any:
        return self.outputs


def task(**changes: Any) -> Task:
    return prepare(Task(**{"model": net(0), "train": (X, Y), "validation": (X, Y), **changes}))


def own(loss: Any = lambda outputs, targets: torch.zeros(())) -> Task:
    return replace(task(), loss=loss, metric=lambda outputs, targets: 0.0)


def value(student: Any, teacher: Any, losses: str | Losses, ready: Task | None = None, targets: Tensor = Y) -> Tensor:
    chosen = parse_losses(losses) if isinstance(losses, str) else losses
    objective = Distillation(ready or task(), Fixed(teacher), chosen)
    return objective(Fixed(student), ((X,), targets)).total


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_default_is_hintons(share: float) -> None:
    student, teacher = torch.randn(2, 64, 4, generator=GENERATOR)
    p, q = torch.softmax(teacher / 3, 1), torch.softmax(student / 3, 1)
    soft = 9 * (p * (p / q).log()).sum(1).mean()
    wanted = share * soft + (1 - share) * functional.cross_entropy(student, Y)
    torch.testing.assert_close(value(student, teacher, Losses(temperature=3.0, soft_share=share)), wanted)


def test_the_tasks_loss_alone_never_runs_the_teacher() -> None:
    student = torch.randn(64, 4, generator=GENERATOR)
    objective = Distillation(task(), nn.Linear(999, 1), parse_losses("task"))
    torch.testing.assert_close(objective(Fixed(student), BATCH).total, functional.cross_entropy(student, Y))


def test_parts_are_reported_unweighted_and_add_up() -> None:
    objective = Distillation(task(), net(0), parse_losses("soft=0.7+logit=2+task=0.3"))
    loss = objective(net(1), BATCH)
    assert list(loss.parts) == ["task", "soft", "logit"]
    assert not any(part.requires_grad for part in loss.parts.values())
    wanted = 0.7 * loss.parts["soft"] + 2 * loss.parts["logit"] + 0.3 * loss.parts["task"]
    torch.testing.assert_close(loss.total.detach(), wanted)
    assert objective.modules() is None


def test_automatic_weights_pull_as_hard_as_soft_labels_and_are_measured_in_training_only() -> None:
    student, objective = net(1), Distillation(task(), net(0), parse_losses("soft+dist+logit"))
    with torch.no_grad():
        objective(student, BATCH)
    objective(student.eval(), BATCH)
    assert objective.weights() == {"task": pytest.approx(0.1), **dict.fromkeys(("soft", "dist", "logit"), 0.3)}
    for _ in range(STEPS + 2):
        objective(student.train(), BATCH)
    norms = {}
    for name, weight in objective.weights().items():
        alone = Distillation(task(), net(0), parse_losses(f"{name}=1+task=0" if name != "task" else "task"))
        gradients = torch.autograd.grad(alone(student, BATCH).total, list(student.parameters()))
        norms[name] = weight * float(torch.cat([g.flatten() for g in gradients]).norm())
    assert norms["dist"] == pytest.approx(norms["soft"], rel=1e-4)
    assert norms["logit"] == pytest.approx(norms["soft"], rel=1e-4)


def test_a_single_loss_is_weighed_against_soft_labels_too() -> None:
    student, objective = net(1), Distillation(task(), net(0), parse_losses("logit"))
    objective(student, BATCH)
    weight = objective.weights()["logit"]
    assert weight != pytest.approx(0.9)
    remembered = objective.modules()
    assert remembered is not None
    other = Distillation(task(), net(0), parse_losses("logit"))
    other.modules().load_state_dict(remembered.state_dict())  # type: ignore[union-attr]
    assert other.weights()["logit"] == weight


@pytest.mark.parametrize("name", LABEL_LOSSES)
def test_every_loss_is_zero_for_a_perfect_student_and_trains_another(name: str) -> None:
    objective = Distillation(task(), net(0), parse_losses(f"{name}+task=0"))
    assert float(objective(net(0), BATCH).total.detach()) == pytest.approx(0, abs=1e-6)
    student = net(1)
    before = objective(student, BATCH).total.detach()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        objective(student, BATCH).total.backward()
        optimizer.step()
    assert float(objective(student, BATCH).total.detach()) < float(before) / 2


def test_the_teacher_is_left_alone() -> None:
    teacher = net(0)
    Distillation(task(), teacher)(net(1), BATCH).total.backward()
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_other_outputs_are_matched_by_squared_error_free_of_scale() -> None:
    student, teacher = torch.randn(2, 64, 4, generator=GENERATOR)
    loss = value(student, teacher, "soft=1+task=0", own(), targets=teacher)
    torch.testing.assert_close(loss, ((student - teacher) ** 2).mean() / teacher.var())
    torch.testing.assert_close(value(9 * student, 9 * teacher, "soft=1+task=0", own(), targets=teacher), loss)
    with pytest.raises(TrainingError, match=r"dkd needs class scores.*\(64, 4\).*use soft"):
        value(student, teacher, "dkd", own(), targets=teacher)


def test_several_outputs_are_compared_one_by_one_each_by_what_it_is() -> None:
    scores, boxes = torch.randn(2, 64, 4, generator=GENERATOR), torch.randn(2, 64, 2, generator=GENERATOR)
    loss = value(
        {"logits": scores[0], "boxes": boxes[0]}, {"logits": scores[1], "boxes": boxes[1]}, "soft=1+task=0", own()
    )
    alone = value(scores[0], scores[1], "soft=1+task=0", own())
    error = ((boxes[0] - boxes[1]) ** 2).mean() / boxes[1].var()
    torch.testing.assert_close(loss, (alone + error) / 2)


def test_per_token_scores_are_soft_labels_of_tokens_that_count() -> None:
    student, teacher = torch.randn(2, 4, 6, 5, generator=GENERATOR)
    targets = torch.randint(0, 5, (4, 6), generator=GENERATOR)
    targets[1, 3:] = -100
    keep = targets != -100
    flat = value(student[keep], teacher[keep], "soft=1+task=0", own(), targets=targets[keep])
    torch.testing.assert_close(value(student, teacher, "soft=1+task=0", own(), targets=targets), flat)
    noisy = torch.where(keep[..., None], student, 99.0)
    torch.testing.assert_close(value(noisy, teacher, "soft=1+task=0", own(), targets=targets), flat)


def test_outputs_that_dont_match_are_refused_naming_both() -> None:
    with pytest.raises(TrainingError, match=r"\(64, 4\) and \(64, 3\)"):
        value(torch.zeros(64, 3), torch.zeros(64, 4), "soft")


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    whole = own(lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="none"))
    with pytest.raises(TaskError, match=r"scalar.*\(64,\)"):
        value(torch.zeros(64, 4), torch.zeros(64, 4), "task", whole)
    with pytest.raises(TaskError, match=r"scalar.*float"):
        value(torch.zeros(64, 4), torch.zeros(64, 4), "task", own(lambda outputs, targets: 1.0))


@pytest.mark.parametrize("losses", ["soft", "dkd+task=0"])
def test_labels_out_of_range_are_named(losses: str) -> None:
    with pytest.raises(TaskError, match=r"out of range|0 to 3"):
        value(torch.zeros(64, 4), torch.zeros(64, 4), losses, targets=Y + 100)
