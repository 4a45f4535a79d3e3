"""How part (c) trains every model: the product's default recovery, without the last stage, training with rounding."""

from __future__ import annotations

from torch import nn

from automl_compress.core.plan import Plan
from automl_compress.recovery.job import Job
from automl_compress.recovery.modes import mode_of
from automl_compress.recovery.names import DEFAULT_MODE
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.techniques.distillation.losses import DEFAULT, parse_losses
from automl_compress.techniques.distillation.objective import Distillation
from automl_compress.techniques.distillation.pairing import pair_layers
from automl_compress.techniques.prune import apply_plan
from automl_compress.techniques.training.settings import Training


def recovered(bench: Workbench, plan: Plan, epochs: float, *, repaired: bool) -> tuple[nn.Module, Plan]:
    """The plan's trained model, and the plan with its channels selected.

    repaired  whether it may start from the repaired model, as the product's short trainings do; other routes have
              selected their channels and know no repair
    """
    losses = parse_losses(DEFAULT)
    student, full = bench.student(plan) if repaired else (apply_plan(bench.teacher, bench.graph, plan), plan)

    def objective(other: Plan) -> Distillation:
        pairs = pair_layers(bench.graph, other, bench.teacher) if losses.features else ()
        return Distillation(bench.task, bench.teacher, losses, pairs)

    job = Job(
        task=bench.task,
        teacher=bench.teacher,
        graph=bench.graph,
        plan=full,
        make=bench.starts(full, student, epochs),
        objective=objective,
        training=Training(epochs=epochs),
    )
    done = mode_of(DEFAULT_MODE)(job)
    return done.model, done.plan
