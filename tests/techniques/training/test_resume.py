"""A training that was interrupted anywhere and taken up again is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from automl_compress.errors import StorageError, TrainingError
from automl_compress.model.task import Task, prepare
from automl_compress.techniques.training import checkpoint
from automl_compress.techniques.training.interruption import between_steps
from automl_compress.techniques.training.log import StepReport, TrainingLog
from automl_compress.techniques.training.randomness import generators_in
from automl_compress.techniques.training.settings import Resources
from tests.techniques.training.support import PLAIN, Plain, X, Y, fit, net, same, score, task


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples with noise from every generator that a data set may use."""

    def __init__(self) -> None:
        self.torchs = torch.Generator().manual_seed(1)
        self.modern = np.random.default_rng(2)
        self.legacy = np.random.RandomState(3)
        self.python = random.Random(4)
        self.transform = partial(lambda rng, x: x + rng.normal(), np.random.Generator(np.random.MT19937(5)))

    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(3) + torch.rand(3, generator=self.torchs)
        noise += float(np.random.normal() + self.modern.normal() + self.legacy.normal())
        noise += random.random() + self.python.random()
        return self.transform(X[index] + noise).float(), Y[index]


class OwnOrder:
    """Batches in an order from torch's own generator, as many users write it."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(64).split(13):
            yield X[index] + torch.rand(len(index), 3), Y[index]


def loaders() -> dict[str, Any]:
    return {
        "shuffled": DataLoader(Noisy(), batch_size=13, shuffle=True),
        "generator": DataLoader(Noisy(), batch_size=13, shuffle=True, generator=torch.Generator().manual_seed(7)),
        "own order": OwnOrder(),
    }


class Stop(Exception):
    pass


def run(data: Any, file: Path | None, stops: tuple[int, ...] = (), **options: Any) -> tuple[nn.Module, TrainingLog]:
    """Train, interrupted at steps, each time in a new process as far as the training can tell."""
    for stop in (*stops, None):
        student = net()
        ready = prepare(Task(model=net(0), train=data(), validation=(X, Y)))
        torch.rand(stop or 0)

        def on_step(report: StepReport, stop: int | None = stop) -> None:
            if report.step == stop:
                raise Stop

        resources = replace(PLAIN, checkpoint=file, checkpoint_seconds=0.0)
        try:
            log = fit(student, ready, on_step=on_step, resources=resources, **options)
        except Stop:
            continue
    return student, log


SETTINGS: dict[str, dict[str, Any]] = {
    "muon": {"average": 0.9, "validate": score},
    "sgd": {"optimizer": "sgd"},
    "adamw": {"optimizer": "adamw", "schedule": "cosine", "warm_up": 0.2},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("data", loaders())
def test_interrupted_and_resumed_is_uninterrupted(data: str, settings: str, tmp_path: Path) -> None:
    options = {"epochs": 3, "learning_rate": 0.05, **SETTINGS[settings]}
    whole, log = run(lambda: loaders()[data], None, **options)
    parts, again = run(lambda: loaders()[data], tmp_path / "c", (3, 4, 11), **options)
    assert same(whole, parts)
    assert again.curves == log.curves
    assert (again.images, again.metric, again.delivered, again.notes) == (
        log.images,
        log.metric,
        log.delivered,
        log.notes,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_loses_no_step_and_a_second_one_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    def interrupt(file: Path, times: int) -> int:
        """The step at which training ends that is interrupted in its fourth."""
        made = []

        def on_step(report: StepReport) -> None:
            made.append(report.step)
            for _ in range(times if report.step == 4 else 0):
                signal.raise_signal(number)

        with pytest.raises(KeyboardInterrupt):
            fit(net(), task(), epochs=5, on_step=on_step, resources=replace(PLAIN, checkpoint=file))
        assert signal.getsignal(number) is signal.default_int_handler
        return made[-1]

    before = signal.signal(number, signal.default_int_handler)
    try:
        assert interrupt(tmp_path / "once", 1) == interrupt(tmp_path / "twice", 2) == 4
    finally:
        signal.signal(number, before)
    assert not (tmp_path / "twice").exists()
    steps: list[int] = []
    student, whole = net(), net()
    file = replace(PLAIN, checkpoint=tmp_path / "once")
    fit(student, task(), epochs=5, on_step=lambda report: steps.append(report.step), resources=file)
    fit(whole, task(), epochs=5)
    assert steps[0] == 5
    assert same(student, whole)


def test_what_fails_in_a_step_after_an_interruption_is_the_interruption() -> None:
    def step(error: Exception, *, interrupted: bool) -> None:
        with between_steps() as stopped:
            if interrupted:
                signal.raise_signal(signal.SIGINT)
            assert stopped() == interrupted
            raise error

    with pytest.raises(KeyboardInterrupt):
        step(TrainingError("a worker is gone"), interrupted=True)
    with pytest.raises(TrainingError):
        step(TrainingError("a worker is gone"), interrupted=False)
    with pytest.raises(StorageError):  # otherwise the user is told that the training can be resumed
        step(StorageError("the disk is full"), interrupted=True)


def test_where_processes_train_together_an_interruption_ends_the_step() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with between_steps(defer=False):
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with between_steps():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_diverged_and_masks_that_change_are_resumed_too(tmp_path: Path) -> None:
    def spoilt() -> Any:
        return [(torch.full_like(X, float("nan")) if i == 3 else X, Y) for i in range(6)]

    def masks(step: int, steps: int) -> dict[str, Tensor] | None:
        return {"0.weight": torch.arange(24).view(8, 3) >= step} if step in (0, 4, 8) else None

    whole, log = run(spoilt, None, epochs=2, masks=masks)
    parts, again = run(spoilt, tmp_path / "c", (3, 5, 10), epochs=2, masks=masks)
    assert log.rollbacks == 2
    assert same(whole, parts)
    assert (again.notes, again.curves) == (log.notes, log.curves)
    assert int((whole[0].weight == 0).sum()) == 8


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first, log = run(OwnOrder, tmp_path / "c", epochs=1)
    steps: list[int] = []
    student = net()
    again = fit(
        student,
        prepare(Task(model=net(0), train=OwnOrder(), validation=(X, Y))),
        epochs=1,
        on_step=lambda report: steps.append(report.step),
        resources=replace(PLAIN, checkpoint=tmp_path / "c", checkpoint_seconds=0.0),
    )
    assert steps == []
    assert same(first, student)
    assert again.curves == log.curves


def test_another_trainings_checkpoint_is_not_used_and_that_is_said(tmp_path: Path) -> None:
    file = tmp_path / "c"
    run(OwnOrder, file, epochs=1)
    student, log = run(OwnOrder, file, epochs=1, learning_rate=0.5)
    assert log.notes == ("the checkpoint was another training's (its learning_rate differs): started anew",)
    assert same(student, run(OwnOrder, None, epochs=1, learning_rate=0.5)[0])


def test_an_order_that_does_not_repeat_is_said(tmp_path: Path) -> None:
    calls = [0]

    class Hidden:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            calls[0] += 1
            return iter([(X[i::4], (Y[i::4] + calls[0]) % 4) for i in range(4)])

    _, log = run(Hidden, tmp_path / "c", (2,), epochs=1)
    assert log.notes == ("the data came in another order after the interruption: resuming was not exact",)


def test_the_file_holds_tensors_and_json_alone(tmp_path: Path) -> None:
    run(OwnOrder, tmp_path / "c", epochs=1)
    with safe_open(tmp_path / "c", framework="pt") as file:
        facts = json.loads(file.metadata()["training"])
        assert facts["step"] == 5
        assert "now.model.0.weight" in file.keys()  # noqa: SIM118
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("content", [b"", b"none at all", None])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "c"
    if content is None:
        save_file({"a": torch.zeros(1)}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(TrainingError, match=r"damaged one.*delete it to start anew"):
        fit(net(), resources=Resources(checkpoint=file))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "c"
    run(OwnOrder, file, (2,), epochs=1)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match=r"No space left on device\); free some space and run the same again"):
        run(OwnOrder, file, epochs=1)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_generators_are_found_once_and_in_order() -> None:
    data = Noisy()
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator())
    found = generators_in(loader)
    assert [id(one) for one in found].count(id(data.modern)) == 1
    assert {id(data.torchs), id(data.modern), id(data.legacy), id(data.python), id(loader.generator)} <= set(
        map(id, found)
    )
    assert [id(one) for one in found] == [id(one) for one in generators_in(loader)]
    assert len(found) == 6


def test_the_objectives_own_modules_are_resumed(tmp_path: Path) -> None:
    class Scaling(Plain):
        def __init__(self, ready: Task) -> None:
            super().__init__(ready)
            self.layer = nn.Linear(4, 4)
            nn.init.eye_(self.layer.weight)

        def __call__(self, student: nn.Module, batch: Any) -> Any:
            return super().__call__(lambda *inputs: self.layer(student(*inputs)), batch)  # type: ignore[arg-type]

        def modules(self) -> Any:
            return self.layer

    def once(file: Path | None, stop: int = 99) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(2)
        objective, student = Scaling(task()), net()

        def on_step(report: StepReport) -> None:
            if report.step == stop:
                raise Stop

        resources = replace(PLAIN, checkpoint=file, checkpoint_seconds=0.0)
        try:
            fit(student, objective=objective, epochs=4, on_step=on_step, resources=resources)
        except Stop:
            return once(file)
        return student, objective.layer

    torch.manual_seed(2)
    whole, parts = once(None), once(tmp_path / "c", 3)
    assert same(whole[0], parts[0])
    assert same(whole[1], parts[1])
