"""Train a model on a task until an objective is low: steps, validation, rollback, and what is delivered.

    train(student, task, objective, Training(epochs=3, average=0.999))

trains in place. The loop knows nothing of distillation, pruning or bits: the objective holds the teacher, masks say
which weights stay zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from automl_compress.errors import TrainingError
from automl_compress.model.task import Batch, Task
from automl_compress.techniques.objective import Objective
from automl_compress.techniques.training import randomness
from automl_compress.techniques.training.averaging import Average
from automl_compress.techniques.training.checkpoint import digest, load_checkpoint, prefixed, save_checkpoint, without
from automl_compress.techniques.training.data import Batches
from automl_compress.techniques.training.divergence import Watch
from automl_compress.techniques.training.interruption import between_steps
from automl_compress.techniques.training.keeper import Keeper, Validate
from automl_compress.techniques.training.log import OnStep, Recorder, StepReport, TrainingLog
from automl_compress.techniques.training.optimizers import ChangingMasks, Held, Masks, make_optimizer, set_rate
from automl_compress.techniques.training.own_loop import run_own_loop
from automl_compress.techniques.training.parallel import Processes
from automl_compress.techniques.training.placement import Placement
from automl_compress.techniques.training.rates import momentum, rate
from automl_compress.techniques.training.settings import Resources, Training
from automl_compress.techniques.training.state import Tensors, Trained, live
from automl_compress.techniques.training.step import Gradients

_GOOD_EVERY = 50  # steps between the states that a rollback can go back to
_DEFAULT = Resources()


def train(
    student: nn.Module,
    task: Task,
    objective: Objective,
    training: Training,
    *,
    seed: int = 0,
    masks: Masks | ChangingMasks | None = None,
    validate: Validate | None = None,
    on_step: OnStep | None = None,
    resources: Resources = _DEFAULT,
    label: str = "training",
    clock: Callable[[], float] = time.monotonic,
) -> TrainingLog:
    """Train `student` in place on the task's training data, and leave it in eval mode.

    masks     parameter name -> which of its weights train; the others are zero before and after every step. Or a
              function that is asked before every step: (step, steps) -> masks that hold from then on, None for the same
    validate  the metric of a model in eval mode, higher is better: decides what is delivered, and when to stop early
    on_step   called after every step
    label     the stage's name, for people

    The same seed, data, settings and number of threads give the same student, interrupted or not: at Ctrl-C the step in
    flight is finished and the state written before KeyboardInterrupt is raised; a second one raises it at once. Inputs
    reach the objective on the student's device; in the chosen precision it runs under autocast, with the student's
    outputs in float32.

    A task with a loop of its own has that one called instead (see `own_loop`).

    Raises TaskError for data that can't be read or a loss that is no scalar, TrainingError for a training that keeps
    diverging or a checkpoint that can't be used, InputError for a device that isn't there.
    """
    if task.train_loop is not None:
        return run_own_loop(
            task, student, objective, training, seed=seed, masks=masks, on_step=on_step, label=label, clock=clock
        )
    run = _Run(student, task, objective, training, seed, masks, validate, on_step, resources, label, clock)
    return run.whole()


class _Run:
    """A training under way. Everything that a checkpoint holds is an attribute that `_facts` and `_tensors` name."""

    def __init__(
        self,
        student: nn.Module,
        task: Task,
        objective: Objective,
        training: Training,
        seed: int,
        masks: Masks | ChangingMasks | None,
        validate: Validate | None,
        on_step: OnStep | None,
        resources: Resources,
        label: str,
        clock: Callable[[], float],
    ) -> None:
        self.student, self.training, self.resources, self.seed = student, training, resources, seed
        self.on_step, self.label, self.clock = on_step, label, clock
        self.home = next(iter(student.parameters())).device
        self.processes = Processes(resources.accelerator)
        self.placement = Placement.choose(student, resources, self.processes.device)
        self.placement.place(student)
        others = objective.modules()
        if others is not None:
            self.placement.place(others)
        self.optimizer = make_optimizer(student, others, training)
        self.changing = masks if callable(masks) else None
        self.held = Held(student, {} if masks is None or callable(masks) else masks)
        average = Average(student, training.average) if training.average else None
        self.average = average
        self.trained = Trained(student, others, self.optimizer, average)
        self.memory = objective.memory()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.gradients = Gradients(
            student, objective, self.placement, self.processes, parameters, self.held, training.clip
        )
        agreed = None if validate is None else lambda model: self.processes.mean(validate(model))
        self.keeper = Keeper(student, average, agreed, training)
        self.generators = randomness.generators_in(task.train)
        self.batches = Batches(task, self.generators)
        self.steps = max(1, round(training.epochs * self.batches.length))
        self.validating = 0 if validate is None else max(1, round(training.validate_every * self.batches.length))
        self.recorder, self.watch = Recorder(self.steps), Watch()
        self.step = self.images = self.rollbacks = 0
        self.scale, self.notes, self.good = 1.0, list[str](), Tensors()

    def whole(self) -> TrainingLog:
        self.begun = self.written = self.clock()
        path = self.resources.checkpoint
        self.identity = self._identity() if path else {}
        with between_steps(defer=self.processes.count == 1) as stopped, randomness.seeded(self.seed, self.generators):
            self.student.train()
            self.good = self.trained.copy()
            if self.memory is not None:
                self.memory.forget()
            self._resume()
            while self.step < self.steps and not self.keeper.patience_is_over and not stopped():
                self._advance()
            if path:
                self._write()
        if self.step < self.steps:
            self.notes.append(
                f"stopped at step {self.step} of {self.steps}: validation found nothing better for a while"
            )
        delivered, metric = self.keeper.deliver()
        self.processes.average(self.trained.floats())
        self.optimizer.zero_grad(set_to_none=True)
        self.student.to(self.home)
        self.student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.student.eval()
        return TrainingLog(
            label=self.label,
            curves=self.recorder.curves(self.step),
            images=self.images,
            seconds=self.clock() - self.begun,
            rollbacks=self.rollbacks,
            metric=metric,
            delivered=delivered,
            computed=self.placement.words,
            micro_batch=self.gradients.micro,
            notes=(*self.notes, *self.batches.notes),
        )

    def _advance(self) -> None:
        """One step, and what is due after it."""
        batch = self.placement.batch(self.processes.part(self.batches.next()))
        if self.step == 0:
            self._fit(batch)
        self._change_masks()
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
            self.images += len(batch[1]) * self.processes.count
            self.recorder.step(self.step, loss, learning_rate)
        if self.validating and (self.step % self.validating == 0 or self.step == self.steps):
            before = randomness.capture(self.generators)
            self.processes.average(self.trained.floats())
            self.keeper.look(last=self.step == self.steps)
            randomness.restore(before, self.generators)  # validating draws nothing from what training draws from
            assert self.keeper.metric is not None
            self.recorder.metric(self.step, self.keeper.metric)
        if self.step % _GOOD_EVERY == 0 and self.watch.calm and not wrong:
            self.good = self.trained.copy()
        if self.resources.checkpoint and self.clock() - self.written >= self.resources.checkpoint_seconds:
            self._write()
        if self.on_step and self.processes.first:
            self.on_step(self._report(loss, parts, learning_rate))

    def _gradients(self, batch: Batch) -> tuple[float, dict[str, float], float]:
        self.optimizer.zero_grad(set_to_none=True)
        try:
            return self.gradients.compute(batch)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"step {self.step + 1} on {len(batch[1])} samples ran out of the device's memory; set "
                f"resources.micro_batch below {self.gradients.micro or len(batch[1])}"
            ) from error

    def _fit(self, batch: Batch) -> None:
        """Decide how many samples are computed at a time, without leaving a trace of having tried."""
        if self.resources.micro_batch is not None:
            self.gradients.micro = self.resources.micro_batch
            return
        before, states = randomness.capture(self.generators), 2 if self.training.optimizer == "adamw" else 1
        self.gradients.fit(batch, states, self.resources.memory_bytes)
        self.trained.put_back(self.good)
        randomness.restore(before, self.generators)
        if self.memory is not None:
            self.memory.forget()
        if self.gradients.micro is not None:
            self.notes.append(
                f"batches of {len(batch[1])} are computed {self.gradients.micro} samples at a time, to fit in memory"
            )

    def _change_masks(self) -> None:
        masks = self.changing(self.step, self.steps) if self.changing else None
        if masks is not None:
            self.held.put_back(masks)
            self.watch.restart()

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
        self.held.weights()
        self.scale /= 2
        self.watch.restart()
        self.notes.append(f"{where} {wrong}: rolled back, learning rate times {self.scale:g} from there")

    def _report(self, loss: float, parts: dict[str, float], learning_rate: float) -> StepReport:
        seconds = max(self.clock() - self.begun, 1e-9)
        return StepReport(
            label=self.label,
            step=self.step,
            steps=self.steps,
            loss=loss,
            parts=parts,
            metric=self.keeper.metric,
            learning_rate=learning_rate,
            images_per_second=self.images / seconds,
            seconds_left=seconds / self.step * (self.steps - self.step),
            rollbacks=self.rollbacks,
        )

    def _identity(self) -> dict[str, Any]:
        """By which a checkpoint of another training is told apart."""
        return {
            **asdict(self.training),
            "seed": self.seed,
            "label": self.label,
            "steps": self.steps,
            "computed": self.placement.words,
            "processes": self.processes.count,
            "start": digest(live(self.student)),
        }

    def _write(self) -> None:
        self.written = self.clock()
        path = self.resources.checkpoint
        if path is None or not self.processes.first:
            return
        tensors = prefixed("now.", self.trained.copy()) | prefixed("good.", self.good)
        tensors |= prefixed("best.", self.keeper.best) | prefixed("mask.", self.held.masks)
        facts = {
            "identity": self.identity,
            "step": self.step,
            "images": self.images,
            "seconds": self.clock() - self.begun,
            "rollbacks": self.rollbacks,
            "scale": self.scale,
            "micro": self.gradients.micro,
            "notes": self.notes,
            "watch": self.watch.state(),
            "curves": self.recorder.state(),
            "keeper": self.keeper.state(),
            "place": self.batches.place(),
            "random": randomness.capture(self.generators),
            "memory": self.memory.write(path) if self.memory is not None else None,
        }
        save_checkpoint(path, tensors, facts)

    def _resume(self) -> None:
        """Go on from the checkpoint, if there is one of this training."""
        path = self.resources.checkpoint
        found = load_checkpoint(path) if path else None
        if path is None or found is None:
            return
        tensors, facts = found
        other = [name for name, value in self.identity.items() if facts["identity"].get(name) != value]
        if other:
            self.notes.append(f"the checkpoint was another training's (its {other[0]} differs): started anew")
            return
        self.step, self.images, self.rollbacks = facts["step"], facts["images"], facts["rollbacks"]
        self.scale, self.notes, self.gradients.micro = facts["scale"], facts["notes"], facts["micro"]
        self.begun -= facts["seconds"]
        self.watch.put_back(facts["watch"])
        self.recorder.put_back(facts["curves"])
        self.keeper.put_back(facts["keeper"], without("best.", tensors))
        self.held.put_back(without("mask.", tensors))
        self.good = without("good.", tensors)
        self.trained.put_back(without("now.", tensors))
        self.batches.resume(facts["place"])
        if self.memory is not None and facts.get("memory") is not None:
            self.memory.read(path, facts["memory"])
        randomness.restore(facts["random"], self.generators)
