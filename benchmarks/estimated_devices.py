"""How far are the estimates of a shipped microcontroller profile from published measurements?

STMicroelectronics publishes what two residual networks for 32x32 images take on an STM32H747 at 400 MHz, quantized to 8
bits: latency, RAM for activations, flash for weights (github.com/STMicroelectronics/stm32ai-modelzoo,
image_classification/resnetv1, STM32Cube.AI 10.0.0). The networks here have the same layers and random weights, which
decide neither. ResNet-8 was used to set the profile's efficiency, ResNet-32 was not.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from common import parser, write_figures
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.core.plan import Plan
from automl_compress.hardware.device.kernels import weight_bytes
from automl_compress.hardware.prediction.cost import CostModel
from automl_compress.hardware.prediction.estimated import device_for
from automl_compress.hardware.profile.catalog import find
from automl_compress.model.task import Task, prepare
from automl_compress.model.trace import trace
from automl_compress.search.evaluation.evaluate import Workbench

PROFILE = "cortex-m7-400mhz"
# Blocks per stage -> name, milliseconds, KiB of RAM for activations, KiB of flash for weights.
PUBLISHED = {1: ("resnet8", 28.67, 62.51, 76.9), 5: ("resnet32", 177.7, 45.41, 464.38)}


class Block(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        stride = 1 if inputs == width else 2
        self.conv1, self.conv2 = nn.Conv2d(inputs, width, 3, stride, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.shortcut = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.conv2(functional.relu(self.conv1(x))))


def residual(blocks: int) -> nn.Module:
    widths = [16, *(width for width in (16, 32, 64) for _ in range(blocks))]
    body = [Block(before, after) for before, after in pairwise(widths)]
    ends = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *body, *ends).eval()


def estimate(blocks: int) -> tuple[float, float, float]:
    """Milliseconds, KiB of live activations, KiB of weights, all layers in 8 bits."""
    torch.manual_seed(0)
    data = (torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))
    task = prepare(Task(model=residual(blocks), train=data, validation=data))
    bench = Workbench(task, trace(task.model, task.example_inputs))
    model = bench.structure(Plan(bits={layer.name: 8 for layer in bench.graph.layers}))
    with device_for(find(PROFILE)) as device:
        cost = CostModel(device.profile, device).predict(model)
        activations = device.lowered(model).activation_bytes
    return cost.latency_us / 1e3, activations / 1024, weight_bytes(model) / 1024


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    figures: dict[str, float] = {}
    for blocks, (name, *published) in PUBLISHED.items():
        for what, ours, theirs in zip(("latency", "activations", "weights"), estimate(blocks), published, strict=True):
            figures[f"{name}/{what}/estimated"], figures[f"{name}/{what}/published"] = ours, theirs
            figures[f"{name}/{what}/error"] = ours / theirs - 1
    write_figures(options.json, "estimated_devices", figures, quick=options.quick)


if __name__ == "__main__":
    main()
