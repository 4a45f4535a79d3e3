"""A batch-norm that follows a convolution or linear layer directly is part of it in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from automl_compress.deploy.normalise import bias_name

_PRODUCERS = ("conv1d", "conv2d", "conv3d", "linear")
_BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")


@dataclass(frozen=True, kw_only=True)
class BatchNormPair:
    """A layer and the batch-norm that alone reads its output, by the names of their parameters and buffers.

    After folding, the layer's weight has its old name, and its bias the one that it had or '<layer>.bias'.
    """

    weight: str
    bias: str | None
    scale: str | None
    shift: str | None
    mean: str
    variance: str
    epsilon: float

    @property
    def folded_bias(self) -> str:
        return self.bias or bias_name(self.weight)

    def folded(self, initializers: Iterable[str]) -> bool:
        """Whether the exporter has folded the pair, seen from the initializers' names."""
        names = set(initializers)
        own = {name for name in (self.scale, self.shift, self.mean, self.variance) if name}
        return self.weight in names and self.folded_bias in names and not own & names


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers under every name that they have."""
    buffers, parameters = model.named_buffers(remove_duplicate=False), model.named_parameters(remove_duplicate=False)
    return {**dict(buffers), **dict(parameters)}


def batch_norm_pairs(model: nn.Module, program: ExportedProgram) -> tuple[BatchNormPair, ...]:
    """All pairs whose two operators are directly connected and each used once. Both must hold `model`'s tensors."""
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    known = named_tensors(model)
    pairs = []
    for node in program.graph.nodes:
        layer = node.args[0] if _operator(node) in _BATCH_NORMS else None
        if not isinstance(layer, Node) or _operator(layer) not in _PRODUCERS or len(layer.users) != 1:
            continue
        tensors = [*_names(layer, targets, 1, 3), *_names(node, targets, 1, 5)]
        weight, bias, scale, shift, mean, variance = tensors
        if weight in known and mean in known and variance in known and _used_once(layer.args[1]):
            pairs.append(
                BatchNormPair(
                    weight=str(weight),
                    bias=bias,
                    scale=scale,
                    shift=shift,
                    mean=str(mean),
                    variance=str(variance),
                    epsilon=float(_epsilon(node)),
                )
            )
    return tuple(pairs)


def _operator(node: Node) -> str:
    name: str = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0] if node.op == "call_function" else ""


def _names(node: Node, targets: dict[str, str], first: int, last: int) -> list[str | None]:
    arguments = [node.args[i] if i < len(node.args) else None for i in range(first, last)]
    return [targets.get(a.name) if isinstance(a, Node) else None for a in arguments]


def _used_once(argument: Any) -> bool:
    return isinstance(argument, Node) and len(argument.users) == 1


def _epsilon(node: Node) -> float:
    """batch_norm(x, w, b, mean, var, training, momentum, eps, ...) or the variant without `training`."""
    position = 7 if _operator(node) == "batch_norm" else 6
    return float(node.args[position])  # type: ignore[arg-type]


def folded_tensors(model: nn.Module, pairs: Iterable[BatchNormPair]) -> dict[str, np.ndarray]:
    """Name -> float32 weight and bias of every pair whose tensors `model` still has, after folding.

    W' = W * g / sqrt(v + eps) per output channel, b' = (b - m) * g / sqrt(v + eps) + s.
    """
    named = named_tensors(model)
    result: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for pair in pairs:
            if pair.weight not in named or pair.variance not in named:
                continue
            weight, mean = named[pair.weight].double(), named[pair.mean].double()
            factor = (named[pair.variance].double() + pair.epsilon).rsqrt()
            if pair.scale is not None:
                factor = factor * named[pair.scale].double()
            bias = named[pair.bias].double() if pair.bias is not None else torch.zeros_like(mean)
            shift = named[pair.shift].double() if pair.shift is not None else torch.zeros_like(mean)
            shape = (-1, *[1] * (weight.ndim - 1))
            result[pair.weight] = (weight * factor.reshape(shape)).float().cpu().numpy()
            result[pair.folded_bias] = ((bias - mean) * factor + shift).float().cpu().numpy()
    return result
