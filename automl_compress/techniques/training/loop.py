"""Train a model on a task until an objective is low: steps, validation, rollback, and what is delivered.

    train(student, task, objective, Training(epochs=3, average=0.999))

trains in place. The loop knows nothing of distillation, pruning or bits: the objective holds the teacher, masks say
which weights stay zero.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from automl_compress.errors import TaskError, TrainingError
from automl_compress.model.task import Batch, Task
from automl_compress.techniques.objective import Loss, Objective
from automl_compress.techniques.training import randomness
from automl_compress.techniques.training.averaging import Average
from automl_compress.techniques.training.data import Batches
from automl_compress.techniques.training.divergence import Watch
from automl_compress.techniques.training.log import OnStep, Recorder, StepReport, TrainingLog
from automl_compress.techniques.training.optimizers import Held, make_optimizer, set_rate
from automl_compress.techniques.training.placement import Placement
from automl_compress.techniques.training.rates import momentum, rate
from automl_compress.techniques.training.settings import Resources, Training
from automl_compress.techniques.training.state import Tensors, Trained, kept, live, write

Validate = Callable[[nn.Module], float]
_GOOD_EVERY = 50  # steps between the states that a rollback can go back to


def train(
    student: nn.Module,
    task: Task,
    objective: Objective,
    training: Training,
    *,
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
    validate: Validate | None = None,
    on_step: OnStep | None = None,
    resources: Resources = Resources(),  # noqa: B008 - frozen
    label: str = "training",
    clock: Callable[[], float] = time.monotonic,
) -> TrainingLog:
    """Train `student` in place on the task's training data, and leave it in eval mode.

    masks     parameter name -> which of its weights train; the others are zero before and after every step
    validate  the metric of a model in eval mode, higher is better: decides what is delivered, and when to stop early
    on_step   called after every step
    label     the stage's name, for people

    The same seed, data, settings and number of threads give the same student. Inputs reach the objective on the
    student's device; in the chosen precision it runs under autocast, with the student's outputs in float32.

    Raises TaskError for data that can't be read or a loss that is no scalar, TrainingError for a training that keeps
    diverging, InputError for a device that isn't there.
    """
    return _Run(student, task, objective, training, seed, masks or {}, validate, on_step, resources, label, clock)()


class _Run:
    def __init__(
        self,
        student: nn.Module,
        task: Task,
        objective: Objective,
        training: Training,
        seed: int,
        masks: Mapping[str, Tensor],
        validate: Validate | None,
        on_step: OnStep | None,
        resources: Resources,
        label: str,
        clock: Callable[[], float],
    ) -> None:
        self.student, self.objective, self.training, self.seed = student, objective, training, seed
        self.validate, self.on_step, self.label, self.clock = validate, on_step, label, clock
        self.home = next(iter(student.parameters())).device
        self.placement = Placement.choose(student, resources)
        self.placement.place(student)
        others = objective.modules()
        if others is not None:
            self.placement.place(others)
        self.optimizer = make_optimizer(student, others, training)
        self.held = Held(student, masks)
        self.average = Average(student, training.average) if training.average else None
        self.trained = Trained(student, others, self.optimizer, self.average)
        self.generators = randomness.generators_in(task.train)
        self.batches = Batches(task, self.generators)
        self.steps = max(1, round(training.epochs * self.batches.length))
        self.recorder, self.watch = Recorder(self.steps), Watch()
        self.step = self.images = self.rollbacks = self.waited = 0
        self.scale, self.best_metric = 1.0, -math.inf
        self.best: Tensors | None = None
        self.best_label, self.notes, self.good = "last", list[str](), Tensors()
        self.metric: float | None = None

    def __call__(self) -> TrainingLog:
        self.begun = self.clock()
        with randomness.seeded(self.seed, self.generators):
            self.good = self.trained.copy()
            self.student.train()
            while self.step < self.steps and not self._finished_early():
                self._advance()
        self._deliver()
        return TrainingLog(
            label=self.label,
            curves=self.recorder.curves(self.step),
            images=self.images,
            seconds=self.clock() - self.begun,
            rollbacks=self.rollbacks,
            metric=self.metric,
            delivered=self.best_label,
            computed=self.placement.words,
            notes=(*self.notes, *self.batches.notes),
        )

    def _advance(self) -> None:
        """One step, and what is due after it."""
        batch = self.placement.batch(self.batches.next())
        learning_rate = self.scale * rate(self.training, self.step, self.steps)
        set_rate(self.optimizer, learning_rate, momentum(self.training, self.step, self.steps))
        loss, parts, gradient = self._gradients(batch)
        self.step += 1
        wrong = self.watch.verdict(loss, gradient)
        if wrong:
            self._roll_back(wrong)
        else:
            self.optimizer.step()
            self.held.weights()
            if self.average is not None:
                self.average.update()
            self.images += len(batch[1])
            self.recorder.step(self.step, loss, learning_rate)
        if self._validation_is_due():
            self._validate()
        if self.step % _GOOD_EVERY == 0 and self.watch.calm and not wrong:
            self.good = self.trained.copy()
        if self.on_step:
            self.on_step(self._report(loss, parts, learning_rate))

    def _gradients(self, batch: Batch) -> tuple[float, dict[str, float], float]:
        """Loss, its parts, and the norm of the gradients, which are left in the parameters (clipped)."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        total = float(loss.total.detach())
        if not math.isfinite(total):
            return total, {}, 0.0
        self._backward(loss.total, batch)
        self.held.gradients()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.training.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.training.clip, norm)
        return total, {name: float(part) for name, part in loss.parts.items()}, float(norm)

    def _loss(self, batch: Batch) -> Loss:
        try:
            with self.placement.computing(self.student), self.placement.autocast():
                loss = self.objective(self.student, batch)
        except (RuntimeError, ValueError) as error:
            raise _step_failed(batch, error) from error
        except IndexError as error:  # cross-entropy on a class that the model doesn't have
            raise TaskError(f"task: train labels are out of range: {error}") from error
        if loss.total.ndim != 0:
            raise TaskError(f"the task's loss must return a scalar tensor, found shape {tuple(loss.total.shape)}")
        return loss

    def _backward(self, total: Tensor, batch: Batch) -> None:
        try:
            total.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise _step_failed(batch, error) from error

    def _roll_back(self, wrong: str) -> None:
        """The weights go back to where nothing was wrong; data and schedule go on, at half the rate."""
        self.rollbacks += 1
        where = f"at step {self.step} of {self.steps}"
        if self.rollbacks > self.training.rollbacks:
            raise TrainingError(
                f"{where} {wrong}, after {self.rollbacks - 1} rollbacks (training.rollbacks); lower the learning rate "
                f"(now {self.training.learning_rate:g}) or check the data"
            )
        self.trained.put_back(self.good)
        self.scale /= 2
        self.watch.forgive()
        self.notes.append(f"{where} {wrong}: rolled back, learning rate times {self.scale:g} from there")

    def _validation_is_due(self) -> bool:
        if self.validate is None:
            return False
        every = max(1, round(self.training.validate_every * self.batches.length))
        return self.step % every == 0 or self.step == self.steps

    def _validate(self) -> None:
        """Look whether the weights, or their average, are the best so far."""
        assert self.validate is not None
        metric, better = self._metric(self.validate), False
        found = [("best" if self.step < self.steps else "last", metric, live(self.student))]
        if self.average is not None:
            now = {name: kept(value) for name, value in live(self.student).items()}
            write(live(self.student), self.average.state)
            found.append(("average", self._metric(self.validate), self.average.state))
            write(live(self.student), now)
        for label, value, state in found:
            if value > self.best_metric or (value == self.best_metric and not better):
                better = better or value > self.best_metric
                self.best_metric, self.best_label = value, label
                self.best = {name: kept(tensor) for name, tensor in state.items()}
        self.waited = 0 if better else self.waited + 1
        self.metric = max(value for _, value, _ in found)
        self.recorder.metric(self.step, self.metric)

    def _metric(self, validate: Validate) -> float:
        self.student.eval()
        with torch.no_grad():
            value = float(validate(self.student))
        self.student.train()
        if math.isnan(value):
            raise TaskError("the metric on validation data is NaN: check the metric, the data and the model's outputs")
        return value

    def _finished_early(self) -> bool:
        if self.training.patience is None or self.waited < self.training.patience:
            return False
        self.notes.append(f"stopped at step {self.step} of {self.steps}: no better metric in {self.waited} validations")
        return True

    def _deliver(self) -> None:
        """Leave in the student what was asked for."""
        wanted = self.training.deliver
        if wanted == "average" or (wanted == "best" and self.validate is None and self.average is not None):
            assert self.average is not None
            write(live(self.student), self.average.state)
            self.best_label = "average"
        elif wanted == "best" and self.best is not None:
            write(live(self.student), self.best)
            self.metric = self.best_metric
        else:
            self.best_label = "last"
        self.optimizer.zero_grad(set_to_none=True)
        self.student.to(self.home)
        self.student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.student.eval()

    def _report(self, loss: float, parts: dict[str, float], learning_rate: float) -> StepReport:
        seconds = max(self.clock() - self.begun, 1e-9)
        return StepReport(
            label=self.label,
            step=self.step,
            steps=self.steps,
            loss=loss,
            parts=parts,
            metric=self.metric,
            learning_rate=learning_rate,
            images_per_second=self.images / seconds,
            seconds_left=seconds / self.step * (self.steps - self.step),
            rollbacks=self.rollbacks,
        )


def _step_failed(batch: Batch, error: Exception) -> Any:
    shapes = ", ".join(str(tuple(part.shape)) for part in batch[0])
    return TrainingError(f"a training step on inputs {shapes} failed: {str(error).partition(chr(10))[0]}")
