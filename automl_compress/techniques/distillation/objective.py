"""The objective of a student that learns from a teacher: the named losses of a batch, weighed and added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from automl_compress.errors import TaskError, TrainingError
from automl_compress.model.outputs import require_loss
from automl_compress.model.task import Batch, Task
from automl_compress.techniques.distillation.balance import Balance
from automl_compress.techniques.distillation.cache import AnswerCache
from automl_compress.techniques.distillation.features import (
    adapted,
    attention_transfer,
    hint,
    layer_inputs,
    same_channels,
)
from automl_compress.techniques.distillation.labels import decoupled, logits, relations, soft_labels
from automl_compress.techniques.distillation.losses import SOFT, TASK, Losses
from automl_compress.techniques.distillation.mixing import mixable, mixed
from automl_compress.techniques.distillation.outputs import (
    ClassRows,
    class_dim,
    class_rows,
    matched,
    named_tensors,
    padding_input,
    squared_error,
)
from automl_compress.techniques.distillation.pairing import Pair
from automl_compress.techniques.distillation.teacher import Answers, Teacher
from automl_compress.techniques.objective import Loss

_ROWS = 2  # dimensions of features of whole samples: [N, C]
_SILENT = {
    "features": "no layer of the student tells what it reads",
    "attention": "no layer that tells what it reads has several positions or tokens",
}


class Distillation:
    """An `Objective`: what a student is to learn from `teacher` (eval mode, frozen; over the task's views) and from the
    task's targets.

    Outputs are compared one by one: class scores by the named losses, anything else by its squared error. Class scores
    are the outputs of a task with the default loss and metric, and those that fit targets which are class numbers: the
    only output, or one with `logits` in its name. Outputs of student and teacher must have the same names and shapes.
    Where it is asked for and means something (`mixing.mixable`), a part of each batch that is trained on is mixed.

    pairs  features to compare, for losses that do
    cache  of this teacher's answers, shared by trainings one after another; none by default
    original  whose features are compared, by default the teacher's

    Calling it raises TrainingError where they don't match, and TaskError for a loss that is no scalar or labels that
    are out of range.
    """

    def __init__(
        self,
        task: Task,
        teacher: nn.Module,
        losses: Losses | None = None,
        pairs: Sequence[Pair] = (),
        cache: AnswerCache | None = None,
        *,
        original: nn.Module | None = None,
    ) -> None:
        self.task, self.losses = task, losses or Losses()
        self._pairs = tuple(pairs) if self.losses.features else ()
        if self.losses.features and not pairs:
            raise _nothing_to_compare(self.losses.features[0])
        layers = [pair.teacher for pair in self._pairs]
        apart = original is not None and original is not teacher and bool(layers)
        self._cache = cache
        self._teacher = Teacher(teacher, () if apart else layers, cache, views=task.views)
        self._original = Teacher(original, layers) if original is not None and apart else None
        automatic = [name for name, weight in self.losses.weights.items() if weight is None]
        self._balance = Balance([name for name in automatic if name not in (SOFT, TASK)])
        self._adapters = nn.ModuleList(
            nn.Identity() if pair.widths is None else nn.Linear(*pair.widths) for pair in self._pairs
        )
        self._padding = padding_input(teacher if original is None else original)
        self._label_losses = _label_losses(self.losses)

    def modules(self) -> nn.Module | None:
        held = nn.ModuleDict({"balance": self._balance, "adapters": self._adapters})
        return held if self._balance.names or any(True for _ in self._adapters.parameters()) else None

    def memory(self) -> AnswerCache | None:
        return self._cache

    def __call__(self, student: nn.Module, batch: Batch) -> Loss:
        inputs, targets = batch
        whole = len(targets)
        if self.losses.mixed and self.losses.labels and student.training and mixable(self.task, inputs):
            inputs, whole = mixed(inputs, self.losses.mixed)
        # The teacher first: what it takes is free again before the student's activations are kept.
        teacher = self._teacher(inputs, unique=len(targets) - whole) if self.losses.needs_teacher else Answers()
        wanted = (teacher if self._original is None else self._original(inputs)).features
        with layer_inputs(student, [pair.student for pair in self._pairs]) as features:
            outputs = student(*inputs)
        counted = None if self._padding is None or self._padding >= len(inputs) else inputs[self._padding]
        compare = self._comparison(outputs, teacher.outputs, targets, counted) if self.losses.needs_teacher else None
        values: dict[str, Tensor] = {}
        if self.losses.task_weight > 0:
            known = outputs if whole == len(targets) else outputs[:whole]
            values[TASK] = task_loss(self.task, known, targets[:whole])
        if compare is not None:
            values |= {name: compare(name) for name in self.losses.labels}
            for name in self.losses.features:
                values[name] = self._on_features(name, features, wanted, counted)
            if self._balance.measuring and student.training and torch.is_grad_enabled():
                unit = values[SOFT] if SOFT in values else compare(SOFT)
                trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
                self._balance.measure(unit, values, trained)
        weights = self.weights()
        total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return Loss(total=total, parts={name: value.detach() for name, value in values.items()})

    def weights(self) -> dict[str, float]:
        """Loss -> its weight as of now."""
        losses = self.losses
        share = losses.soft_share / max(1, sum(losses.weights[name] is None for name in losses.labels))
        shares = dict.fromkeys(losses.labels, share)
        shares |= dict.fromkeys(losses.features, losses.soft_share * losses.feature_share)
        ratios = self._balance.ratios()
        weights = {TASK: losses.task_weight}
        for name, share in shares.items():
            given = losses.weights[name]
            weights[name] = share * ratios.get(name, 1.0) if given is None else given
        return weights

    def _on_features(
        self, loss: str, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], counted: Tensor | None
    ) -> Tensor:
        parts = []
        for pair, adapter in zip(self._pairs, self._adapters, strict=True):
            if pair.student not in student or pair.teacher not in teacher:
                continue  # its weight was used without running its module
            if loss == "attention" and student[pair.student].ndim == _ROWS:
                continue  # no positions
            mine, wanted = student[pair.student], same_channels(pair, teacher[pair.teacher])
            if pair.widths is not None and loss != "attention":
                mine = adapted(adapter, mine, pair.channel_dim)
            if loss == "attention":
                parts.append(attention_transfer(mine, teacher[pair.teacher], pair.channel_dim, counted))
            elif mine.shape == wanted.shape:
                parts.append(hint(mine, wanted, counted))
            else:
                raise TrainingError(
                    f"features of teacher and student differ in shape: {pair.teacher} reads {tuple(wanted.shape)}, "
                    f"{pair.student} {tuple(mine.shape)}"
                )
        if not parts:
            raise _nothing_to_compare(loss)
        return torch.stack(parts).mean()

    def _comparison(
        self, outputs: Any, teacher: Mapping[str, Tensor], targets: Tensor, counted: Tensor | None
    ) -> Callable[[str], Tensor]:
        """Loss name -> its mean over the model's outputs."""
        student = named_tensors(outputs)
        teacher = matched(student, teacher)
        dims = {
            # Of several outputs, which the targets belong to can only be told by their names.
            name: 1 if self.task.classifies else class_dim(value, targets)
            for name, value in student.items()
            if len(student) == 1 or "logits" in name
        }
        rows = {}
        for name, dim in dims.items():
            if dim is not None:
                known = targets if targets.ndim == student[name].ndim - 1 else None
                rows[name] = class_rows(student[name], teacher[name], known, dim, counted)

        def compare(loss: str) -> Tensor:
            if not rows and loss not in (SOFT, "logit"):
                name, value = next(iter(student.items()))
                raise TrainingError(
                    f"distillation loss {loss} needs class scores, and targets that are class numbers; {name} "
                    f"{tuple(value.shape)} with targets {tuple(targets.shape)} is something else: use soft"
                )
            parts = [
                self._label_losses[loss](rows[name]) if name in rows else squared_error(value, teacher[name])
                for name, value in student.items()
            ]
            return torch.stack(parts).mean()

        return compare


def _nothing_to_compare(loss: str) -> TrainingError:
    way = "distil with losses on outputs, such as soft"
    return TrainingError(f"distillation loss {loss} has nothing to compare: {_SILENT[loss]}; {way}")


def task_loss(task: Task, outputs: Any, targets: Tensor) -> Tensor:
    """The task's own loss. Raises TaskError where it is no scalar, or a label is out of range."""
    try:
        return require_loss(task.loss_of(outputs, targets))
    except IndexError as error:  # cross-entropy on a class that the model doesn't have
        raise TaskError(f"task: train labels are out of range: {error}") from error


def _label_losses(losses: Losses) -> dict[str, Callable[[ClassRows], Tensor]]:
    t = losses.temperature

    def soft(rows: ClassRows) -> Tensor:
        return soft_labels(rows.student, rows.teacher, t)

    def logit(rows: ClassRows) -> Tensor:
        return logits(rows.student, rows.teacher)

    def dist(rows: ClassRows) -> Tensor:
        return relations(rows.student, rows.teacher, t)

    def dkd(rows: ClassRows) -> Tensor:
        assert rows.labels is not None
        return decoupled(rows.student, rows.teacher, rows.labels, t, target=losses.target, others=losses.others)

    return {SOFT: soft, "logit": logit, "dist": dist, "dkd": dkd}
