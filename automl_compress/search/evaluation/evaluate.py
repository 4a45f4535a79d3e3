"""The workbench on which plans become models and models get figures.

It holds everything about one task that is computed once and used by every trial: calibration samples, the exported
template, the ranking of channels, the teacher's activations and outputs. A trial's metric is that of the ONNX model in
the runtime, quantized layers included: what is compared in the search is what is delivered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.deploy.export import Template
from automl_compress.deploy.runtime import OnnxModel
from automl_compress.errors import TaskError
from automl_compress.model.batches import NO_BATCH
from automl_compress.model.outputs import arranged, check_labels, checked_forward
from automl_compress.model.surgery import copy_model
from automl_compress.model.task import Inputs, Task
from automl_compress.recovery.job import Make
from automl_compress.recovery.start import starting_model
from automl_compress.search.evaluation.student import REPAIR_SAMPLES, Outputs, Students, distance
from automl_compress.techniques.prune import Ranking, apply_plan, select_channels
from automl_compress.techniques.quantization.calibrate import activation_tensors
from automl_compress.techniques.quantization.fake_quant import FakeQuantized
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS, Executions
from automl_compress.techniques.quantization.tune import Calibration, Quantization, quantized, tune
from automl_compress.techniques.training.data import batches_in

CALIBRATION_SAMPLES = 512
_JUDGED = 256
TRAIN_SAMPLES = 1024
ONE_SHOT_SAMPLES = 2048


class Workbench:
    """Turns plans of one task into models, and measures how good they are (not how fast)."""

    def __init__(
        self,
        task: Task,
        graph: Graph,
        *,
        importance: str = "obs",
        seed: int = 0,
        threads: int | None = None,
        executions: Executions = DEFAULT_EXECUTIONS,
        repair_samples: int = REPAIR_SAMPLES,
    ) -> None:
        self.task, self.graph, self.importance, self.seed = task, graph, importance, seed
        self.executions = executions
        self._threads, self._repair_samples = threads, repair_samples
        self.teacher = copy_model(task.model).cpu().float().eval()

    @cached_property
    def template(self) -> Template:
        return Template(self.teacher, self.task.example_inputs, self.graph)

    @cached_property
    def _train(self) -> list[tuple[Inputs, Tensor]]:
        """Training samples for calibration, batch by batch, at most TRAIN_SAMPLES."""
        torch.manual_seed(self.seed)
        found = _limited(self.task, "train", TRAIN_SAMPLES)
        # Everything that runs on these samples takes for granted that the model can.
        shapes = {tuple(part.shape[1:] for part in inputs): inputs for inputs, _ in found}
        for inputs in shapes.values():
            checked_forward(self.teacher, tuple(part[:1] for part in inputs), "a train input")
        return found

    @property
    def samples(self) -> list[Inputs]:
        """The inputs of the training samples for calibration, batch by batch."""
        return [inputs for inputs, _ in self._train]

    @cached_property
    def validation(self) -> list[tuple[Inputs, Tensor]]:
        """Validation samples for one-shot trials, at most ONE_SHOT_SAMPLES."""
        return _limited(self.task, "validation", ONE_SHOT_SAMPLES)

    @cached_property
    def students(self) -> Students:
        """What turns plans into repaired models."""
        return Students(
            self.teacher,
            self.graph,
            lambda: self._train,
            loss=self.task.loss_of,
            classifies=self.task.classifies,
            importance=self.importance,
            seed=self.seed,
            repair_samples=self._repair_samples,
        )

    @property
    def ranking(self) -> Ranking:
        return self.students.ranking

    @cached_property
    def original(self) -> onnx.ModelProto:
        """The original as ONNX, batch-norms folded, nothing else changed."""
        return self.template.fill(self.teacher, Plan())

    @cached_property
    def _reference(self) -> list[Outputs]:
        return self._outputs(self.original, self._calibration)

    @cached_property
    def _answer(self) -> Any:
        """What the original returns, for the container that it is in."""
        return checked_forward(self.teacher, self.task.example_inputs, "the example input")

    @cached_property
    def _calibration(self) -> list[Inputs]:
        return head(self.samples, CALIBRATION_SAMPLES)

    @cached_property
    def _original_calibration(self) -> Calibration:
        """What one pass over calibration samples shows of the original; serves every plan that keeps its structure."""
        found = Calibration(self.original, self._feeds(self._calibration), self.executions)
        found.watch(activation_tensors(self.original, {layer.name: 8 for layer in self.graph.layers}))
        return found

    def student(self, plan: Plan) -> tuple[nn.Module, Plan]:
        """The plan's model without any training, and the plan with its channels selected.

        See `Students.make` for how it is repaired.
        """
        student = self.students.make(plan)
        return student.model, student.plan

    def starts(self, plan: Plan, repaired: nn.Module, epochs: float) -> Make:
        """What recovering a plan (channels selected) for so many epochs begins with: its own model as `starting_model`
        says; models of other plans, on the way to it, are repaired without training."""

        def make(other: Plan, whole: nn.Module) -> nn.Module:
            if whole is self.teacher and other == plan:
                return starting_model(repaired, whole, self.graph, plan, epochs * batches_in(self.task))
            return self.students.make(other, whole).model

        return make

    def structure(self, plan: Plan) -> onnx.ModelProto:
        """The plan's ONNX model with the right shapes and operators, but without repair and of any channels: enough to
        predict its cost."""
        plan = select_channels(self.graph, plan, None)
        model = self.template.fill(apply_plan(self.teacher, self.graph, plan), plan)
        # A model that was exported by itself may call its values differently; for the time, any range will do.
        anything = dict.fromkeys(activation_tensors(model, _low_bits(plan), self.executions), (-1.0, 1.0))
        ranges = {**anything, **self._original_calibration.ranges()}
        return quantized(model, _low_bits(plan), Quantization(ranges=ranges), self.executions, draft=True)

    def export(self, model: nn.Module, plan: Plan, found: Quantization | None = None) -> onnx.ModelProto:
        """The finished ONNX model; layers with fewer than 32 bits as `found` says, by default after calibration."""
        filled = self.template.fill(model, plan)
        known = self.quantization(model, plan) if found is None else found
        return quantized(filled, _low_bits(plan), known, self.executions)

    def quantization(self, model: nn.Module, plan: Plan, *, thorough: bool = False) -> Quantization:
        """What calibration on training samples decides for the plan's layers with fewer than 32 bits.

        `thorough` tries several ways and keeps the one that is nearest to the same model in 32 bits on other training
        samples. Not to the original: next to what a cut changes, what rounding does is chance on so few samples.
        """
        bits = _low_bits(plan)
        if not bits:
            return Quantization()
        calibration = self._calibration_of(model, plan)
        if not thorough:
            return tune(calibration, bits)
        inputs = head(self._unseen, _JUDGED)
        reference = self._outputs(calibration.model, inputs)

        def judge(tried: onnx.ModelProto) -> float:
            return distance(self._outputs(tried, inputs), reference, self.task.classifies)

        return tune(calibration, bits, judge)

    def trainable(self, model: nn.Module, plan: Plan, found: Quantization) -> FakeQuantized:
        """The plan's quantized model as one that can be trained. Raises ExportError if an operator prevents it."""
        filled = self.template.fill(model, plan)
        return FakeQuantized(filled, _low_bits(plan), found, self.executions, like=self._answer)

    def _calibration_of(self, model: nn.Module, plan: Plan) -> Calibration:
        if not plan.kept and not plan.drop and _same(model, self.teacher):
            return self._original_calibration
        return Calibration(self.template.fill(model, plan), self._feeds(self._calibration), self.executions)

    def one_shot(self, plan: Plan) -> float:
        """The metric on validation samples after pruning, repair and quantization, without training."""
        model, plan = self.student(plan)
        return self.metric(self.export(model, plan), self.validation)

    @cached_property
    def original_one_shot(self) -> float:
        """The original's metric on the samples of one-shot trials."""
        return self.metric(self.original, self.validation)

    @cached_property
    def _validation_samples(self) -> int:
        return sum(len(targets) for _, targets in self.task.batches("validation"))

    def standard_error(self, value: float, *, whole: bool = False) -> float:
        """By how much a metric errs for want of samples: that of a share of samples for classification, else unknown,
        and 0. Of the one-shot metric, or of that on the whole validation split."""
        if not self.task.classifies or not 0 < value < 1:
            return 0.0
        samples = self._validation_samples if whole else sum(len(targets) for _, targets in self.validation)
        return math.sqrt(value * (1.0 - value) / samples)

    def metric(self, model: onnx.ModelProto, data: Sequence[tuple[Inputs, Tensor]] | str) -> float:
        """The task's metric of an ONNX model on samples, or on a whole split by name."""
        batches = list(self.task.batches(data)) if isinstance(data, str) else data
        if not batches:
            raise TaskError(f"task: {data if isinstance(data, str) else 'validation'} data is empty")
        outputs = self._outputs(model, [inputs for inputs, _ in batches])
        targets = torch.cat([target for _, target in batches])
        parts = tuple(torch.from_numpy(np.concatenate(column)) for column in zip(*outputs, strict=True))
        if self.task.classifies:
            check_labels(targets, parts[0].shape[1], data if isinstance(data, str) else "validation")
        return self.task.metric_of(arranged(parts, self._answer), targets)

    def distance_of(self, plan: Plan) -> float:
        """How far the outputs are from the original's with a plan in force, on training samples: see `distance`.

        A quantized model runs as ONNX; one that is only cut is refitted and runs in PyTorch, on samples that the refit
        hasn't seen.
        """
        if not _low_bits(plan):
            return float(self.students.estimate(plan).mean())
        model, plan = self.student(plan)
        return self.distortion(self.export(model, plan))

    def distortion(self, model: onnx.ModelProto) -> float:
        """How far a model's outputs are from the original's on calibration samples; 0 for the original itself.

        Kullback-Leibler divergence (nats a sample) for classification, else squared error over the outputs' variance.
        """
        outputs = self._outputs(model, head(self._calibration, 256))
        return distance(outputs, self._reference[: len(outputs)], self.task.classifies)

    @cached_property
    def _unseen(self) -> list[Inputs]:
        """Training samples that calibration has not seen; where there are too few, the last ones that it has."""
        return tail(self.samples, max(_JUDGED, sum(len(part[0]) for part in self.samples) - CALIBRATION_SAMPLES))

    def _outputs(self, model: onnx.ModelProto, batches: Sequence[Inputs]) -> list[Outputs]:
        session = OnnxModel(model, self._threads)
        return [session(tuple(part.numpy() for part in inputs)) for inputs in batches]

    def _feeds(self, batches: Sequence[Inputs]) -> list[dict[str, np.ndarray]]:
        names = [value.name for value in self.original.graph.input]
        return [dict(zip(names, (part.numpy() for part in inputs), strict=True)) for inputs in batches]


def _low_bits(plan: Plan) -> dict[str, int]:
    return {layer: bits for layer, bits in plan.bits.items() if bits != FULL_BITS}


def _same(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same numbers."""
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def _limited(task: Task, split: str, samples: int) -> list[tuple[Inputs, Tensor]]:
    """The first batches of a split, in float32 on the CPU, up to a number of samples."""
    result: list[tuple[Inputs, Tensor]] = []
    left = samples
    for number, (inputs, targets) in enumerate(task.batches(split)):
        rows = tuple(_plain(part[:left]) for part in inputs)
        if any(part.is_floating_point() and bool(part.isnan().any()) for part in rows):
            raise TaskError(f"task: {split} batch {number} has NaN among its inputs; leave such samples out")
        result.append((rows, targets[:left].cpu()))
        left -= len(targets)
        if left <= 0:
            break
    if not result:
        raise TaskError(f"task: {split} data is empty: {NO_BATCH}")
    return result


def _plain(part: Tensor) -> Tensor:
    part = part.detach().cpu()
    return part.float() if part.is_floating_point() else part


def head(batches: Sequence[Inputs], samples: int) -> list[Inputs]:
    """The first `samples` rows of a list of batches."""
    result, left = [], samples
    for inputs in batches:
        if left <= 0:
            break
        result.append(tuple(part[:left] for part in inputs))
        left -= len(inputs[0])
    return result


def tail(batches: Sequence[Inputs], samples: int) -> list[Inputs]:
    """The last `samples` rows of a list of batches."""
    skipped = max(0, sum(len(inputs[0]) for inputs in batches) - samples)
    result = []
    for inputs in batches:
        rows = len(inputs[0])
        if skipped < rows:
            result.append(tuple(part[skipped:] for part in inputs))
        skipped = max(0, skipped - rows)
    return result
