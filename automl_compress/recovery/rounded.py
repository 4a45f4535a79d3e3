"""Training with rounded weights: each step computes with weights at a bit-width and moves the exact ones behind them.

Gradients pass through the rounding (straight-through: Bengio et al. 2013). Symmetric, a scale for each output, the
largest weight at the end of the range.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.model.task import Batch
from automl_compress.techniques.objective import Loss, Memory, Objective

WIDEST = 16.0
_SMALLEST = 1e-12


class Rounded:
    """An objective of a student whose layers' weights are rounded. `share` 0 rounds to 16 bits, 1 to the plan's."""

    def __init__(self, objective: Objective, graph: Graph, plan: Plan) -> None:
        self._objective, self.share = objective, 0.0
        self._layers = {
            layer.weight: (plan.layer_bits(layer.name), layer.out_axis)
            for layer in graph.layers
            if plan.layer_bits(layer.name) != FULL_BITS and not plan.drop.intersection(layer.blocks)
        }

    def __call__(self, student: nn.Module, batch: Batch) -> Loss:
        with rounded_weights(student, self.widths()):
            return self._objective(student, batch)

    def modules(self) -> nn.Module | None:
        return self._objective.modules()

    def memory(self) -> Memory | None:
        return self._objective.memory()

    def widths(self) -> dict[str, tuple[float, int]]:
        """Parameter -> its bit-width for now, and the dimension of its outputs."""
        return {
            name: (max(float(bits), WIDEST - self.share * (WIDEST - bits)), axis)
            for name, (bits, axis) in self._layers.items()
        }


def fake_rounded(weight: Tensor, bits: float, axis: int) -> Tensor:
    """The weight at the nearest of 2^bits - 1 steps that are symmetric around zero; bits may be a fraction."""
    highest = max(1, round(2 ** (bits - 1)) - 1)
    others = [dim for dim in range(weight.ndim) if dim != axis]
    scale = (weight.detach().abs().amax(dim=others, keepdim=True) / highest).clamp_min(_SMALLEST)
    steps = weight / scale
    return (steps + (steps.round() - steps).detach()) * scale


@contextmanager
def rounded_weights(model: nn.Module, widths: Mapping[str, tuple[float, int]]) -> Iterator[None]:
    """Within, modules compute with these parameters rounded."""
    handles = []
    for name, (bits, axis) in widths.items():
        path, _, leaf = name.rpartition(".")
        handles += _rounding(model.get_submodule(path), leaf, bits, axis)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding(module: nn.Module, name: str, bits: float, axis: int) -> list[Any]:
    """Hooks that put the rounded weight in the place of the parameter for the time of a call."""

    # An entry of the instance is found before the parameter of the same name, which stays registered where it is.
    def before(module: nn.Module, _: Any) -> None:
        parameter = module._parameters[name]
        assert parameter is not None
        module.__dict__[name] = fake_rounded(parameter, bits, axis)

    def after(module: nn.Module, _: Any, __: Any) -> None:
        del module.__dict__[name]

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
