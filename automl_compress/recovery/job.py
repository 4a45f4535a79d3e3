"""What a recovery starts from and what it ends with: the base that all modes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.model.task import Task
from automl_compress.techniques.objective import Objective
from automl_compress.techniques.sparsify import held_masks
from automl_compress.techniques.training.keeper import Validate
from automl_compress.techniques.training.log import OnStep, TrainingLog
from automl_compress.techniques.training.loop import train
from automl_compress.techniques.training.optimizers import ChangingMasks
from automl_compress.techniques.training.settings import Resources, Training

Make = Callable[[Plan, nn.Module], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """A trained model in eval mode, the plan that it follows (channels selected), and what was trained for it."""

    model: nn.Module
    plan: Plan
    logs: tuple[TrainingLog, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A plan to recover a model for.

    teacher    the original at full size, in eval mode; never modified
    plan       with its channels selected
    make       (plan, a model at full size) -> that model cut to the plan and repaired without training
    objective  plan -> what a model that follows it is trained for
    training   of all stages together: their epochs add up to its
    label      how stages are named
    validate   decides on the last stage: what is delivered, when to stop early
    easy_first begin with samples that are easy for the teacher (see `curriculum`), in modes that have steps
    scratch    end-to-end: from fresh weights instead of the teacher's
    """

    task: Task
    teacher: nn.Module
    graph: Graph
    plan: Plan
    make: Make
    objective: Callable[[Plan], Objective]
    training: Training
    seed: int = 0
    resources: Resources = field(default_factory=Resources)
    on_step: OnStep | None = None
    label: str = "recovery"
    validate: Validate | None = None
    easy_first: bool = False
    scratch: bool = False

    def train(
        self,
        model: nn.Module,
        objective: Objective,
        stage: str,
        masks: Mapping[str, Tensor] | ChangingMasks | None = None,
        *,
        validate: Validate | None = None,
        **changes: object,
    ) -> TrainingLog:
        """Train a model in place for one stage ('': the only one); `changes` are settings that differ from the job's.

        Every stage has a checkpoint of its own, which stays until the job is done: after an interruption the finished
        stages are read, not trained.
        """
        resources = self.resources
        if resources.checkpoint is not None and stage:
            file = resources.checkpoint.with_name(f"{resources.checkpoint.name}-{stage.replace(' ', '-')}")
            resources = replace(resources, checkpoint=file)
        return train(
            model,
            self.task,
            objective,
            replace(self.training, **changes),  # type: ignore[arg-type]
            seed=self.seed,
            masks=masks,
            validate=validate,
            on_step=self.on_step,
            resources=resources,
            label=f"{self.label}, {stage}" if stage else self.label,
        )

    def held(self, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
        """The masks that a model has which follows a plan."""
        return held_masks(model, self.graph, plan)
