"""What a teacher says about a batch: its outputs, and what the layers that are compared read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from automl_compress.errors import TaskError
from automl_compress.model.outputs import joined
from automl_compress.model.surgery import copy_model
from automl_compress.model.task import Inputs, Task
from automl_compress.model.views import View, seen
from automl_compress.techniques.distillation.cache import AnswerCache, Tensors
from automl_compress.techniques.distillation.features import layer_inputs
from automl_compress.techniques.distillation.outputs import named_tensors

_OUTPUT, _FEATURE = "output:", "feature:"
_ENOUGH = 2000


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Output name -> tensor, and layer -> what it reads; no graph behind them."""

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)


class Teacher:
    """Asks a model (eval mode, never trained) for its answers, or the cache, which must be this model's.

    views  of its inputs, whose outputs are averaged with those of the inputs; features are those of the inputs. Source:
           Radosavovic et al. 2018, "Data Distillation: Towards Omni-Supervised Learning", section 3
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str] = (),
        cache: AnswerCache | None = None,
        *,
        views: Sequence[View] = (),
    ) -> None:
        self.model, self._layers, self._cache = model.eval(), tuple(layers), cache or AnswerCache(0)
        self._views = tuple(views)

    def __call__(self, inputs: Inputs, *, unique: int = 0) -> Answers:
        """The last `unique` samples will never be asked about again."""
        answers = self._cache.answers(self._context(inputs), inputs, self._ask, unique=unique)
        outputs, features = (
            {name.removeprefix(kind): value for name, value in answers.items() if name.startswith(kind)}
            for kind in (_OUTPUT, _FEATURE)
        )
        return Answers(outputs=outputs, features=features)

    def _ask(self, inputs: Inputs) -> Tensors:
        if any(parameter.device != inputs[0].device for parameter in self.model.parameters()):
            self.model = copy_model(self.model).to(inputs[0].device)  # the caller's own stays where it is
        with torch.no_grad(), layer_inputs(self.model, self._layers) as features:
            outputs = named_tensors(self.model(*inputs))
        with torch.no_grad():
            others = [named_tensors(self.model(*seen(view, inputs))) for view in self._views]
        if others:
            outputs = {k: torch.stack([value, *(o[k] for o in others)]).mean(0) for k, value in outputs.items()}
        return {_OUTPUT + name: value for name, value in outputs.items()} | {
            _FEATURE + name: value for name, value in features.items()
        }

    def _context(self, inputs: Inputs) -> str:
        """Which layers are watched, and the precision of the computation."""
        kind = inputs[0].device.type
        precision = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "full"
        return f"{self._layers}{precision}"


def worth_of_views(task: Task) -> str:
    """What the teacher's metric on validation data is with and without the task's views; empty where it has none.

    Some thousand samples are read. A view that means something else, such as a 6 upside down, shows here.
    """
    if not task.views:
        return ""
    teacher = (task.teacher or task.model).eval()
    alone, averaged, targets = list[Any](), list[Any](), list[Tensor]()
    with torch.no_grad():
        for inputs, wanted in task.batches("validation"):
            answers = [teacher(*shown) for shown in (inputs, *(seen(view, inputs) for view in task.views))]
            alone.append(answers[0])
            averaged.append(tree_map(_mean, *answers))
            targets.append(wanted)
            if sum(map(len, targets)) >= _ENOUGH:
                break
    try:
        before, after = (task.metric_of(joined(outputs), torch.cat(targets)) for outputs in (alone, averaged))
    except TaskError as error:  # a metric may want all of the data
        return f"what the task's views do to the teacher's {task.metric_name} isn't known: {error}"
    told = (
        f"over the task's views the teacher's {task.metric_name} on {sum(map(len, targets))} validation samples is "
        f"{after:.4f}, without them {before:.4f}"
    )
    return told if after >= before else f"warning: {told}; do the views mean the same as the inputs?"


def _mean(*answers: Any) -> Any:
    first = answers[0]
    return torch.stack(answers).mean(0) if isinstance(first, Tensor) and first.is_floating_point() else first


def samples_per_epoch(task: Task) -> int | None:
    """Training samples, where the data says how many; of batches without a dataset, as many as full ones hold."""
    try:
        dataset = getattr(task.train, "dataset", None)
        if dataset is not None:
            return len(dataset)
        first = next(iter(task.batches("train")), None)
        return None if first is None else len(task.train) * len(first[1])
    except TypeError:
        return None
