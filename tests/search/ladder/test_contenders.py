"""Students that weren't cut from the teacher are trained, measured, quantized, verified and made again like others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from automl_compress import api
from automl_compress.core.plan import Plan
from automl_compress.deploy.runtime import OnnxModel
from automl_compress.errors import CompressError, InputError, TaskError
from automl_compress.hardware.prediction.estimated import device_for
from automl_compress.model.task import load_task
from automl_compress.recovery.own_student import make_student
from automl_compress.recovery.students import parse_students
from automl_compress.search.campaign import opening
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.learning import learn
from automl_compress.search.campaign.settings import Settings
from automl_compress.search.delivery.deliver import verify
from automl_compress.search.evaluation.candidate import Candidate, plan_file
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.ladder import contenders
from automl_compress.search.ladder.contenders import Contenders
from automl_compress.search.ladder.ladder import Recovery
from automl_compress.techniques.training.settings import Training
from tests import tiny
from tests.search import campaigns
from tests.search.device import TimelessRuntime

LATENCY = "70%"


class Plain(nn.Module):
    """Another architecture than the teacher's, of any width."""

    def __init__(self, width: float) -> None:
        super().__init__()
        channels = max(2, round(24 * width))
        self.enter, self.norm = nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.deep, self.out = nn.Conv2d(channels, channels, 3, 2, 1), nn.Linear(channels, tiny.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.enter(x)))
        return self.out(torch.relu(self.deep(x)).mean((2, 3)))


def settings(**options: Any) -> Settings:
    chosen = {"epochs": 30.0, "distillation": "soft+features", "recovery": "fine-tune", "students": None, **options}
    return Settings(limits={}, options=chosen)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with campaigns.campaign(tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("home"), latency=LATENCY) as opened:
        opened.bench = Workbench(replace(campaigns.ready(), student=Plain), campaigns.graph(), importance="l2")
        learn(opened)
        yield opened


@pytest.fixture(scope="module")
def inherited(learned: Campaign) -> Candidate:
    plan = Plan(sparsity={"block.conv1": 0.5}, bits={"down": 8})
    return Recovery(learned.bench, learned.folder).recover(plan, "full", Training(epochs=0))


@pytest.fixture(scope="module")
def own(learned: Campaign, inherited: Candidate) -> Candidate:
    [found] = Contenders(learned, settings()).finished(inherited)
    return found


def test_an_own_student_is_the_widest_that_fits_when_measured_and_has_learned(
    learned: Campaign, own: Candidate
) -> None:
    assert own.width is not None
    assert own.metric > 0.6
    paths = {"original": learned.folder.path / "original.onnx", "own": own.onnx}
    timings = learned.device.compare(paths)
    assert timings["own"].median_us <= learned.budget.limits["latency"]
    assert own.training[0]["label"] == f"student({own.width:g})"


def test_it_is_trained_once_and_never_stands_in_for_a_plan(
    learned: Campaign, inherited: Candidate, own: Candidate
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (learned.folder.path / "candidates").iterdir()}
    [again] = Contenders(learned, settings()).finished(inherited)
    assert (again.metric, again.weights, again.training) == (own.metric, own.weights, own.training)
    assert {path: path.stat().st_mtime_ns for path in (learned.folder.path / "candidates").iterdir()} == before
    assert own.weights.name.startswith("own-")
    assert own.plan.key not in learned.measured


def test_it_is_verified_like_any_other_and_made_again(learned: Campaign, own: Candidate, tmp_path: Path) -> None:
    verified = verify(learned, own, {})
    assert verified.met
    assert verified.delivered.metric == own.metric
    assert f"the delivered model is the task's own student({own.width:g}), taught by the original" in verified.notes
    assert verified.delivered.predicted_latency_us is None  # no plan of the teacher tells it
    assert verified.delivered.size_bytes == own.onnx.stat().st_size
    assert {row["name"] for row in verified.layers} == {"enter", "deep", "out"}
    assert all("runs" in row for row in verified.layers if row["bits"] == 8)
    (tmp_path / "plan.json").write_text(json.dumps(plan_file(own, learned.bench)))
    (tmp_path / "best.safetensors").write_bytes(own.weights.read_bytes())
    task = replace(tiny.task(), student=Plain)
    made = api.replay(tmp_path, task, output=tmp_path / "again.onnx")
    images = tiny.split(64, 3)[0].numpy()
    one, other = (OnnxModel(onnx.load(path))((images,))[0] for path in (made, own.onnx))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="define student"):
        api.replay(tmp_path, tiny.task(), output=tmp_path / "never.onnx")


def test_one_from_scratch_has_the_best_plans_structure_and_its_own_files(
    learned: Campaign, inherited: Candidate
) -> None:
    [found] = Contenders(learned, settings(students="scratch", epochs=2.0)).finished(inherited)
    assert found.plan.key == inherited.plan.key
    assert found.weights != inherited.weights
    sizes = [Path(candidate.onnx).stat().st_size for candidate in (found, inherited)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    assert any("approach" in log["label"] for log in found.training)
    assert any("trained from fresh weights" in note for note in verify(learned, found, {}).notes)


def test_nobody_competes_unless_asked_or_offered(learned: Campaign, inherited: Candidate) -> None:
    assert Contenders(learned, settings(students="inherited")).finished(inherited) == []
    assert Contenders(learned, settings(epochs=0.0)).finished(inherited) == []


def test_where_none_fits_nothing_is_trained(
    learned: Campaign, inherited: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(learned.progress, "note", notes.append)
    monkeypatch.setattr(contenders, "WIDTHS", (12.0,))
    assert Contenders(learned, settings()).finished(inherited) == []
    assert notes == ["no student of the task's own fits the budget, down to width 12"]


def test_one_that_fails_leaves_what_was_found_without_it(
    learned: Campaign, inherited: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(learned.progress, "note", notes.append)
    monkeypatch.setattr(learned.bench, "task", replace(learned.bench.task, student=lambda width: 1 / 0))
    competing = Contenders(learned, settings())
    assert competing.finished(inherited) == []
    assert notes == [
        "student own failed, and doesn't compete: task: student(1) raised ZeroDivisionError: division by zero"
    ]
    assert notes == list(competing.told)
    assert not learned.rejected


class Deciding(Plain):
    """Control flow that torch can't export."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (lambda width: Plain(width) if width > 0.2 else nn.Linear(3, 3), r"student\(0.125\)'s forward fails"),
        (Deciding, r"student\(1\): the model can't be exported, at test_contenders.py"),
    ],
)
def test_a_student_that_cannot_compete_is_told_of_before_anything_is_searched(
    factory: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opening, "device_for", partial(device_for, launch=TimelessRuntime))
    task = replace(tiny.task(), student=factory)
    with pytest.raises(TaskError, match=told):
        api.compress(task, size="90%", output=tmp_path / "run")
    assert not (tmp_path / "run" / "original.json").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (lambda width: 1 / 0, r"student\(0.5\) raised ZeroDivisionError"),
        (lambda width: "net", r"student\(0.5\) must return a torch.nn.Module, found str"),
        (lambda width: nn.Linear(3, 3), r"student\(0.5\)'s forward fails on the example input"),
        (
            lambda width: nn.Sequential(nn.Flatten(), nn.Linear(64, 9)),
            r"student\(0.5\): teacher and student outputs differ in shape: output: \(128, 4\) and \(128, 9\)",
        ),
        (lambda width: Plain(width).requires_grad_(False), r"student\(0.5\) has nothing to train"),
    ],
)
def test_factories_that_make_something_else_are_told(factory: Any, told: str) -> None:
    with pytest.raises(CompressError, match=told):
        make_student(replace(campaigns.ready(), student=factory), 0.5, 0)


def test_the_same_seed_makes_the_same_student() -> None:
    task = replace(campaigns.ready(), student=Plain)
    one, other, third = (make_student(task, 0.5, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], third[name]) for name in one)


@pytest.mark.parametrize(
    ("text", "has_own", "names"),
    [
        (None, False, ()),
        (None, True, ("own",)),
        ("inherited", True, ()),
        ("scratch + own", False, ("scratch", "own")),
        ("own+own", True, ("own",)),
    ],
)
def test_students_are_named(text: str | None, has_own: bool, names: tuple[str, ...]) -> None:
    assert parse_students(text, has_own=has_own) == names


def test_unknown_students_and_a_missing_one_are_refused(learned: Campaign) -> None:
    with pytest.raises(
        InputError, match=r"unknown student 'scrtch'; there are: inherited, scratch, own; did you mean scratch\?"
    ):
        parse_students("scrtch")


def test_a_task_file_brings_its_student(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text(
        "from tests import tiny\nfrom tests.search.ladder.test_contenders import Plain\n"
        "task = tiny.task\n\ndef student(width):\n    return Plain(width)\n"
    )
    made = load_task(str(file)).student
    assert made is not None
    assert isinstance(made(0.5), nn.Module)
    with pytest.raises(TaskError, match=r"student must be a function student\(width\), found int"):
        api.load(replace(tiny.task(), student=3), None)  # type: ignore[arg-type]
