"""What a teacher says about a batch: its outputs, and what the layers that are compared read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from automl_compress.model.surgery import copy_model
from automl_compress.model.task import Inputs
from automl_compress.techniques.distillation.features import layer_inputs
from automl_compress.techniques.distillation.outputs import named_tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Output name -> tensor, and layer -> what it reads; no graph behind them."""

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)


class Teacher:
    """Asks a model (eval mode, never trained) for its answers."""

    def __init__(self, model: nn.Module, layers: Collection[str] = ()) -> None:
        self.model, self._layers = model.eval(), tuple(layers)

    def __call__(self, inputs: Inputs) -> Answers:
        if any(parameter.device != inputs[0].device for parameter in self.model.parameters()):
            self.model = copy_model(self.model).to(inputs[0].device)  # the caller's own stays where it is
        with torch.no_grad(), layer_inputs(self.model, self._layers) as features:
            outputs = named_tensors(self.model(*inputs))
        return Answers(outputs=outputs, features=dict(features))
