"""A job over the tiny task: what the tests of recovery modes share."""

from __future__ import annotations

from typing import Any

from torch import nn

from automl_compress.core.plan import Plan
from automl_compress.recovery.job import Job
from automl_compress.techniques.distillation.losses import parse_losses
from automl_compress.techniques.distillation.objective import Distillation
from automl_compress.techniques.prune import apply_plan
from automl_compress.techniques.sparsify import apply_masks
from automl_compress.techniques.training.settings import Resources, Training
from tests import tiny
from tests.tiny import graph, ready

KEPT = {"block.conv1": (0, 2, 3, 5, 7, 8, 9, 15), "down": tuple(range(0, 32, 3))}


def make(plan: Plan, whole: nn.Module) -> nn.Module:
    model = apply_plan(whole, graph(), plan)
    apply_masks(model, graph(), plan)
    return model.eval()


def job(plan: Plan, **changes: Any) -> Job:
    teacher = tiny.teacher()
    losses = parse_losses("soft")
    parts: dict[str, Any] = {
        "task": ready(),
        "teacher": teacher,
        "graph": graph(),
        "plan": plan,
        "make": make,
        "objective": lambda plan: Distillation(ready(), teacher, losses),
        "training": Training(epochs=2),
        "resources": Resources(device="cpu", precision="float32"),
    }
    return Job(**{**parts, **changes})
