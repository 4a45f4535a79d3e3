"""The workbench on which plans become models and models get figures.

It holds everything about one task that is computed once and used by every trial: calibration samples, the exported
template, the ranking of channels, the teacher's activations and outputs. A trial's metric is that of the ONNX model in
the runtime, quantized layers included: what is compared in the search is what is delivered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.deploy.export import Template
from automl_compress.deploy.runtime import OnnxModel
from automl_compress.errors import TaskError
from automl_compress.model.surgery import copy_model
from automl_compress.model.task import Inputs, Task, check_labels
from automl_compress.search.student import REPAIR_SAMPLES, Outputs, Students, distance
from automl_compress.techniques.prune import Ranking, apply_plan, select_channels
from automl_compress.techniques.quantization.calibrate import activation_tensors, calibrate
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS, Executions
from automl_compress.techniques.quantization.rewrite import quantize

CALIBRATION_SAMPLES = 512
TRAIN_SAMPLES = 1024
ONE_SHOT_SAMPLES = 2048
Ranges = Mapping[str, tuple[float, float]]


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
        return _limited(self.task, "train", TRAIN_SAMPLES)

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
    def _calibration(self) -> list[Inputs]:
        return head(self.samples, CALIBRATION_SAMPLES)

    @cached_property
    def _original_ranges(self) -> Ranges:
        """Activation ranges of the original for every tensor that some plan quantizes."""
        bits = {layer.name: 8 for layer in self.graph.layers}
        tensors = activation_tensors(self.original, bits)  # 8 bits run in integers by default
        return calibrate(self.original, self._feeds(self._calibration), tensors)

    def student(self, plan: Plan) -> tuple[nn.Module, Plan]:
        """The plan's model without any training, and the plan with its channels selected.

        See `Students.make` for how it is repaired.
        """
        student = self.students.make(plan)
        return student.model, student.plan

    def structure(self, plan: Plan) -> onnx.ModelProto:
        """The plan's ONNX model with the right shapes and operators but without repair: enough to predict its cost."""
        plan = select_channels(self.graph, plan, self.ranking)
        model = self.template.fill(apply_plan(self.teacher, self.graph, plan), plan)
        return self._quantized(model, plan, self._original_ranges)

    def export(self, model: nn.Module, plan: Plan, ranges: Ranges | None = None) -> onnx.ModelProto:
        """The finished ONNX model: layers with fewer than 32 bits quantized with `ranges`, by default those of
        training samples."""
        filled = self.template.fill(model, plan)
        return self._quantized(filled, plan, self.ranges(model, plan) if ranges is None else ranges)

    def ranges(self, model: nn.Module, plan: Plan) -> Ranges:
        """Value name -> (low, high) of every activation that the plan quantizes, from training samples."""
        bits = _low_bits(plan)
        if not bits:
            return {}
        filled = self.template.fill(model, plan)
        return calibrate(filled, self._feeds(self._calibration), activation_tensors(filled, bits, self.executions))

    def one_shot(self, plan: Plan) -> float:
        """The metric on validation samples after pruning, repair and quantization, without training."""
        model, plan = self.student(plan)
        return self.metric(self.export(model, plan), self.validation)

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
        return self.task.metric_of(parts[0] if len(parts) == 1 else parts, targets)

    def distortion(self, model: onnx.ModelProto) -> float:
        """How far a model's outputs are from the original's on calibration samples; 0 for the original itself.

        Kullback-Leibler divergence (nats a sample) for classification, else squared error over the outputs' variance.
        """
        outputs = self._outputs(model, head(self._calibration, 256))
        return distance(outputs, self._reference[: len(outputs)], self.task.classifies)

    def _quantized(self, model: onnx.ModelProto, plan: Plan, ranges: Ranges) -> onnx.ModelProto:
        bits = _low_bits(plan)
        return quantize(model, bits, ranges, executions=self.executions) if bits else model

    def _outputs(self, model: onnx.ModelProto, batches: Sequence[Inputs]) -> list[Outputs]:
        session = OnnxModel(model, self._threads)
        return [session(tuple(part.numpy() for part in inputs)) for inputs in batches]

    def _feeds(self, batches: Sequence[Inputs]) -> list[dict[str, np.ndarray]]:
        names = [value.name for value in self.original.graph.input]
        return [dict(zip(names, (part.numpy() for part in inputs), strict=True)) for inputs in batches]


def _low_bits(plan: Plan) -> dict[str, int]:
    return {layer: bits for layer, bits in plan.bits.items() if bits != FULL_BITS}


def _limited(task: Task, split: str, samples: int) -> list[tuple[Inputs, Tensor]]:
    """The first batches of a split, in float32 on the CPU, up to a number of samples."""
    result: list[tuple[Inputs, Tensor]] = []
    left = samples
    for inputs, targets in task.batches(split):
        rows = tuple(_plain(part[:left]) for part in inputs)
        result.append((rows, targets[:left].cpu()))
        left -= len(targets)
        if left <= 0:
            break
    if not result:
        raise TaskError(f"task: {split} data is empty: its loader yields no batch")
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
