"""What a teacher says about a batch: its outputs, and what the layers that are compared read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from automl_compress.errors import TaskError
from automl_compress.model.outputs import arranged, joined
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


def worth_of_teaching(task: Task) -> str:
    """What the metric on validation data is of the model, of the task's teacher and of its mean over the task's views;
    empty where students learn from the model itself, without views.

    Some thousand samples are read. A view that means something else, such as a 6 upside down, shows here.
    """
    if task.teacher is None and not task.views:
        return ""
    outputs: dict[str, list[Any]] = {}
    targets: list[Tensor] = []
    with torch.no_grad():
        for inputs, wanted in task.batches("validation"):
            for who, answer in _answers(task, inputs).items():
                outputs.setdefault(who, []).append(answer)
            targets.append(wanted)
            if sum(map(len, targets)) >= _ENOUGH:
                break
    try:
        found = {who: task.metric_of(joined(parts), torch.cat(targets)) for who, parts in outputs.items()}
    except TaskError as error:  # a metric may want all of the data
        return f"how good the teacher is isn't known: {error}"
    samples = sum(map(len, targets))
    told = f"{task.metric_name} on {samples} validation samples: {', '.join(f'{w} {v:.4f}' for w, v in found.items())}"
    values = list(found.values())
    return told if values == sorted(values) else f"warning: students learn from what is worse; {told}"


def _answers(task: Task, inputs: Inputs) -> dict[str, Any]:
    """Who answers a batch, in the order in which each should do better than those before -> the answer."""
    model = task.model.eval()(*inputs)

    def taught(*shown: Tensor) -> Any:
        answer = (task.teacher or task.model).eval()(*shown)
        if type(answer) is type(model):
            return answer
        return arranged(list(named_tensors(answer).values()), like=model)  # the container that the metric knows

    found = {"the model": model}
    if task.teacher is not None:
        found["the teacher"] = taught(*inputs)
    if task.views:
        alone = found[next(reversed(found))]
        found["over its views"] = tree_map(_mean, alone, *(taught(*seen(view, inputs)) for view in task.views))
    return found


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
