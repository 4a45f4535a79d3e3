"""What rules can match: channel groups, blocks and layers of one network, with what they are matched by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from automl_compress.core.graph import Graph, Layer

TargetKind = Literal["channel-group", "block", "layer"]
Operator = Literal["conv", "depthwise", "linear"]
_COMPARISON = re.compile(r"\s*(>=|<=|>|<|=)?\s*(\d[\d_]*)\s*")
_FEW = 5


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that a rule can match.

    channels  a group's size, a layer's output channels; 0 for a block
    layers    the layer itself, a block's layers, those that produce a group
    blocks    the removable blocks that contain it as a whole
    """

    kind: TargetKind
    name: str
    channels: int = 0
    layers: tuple[Layer, ...] = ()
    blocks: tuple[str, ...] = ()

    def figure(self, what: str) -> int:
        """'channels', or the sum over `layers` of 'parameters' or 'macs'."""
        if what == "channels":
            return self.channels
        return sum(layer.params if what == "parameters" else layer.macs for layer in self.layers)

    def runs(self, operator: str) -> bool:
        """Whether all of its layers are that: 'linear', 'conv', or of the convolutions the 'depthwise' ones."""
        return bool(self.layers) and all(operator in operators_of(layer) for layer in self.layers)

    def has_kernel(self, kernel: Sequence[int]) -> bool:
        """Whether all of its layers have that kernel; one number stands for all dimensions."""
        return bool(self.layers) and all(
            bool(layer.kernel) and tuple(layer.kernel) == _filled(kernel, len(layer.kernel)) for layer in self.layers
        )


def operators_of(layer: Layer) -> tuple[Operator, ...]:
    """What a rule may call the layer."""
    if layer.kind == "linear":
        return ("linear",)
    depthwise = layer.groups > 1 and layer.groups == layer.in_channels
    return ("conv", "depthwise") if depthwise else ("conv",)


def _filled(kernel: Sequence[int], dimensions: int) -> tuple[int, ...]:
    return tuple(kernel) * dimensions if len(kernel) == 1 else tuple(kernel)


def targets_of(graph: Graph) -> tuple[Target, ...]:
    """Everything that a rule can match: channel groups, then blocks, then layers."""
    groups = [
        Target(
            kind="channel-group",
            name=group.name,
            channels=group.size,
            layers=_layers(graph, group.producers),
            blocks=_around(graph, (*group.producers, *group.consumers)),
        )
        for group in graph.groups
    ]
    blocks = [
        Target(kind="block", name=b.name, layers=_layers(graph, b.layers), blocks=_around(graph, b.layers, but=b.name))
        for b in graph.blocks
        if b.ending == "zeros"
    ]
    layers = [
        Target(kind="layer", name=layer.name, channels=layer.out_channels, layers=(layer,), blocks=layer.blocks)
        for layer in graph.layers
    ]
    return (*groups, *blocks, *layers)


def _layers(graph: Graph, names: Iterable[str]) -> tuple[Layer, ...]:
    return tuple(graph.layer[name] for name in names)


def _around(graph: Graph, names: Iterable[str], but: str = "") -> tuple[str, ...]:
    """The blocks that contain all of these layers."""
    inside = set(names)
    return tuple(b.name for b in graph.blocks if b.name != but and inside and inside <= set(b.layers))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A condition on a number: '>=64', '<10_000', or a number alone, which must be equal."""

    sign: Literal[">=", "<=", ">", "<", "="]
    value: int

    @classmethod
    def parse(cls, text: str | int) -> Comparison:
        """Raises ValueError, with what may be written, for anything else."""
        found = _COMPARISON.fullmatch(str(text)) if not isinstance(text, bool) else None
        if found is None:
            raise ValueError(f"{text!r} is no comparison: write a number, or '>=64', '>64', '<=64', '<64' in quotes")
        sign: str = found[1] or "="
        return cls(sign=sign, value=int(found[2]))  # type: ignore[arg-type]

    def __call__(self, number: int) -> bool:
        return {
            ">=": number >= self.value,
            "<=": number <= self.value,
            ">": number > self.value,
            "<": number < self.value,
            "=": number == self.value,
        }[self.sign]


def known(targets: Sequence[Target], kind: TargetKind, name: str | None) -> str:
    """What there is of a kind, for whoever looked for something else: names, operators, sizes, the nearest name."""
    found = [target for target in targets if target.kind == kind]
    if not found:
        return f"the network has no {kind}"
    names = [target.name for target in found]
    told = [f"the network's {kind}s: {', '.join(names[:_FEW])}{', ...' if len(names) > _FEW else ''}"]
    operators = sorted({o for target in found for layer in target.layers for o in operators_of(layer)})
    told += [f"operators {', '.join(operators)}"] if operators else []
    for what in ("channels", "parameters"):
        sizes = sorted(target.figure(what) for target in found)
        told += [f"{sizes[0]:,} to {sizes[-1]:,} {what}"] if sizes[-1] else []
    near = get_close_matches(name, names, n=1) if name else []
    return "; ".join(told) + (f"; did you mean {near[0]}?" if near else "")
