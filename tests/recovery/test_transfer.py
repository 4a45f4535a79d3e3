"""A pretrained model gets a new head, learns the new data, and is then compressed like any other."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from automl_compress import api, recover
from automl_compress.core.plan import Plan
from automl_compress.deploy.run_folder import RunFolder
from automl_compress.errors import PlanError, TaskError
from automl_compress.hardware.prediction.estimated import device_for
from automl_compress.model.task import Task, prepare
from automl_compress.model.transfer import Transfer, head_name, with_new_head
from automl_compress.recovery.transfer import (
    in_words,
    read_transferred,
    transfer_in,
    transferred,
    validation_metric,
)
from automl_compress.search.campaign import opening
from tests import tiny
from tests.search.device import TimelessRuntime

TRANSFER = Transfer(classes=2, head_epochs=2, epochs=2, learning_rate=0.02)


def halves(split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two classes out of four."""
    return split[0], split[1] // 2


def task(transfer: Transfer = TRANSFER) -> Task:
    return Task(
        model=tiny.teacher(),
        train=halves(tiny.split(512, 1)),
        validation=halves(tiny.split(400, 2)),
        test=halves(tiny.split(200, 3)),
        transfer=transfer,
    )


@cache
def done() -> Task:
    return transferred(prepare(task()))[0]


def test_only_the_head_is_exchanged_and_always_for_the_same_one() -> None:
    model, again = (with_new_head(tiny.teacher(), TRANSFER) for _ in range(2))
    old = tiny.teacher().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert name.startswith("head") or torch.equal(value, old[name])
    assert model.head.weight.shape == (2, 32)
    ready = prepare(task())
    assert ready.model.head.out_features == 2
    assert torch.equal(tiny.teacher().head.weight, old["head.weight"])


def test_a_convolution_may_be_the_head() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    changed = with_new_head(model, Transfer(classes=3, head="1"))
    assert changed(torch.zeros(2, 3, 5, 5)).shape == (2, 3)
    assert changed[1].bias is None


@pytest.mark.parametrize(
    ("model", "head", "told"),
    [
        (tiny.Net(), "fc", "has no module 'fc'; head must be a linear layer or a convolution, such as head"),
        (tiny.Net(), "norm", "has a BatchNorm2d as 'norm'"),
        (nn.Conv2d(3, 3, 1), None, "no linear layer"),
    ],
)
def test_a_head_that_isnt_there_is_named_with_the_way_out(model: nn.Module, head: str | None, told: str) -> None:
    with pytest.raises(TaskError, match=told):
        head_name(model, Transfer(classes=2, head=head))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"classes": 1}, "classes must be at least 2, found 1"),
        ({"classes": 2, "epochs": -1.0}, "epochs must be at least 0"),
        ({"classes": 2, "epochs": 0, "head_epochs": 0}, "would stay untrained"),
        ({"classes": 2, "learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, float], told: str) -> None:
    with pytest.raises(TaskError, match=told):
        Transfer(**options)  # type: ignore[arg-type]


def test_labels_beyond_the_new_classes_are_refused() -> None:
    with pytest.raises(TaskError, match=r"labels must be 0 to 1 .*found 3"):
        prepare(Task(model=tiny.teacher(), train=tiny.split(64, 1), validation=tiny.split(64, 2), transfer=TRANSFER))


def test_the_head_is_trained_first_and_alone() -> None:
    ready = prepare(task(Transfer(classes=2, head_epochs=1, epochs=0)))
    trained, logs = transferred(ready)
    before, after = ready.model.state_dict(), trained.model.state_dict()
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(before[name], after[name]) is not name.startswith("head")
        assert parameter.requires_grad
    assert [log.label for log in logs] == ["transfer, the new head alone"]
    assert trained.transfer is None


def test_the_new_task_is_learned_and_the_pretrained_model_left_alone() -> None:
    ready = prepare(task())
    before = {name: value.clone() for name, value in ready.model.state_dict().items()}
    assert validation_metric(ready)(ready.model.eval()) < 0.7
    assert validation_metric(ready)(done().model) > 0.85
    assert all(torch.equal(value, before[name]) for name, value in ready.model.state_dict().items())


def test_it_is_trained_once_for_a_run_folder(tmp_path: Path) -> None:
    ready, steps = prepare(task()), list[str]()
    with RunFolder(tmp_path / "run", {}) as folder:
        first, known = transfer_in(folder, ready, on_step=lambda report: steps.append(report.label))
        assert set(steps) == {"transfer, the new head alone", "transfer, everything"}
        steps.clear()
        again, _ = transfer_in(folder, ready, on_step=lambda report: steps.append(report.label))
        assert transfer_in(folder, first) == (first, None)
    assert not steps
    assert known is not None
    assert in_words(known).startswith("transferred to this data first (the new head alone; everything): 0.")
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
        assert torch.equal(value, done().model.state_dict()[name])
    left = sorted(path.name for path in (tmp_path / "run").glob("transferred*"))
    assert left == ["transferred.json", "transferred.safetensors"]
    with pytest.raises(PlanError, match=r"transferred\.safetensors: no such file"):
        read_transferred(tmp_path / "elsewhere", ready)


def test_a_search_compresses_what_was_transferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "device_for", partial(device_for, launch=TimelessRuntime))
    space = tmp_path / "space.yaml"
    space.write_text("name: one\nrules: [{match: {kind: layer, name: down}, bits: [8, 32]}]\n")
    result = api.compress(task(), size="95%", space=str(space), trials=2, epochs=0, output=tmp_path / "run")
    assert result.original is not None
    assert result.delivered is not None
    assert result.original.metric > 0.85
    assert any("transferred to this data first" in note for note in result.notes)
    again = api.replay(tmp_path / "run", task(), output=tmp_path / "again.onnx")
    assert onnx.load(again) == onnx.load(tmp_path / "run" / "best.onnx")


def test_a_plan_is_recovered_of_what_was_transferred(tmp_path: Path) -> None:
    plan = Plan(sparsity={"down": 0.5})
    one = recover(task(), plan, epochs=0, output=tmp_path / "one")
    assert one.metric > 0.8
    again = recover(task(), tmp_path / "one" / "plan.json", epochs=0, output=tmp_path / "other")
    assert again.metric == one.metric
    assert not (tmp_path / "other" / "transferred.safetensors").exists()  # the plan's folder has it
