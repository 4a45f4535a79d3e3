"""Several processes: each computes its part, what they average is the whole, and all end with the same model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from automl_compress.errors import TrainingError
from automl_compress.techniques.training.parallel import Processes
from tests.techniques.training.support import X, Y


def processes(index: int, count: int, reduce: Any = None) -> Processes:
    return Processes(SimpleNamespace(num_processes=count, process_index=index, device="cpu", reduce=reduce))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_parts_are_equal_and_make_up_the_batch_without_a_remainder(count: int) -> None:
    parts = [processes(index, count).part(((X, X[:, :1]), Y)) for index in range(count)]
    used = 64 // count * count
    assert torch.equal(torch.cat([inputs[0] for inputs, _ in parts]), X[:used])
    assert torch.equal(torch.cat([targets for _, targets in parts]), Y[:used])
    assert {len(targets) for _, targets in parts} == {64 // count}


def test_one_process_has_everything_and_averages_nothing() -> None:
    alone, value = Processes(), torch.ones(2)
    assert alone.part(((X,), Y))[1] is Y
    alone.average([value])
    assert torch.equal(value, torch.ones(2))
    assert alone.first


def test_batches_that_are_too_small_are_refused() -> None:
    with pytest.raises(TrainingError, match="batch of 2 can't be divided among 3 processes"):
        processes(0, 3).part(((X[:2],), Y[:2]))


def test_tensors_of_any_shape_are_averaged_at_once() -> None:
    calls: list[int] = []

    def reduce(flat: Tensor, reduction: str) -> Tensor:
        calls.append(len(flat))
        return flat / 2

    values = [torch.full((2, 3), 4.0), torch.tensor(6.0), torch.tensor([8.0], dtype=torch.float64)]
    processes(0, 2, reduce).average(values)
    assert calls == [7, 1]
    assert values[2].dtype == torch.float64
    assert torch.equal(values[0], torch.full((2, 3), 2.0))
    assert float(values[1]) == 3.0


def test_numbers_are_averaged_without_losing_digits() -> None:
    assert processes(0, 2, lambda flat, reduction: flat + 1e-12).mean(1.0) == 1.0 + 1e-12
    assert processes(0, 1).mean(torch.tensor(0.5)) == 0.5


def test_all_compute_in_the_smallest_pieces_that_any_of_them_needs() -> None:
    fields = {"num_processes": 2, "process_index": 0, "device": "cpu"}
    others = Processes(SimpleNamespace(**fields, gather=lambda value: torch.cat([value, torch.tensor([16])])))
    assert (others.least(32), others.least(8), Processes().least(32)) == (16, 8, 32)


TRAIN = """
import sys
from dataclasses import replace
import torch
from accelerate import Accelerator
from torch import nn
from automl_compress.model.surgery import copy_model
from automl_compress.model.task import prepare
from automl_compress.techniques.distillation.losses import parse_losses
from automl_compress.techniques.distillation.objective import Distillation
from tests import tiny
from tests.techniques.training.support import PLAIN, fit
accelerator = Accelerator(cpu=True)
torch.manual_seed(3)
task, student = prepare(tiny.task()), tiny.Net(16)
balanced = Distillation(task, task.model, parse_losses("soft+dist"))

class Rounding:
    modules, memory = balanced.modules, balanced.memory

    def __call__(self, student, batch):  # as kernels may: not alike in both processes
        with torch.no_grad():
            next(student.parameters()).mul_(1 + 1e-6 * accelerator.process_index)
        return balanced(student, batch)

images = tiny.split(64, 1)[0]
log = fit(
    student, task, objective=Rounding(), epochs=1, average=0.9, validate_every=0.5,
    validate=lambda model: float(model(images).sum()), resources=replace(PLAIN, accelerator=accelerator)
)
state = [*student.state_dict().values(), *balanced.modules().buffers(), torch.tensor([log.metric])]
values = torch.cat([value.double().reshape(-1) for value in state])
torch.save(values, f"{sys.argv[1]}/{accelerator.process_index}.pt")
assert log.images == 512
accelerator.end_training()
"""


def test_two_processes_of_accelerate_end_with_the_same_model_however_they_round(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = str(Path(__file__).parents[3])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [*command, str(script), str(tmp_path)], check=True, capture_output=True, env={**os.environ, "PYTHONPATH": paths}
    )
    one, other = (torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in (0, 1))
    assert torch.equal(one, other)
