"""A training loop of the user's own in the place of ours, and what is checked of it.

def my_loop(work):
    optimizer = torch.optim.RMSprop(work.model.parameters(), lr=1e-4)
    for batch in work.batches():
        work.before_step()
        work.objective(work.model, batch).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        work.after_step()

Task(model=..., train=..., validation=..., train_loop=my_loop)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from automl_compress.errors import CompressError, TrainingError, raised
from automl_compress.model.task import Batch, Task
from automl_compress.techniques.objective import Loss, Memory, Objective
from automl_compress.techniques.training import randomness
from automl_compress.techniques.training.checkpoint import digest
from automl_compress.techniques.training.data import Batches
from automl_compress.techniques.training.log import OnStep, Recorder, StepReport, TrainingLog
from automl_compress.techniques.training.optimizers import ChangingMasks, Held, Masks
from automl_compress.techniques.training.settings import Training
from automl_compress.techniques.training.state import live


class Work:
    """What a loop of the user's own is given.

    model      to be trained in place; it comes in train mode
    objective  (model, batch) -> a `Loss`, whose `total` is to be lowered; what it trains itself is its `modules()`
    training   the settings that were asked for; a loop may follow them or not
    steps      how many steps these come to
    label      what this training is part of
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        training: Training,
        batches: Batches,
        held: Held,
        changing: ChangingMasks | None,
        on_step: OnStep | None,
        label: str,
        clock: Callable[[], float],
    ) -> None:
        self.model, self.training, self.label = model, training, label
        self.objective = _Heard(objective)
        self.steps = max(1, round(training.epochs * batches.length))
        self._batches, self._held, self._changing, self._on_step = batches, held, changing, on_step
        self._recorder, self._clock, self._begun = Recorder(self.steps), clock, clock()
        self._step = self._images = 0
        self.notes: list[str] = []

    def batches(self) -> Iterator[Batch]:
        """As many batches as there are steps, pass after pass: (tuple of inputs, targets)."""
        for _ in range(self.steps):
            batch = self._batches.next()
            self._images += len(batch[1])
            yield batch

    def before_step(self) -> None:
        """To be called before a step: masks that close on the way are set."""
        masks = self._changing(min(self._step, self.steps - 1), self.steps) if self._changing else None
        if masks is not None:
            self._held.put_back(masks)

    def after_step(self, learning_rate: float = 0.0) -> None:
        """To be called after a step: weights that masks removed become zero again, and progress is told."""
        self._held.weights()
        self._step += 1
        self._recorder.step(self._step, self.objective.last, learning_rate)
        if self._on_step:
            seconds = max(self._clock() - self._begun, 1e-9)
            self._on_step(
                StepReport(
                    label=self.label,
                    step=self._step,
                    steps=self.steps,
                    loss=self.objective.last,
                    parts={},
                    metric=None,
                    learning_rate=learning_rate,
                    images_per_second=self._images / seconds,
                    seconds_left=max(0.0, seconds / self._step * (self.steps - self._step)),
                    rollbacks=0,
                )
            )

    def log(self) -> TrainingLog:
        """What was done."""
        return TrainingLog(
            label=self.label,
            curves=self._recorder.curves(self._step),
            images=self._images,
            seconds=self._clock() - self._begun,
            computed="a loop of the task's own",
            notes=(*self.notes, *self._batches.notes),
        )


def run_own_loop(
    task: Task,
    model: nn.Module,
    objective: Objective,
    training: Training,
    *,
    seed: int,
    masks: Masks | ChangingMasks | None,
    on_step: OnStep | None,
    label: str,
    clock: Callable[[], float],
) -> TrainingLog:
    """Let the task's loop train a model in place, and check what it made of it.

    Raises TrainingError where it raises, returns something, leaves another model or one that isn't finite, or where
    weights that a mask removed are back.
    """
    assert task.train_loop is not None
    name = f"the task's train_loop ({getattr(task.train_loop, '__name__', type(task.train_loop).__name__)})"
    generators = randomness.generators_in(task.train)
    held = Held(model, {} if masks is None or callable(masks) else masks)
    changing = masks if callable(masks) else None
    work = Work(model, objective, training, Batches(task, generators), held, changing, on_step, label, clock)
    before, untrained = {key: value.shape for key, value in live(model).items()}, digest(live(model))
    memory = objective.memory()
    if memory is not None:
        memory.forget()
    with randomness.seeded(seed, generators):
        model.train()
        try:
            result = task.train_loop(work)
        except CompressError:
            raise
        except Exception as error:
            raise TrainingError(f"{name} raised {raised(error)}") from error
    model.zero_grad(set_to_none=True)
    model.eval()
    if digest(live(model)) == untrained:
        work.notes.append(f"{name} left the model as it was")
    if result is not None and result is not model:
        what = type(result).__name__
        raise TrainingError(f"{name} returned {what}; it must train work.model in place and return None")
    after = live(model)
    if {key: value.shape for key, value in after.items()} != before:
        raise TrainingError(f"{name} changed the model's parameters or their shapes; it may only change their values")
    for key, value in after.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise TrainingError(f"{name} left values in {key} that are no finite numbers; lower its learning rate")
    for key, mask in held.masks.items():
        if bool((after[key][~mask.to(after[key].device)] != 0).any()):
            raise TrainingError(f"{name} left weights in {key} that a mask removed; call work.after_step() each time")
    return work.log()


class _Heard:
    """An objective whose last loss is known."""

    def __init__(self, objective: Objective) -> None:
        self._objective, self.last = objective, 0.0

    def __call__(self, student: nn.Module, batch: Batch) -> Loss:
        loss = self._objective(student, batch)
        self.last = float(loss.total.detach())
        return loss

    def modules(self) -> nn.Module | None:
        return self._objective.modules()

    def memory(self) -> Memory | None:
        return self._objective.memory()
