"""The optimizer, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from automl_compress.errors import TrainingError
from automl_compress.techniques.training.muon import Muon
from automl_compress.techniques.training.settings import Training

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def make_optimizer(student: nn.Module, others: nn.Module | None, training: Training) -> torch.optim.Optimizer:
    """Muon, SGD or AdamW over what requires gradients in the student and in `others` (what the objective trains).

    Raises TrainingError where the student has nothing to train.
    """
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise TrainingError(
            "the model has no trainable parameter: every requires_grad is False; unfreeze some to recover "
            "accuracy, or ask for --epochs 0"
        )
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    seen: set[int] = set()
    for model in (student, others):
        for parameter, decays, matrices in _parameters(model, training) if model is not None else ():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                new = {"params": [], "weight_decay": training.weight_decay if decays else 0.0, "matrices": matrices}
                groups.setdefault((decays, matrices), new)["params"].append(parameter)
    rate, first = training.learning_rate, training.momentum
    if training.optimizer == "muon":
        return Muon([*groups.values()], lr=rate, momentum=first)
    if training.optimizer == "adamw":
        return torch.optim.AdamW([*groups.values()], lr=rate, betas=(first, 0.999))
    return torch.optim.SGD([*groups.values()], lr=rate, momentum=first, nesterov=first > 0)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, momentum: float) -> None:
    """Learning rate and momentum of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif group["momentum"]:
            group["momentum"] = momentum


Masks = Mapping[str, Tensor]  # parameter name -> which of its weights train
# Asked before step 0 to steps - 1: masks that hold from then on, None while they stay as they are.
ChangingMasks = Callable[[int, int], Masks | None]


class Held:
    """Weights that masks keep at zero."""

    def __init__(self, student: nn.Module, masks: Masks) -> None:
        self._stored = dict(student.named_parameters(remove_duplicate=False))
        self.put_back(masks)

    def put_back(self, masks: Masks) -> None:
        """Hold these masks from now on."""
        stored = self._stored
        self._pairs = [(stored[n], mask.to(stored[n].device, stored[n].dtype)) for n, mask in masks.items()]
        self.masks = {name: mask.detach() != 0 for name, mask in masks.items()}
        self.weights()

    def gradients(self) -> None:
        """Take masked weights out of the gradients, so that they are no part of the norm that is clipped."""
        for parameter, mask in self._pairs:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    def weights(self) -> None:
        for parameter, mask in self._pairs:
            parameter.data.mul_(mask)


def _parameters(model: nn.Module, training: Training) -> Iterator[tuple[nn.Parameter, bool, int]]:
    """Each parameter, whether weight decay applies to it, and of how many matrices it consists (0: it is none)."""
    # Embeddings first: what is tied to one is what it is, wherever the layer that shares it was defined.
    for module in sorted(model.modules(), key=lambda module: not isinstance(module, _EMBEDDINGS)):
        exempt = isinstance(module, _NORMS) or type(module).__name__.endswith("Norm")
        exempt = exempt or (isinstance(module, _EMBEDDINGS) and not training.decay_embeddings)
        for name, parameter in module.named_parameters(recurse=False):
            weight = parameter.ndim > 1 and not name.endswith("bias")
            yield parameter, not exempt and weight, _matrices(module, name)


def _matrices(module: nn.Module, name: str) -> int:
    """Of how many matrices, one below the other, a module's parameter of this name consists. An embedding is none: its
    rows are looked up one by one."""
    if name == "in_proj_weight" and isinstance(module, nn.MultiheadAttention):
        return 3  # of queries, keys and values
    if name == "weight" and isinstance(module, nn.modules.conv._ConvNd):
        return module.groups
    return int(name == "weight" and isinstance(module, nn.Linear))
