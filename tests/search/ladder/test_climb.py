"""A time limit is kept while models train: what is slower than planned is trained for less, and what is cut is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from automl_compress.core.plan import Plan
from automl_compress.errors import InputError
from automl_compress.progress import SilentProgress
from automl_compress.search.campaign.timing import Clock
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.ladder import climb
from automl_compress.techniques.training.log import StepReport
from automl_compress.techniques.training.settings import Training

BATCHES = 100
FINISHING, MEASURING, TRIAL = 2.0, 1.0, 0.5


class Hand:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


class Slow:
    """Recovers by moving the clock: `pace` seconds a step, and some before and after."""

    def __init__(self, hand: Hand, pace: float) -> None:
        self.hand, self.pace = hand, pace
        self.cache = SimpleNamespace(hits=0)
        self.trained: list[tuple[str, float]] = []

    def label(self, rung: str) -> str:
        return f"{rung} distillation"

    def has(self, *_: object) -> bool:
        return False

    def time_steps(self, steps: int, schedule: Training, on_step: Any) -> None:
        for _ in range(steps):
            self.hand.time += self.pace
            on_step(None)

    def recover(self, plan: Plan, rung: str, schedule: Training, on_step: Any) -> Candidate:
        steps = round(schedule.epochs * BATCHES)
        begun = self.hand.time
        for step in range(1, steps + 1):
            self.hand.time += self.pace
            on_step(
                StepReport(
                    label=self.label(rung), step=step, steps=steps, loss=1.0, parts={}, metric=None, learning_rate=0.1,
                    images_per_second=1.0, seconds_left=(steps - step) * self.pace, rollbacks=0,
                )
            )  # fmt: skip
        seconds = self.hand.time - begun
        self.hand.time += FINISHING
        self.trained.append((rung, schedule.epochs))
        return Candidate(
            plan=plan, ranges={}, metric=plan.width, weights=Path(), onnx=Path(), training=(), seconds=seconds
        )


@pytest.fixture
def hand() -> Iterator[Hand]:
    return Hand()


def climber(hand: Hand, monkeypatch: pytest.MonkeyPatch, *, limit: float | None, pace: float = 0.1) -> climb.Climber:
    slow = Slow(hand, pace)
    monkeypatch.setattr(climb, "Recovery", lambda *_: slow)
    clock = Clock(deadline=limit, now=hand)
    clock.record("trial", TRIAL)
    clock.record("measuring", MEASURING)
    clock.record("metric", 0.1)
    campaign: Any = SimpleNamespace(
        bench=SimpleNamespace(task=SimpleNamespace(train=range(BATCHES)), standard_error=lambda value, whole: 0.0),
        recovery_study=lambda: optuna.create_study(direction="maximize"),
        folder=None,
        clock=clock,
        progress=SilentProgress(),
        describe=lambda plan: "",
        original_metric=lambda: 1.0,
        seeds=lambda: {"uniform-int8": Plan(width=0.9), "milp": Plan(width=0.8), "original": Plan()},
    )
    settings: Any = SimpleNamespace(schedule=Training(epochs=3), losses=None, recovery="fine-tune", baselines="none")
    return climb.Climber(campaign, settings)


@pytest.mark.parametrize("limit", [30.0, 60.0, 100.0, 200.0, 1000.0])
@pytest.mark.parametrize("slowdown", [1.0, 3.0])
def test_the_limit_leaves_room_to_deliver_however_slow_training_becomes(
    hand: Hand, monkeypatch: pytest.MonkeyPatch, limit: float, slowdown: float
) -> None:
    found = climber(hand, monkeypatch, limit=limit)
    allotment = found.allot(0, baselines=2)
    found.recovery.pace *= slowdown
    for plan in (Plan(width=0.5), *found.campaign.seeds().values()):
        if found.time_for_another():
            found.recover(found.campaign, plan, "full", allotment.epochs)
    assert hand.time + 2 * MEASURING + FINISHING <= limit
    assert found.recovery.trained[0][1] <= 3
    if limit == 1000.0:
        assert found.recovery.trained[0] == ("full", 3.0)
    if (limit, slowdown) == (60.0, 3.0):
        assert any("training became slower" in cut for cut in found.campaign.clock.cuts)


def test_without_a_limit_everything_is_as_asked(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    found = climber(hand, monkeypatch, limit=None)
    allotment = found.allot(100, baselines=2)
    assert (allotment.exploring, allotment.epochs, allotment.baseline_epochs) == (None, 3.0, 3.0)
    assert set(found.baselines(found.campaign, allotment)) == {"uniform-int8"}
    assert found.campaign.clock.cuts == []


def test_what_is_cut_is_told_when_it_is_done(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    found = climber(hand, monkeypatch, limit=60.0)
    allotment = found.allot(10, baselines=2)
    assert allotment.epochs < 3
    assert found.campaign.clock.cuts == []
    found.climb(found.campaign, [Plan(width=0.5)], climb.replace(allotment, rungs=allotment.rungs[-1:]))
    assert found.campaign.clock.cuts == list(allotment.cut)


def test_a_limit_below_the_least_is_refused(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--timeout 5s is too short: .* a trial takes 0\.5 s"):
        climber(hand, monkeypatch, limit=5.0).allot(10, baselines=0)


def test_once_there_are_trials_a_model_is_finished_however_little_time_is_left(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = climber(hand, monkeypatch, limit=60.0)
    found.allot(10, baselines=2)
    hand.time += 59.0
    allotment = found.allot(0, baselines=2)
    assert (allotment.exploring, allotment.epochs) == (0.0, 0.0)
    assert found.climb(found.campaign, [Plan(width=0.5)], allotment).plan == Plan(width=0.5)
    assert any("0 instead of 3 epochs" in cut for cut in found.campaign.clock.cuts)
