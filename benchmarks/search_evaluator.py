"""One-shot evaluations of ResNet-20 that are cheap enough to compare searches by thousands of them.

A plan's quality is the share of validation images that its network classifies rightly without any training. As in the
product, channels are chosen by the `obs` criterion and the cut network is refitted block after block to what the
original has behind each residual addition, by least squares. To be ten times faster, only each block's second
convolution and the classifier are refitted, on fewer rows, with one ridge, on bfloat16 activations; and layers in 8
bits get the original's ranges instead of a calibration. What is evaluated is the ONNX model in the runtime, integer
kernels included. Every value is kept in a file, a line a plan, and never computed twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.deploy.runtime import OnnxModel
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.techniques.prune import apply_plan, select_channels
from automl_compress.techniques.quantization.calibrate import activation_tensors
from automl_compress.techniques.quantization.tune import Calibration, Quantization, quantized
from automl_compress.techniques.repair import kept_rows

FITTING_IMAGES, ROWS, CALIBRATION_IMAGES, VALIDATION_IMAGES = 128, 2048, 256, 500
_DAMPING = 1e-1  # of the mean diagonal of the Gram matrix
_STEPS = 3  # majorise-minimise behind a rectifier
_BATCH = 25


class Lines:
    """A file of numbers by key, a JSON line each, appended at once; a line that a kill cut short is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, Any] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            try:
                key, value = json.loads(line)
            except ValueError:
                continue
            self.known[key] = value
        self._torn = bool(text) and not text.endswith("\n")

    def add(self, key: str, value: Any) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("\n" * self._torn + json.dumps([key, value]) + "\n")
        self._torn = False
        self.known[key] = value


@dataclass(frozen=True, eq=False)
class _Target:
    """What the original has behind a residual addition, before the ReLU: rows [ROWS, channels] at (image, y, x)."""

    image: Tensor
    y: Tensor
    x: Tensor
    values: Tensor


class Evaluator:
    """Accuracy of plans of a ResNet-20 on validation images, from the cache where it was computed before.

    key_of  what plans that make the same network have in common
    """

    def __init__(self, bench: Workbench, key_of: Callable[[Plan], str], cache: Path) -> None:
        self._bench, self._graph, self._model, self._key_of = bench, bench.graph, bench.teacher, key_of
        self._lines = Lines(cache)
        self.computed = 0
        images = torch.cat([inputs[0] for inputs in bench.samples])
        self._fitting = images[:FITTING_IMAGES].to(torch.bfloat16).to(memory_format=torch.channels_last)
        data = list(bench.task.batches("validation"))
        self._images = torch.cat([inputs[0] for inputs, _ in data])[:VALIDATION_IMAGES].numpy()
        self._labels = torch.cat([labels for _, labels in data])[:VALIDATION_IMAGES].numpy()
        eight = {layer.name: 8 for layer in self._graph.layers}
        calibration = Calibration(
            bench.original,
            [{bench.original.graph.input[0].name: images[:CALIBRATION_IMAGES].numpy()}],
            bench.executions,
        )
        calibration.watch(activation_tensors(bench.original, eight))
        self._ranges = calibration.ranges()
        with torch.no_grad():
            self._targets, self._logits = self._record()

    def known(self, plan: Plan) -> float | None:
        """The plan's accuracy if the cache has it."""
        return self._lines.known.get(self._key_of(plan))

    def __call__(self, plan: Plan) -> float:
        """Share of validation images that are classified rightly."""
        known = self.known(plan)
        if known is None:
            self.computed += 1
            known = self._evaluate(plan)
            self._lines.add(self._key_of(plan), known)
        return known

    def _evaluate(self, plan: Plan) -> float:
        selected = select_channels(self._graph, plan, self._bench.ranking)
        filled = self._bench.template.fill(self._repair(selected)[0], selected)
        bits = {layer: width for layer, width in plan.bits.items() if width != FULL_BITS}
        # Values that a plan's own export would name otherwise than the original's don't occur in this network.
        model = quantized(filled, bits, Quantization(ranges=self._ranges), self._bench.executions, draft=True)
        session = OnnxModel(model, 1)
        parts = [self._images[start : start + _BATCH] for start in range(0, len(self._images), _BATCH)]
        found = np.concatenate([session((part,))[0].argmax(1) for part in parts])
        return float((found == self._labels).mean())

    def distance(self, plan: Plan) -> float:
        """Kullback-Leibler divergence of the repaired network's outputs from the original's on the fitting images."""
        key = f"distance {self._key_of(plan)}"
        if key not in self._lines.known:
            _, logits = self._repair(select_channels(self._graph, plan, self._bench.ranking))
            found, wanted = functional.log_softmax(logits, 1), functional.log_softmax(self._logits, 1)
            self._lines.add(key, float(functional.kl_div(found, wanted, reduction="batchmean", log_target=True)))
        return float(self._lines.known[key])

    def _repair(self, plan: Plan) -> tuple[nn.Module, Tensor]:
        """The network of a plan with selected channels, cut and refitted, and its outputs on the fitting images."""
        model: Any = apply_plan(self._model, self._graph, plan).eval()
        with torch.no_grad():
            now = _convolved(model.conv1, model.bn1, self._fitting).relu_()
            changed = "conv1" in plan.kept
            for name, block in _blocks(model):
                shortcut = _shortcut(block, now)
                changed = changed or name in plan.drop or any(f"{name}.conv{i}" in plan.kept for i in (1, 2))
                if name in plan.drop:
                    now = functional.relu(shortcut)
                    continue
                inner = _convolved(block.conv1, block.bn1, now).relu_()
                total = _convolved(block.conv2, block.bn2, inner).add_(shortcut)
                if changed:
                    self._refit(block, inner, total, self._targets[name], name, plan)
                    total = _convolved(block.conv2, block.bn2, inner).add_(shortcut)
                now = total.relu_()
            pooled = now.float().mean((2, 3))
            if changed:
                self._refit_classifier(model.linear, pooled)
            return model, model.linear(pooled)

    def _record(self) -> tuple[dict[str, _Target], Tensor]:
        """Targets by block, and the logits [N, classes]."""
        random = torch.Generator().manual_seed(0)
        model: Any = self._model
        now = _convolved(model.conv1, model.bn1, self._fitting.float()).relu_()
        targets = {}
        for name, block in _blocks(model):
            inner = _convolved(block.conv1, block.bn1, now).relu_()
            total = _convolved(block.conv2, block.bn2, inner) + _shortcut(block, now)
            count, _, height, width = total.shape
            image, y, x = (torch.randint(high, (ROWS,), generator=random) for high in (count, height, width))
            targets[name] = _Target(image, y, x, total[image, :, y, x])
            now = functional.relu(total)
        return targets, model.linear(now.mean((2, 3)))

    def _refit(self, block: Any, inner: Tensor, total: Tensor, target: _Target, name: str, plan: Plan) -> None:
        """Change conv2 and the mean of bn2 such that what is behind the addition, and passes the ReLU, is as before."""
        kept = kept_rows(f"{name}.conv2", self._graph, plan)
        wanted = target.values if len(kept) == target.values.shape[1] else target.values[:, kept]
        now = total[target.image, :, target.y, target.x].float()
        change = _ridge(_patches(inner, target), wanted, now) / _scale(block.bn2)
        outputs, inputs = block.conv2.weight.shape[:2]
        block.conv2.weight += change[:-1].t().reshape(outputs, 3, 3, inputs).permute(0, 3, 1, 2)
        block.bn2.running_mean -= change[-1]

    def _refit_classifier(self, layer: Any, pooled: Tensor) -> None:
        rows = torch.cat([pooled, pooled.new_ones(len(pooled), 1)], dim=1)
        change = torch.cholesky_solve(rows.t() @ (self._logits - layer(pooled)), _factor(rows))
        layer.weight += change[:-1].t()
        layer.bias += change[-1]


def _ridge(rows: Tensor, wanted: Tensor, now: Tensor) -> Tensor:
    """A change [columns, channels]: rows times it, added, brings `now` to `wanted` as far as a ReLU lets it through."""
    factor = _factor(rows)
    change = rows.new_zeros(rows.shape[1], now.shape[1])
    for _ in range(_STEPS):
        missing = torch.where(wanted > 0, wanted - now, -now.clamp_min(0))
        step = torch.cholesky_solve(rows.t() @ missing, factor)
        now, change = now + rows @ step, change + step
    return change


def _factor(rows: Tensor) -> Tensor:
    gram = rows.t() @ rows
    gram.diagonal().add_(_DAMPING * gram.diagonal().mean())
    factor: Tensor = torch.linalg.cholesky(gram)
    return factor


def _patches(values: Tensor, target: _Target) -> Tensor:
    """What a 3x3 convolution with padding reads at the target's positions, and a one: [ROWS, 9 * channels + 1]."""
    padded = functional.pad(values, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    parts = [padded[target.image, target.y + dy, target.x + dx] for dy in range(3) for dx in range(3)]
    parts.append(parts[0].new_ones(len(parts[0]), 1))
    return torch.cat(parts, dim=1).float()


def _convolved(layer: Any, norm: Any, x: Tensor) -> Tensor:
    """A convolution and its batch-norm in one, in the input's type."""
    scale = _scale(norm)
    weight = (layer.weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
    bias = (norm.bias - norm.running_mean * scale).to(x.dtype)
    return functional.conv2d(x, weight, bias, layer.stride, layer.padding)


def _scale(norm: Any) -> Tensor:
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return torch.where(scale.abs() < 1e-6, 1e-6, scale)


def _shortcut(block: Any, x: Tensor) -> Tensor:
    padding = block.padding
    return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, padding, padding)) if padding else x


def _blocks(model: Any) -> list[tuple[str, Any]]:
    stages: Mapping[str, Any] = {"layer1": model.layer1, "layer2": model.layer2, "layer3": model.layer3}
    return [(f"{stage}.{i}", block) for stage, blocks in stages.items() for i, block in enumerate(blocks)]
