"""The state of a training as named tensors and plain values: what a rollback goes back to and a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from automl_compress.techniques.training.averaging import Average

Tensors = dict[str, Tensor]


class Trained:
    """What steps change: the student, what the objective trains itself, the optimizer, the average."""

    def __init__(
        self, student: nn.Module, others: nn.Module | None, optimizer: torch.optim.Optimizer, average: Average | None
    ) -> None:
        self._parts = {"model": live(student)}
        if others is not None:
            self._parts["objective"] = live(others)
        if average is not None:
            self._parts["average"] = average.state
        self._optimizer, self._average = optimizer, average

    def floats(self) -> list[Tensor]:
        """All weights and statistics, sharing memory with what is trained."""
        return [v for named in self._parts.values() for v in named.values() if v.is_floating_point()]

    def copy(self) -> Tensors:
        """Copies of everything on the processor, by name."""
        found = {f"{part}.{name}": kept(v) for part, named in self._parts.items() for name, v in named.items()}
        for index, entries in self._optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    found[f"optimizer.{index}.{key}"] = kept(value)
        if self._average is not None:
            found["updates"] = torch.tensor(self._average.updates)
        return found

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Set everything to what `copy` returned."""
        for part, named in self._parts.items():
            write(
                named, {name.removeprefix(f"{part}."): v for name, v in tensors.items() if name.startswith(f"{part}.")}
            )
        entries: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                entries.setdefault(int(index), {})[key] = value.clone()
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": entries})
        if self._average is not None:
            self._average.updates = int(tensors["updates"])

    def shapes(self) -> dict[str, list[int]]:
        """By which a state that belongs to another model is recognised."""
        return {f"{p}.{name}": list(value.shape) for p, named in self._parts.items() for name, value in named.items()}


def live(module: nn.Module) -> Tensors:
    """A module's parameters and buffers by name, sharing memory with it."""
    return {n: v.detach() for n, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}


def kept(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


@torch.no_grad()
def write(named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into live tensors, which keep their device and layout."""
    for name, tensor in named.items():
        tensor.copy_(values[name])
