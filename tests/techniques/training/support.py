"""A small network, its data and the plain loss: what the tests of the training loop share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.model.task import Batch, Task, prepare
from automl_compress.techniques.objective import Loss
from automl_compress.techniques.training.log import TrainingLog
from automl_compress.techniques.training.loop import train
from automl_compress.techniques.training.settings import Resources, Training

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 3, generator=GENERATOR), torch.arange(64) % 4
PLAIN = Resources(device="cpu", precision="float32", micro_batch=4096)


class Plain:
    """The task's own loss."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, student: nn.Module, batch: Batch) -> Loss:
        return Loss(total=self.task.loss_of(student(*batch[0]), batch[1]))

    def modules(self) -> None:
        return None

    def memory(self) -> None:
        return None


def net(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 4))


def task(**changes: Any) -> Task:
    parts: dict[str, Any] = {"model": net(0), "train": [(X[:32], Y[:32]), (X[32:], Y[32:])], "validation": (X, Y)}
    return prepare(Task(**{**parts, **changes}))


def fit(student: nn.Module, ready: Task | None = None, **options: Any) -> TrainingLog:
    """Train with `options`: those of `train` by name, the others are settings."""
    known = ("seed", "masks", "validate", "on_step", "resources", "label", "clock", "objective")
    given = {name: options.pop(name) for name in known if name in options}
    ready = ready or task()
    objective = given.pop("objective", None) or Plain(ready)
    return train(student, ready, objective, Training(**options), **{"resources": PLAIN, **given})


def score(model: nn.Module) -> float:
    """Minus the loss on all data."""
    return -float(functional.cross_entropy(model(X), Y))


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][n]) for n, v in states[0].items())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
