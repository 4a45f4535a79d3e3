"""Transfer to another data set: a pretrained model whose head is exchanged for one with the new classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from automl_compress.errors import TaskError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """How a pretrained model becomes one for a task's data, before anything is compressed.

    classes        of the new data: as many outputs as the new head has
    head           path of the linear layer or convolution to exchange, as `model.named_modules()` has it; None: the
                   last linear layer
    head_epochs    passes in which the new head alone is trained
    epochs         passes in which everything is; 0 leaves the pretrained weights as they are
    learning_rate  of these, at its peak; the head alone is trained at five times as much
    """

    classes: int
    head: str | None = None
    head_epochs: float = 1.0
    epochs: float = 3.0
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        for name, least in (("classes", 2), ("head_epochs", 0), ("epochs", 0)):
            if getattr(self, name) < least:
                raise TaskError(f"transfer: {name} must be at least {least}, found {getattr(self, name):g}")
        if not self.learning_rate > 0:
            raise TaskError(f"transfer: learning_rate must be above 0, found {self.learning_rate:g}")
        if self.head_epochs + self.epochs == 0:
            raise TaskError("transfer: head_epochs and epochs are both 0: the new head would stay untrained")


def head_name(model: nn.Module, transfer: Transfer) -> str:
    """The path of the layer that is exchanged. Raises TaskError where there is none, or it is something else."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    linear: list[str] = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if transfer.head is None:
        if not linear:
            raise TaskError("transfer: the model has no linear layer; name the layer to exchange as head")
        return linear[-1]
    found = modules.get(transfer.head)
    if not isinstance(found, (nn.Linear, *_CONVOLUTIONS)) or transfer.head == "":
        what = "has no module" if found is None else f"has a {type(found).__name__} as"
        raise TaskError(
            f"transfer: the model {what} {transfer.head!r}; head must be a linear layer or a convolution, such as "
            f"{', '.join(linear[-3:]) or 'the last one'}"
        )
    return transfer.head


def with_new_head(model: nn.Module, transfer: Transfer, seed: int = 0) -> nn.Module:
    """The model itself with a fresh head for the new classes, everything else as it is. Raises TaskError."""
    name = head_name(model, transfer)
    old = model.get_submodule(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = _like(old, transfer.classes).to(next(old.parameters()).dtype)
    model.set_submodule(name, new)
    return model


def _like(old: nn.Module, outputs: int) -> nn.Module:
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, outputs, bias=old.bias is not None)
    assert isinstance(old, _CONVOLUTIONS)
    return type(old)(
        old.in_channels,
        outputs,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
