"""Recovering a plan without a search: what is written is what was measured, and it can be gone on with."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress import recover
from automl_compress.core.plan import Plan
from automl_compress.errors import CompressError, InputError, PlanError, RunFolderError
from automl_compress.model.task import accuracy, prepare
from automl_compress.model.trace import trace
from automl_compress.progress import PlainProgress
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.techniques.training.log import StepReport, shown_by
from automl_compress.techniques.training.settings import Training
from tests import tiny

PLAN = Plan(sparsity={"block.conv1": 0.5, "down": 0.5}, bits={"down": 8})


def test_a_plan_is_recovered_in_a_mode_and_its_files_recover_it_again(tmp_path: Path) -> None:
    found = recover(tiny.task(), PLAN, mode="gradual", epochs=2, output=tmp_path / "a")
    assert found.metric > 0.6
    assert {path.name for path in (tmp_path / "a").iterdir() if path.is_file()} >= {
        "recovered.onnx",
        "recovered.safetensors",
        "plan.json",
    }
    onnx.checker.check_model(onnx.load(found.onnx))
    assert {record["label"].partition(",")[0] for record in found.training} >= {"full distillation (gradual)"}
    again = recover(tiny.task(), tmp_path / "a" / "plan.json", epochs=0, output=tmp_path / "b")
    assert again.plan.kept == found.plan.kept
    assert recover(tiny.task(), PLAN, mode="gradual", epochs=2, output=tmp_path / "a").metric == found.metric


def test_settings_of_the_training_are_ones_own_and_validation_stops_it(tmp_path: Path) -> None:
    training = Training(optimizer="adamw", learning_rate=1e-3, epochs=3, average=0.9, patience=1, validate_every=0.5)
    found = recover(tiny.task(), Plan(sparsity={"down": 0.5}), training=training, output=tmp_path / "a")
    (log,) = found.training
    assert len(log["metrics"]) >= 2
    assert log["metric"] == max(metric for _, metric in log["metrics"])


class Stubborn(nn.Module):
    """Says the same of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scores", torch.tensor([8.0, 0.0, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores.expand(len(x), -1)


def test_a_teacher_of_the_tasks_own_is_learned_from(tmp_path: Path) -> None:
    task, plan = replace(tiny.task(), teacher=Stubborn()), Plan(sparsity={"down": 0.5})
    task.validation[1][:] = 0  # what it says is right here
    assert recover(task, plan, epochs=20, distillation="soft=1+task=0", output=tmp_path / "a").metric > 0.9
    with pytest.raises(RunFolderError, match="its model"):
        recover(replace(task, teacher=None), plan, epochs=20, output=tmp_path / "a")


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        (3, "teacher must be a torch.nn.Module, found int"),
        (nn.Linear(3, 3), "the teacher's forward fails on the example input"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), r"differ in shape: output: \(128, 9\) and \(128, 4\)"),
    ],
)
def test_a_teacher_that_answers_otherwise_is_refused(teacher: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=told):
        recover(replace(tiny.task(), teacher=teacher), PLAN, output=tmp_path / "a")


def test_what_cannot_be_recovered_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'slow' is unknown"):
        recover(tiny.task(), PLAN, mode="slow")
    with pytest.raises(InputError, match=r"missing.json: no such file"):
        recover(tiny.task(), tmp_path / "missing.json", output=tmp_path / "a")
    with pytest.raises(PlanError, match="no channel group 'other'"):
        recover(tiny.task(), Plan(sparsity={"other": 0.5}), output=tmp_path / "a")
    recover(tiny.task(), PLAN, epochs=0, output=tmp_path / "a")
    with pytest.raises(RunFolderError, match="belongs to another run"):
        recover(tiny.task(), Plan(bits={"down": 8}), epochs=0, output=tmp_path / "a")
    json.loads((tmp_path / "a" / "plan.json").read_text())


def test_a_training_that_is_taken_up_is_shown_from_where_it_stood(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter(range(100))
    on_step = shown_by(PlainProgress(sys.stdout, every=0.0, clock=lambda: float(next(seconds))))
    for step in (7, 8, 7):
        on_step(
            StepReport(
                label="training", step=step, steps=10, loss=0.5, parts={}, metric=None, learning_rate=0.1,
                images_per_second=100.0, seconds_left=1.0, rollbacks=0,
            )
        )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    shown = [line.partition("training ")[2] for line in lines if "loss 0.5, images per second 100" in line]
    assert [line.split()[0] for line in shown] == ["7/10", "8/10", "7/10"]
    # What was done before tells nothing of the pace, which is known from the second step that was seen.
    assert [" left " in line for line in shown] == [False, True, False]


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.scores, self.boxes = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x).relu().mean((2, 3))
        return {"scores": self.scores(y), "boxes": self.boxes(y)}


def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs["scores"], targets) + outputs["boxes"].square().mean()


def hits(outputs: dict[str, Tensor], targets: Tensor) -> float:
    return accuracy(outputs["scores"], targets) - float(outputs["boxes"].abs().mean())


def test_loss_and_metric_get_the_outputs_in_the_models_own_container(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = replace(tiny.task(), model=Detector(), loss=loss, metric=hits)
    training = Training(epochs=1, average=0.5)  # validates the PyTorch model, too
    found = recover(task, Plan(sparsity={"stem": 0.5}), training=training, output=tmp_path / "a")
    session = onnxruntime.InferenceSession(str(found.onnx), providers=["CPUExecutionProvider"])
    images, classes = tiny.split(400, 2)
    scores, boxes = map(torch.from_numpy, session.run(None, {session.get_inputs()[0].name: images.numpy()}))
    assert found.metric == pytest.approx(hits({"scores": scores, "boxes": boxes}, classes), abs=1e-5)


def test_a_rounded_student_answers_in_the_models_own_container() -> None:
    torch.manual_seed(0)
    task = prepare(replace(tiny.task(), model=Detector(), loss=loss, metric=hits))
    bench = Workbench(task, trace(task.model, task.example_inputs))
    model, plan = bench.student(Plan(bits={"stem": 8}))
    rounded = bench.trainable(model, plan, bench.quantization(model, plan))(*task.example_inputs)
    exact = model(*task.example_inputs)
    assert rounded.keys() == exact.keys()
    for name, values in exact.items():
        torch.testing.assert_close(rounded[name], values, atol=0.02, rtol=0)
