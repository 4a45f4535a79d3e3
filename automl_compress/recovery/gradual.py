"""Gradual recovery: the plan comes into force step by step, and each step is trained on before the next one.

A step cuts the model a little further (channels, blocks, masks), repairs it without training and trains it, its weights
rounded to fewer bits from step to step where the plan says so (see `rounded`). Models get smaller on the way, so early
steps cost what whole models do and late ones what the plan's does. What was trained is written back to the whole model
before it is cut again, whose channels are removed in the order of their present size.
"""

from __future__ import annotations

from collections.abc import Mapping

from automl_compress.core.plan import Plan
from automl_compress.model.surgery import copy_model
from automl_compress.recovery.approach import Shape, cubic, plan_at, removal_order
from automl_compress.recovery.curriculum import Easiest, pace
from automl_compress.recovery.job import Job, Recovered
from automl_compress.recovery.nested import write_back
from automl_compress.recovery.rounded import Rounded
from automl_compress.techniques.objective import Objective
from automl_compress.techniques.training.log import TrainingLog

STEPS = 4
RAMP_SHARE = 0.4  # of the epochs, in which the plan comes into force
RAMP_RATE = 0.25  # of the learning rate's peak: the weights should settle, not start afresh


def gradual(job: Job, *, steps: int = STEPS, shape: Shape = cubic) -> Recovered:
    """Approach the plan in `steps` steps along a schedule, then train on at full size of the plan."""
    whole = copy_model(job.teacher)
    logs: list[TrainingLog] = []
    order: Mapping[str, list[int]] = removal_order(whole, job.graph, job.plan)
    epochs = job.training.epochs * RAMP_SHARE / max(1, steps - 1)
    for number in range(1, steps):
        plan = plan_at(job.plan, job.graph, shape(number / steps), order)
        model = job.make(plan, whole)
        objective = _rounded(job, plan, shape(number / steps))
        if job.easy_first:
            objective = Easiest(objective, job.task, job.teacher, pace(number / steps))
        logs.append(
            job.train(
                model,
                objective,
                f"step {number} of {steps}",
                job.held(model, plan),
                epochs=epochs,
                schedule="constant",
                warm_up=0.1,
                learning_rate=job.training.learning_rate * RAMP_RATE,
                deliver="last",
            )
        )
        write_back(whole, model, job.graph, plan)
        order = _continued(order, plan.kept, removal_order(whole, job.graph, job.plan))
    model = job.make(job.plan, whole)
    left = job.training.epochs * (1 - RAMP_SHARE if steps > 1 else 1)
    logs.append(
        job.train(
            model,
            _rounded(job, job.plan, 1.0),
            f"step {steps} of {steps}",
            job.held(model, job.plan),
            validate=job.validate,
            epochs=left,
        )
    )
    return Recovered(model=model, plan=job.plan, logs=tuple(logs))


def _rounded(job: Job, plan: Plan, share: float) -> Objective:
    """The plan's objective, with weights on the way to its bits."""
    objective = Rounded(job.objective(plan), job.graph, plan)
    objective.share = share
    return objective


def _continued(
    before: Mapping[str, list[int]], kept: Mapping[str, tuple[int, ...]], now: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """What is gone already, then the rest in its present order."""
    gone = {name: set(before[name]) - set(kept[name]) if name in kept else set() for name in before}
    return {
        name: [*(c for c in before[name] if c in gone[name]), *(c for c in now[name] if c not in gone[name])]
        for name in now
    }
