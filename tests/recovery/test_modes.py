"""Every mode ends at the plan, is repeatable, loses little to a kill, and says what it did."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from automl_compress.core.plan import Plan
from automl_compress.errors import InputError, TrainingError
from automl_compress.model.task import Task, prepare
from automl_compress.recovery.curriculum import Easiest, pace
from automl_compress.recovery.end_to_end import reset
from automl_compress.recovery.gradual import gradual
from automl_compress.recovery.job import Recovered
from automl_compress.recovery.modes import MODES, mode_of
from automl_compress.recovery.names import NAMES
from automl_compress.recovery.rounded import Rounded, fake_rounded, rounded_weights
from automl_compress.techniques.objective import Loss
from automl_compress.techniques.training.log import StepReport
from automl_compress.techniques.training.settings import Resources, Training
from tests import tiny
from tests.recovery.support import KEPT, job, make
from tests.tiny import graph, ready

PLAN = Plan(kept=KEPT, masks={"head": "0.5"}, bits={"down": 4})
EXACT = Resources(device="cpu", precision="float32", checkpoint_seconds=0.0)


def accuracy(model: nn.Module) -> float:
    images, classes = tiny.split(400, 2)
    with torch.no_grad():
        return float((model(images).argmax(1) == classes).float().mean())


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_every_mode_has_a_name_and_a_word() -> None:
    assert set(MODES) == set(NAMES)
    with pytest.raises(InputError, match=r"'slow' is unknown; choose one of fine-tune, .*from-scratch$"):
        mode_of("slow")
    with pytest.raises(InputError, match=r"'gradul' is unknown; .*; did you mean gradual\?"):
        mode_of("gradul")


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_ends_at_the_plan(mode: str) -> None:
    found = MODES[mode](job(PLAN))
    assert {name: len(kept) for name, kept in found.plan.kept.items()} == {n: len(k) for n, k in KEPT.items()}
    shapes = {name: value.shape for name, value in make(PLAN, tiny.teacher()).state_dict().items()}
    assert {name: value.shape for name, value in found.model.state_dict().items()} == shapes
    assert not found.model.training
    assert float((found.model.head.weight == 0).float().mean()) >= 0.5
    assert all(parameter.isfinite().all() for parameter in found.model.parameters())
    assert sum(log.curves.steps[-1] for log in found.logs) == 8
    assert len({log.label for log in found.logs}) == len(found.logs)


@pytest.mark.parametrize("mode", ["fine-tune", "gradual", "curriculum", "end-to-end"])
def test_training_wins_accuracy_back(mode: str) -> None:
    plan = Plan(kept=KEPT)
    assert accuracy(make(plan, tiny.teacher())) < 0.6
    found = MODES[mode](job(plan, training=Training(epochs=10, learning_rate=0.1)))
    assert accuracy(found.model) > 0.8


@pytest.mark.parametrize("mode", ["gradual", "end-to-end"])
def test_interrupted_at_any_stage_and_resumed_is_uninterrupted(mode: str, tmp_path: Path) -> None:
    training = Training(epochs=4, average=0.9)
    whole = MODES[mode](job(PLAN, training=training))
    resources = replace(EXACT, checkpoint=tmp_path / "run.training")
    made: list[int] = []
    for stop in (2, 5, 11, 99):

        def on_step(report: StepReport, stop: int = stop) -> None:
            made.append(report.step)
            if len(made) == stop:
                raise KeyboardInterrupt

        stopped = job(PLAN, training=training, resources=resources, on_step=on_step)
        try:
            found: Recovered = MODES[mode](stopped)
        except KeyboardInterrupt:
            continue
    assert len(made) == 16
    assert same(found.model, whole.model)
    assert found.plan == whole.plan
    assert [log.curves for log in found.logs] == [log.curves for log in whole.logs]


def test_gradual_steps_are_nested_and_repaired_each() -> None:
    plans: list[Plan] = []

    def noted(plan: Plan, whole: nn.Module) -> nn.Module:
        plans.append(plan)
        return make(plan, whole)

    gradual(job(Plan(kept=KEPT), make=noted), steps=5)
    sizes = [len(plan.kept.get("down", range(32))) for plan in plans]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < 32
    assert plans[-1].kept == KEPT
    for early, late in pairwise(plans):
        assert all(set(late.kept[name]) <= set(kept) for name, kept in early.kept.items())


def test_weights_have_fewer_values_from_step_to_step() -> None:
    stages: dict[str, int] = {}
    values: list[int] = []

    class Counting:
        def __call__(self, student: nn.Module, batch: Any) -> Loss:
            handle = student.down.register_forward_pre_hook(
                lambda module, _: values.append(max(len(part.unique()) for part in module.weight.detach()))
            )
            outputs = student(*batch[0])
            handle.remove()
            return Loss(total=ready().loss_of(outputs, batch[1]))

        def modules(self) -> None:
            return None

        def memory(self) -> None:
            return None

    def on_step(report: StepReport) -> None:
        stages[report.label] = values[-1]

    found = gradual(job(Plan(bits={"down": 3}), objective=lambda _: Counting(), on_step=on_step))
    counts = list(stages.values())
    assert len(counts) == 4
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] <= 7
    assert len(found.model.down.weight[0].unique()) > 7  # what is delivered is exact; quantization rounds it


def test_cutting_out_what_end_to_end_masked_changes_nothing() -> None:
    """At the moment of the cut: with no training after it, the whole masked model and the cut one agree."""
    labels: list[str] = []
    whole: list[nn.Module] = []

    class Watching:
        def __call__(self, student: nn.Module, batch: Any) -> Loss:
            if student.stem.weight.shape[0] == 16 and student.down.weight.shape[0] == 32:
                whole[:] = [student]
            return Loss(total=ready().loss_of(student(*batch[0]), batch[1]))

        def modules(self) -> None:
            return None

        def memory(self) -> None:
            return None

    def on_step(report: StepReport) -> None:
        labels.append(report.label)

    found = MODES["end-to-end"](
        job(Plan(kept=KEPT), objective=lambda _: Watching(), on_step=on_step, training=Training(epochs=2))
    )
    model = whole[0].eval()
    images, _ = tiny.split(64, 5)
    gone = [c for c in range(32) if c not in found.plan.kept["down"]]
    assert bool((model.down.weight[gone] == 0).all())
    with torch.no_grad():
        torch.testing.assert_close(make(found.plan, model)(images), model(images), rtol=1e-4, atol=1e-5)


def test_fresh_weights_are_the_seeds_and_a_module_without_a_way_to_them_is_named() -> None:
    one, other, third = tiny.Net(), tiny.Net(), tiny.Net()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for model, seed in ((one, 1), (other, 1), (third, 2)):
        reset(model, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one, other)
    assert not same(one, third)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(TrainingError, match=r"0 \(Own\) has weights but no reset_parameters"):
        reset(nn.Sequential(Own()), 0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2.0, 3.5, 8.0])
def test_rounded_weights_have_few_values_and_pass_gradients_on(bits: float, axis: int) -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = fake_rounded(weight, bits, axis)
    for part, exact in zip(rounded.detach().movedim(axis, 0), weight.detach().movedim(axis, 0), strict=True):
        assert len(part.unique()) <= 2 ** round(bits + 0.49) - 1
        assert float(part.abs().max()) == pytest.approx(float(exact.abs().max()), rel=1e-5)
    rounded.sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones_like(weight))


def test_a_model_computes_with_rounded_weights_only_inside() -> None:
    model = tiny.teacher()
    images, _ = tiny.split(8, 5)
    exact, before = model(images), {name: value.clone() for name, value in model.state_dict().items()}
    with rounded_weights(model, {"down.weight": (2.0, 0)}):
        coarse = model(images)
        coarse.sum().backward()
    assert not torch.equal(exact, coarse)
    assert torch.equal(model(images), exact)
    assert list(model.state_dict()) == list(before)
    assert model.down.weight.grad is not None


def test_bits_come_down_to_the_plans() -> None:
    rounded = Rounded(job(PLAN).objective(PLAN), graph(), PLAN)
    widths = []
    for share in (0.0, 0.5, 1.0):
        rounded.share = share
        widths.append(rounded.widths()["down.weight"][0])
    assert widths == [16.0, 10.0, 4.0]


@pytest.mark.parametrize("own_loss", [False, True])
def test_the_easiest_samples_are_those_of_the_smallest_loss(own_loss: bool) -> None:
    own = {"loss": nn.functional.cross_entropy, "metric": lambda o, t: 0.0} if own_loss else {}
    task = prepare(Task(model=tiny.teacher(), train=tiny.split(64, 1), validation=tiny.split(32, 2), **own))
    seen: list[torch.Tensor] = []

    class Noting:
        def __call__(self, student: nn.Module, batch: Any) -> Loss:
            seen.append(batch[1])
            return Loss(total=student(*batch[0]).sum())

        def modules(self) -> None:
            return None

        def memory(self) -> None:
            return None

    images, classes = tiny.split(40, 7)
    easiest = Easiest(Noting(), task, tiny.teacher(), 0.25)
    losses = nn.functional.cross_entropy(tiny.teacher()(images), classes, reduction="none")
    torch.testing.assert_close(easiest.difficulty(((images,), classes)), losses)
    easiest(tiny.Net().train(), ((images,), classes))
    easiest(tiny.Net().eval(), ((images,), classes))
    assert torch.equal(seen[0], classes[losses.argsort()[:10].sort().values])
    assert torch.equal(seen[1], classes)
    assert (pace(0.0), pace(1.0)) == (0.5, 1.0)
