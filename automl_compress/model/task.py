"""What the user brings: a trained model, its data, and how good it is measured.

A task file is ordinary Python with a function `task()` that returns a `Task`. It is the one piece of foreign code that
the program executes, because the user named it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from automl_compress.errors import TaskError, first_line, raised
from automl_compress.model.batches import NO_BATCH, as_batch, as_inputs, loader, reading
from automl_compress.model.outputs import called, check_labels, checked_forward, require_loss
from automl_compress.model.task_file import split_spec
from automl_compress.model.transfer import Transfer, with_new_head
from automl_compress.model.views import View, seen

Inputs = tuple[Tensor, ...]
Batch = tuple[Inputs, Tensor]
Loss = Callable[[Any, Tensor], Tensor]
Metric = Callable[[Any, Tensor], float]
FEW = 100  # validation samples, below which a reader should know how few they are


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Fraction of rows whose largest output is the target class: outputs [N, classes], targets [N]."""
    return float((outputs.argmax(dim=1) == targets).float().mean())


@dataclass(frozen=True, kw_only=True)
class Task:
    """A trained model with its data; classification with accuracy unless a loss or metric is given.

    model           the trained network (the teacher); it is never modified
    train           training batches: a DataLoader, any re-iterable of (inputs, targets) batches, a map-style Dataset,
                    or a pair of tensors. Inputs are a tensor or a tuple of tensors, batch dimension first.
    validation      the same; every decision is taken on it
    test            the same; read once, for the delivered model alone
    loss            loss(outputs, targets) -> scalar tensor; cross-entropy by default
    metric          metric(outputs, targets) -> float over a whole split, higher is better; accuracy by default. Outputs
                    come in the container in which the model returns them, for both
    example_inputs  one batch of inputs to trace with; the first validation batch by default
    train_loop      a training loop to use instead of the program's own, called with a
                    `techniques.training.own_loop.Work`; it trains `work.model` in place
    teacher         what students learn from in the model's place, if anything: any module with the model's outputs,
                    trained, put into eval mode. Features are compared with the model's all the same
    views           functions, called with a batch's inputs as the model is, that return others which mean the same, in
                    the same shapes: mirror images, say. What the teacher answers is its mean over the inputs and their
                    views, position by position. The same inputs must give the same view
    student         student(width) -> an untrained network of your own, which competes with what is cut from the model;
                    in a task file a function `student` beside `task`
    transfer        the model was trained for other classes: what it needs before it is the teacher of these
    """

    model: nn.Module
    train: Any
    validation: Any
    test: Any = None
    loss: Loss | None = None
    metric: Metric | None = None
    example_inputs: Any = None
    train_loop: Callable[[Any], Any] | None = None
    teacher: nn.Module | None = None
    views: Sequence[View] = ()
    student: Callable[[float], nn.Module] | None = None
    transfer: Transfer | None = None

    @property
    def classifies(self) -> bool:
        """Whether the default loss and metric apply."""
        return self.loss is None and self.metric is None

    @property
    def metric_name(self) -> str:
        return "accuracy" if self.metric is None else getattr(self.metric, "__name__", "metric")

    def loss_of(self, outputs: Any, targets: Tensor) -> Tensor:
        if self.loss is None:
            return functional.cross_entropy(outputs, targets)
        with called("loss", self.loss, f"targets {tuple(targets.shape)}"):
            return self.loss(outputs, targets)

    def metric_of(self, outputs: Any, targets: Tensor) -> float:
        with called("metric", self.metric or accuracy, f"targets {tuple(targets.shape)}"):
            value = float((self.metric or accuracy)(outputs, targets))
        if not math.isfinite(value):
            raise TaskError(
                f"the task's metric {self.metric_name} is {value}: check the model's outputs and the metric"
            )
        return value

    def batches(self, split: str) -> Iterator[Batch]:
        """The batches of 'train', 'validation' or 'test' in their own order, as (tuple of inputs, targets).

        Raises TaskError where reading fails or yields something else.
        """
        for number, batch in enumerate(reading(getattr(self, split), split)):
            yield as_batch(batch, split, number)


def load_task(spec: str, *, weights: Path | None = None) -> Task:
    """Load `path/task.py[:function]` or `package.module[:function]`, call it, and check what it returns.

    `weights` (.safetensors, or .pt read with weights_only) replaces the model's parameters. Raises TaskError.
    """
    source, function = split_spec(spec)
    module = _import(source)
    name = function or "task"
    make = getattr(module, name, None)
    if not callable(make):
        raise TaskError(
            f"{source}: has no function {name}(); a task file defines task() and returns automl_compress.Task"
        )
    try:
        task = make()
    except Exception as error:
        raise TaskError(f"{source}: {name}() raised {raised(error)}") from error
    if not isinstance(task, Task):
        raise TaskError(f"{source}: {name}() returned {type(task).__name__}; it must return automl_compress.Task")
    student = getattr(module, "student", None)
    if task.student is None and callable(student):
        task = replace(task, student=student)
    return prepare(task, weights=weights)


def prepare(task: Task, *, weights: Path | None = None) -> Task:
    """Check a task and bring its data into re-iterable form. Raises TaskError that says which part is wrong."""
    if not isinstance(task.model, nn.Module):
        raise TaskError(f"task: model must be a torch.nn.Module, found {type(task.model).__name__}")
    if task.train_loop is not None and not callable(task.train_loop):
        raise TaskError(f"task: train_loop must be callable, found {type(task.train_loop).__name__}")
    if task.teacher is not None and not isinstance(task.teacher, nn.Module):
        raise TaskError(f"task: teacher must be a torch.nn.Module, found {type(task.teacher).__name__}")
    if task.student is not None and not callable(task.student):
        raise TaskError(f"task: student must be a function student(width), found {type(task.student).__name__}")
    if weights is not None:
        load_weights(task.model, weights)
    if task.transfer is not None:
        task = replace(task, model=with_new_head(copy.deepcopy(task.model), task.transfer))
    splits: dict[str, Any] = {
        "train": loader(task.train, "train", shuffle=True),
        "validation": loader(task.validation, "validation"),
    }
    if task.test is not None:
        splits["test"] = loader(task.test, "test")
    task = replace(task, **splits)
    for split in ("train", "validation"):  # the test split is read once, for the delivered model
        _first(task, split)
    inputs = task.example_inputs if task.example_inputs is not None else _first(task, "validation")[0]
    task = replace(task, example_inputs=as_inputs(inputs, "example_inputs"))
    _check_forward(task)
    _check_loss(task)
    _check_views(task)
    scarcity(task)
    return task


def scarcity(task: Task) -> str:
    """What is to be known about validation data of few samples; empty where there are enough of them.

    Raises TaskError for a single one to classify: no two models could be told apart.
    """
    samples, wanted = 0, FEW if task.classifies else 2
    for _, targets in task.batches("validation"):
        samples += len(targets)
        if samples >= wanted:
            return ""
    if not task.classifies:
        return (
            "validation data is a single sample, on which every decision is taken: more would tell models apart better"
        )
    if samples == 1:
        raise TaskError(
            "task: validation data is a single sample, which can't tell models apart; give some hundreds at least"
        )
    return (
        f"validation data has only {samples} samples, of which each makes {1 / samples:.3f} of the accuracy: smaller "
        "differences between models can't be seen, and those of a few samples are chance"
    )


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model from .safetensors or a .pt state dict; nothing is ever unpickled. Raises TaskError."""
    if not path.is_file():
        raise TaskError(f"--weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the same pickles that are refused below
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":  # what torch.load raises, from a module that nothing here imports
            raise TaskError(
                f"--weights {path}: holds pickled objects or is damaged; only tensors are ever loaded: save "
                "model.state_dict() with torch.save, or as .safetensors"
            ) from error
        raise TaskError(f"--weights {path}: can't be read as a state dict: {first_line(error)[:160]}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise TaskError(f"--weights {path}: doesn't fit the model: {' '.join(lines[:3])[:300]}") from error


def _import(source: str) -> Any:
    path = Path(source)
    if source.endswith(".py") or path.exists() or "/" in source:
        if not path.is_file():
            raise TaskError(f"{source}: no such task file")
        loader = importlib.util.spec_from_file_location(f"automl_compress_task_{path.stem}", path)
        if loader is None or loader.loader is None:
            raise TaskError(f"{source}: not a Python file; name a task.py or an importable module")
        module = importlib.util.module_from_spec(loader)
        sys.modules[module.__name__] = module
        # Helper modules beside the task file must be importable, as when the file is run as a script.
        sys.path.insert(0, str(path.resolve().parent))
        run: Callable[[], Any] = lambda: loader.loader.exec_module(module)  # type: ignore[union-attr]  # noqa: E731
    else:
        sys.path.insert(0, "")

        def run() -> Any:
            return importlib.import_module(source)

    try:
        return run() or module
    except ModuleNotFoundError as error:
        raise TaskError(f"{source}: no module named {error.name!r}; name a task.py or an importable module") from error
    except (Exception, SystemExit) as error:
        raise TaskError(f"{source}: loading it raised {raised(error)}") from error


def _first(task: Task, split: str) -> Batch:
    for batch in task.batches(split):
        return batch
    raise TaskError(f"task: {split} data is empty: {NO_BATCH}")


def _check_forward(task: Task) -> None:
    outputs = checked_forward(task.model, task.example_inputs, "the example input")
    if not task.classifies:
        return
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TaskError(f"task: classification needs outputs [batch, classes], found {found}; give a loss and a metric")
    for split in ("train", "validation"):
        check_labels(_first(task, split)[1], int(outputs.shape[1]), split)


def _check_loss(task: Task) -> None:
    """Raise TaskError where the task's own loss of the first training batch is nothing that training could lower."""
    if task.loss is None:
        return
    inputs, targets = _first(task, "train")
    outputs = checked_forward(task.model, inputs, "the first train input")
    loss = require_loss(task.loss_of(tree_map_only(Tensor, _differentiable, outputs), targets))
    if not torch.isfinite(loss):
        raise TaskError(f"the task's loss is {loss.item()} on the first train batch: check the loss and the data")
    if not loss.requires_grad:
        raise TaskError("the task's loss has no gradient: compute it from the outputs, without detach() or item()")


def _check_views(task: Task) -> None:
    """Raise TaskError where a view is no function, or shows the example inputs in another shape."""
    if not isinstance(task.views, (list, tuple)):
        raise TaskError(f"task: views must be a list of functions, found {type(task.views).__name__}")
    for view in task.views:
        if not callable(view):
            raise TaskError(f"task: views must be functions of the model's inputs, found {type(view).__name__}")
        seen(view, task.example_inputs)


def _differentiable(output: Tensor) -> Tensor:
    return output.detach().requires_grad_() if output.is_floating_point() else output
