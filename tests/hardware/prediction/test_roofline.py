from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.nn import functional

from automl_compress.core.plan import Plan
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.prediction.roofline import estimate, time_us, work_of
from automl_compress.hardware.profile.header import Roofline
from automl_compress.hardware.profile.profile import load_profile
from automl_compress.model.task import Task, prepare
from automl_compress.model.trace import trace
from automl_compress.search.evaluation.evaluate import Workbench
from tests.model import networks

ROOF = Roofline(
    peak_gops={8: 4.0, 32: 1.0}, bandwidth_gbps=2.0, overhead_us=5.0, efficiency={"conv": 0.5, "other": 0.1}
)
CONV = "Conv.nchwc|float[1,16,32,32]>float[1,16,32,32]|w float[16,16,3,3]|k3x3 s1x1 p1 g1|relu"


# fmt: off
WORK = [
    (CONV, "conv", 1024 * 16 * 16 * 9, 32, 4 * (2 * 16384 + 2304)),
    ("QLinearConv|uint8[1,4,8,8]>uint8[1,4,8,8]|w int8[4,1,3,3]|k3x3 s1x1 p1 g4", "depthwise", 64 * 36, 8, 548),
    ("QLinearConv|uint8[1,8,8,3]>uint8[1,4,4,6]|w int8[6,3,3,3]|k3x3 s2x2|channels_last=1", "conv", 2592, 8, 450),
    ("FusedConv|float[1,8,16]>float[1,8,14]|w float[8,4,3]|k3 s1 p0 g2|relu", "conv", 14 * 96, 32, 1344),
    ("ConvTranspose|float[1,3,4,4]>float[1,2,8,8]|w float[3,2,2,2]|k2x2 s2x2 p0 g1", "conv", 16 * 24, 32, 800),
    ("QGemm|uint8[10,32]>float[10,64]|w int8[64,32]|alpha=1 transA=0 transB=1", "linear", 10 * 32 * 64, 8, 4928),
    ("MatMul|float[1,10,32]>float[1,10,64]|w float[32,64]", "linear", 10 * 32 * 64, 32, 12032),
    ("MatMul|float[1,4,10,8],float[1,4,8,12]>float[1,4,10,12]", "linear", 4 * 10 * 8 * 12, 32, 4736),
    ("MatMulNBits|float[10,64]>float[10,96]|w uint8[96,2,16],float[96,2]|K=64 N=96", "linear", 61440, 32, 10240),
    ("QLinearAdd|uint8[1,8],uint8[1,8]>uint8[1,8]", "other", 8, 8, 24),
    ("ReduceMean|float[1,10,32]>float[1,32]|keepdims=0", "other", 320, 32, 1408),
    ("Reshape|float[1,10,32],int64[2]>float[10,32]|allowzero=0", "other", 0, 32, 0),
    ("a text of another form", "other", 0, 32, 0),
]
# fmt: on


@pytest.mark.parametrize(("key", "kind", "operations", "bits", "size"), WORK)
def test_a_kernels_work_is_what_one_counts_by_hand(key: str, kind: str, operations: int, bits: int, size: int) -> None:
    work = work_of(key)
    assert (work.kind, work.operations, work.bits, work.bytes) == (kind, operations, bits, size)


def test_a_kernel_takes_the_longer_of_computing_and_moving_and_the_overhead() -> None:
    work = work_of(CONV)
    computing, moving = work.operations / 0.5e3, work.bytes / 2e3
    assert computing > moving
    assert time_us(work, ROOF) == pytest.approx(computing + 5.0)
    slow = ROOF.model_copy(update={"bandwidth_gbps": 0.001})
    assert time_us(work, slow) == pytest.approx(work.bytes * 1.0 + 5.0)


def test_fewer_bits_and_fewer_channels_never_take_longer() -> None:
    narrow = CONV.replace("[16,16,3,3]", "[8,16,3,3]").replace(">float[1,16", ">float[1,8")
    assert time_us(work_of(narrow), ROOF) < time_us(work_of(CONV), ROOF)
    integer = CONV.replace("w float", "w int8").replace("|float[", "|uint8[").replace(">float[", ">uint8[")
    assert time_us(work_of(integer), ROOF) < time_us(work_of(CONV), ROOF)


def test_a_bit_width_without_a_rate_has_that_of_the_next_wider() -> None:
    half = work_of(CONV.replace("float[", "float16["))
    assert half.bits == 16
    assert time_us(half, ROOF) == pytest.approx(half.operations / 0.5e3 + 5.0)


def test_estimates_say_that_they_are() -> None:
    [record] = estimate([CONV, CONV], ROOF)
    assert (record.key, record.provenance, record.conditions) == (CONV, "estimated", "roofline")


class Mixed(nn.Module):
    """Depthwise, grouped, pointwise, strided and transposed convolutions, and linear layers over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.up = nn.Conv2d(16, 24, 1), nn.ConvTranspose2d(24, 8, 4, stride=2, padding=1)
        self.grouped, self.along = nn.Conv2d(8, 8, 3, groups=2), nn.Conv1d(8, 4, 3)
        self.linear, self.head = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.point(functional.relu(self.depthwise(self.stem(x)))))
        x = self.along(functional.relu(self.grouped(x)).mean(3))
        return self.head(self.linear(x.transpose(1, 2)).mean(1))


@pytest.mark.parametrize("name", ["Mixed", "ResNet", "Concatenated"])
def test_operations_agree_with_fvcore(tmp_path: Path, name: str) -> None:
    model, images = (Mixed().eval() if name == "Mixed" else networks.make(name)), torch.randn(4, 3, 8, 8)
    analysis = FlopCountAnalysis(model, images[:1]).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counted = sum(analysis.by_operator()[operator] for operator in ("conv", "linear", "addmm", "matmul"))
    data = (images, torch.zeros(4, dtype=torch.long))
    task = prepare(Task(model=model, train=data, validation=data))
    bench = Workbench(task, trace(task.model, task.example_inputs))
    integer = bench.structure(Plan(bits={layer.name: 8 for layer in bench.graph.layers}))
    profile = load_profile("local", home=tmp_path)
    for optimization in ("extended", "all"):
        runtime = profile.header.runtime.model_copy(update={"optimization": optimization})
        profile.header = profile.header.model_copy(update={"runtime": runtime})
        with Device(profile) as device:
            for lowered in (device.lowered(bench.original), device.lowered(integer)):
                works = [work_of(kernel.key) for kernel in lowered.kernels]
                found = sum(work.operations for work in works if work.kind != "other")
                # In a blocked layout the runtime really computes channels up to the next multiple of the block.
                assert found == counted if optimization == "extended" else found >= counted
