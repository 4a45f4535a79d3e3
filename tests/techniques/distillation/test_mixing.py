"""Mixtures: which rows are, what they are of, and what is learned from them."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.model.task import Task, prepare
from automl_compress.techniques.distillation.losses import parse_losses
from automl_compress.techniques.distillation.mixing import mixable, mixed, shares_of_own
from automl_compress.techniques.distillation.objective import Distillation

GENERATOR = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(16, 2, 4, 4, generator=GENERATOR), torch.arange(16) % 3


class Linear(nn.Module):
    """A linear function of the image: of a mixture it is the mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 3)
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        out: Tensor = self.head(image.flatten(1))
        return out


def task(inputs: Any = IMAGES, **changes: Any) -> Task:
    torch.manual_seed(0)
    return prepare(Task(model=Linear(), train=(inputs, LABELS), validation=(inputs, LABELS), **changes))


@pytest.mark.parametrize(("share", "clean"), [(0.5, 8), (0.25, 12), (0.99, 2), (0.0, 16)])
def test_the_last_rows_are_mixtures_of_two_pasted_then_blended(share: float, clean: int) -> None:
    torch.manual_seed(1)
    (found,), kept = mixed((IMAGES,), share)
    assert kept == clean
    assert torch.equal(found[:clean], IMAGES[:clean])
    for row in range(clean, 16):
        if row < clean + (16 - clean) // 2:
            own = found[row] == IMAGES[row]
            assert any(torch.equal(torch.where(own, IMAGES[row], other), found[row]) for other in IMAGES)
            continue
        # What has to be added to the row lies along the way to one other row.
        ways = torch.stack([other - IMAGES[row] for other in IMAGES]).flatten(1)
        step = (found[row] - IMAGES[row]).flatten()
        along = (ways @ step) / (ways.square().sum(1) + 1e-12)
        misses = (along[:, None] * ways - step).norm(dim=1)
        nearest = int(misses.argmin())
        assert misses[nearest] < 1e-4
        assert -1e-4 <= along[nearest] <= 1 + 1e-4


@pytest.mark.parametrize("sizes", [(32,), (32, 32), (8, 16, 16)])
def test_a_box_is_whole_inside_and_has_its_share_of_the_positions(sizes: tuple[int, ...]) -> None:
    own, corner = torch.tensor([0.0, 0.3, 0.75, 1.0] * 2), torch.rand(8, len(sizes), generator=GENERATOR)
    weight = shares_of_own(own, corner, sizes)
    assert weight.shape == (8, 1, *sizes)
    for row, share in enumerate([0.0, 0.3, 0.75, 1.0]):
        box = weight[row, 0] == 0
        spans = [box.any(dim=tuple(d for d in range(len(sizes)) if d != dim)).nonzero() for dim in range(len(sizes))]
        assert int(box.sum()) == prod(int(s.max() - s.min()) + 1 if len(s) else 0 for s in spans)
        assert float(weight[row].mean()) == pytest.approx(share, abs=0.05)
    assert torch.equal(weight[4:], own[4:].reshape(4, *(1 for _ in range(1 + len(sizes)))).expand(4, 1, *sizes))


def test_all_inputs_of_a_row_are_mixed_alike() -> None:
    torch.manual_seed(2)
    (one, two), _ = mixed((IMAGES, 3 * IMAGES), 0.5)
    torch.testing.assert_close(two, 3 * one)


@pytest.mark.parametrize(
    ("ready", "inputs", "means"),
    [
        (task(), IMAGES, True),
        (task(), IMAGES[:, :, 0, 0], False),
        (task(), (IMAGES > 0).long(), False),
        (task(loss=functional.cross_entropy), IMAGES, False),
    ],
)
def test_only_classified_signals_have_mixtures(ready: Task, inputs: Tensor, means: bool) -> None:
    assert mixable(ready, (inputs,)) is means


def test_teacher_and_student_see_the_same_mixtures_and_true_labels_count_for_the_rest() -> None:
    ready = task()
    student, teacher = Linear(), Linear()
    objective = Distillation(ready, teacher, parse_losses("soft+mixed"))
    torch.manual_seed(3)
    loss = objective(student, ((IMAGES,), LABELS))
    seen = student.seen[-1]
    assert torch.equal(seen, teacher.seen[-1])
    assert torch.equal(seen[:8], IMAGES[:8])
    assert not any(torch.equal(seen[row], IMAGES[row]) for row in range(8, 16))
    wanted = functional.cross_entropy(student(IMAGES[:8]), LABELS[:8])
    torch.testing.assert_close(loss.parts["task"], wanted.detach())


def test_what_is_not_trained_on_is_not_mixed() -> None:
    student = Linear().eval()
    Distillation(task(), Linear(), parse_losses("soft+mixed"))(student, ((IMAGES,), LABELS))
    assert torch.equal(student.seen[-1], IMAGES)
