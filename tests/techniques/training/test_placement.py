"""Device and precision follow from rules; the loss and what is delivered are in float32 whatever was chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from automl_compress.errors import InputError
from automl_compress.model.task import Batch, prepare
from automl_compress.techniques.objective import Loss
from automl_compress.techniques.training.placement import Placement, device_of, precision_of
from automl_compress.techniques.training.settings import Resources
from tests import tiny
from tests.techniques.training.support import fit, same

BFLOAT16 = Resources(device="cpu", precision="bfloat16")


@pytest.mark.parametrize(("matrix_units", "instructions"), [(True, True), (False, True), (False, False)])
def test_a_processor_computes_in_bfloat16_where_it_multiplies_it(
    matrix_units: bool, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    cpu = torch.device("cpu")
    assert precision_of(Resources(), cpu) == (torch.bfloat16 if matrix_units or instructions else torch.float32)
    assert precision_of(Resources(precision="float32"), cpu) == torch.float32
    assert precision_of(Resources(precision="bfloat16"), cpu) == torch.bfloat16


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_a_gpu_computes_in_bfloat16_from_ampere_on(capability: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = precision_of(Resources(), torch.device("cuda"))
    assert found == (torch.bfloat16 if capability >= (8, 0) else torch.float32)


@pytest.mark.parametrize("name", ["gpu", "cuda:77", "mps", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="training: "):
        device_of(name)


def test_the_loss_sees_float32_and_the_student_computes_in_bfloat16() -> None:
    ready, seen = prepare(tiny.task()), []
    student = tiny.Net(8)
    student.stem.register_forward_hook(lambda module, inputs, output: seen.append((module.training, output.dtype)))

    class Noting:
        def __call__(self, student: nn.Module, batch: Batch) -> Loss:
            outputs = student(*batch[0])
            assert outputs.dtype == torch.float32
            loss = ready.loss_of(outputs, batch[1])
            assert loss.dtype == torch.float32
            return Loss(total=loss)

        def modules(self) -> None:
            return None

        def memory(self) -> None:
            return None

    def validate(model: nn.Module) -> float:
        return -float(ready.loss_of(model(*ready.example_inputs), torch.zeros(len(ready.example_inputs[0])).long()))

    log = fit(student, ready, objective=Noting(), epochs=0.5, resources=BFLOAT16, validate=validate)
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    # What is validated computes as it will be delivered.
    assert {dtype for training, dtype in seen if not training} == {torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    assert log.computed == "cpu, bfloat16, channels last"
    assert not student._forward_hooks


def test_bfloat16_is_as_repeatable() -> None:
    students = [tiny.teacher(), tiny.teacher()]
    for student in students:
        fit(student, prepare(tiny.task()), epochs=0.5, resources=BFLOAT16)
    assert same(*students)


def test_the_layout_is_channels_last_for_images_alone() -> None:
    placement = Placement.choose(tiny.Net(), Resources(device="cpu"))
    images, _ = placement.batch(((torch.rand(2, 3, 8, 8), torch.rand(2, 5)), torch.zeros(2)))
    assert images[0].is_contiguous(memory_format=torch.channels_last)
    assert images[1].shape == (2, 5)
    assert not Placement.choose(nn.Linear(3, 4), Resources(device="cpu")).channels_last
