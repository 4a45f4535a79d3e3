"""What a teacher says about a batch: its outputs, and what the layers that are compared read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from automl_compress.model.surgery import copy_model
from automl_compress.model.task import Inputs, Task
from automl_compress.techniques.distillation.cache import AnswerCache, Tensors
from automl_compress.techniques.distillation.features import layer_inputs
from automl_compress.techniques.distillation.outputs import named_tensors

_OUTPUT, _FEATURE = "output:", "feature:"


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Output name -> tensor, and layer -> what it reads; no graph behind them."""

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)


class Teacher:
    """Asks a model (eval mode, never trained) for its answers, or the cache, which must be this model's."""

    def __init__(self, model: nn.Module, layers: Collection[str] = (), cache: AnswerCache | None = None) -> None:
        self.model, self._layers, self._cache = model.eval(), tuple(layers), cache or AnswerCache(0)

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
        return {_OUTPUT + name: value for name, value in outputs.items()} | {
            _FEATURE + name: value for name, value in features.items()
        }

    def _context(self, inputs: Inputs) -> str:
        """Which layers are watched, and the precision of the computation."""
        kind = inputs[0].device.type
        precision = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "full"
        return f"{self._layers}{precision}"


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
