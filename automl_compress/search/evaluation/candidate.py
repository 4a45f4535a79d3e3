"""A recovered model and its files: the plan with its ranges, the weights, and the model that they make again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.errors import PlanError, first_line
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.techniques.prune import apply_plan
from automl_compress.techniques.quantization.files import PREFIX, from_tensors
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS, Executions
from automl_compress.techniques.quantization.tune import Limits, Quantization


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan's recovered model: its selected channels, activation ranges, validation metric, weights and ONNX file.

    training  what was trained for it, a `TrainingLog.to_json` each
    contender     under which name it competes with the plans' own models; '' for one of these
    width, bench  of a student of the task's own: what it was made with, and the workbench whose original it is
    """

    plan: Plan
    ranges: Mapping[str, Limits]
    metric: float
    weights: Path
    onnx: Path
    training: tuple[Mapping[str, Any], ...]
    seconds: float
    notes: tuple[str, ...] = ()
    bench: Workbench | None = None
    width: float | None = None
    contender: str = ""

    def model(self, bench: Workbench) -> nn.Module:
        """The PyTorch model, rebuilt from the original, the plan and the weights."""
        return rebuild(self.bench or bench, self.plan, self.weights)


def rebuild(bench: Workbench, plan: Plan, weights: Path) -> nn.Module:
    """The PyTorch model of a plan with selected channels and stored weights, in floating point.

    Raises PlanError if they don't fit.
    """
    model = apply_plan(bench.teacher, bench.graph, plan)
    try:
        stored = load_file(weights)
        model.load_state_dict({name: value for name, value in stored.items() if not name.startswith(PREFIX)})
    except (RuntimeError, OSError, SafetensorError) as error:
        raise PlanError(f"{weights}: doesn't fit the plan ({first_line(error)})") from error
    return model.eval()


def stored_quantization(weights: Path, ranges: Mapping[str, Limits]) -> Quantization:
    """What a candidate's weights' file holds about its integers, with its ranges. Raises PlanError."""
    try:
        return from_tensors(load_file(weights), ranges)
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{weights}: can't be read ({first_line(error)})") from error


def read_plan(path: Path, graph: Graph) -> tuple[Plan, dict[str, Limits], Executions]:
    """A delivered plan file, checked against the model, the ranges of its activations, and how its device runs each
    bit-width. Raises PlanError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        ranges = {str(value): (float(low), float(high)) for value, (low, high) in data.get("ranges", {}).items()}
        executions = {(str(kind), int(bits)): how for kind, bits, how in data.get("executions", [])}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PlanError(f"{path}: can't be read as a plan ({error})") from error
    return Plan.from_json(data, graph), ranges, executions or DEFAULT_EXECUTIONS


def student_width(path: Path) -> float | None:
    """The width of the task's own student that a plan file belongs to; None for the original's. Raises PlanError."""
    try:
        width = json.loads(path.read_text(encoding="utf-8")).get("student")
        return None if width is None else float(width)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PlanError(f"{path}: can't be read as a plan ({error})") from error


def plan_file(candidate: Candidate, bench: Workbench) -> dict[str, Any]:
    """What `read_plan` reads: with the original and the weights, all that makes the delivered model again.

    A student of the task's own is told by `student`, its width; the plan is then that network's.
    """
    bench = candidate.bench or bench
    ranges = {value: list(limits) for value, limits in candidate.ranges.items()}
    executions = [[kind, bits, how] for (kind, bits), how in sorted(bench.executions.items())]
    own = {} if candidate.width is None else {"student": candidate.width}
    return {**candidate.plan.to_json(bench.graph), "ranges": ranges, "executions": executions, **own}
