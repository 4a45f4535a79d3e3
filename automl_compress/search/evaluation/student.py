"""From a plan to its model without training: channels selected, cut, repaired where held-out samples approve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.deploy.verify import torch_outputs
from automl_compress.model.surgery import copy_model
from automl_compress.model.task import Inputs
from automl_compress.techniques.evidence import Evidence
from automl_compress.techniques.importance import criterion
from automl_compress.techniques.least_squares import LayerRepair
from automl_compress.techniques.prune import Ranking, apply_plan, select_channels
from automl_compress.techniques.recover import recalibrate_batch_norm
from automl_compress.techniques.repair import Targets, record_targets, repair
from automl_compress.techniques.rows import ROWS
from automl_compress.techniques.sparsify import apply_masks, masks_in_force

REPAIR_SAMPLES = 384
JUDGE_SAMPLES = 256
_REPAIR_BYTES = 1 << 30
_PIECE = 64  # samples at a time: activations stay in nearer caches
_ALIVE = 3  # tensors of the widest layer's size that live at once while a model runs
Outputs = tuple[np.ndarray, ...]
Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Student:
    """A plan's model in eval mode, the plan with its channels selected, and what was repaired.

    layers  layer name -> what its refit did on held-out rows
    repair  what was kept in the end: 'none', 'refit', or 'refit and batch-norm'
    """

    model: nn.Module
    plan: Plan
    layers: Mapping[str, LayerRepair] = field(default_factory=dict)
    repair: str = "none"


class Students:
    """Makes the students of one teacher (eval mode, CPU, never modified); what is the same for all is computed once.

    batches  training inputs and targets: the first `repair_samples` are for fitting (fewer where activations are large:
             they are all in memory at once), the next `judge_samples` decide which repair is kept
    rows     positions of each layer that it is fitted to, at most
    """

    def __init__(
        self,
        teacher: nn.Module,
        graph: Graph,
        batches: Callable[[], Sequence[tuple[Inputs, Tensor]]],
        *,
        loss: Callable[..., Tensor],
        classifies: bool,
        importance: str = "obs",
        seed: int = 0,
        repair_samples: int = REPAIR_SAMPLES,
        judge_samples: int = JUDGE_SAMPLES,
        rows: int = ROWS,
    ) -> None:
        self.teacher, self.graph = teacher, graph
        self._batches, self._classifies = batches, classifies
        self._importance = criterion(importance)
        self._repair_samples, self._judge_samples, self._rows = repair_samples, judge_samples, rows
        self.evidence = Evidence(teacher, graph, batches=batches, loss=loss, seed=seed)

    @cached_property
    def ranking(self) -> Ranking:
        return Ranking(self.evidence, self._importance)

    @cached_property
    def targets(self) -> Targets:
        """The original's values on the fitting samples."""
        wanted = min(self._repair_samples, max(1, _REPAIR_BYTES // bytes_per_sample(self.graph)))
        rows = uniform_rows([inputs for inputs, _ in self._batches()])
        # Something must be left to judge by.
        count = min(wanted, max(1, len(rows[0]) * 3 // 4))
        inputs = tuple(part[:count] for part in rows)
        return record_targets(self.teacher, self.graph, inputs, self._rows)

    @cached_property
    def judge(self) -> tuple[Tensor, ...]:
        """The samples that repairs are judged by, not among those that they were fitted to unless there is only one."""
        rows = uniform_rows([inputs for inputs, _ in self._batches()])
        used = len(self.targets.inputs[0])
        return tuple(part[used : used + self._judge_samples] if len(part) > used else part for part in rows)

    @cached_property
    def _reference(self) -> list[Outputs]:
        return self._outputs(self.teacher)

    def make(self, plan: Plan, base: nn.Module | None = None) -> Student:
        """The plan's model, cut from `base` (of full size; default: the teacher).

        Of the cut model as it is, the refitted one, and that with its batch-norms recalibrated, it is the one nearest
        to the original's outputs on samples that none of them was fitted to.
        """
        plan = select_channels(self.graph, plan, self.ranking)
        cut = apply_plan(self.teacher if base is None else base, self.graph, plan).eval()
        if not plan.kept and not plan.drop and not masks_in_force(self.graph, plan):
            return Student(model=cut, plan=plan)
        refitted = copy_model(cut)
        layers = repair(refitted, self.graph, plan, self.targets)
        for model in (cut, refitted):
            apply_masks(model, self.graph, plan)
        candidates: dict[str, nn.Module] = {"none": cut, "refit": refitted}
        recalibrated = copy_model(refitted)
        if recalibrate_batch_norm(recalibrated, [self.targets.inputs]):
            candidates["refit and batch-norm"] = recalibrated.eval()
        errors = {name: float(np.nan_to_num(self.distances(m).mean(), nan=np.inf)) for name, m in candidates.items()}
        best = min(errors, key=errors.__getitem__)
        return Student(model=candidates[best], plan=plan, layers=layers, repair=best)

    def estimate(self, plan: Plan) -> Vector:
        """`distances` of the refitted model alone: for comparing many plans."""
        plan = select_channels(self.graph, plan, self.ranking)
        model = apply_plan(self.teacher, self.graph, plan).eval()
        repair(model, self.graph, plan, self.targets)
        apply_masks(model, self.graph, plan)
        return self.distances(model)

    def distances(self, model: nn.Module) -> Vector:
        """How far a model's outputs are from the original's on each of the samples that judge; see `distance`."""
        return distances(self._outputs(model), self._reference, self._classifies)

    def _outputs(self, model: nn.Module) -> list[Outputs]:
        starts = range(0, len(self.judge[0]), _PIECE)
        return [torch_outputs(model, tuple(part[i : i + _PIECE] for part in self.judge)) for i in starts]


def bytes_per_sample(graph: Graph) -> int:
    """Of activations that live at once, estimated from the widest layer."""
    return max(4 * _ALIVE * (prod(layer.input_shape) + prod(layer.output_shape)) for layer in graph.layers)


def uniform_rows(batches: Sequence[Inputs]) -> tuple[Tensor, ...]:
    """All batches in one, those whose samples have another shape than the first's left out."""
    shapes = [tuple(part.shape[1:] for part in inputs) for inputs in batches]
    alike = [inputs for inputs, shape in zip(batches, shapes, strict=True) if shape == shapes[0]]
    return tuple(torch.cat(parts) for parts in zip(*alike, strict=True))


def distance(outputs: Sequence[Outputs], reference: Sequence[Outputs], classifies: bool) -> float:
    """The mean of `distances`."""
    return float(distances(outputs, reference, classifies).mean())


def distances(outputs: Sequence[Outputs], reference: Sequence[Outputs], classifies: bool) -> Vector:
    """Mean over the model's outputs of the Kullback-Leibler divergence (nats) for classification, else of the squared
    error over the outputs' variance, for each sample. The reference may have more rows."""
    pairs: Any = zip(zip(*outputs, strict=True), zip(*reference, strict=True), strict=True)
    found = [_distances(np.concatenate(a), np.concatenate(b), classifies) for a, b in pairs]
    result: Vector = np.mean(found, axis=0)
    return result


def _distances(one: np.ndarray, other: np.ndarray, classifies: bool) -> Vector:
    one, other = one.astype(np.float64), other.astype(np.float64)[: len(one)]
    if classifies:
        p, q = _log_softmax(other), _log_softmax(one)
        result: Vector = (np.exp(p) * (p - q)).sum(axis=1)
        means: Vector = result.reshape(len(one), -1).mean(axis=1)
        return means
    squares: Vector = ((one - other) ** 2).reshape(len(one), -1).mean(axis=1) / max(float(other.var()), 1e-12)
    return squares


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
