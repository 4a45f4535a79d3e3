"""Channel groups and removable blocks of an exported model: channel indices are followed through its operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from automl_compress.core.graph import Block, ChannelGroup, Frozen, Place
from automl_compress.model.labels import Channels, Ids, Labels
from automl_compress.model.rules import RULES

_CONVOLUTIONS = {f"conv{n}d" for n in (1, 2, 3)}
_TRANSPOSED = {f"conv_transpose{n}d" for n in (1, 2, 3)}
_MINIMUM_CHANNELS = 2


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """A call of a convolution or linear operator with a stored weight. Axes are those of the weight."""

    name: str
    node: Node
    weight: str
    bias: str | None
    kind: Literal["conv", "linear"]
    groups: int
    in_axis: int
    out_axis: int


@dataclass
class Walk:
    """One pass over the exported graph that gives every value its channel labels."""

    program: ExportedProgram
    channels: Channels = field(default_factory=Channels)
    stored: dict[str, Labels] = field(default_factory=dict)  # parameter or buffer -> labels
    layers: list[LayerUse] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _labels: dict[Node, Labels] = field(default_factory=dict)

    def run(self) -> Walk:
        targets = {
            spec.arg.name: spec for spec in self.program.graph_signature.input_specs if hasattr(spec.arg, "name")
        }
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._labels[node] = self._stored(node, targets.get(node.name))
            elif node.op == "call_function":
                self._labels[node] = self._call(node)
            elif node.op == "output":
                for value in self.tensors(node):
                    for ids in self.labels(value):
                        self.channels.freeze(ids, "it is the model's output")
        return self

    def labels(self, node: Node) -> Labels:
        return self._labels[node]

    def shape(self, node: Node) -> tuple[int, ...]:
        value = node.meta.get("val")
        return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()

    def tensors(self, node: Node) -> list[Node]:
        """The tensor-valued arguments of a node in order, those inside lists included."""
        return [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor)]

    def title(self, node: Node) -> str:
        """The operator and the module that called it, for messages."""
        return f"{operator(node)} in {module_of(node) or 'the model'}"

    def _stored(self, node: Node, spec: Any) -> Labels:
        if spec is None or spec.kind == InputKind.USER_INPUT or not self.shape(node):
            return (None,) * len(self.shape(node))
        labels = tuple(self.channels.fresh(size) if size > 1 else None for size in self.shape(node))
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            self.stored[str(spec.target)] = labels
        else:
            for ids in labels:
                self.channels.freeze(ids, f"{spec.target} is a constant in the model's code")
        return labels

    def _call(self, node: Node) -> Labels:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return self._unknown(node) if self.tensors(node) and operator(node) != "sym_size" else ()
        name = operator(node)
        self._note_layer(node, name)
        rule = RULES.get(name)
        return rule(self, node) if rule else self._unknown(node)

    def _unknown(self, node: Node) -> Labels:
        frozen = False
        for value in self.tensors(node):
            for ids in self._labels.get(value, ()):
                if ids is not None:
                    frozen = True
                    self.channels.freeze(ids, f"{self.title(node)} is not understood")
        if frozen:
            self.unknown[operator(node)] += 1
        return (None,) * len(self.shape(node))

    def _note_layer(self, node: Node, name: str) -> None:
        if name not in _CONVOLUTIONS | _TRANSPOSED | {"linear"}:
            return
        weight = self._target(node.args[1])
        if weight is None:
            return
        bias = self._target(node.args[2]) if len(node.args) > 2 else None
        arguments: tuple[Any, ...] = node.args
        groups = int(arguments[6]) if name != "linear" and len(arguments) > 6 else 1
        self.layers.append(
            LayerUse(
                name=weight.removesuffix(".weight"),
                node=node,
                weight=weight,
                bias=bias,
                kind="linear" if name == "linear" else "conv",
                groups=groups,
                in_axis=0 if name in _TRANSPOSED or groups > 1 else 1,
                out_axis=1 if name in _TRANSPOSED else 0,
            )
        )

    def _target(self, value: Any) -> str | None:
        if not isinstance(value, Node) or value.op != "placeholder":
            return None
        signature = self.program.graph_signature
        targets: Mapping[str, str] = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
        return targets.get(value.name)


def operator(node: Node) -> str:
    """'conv2d' for aten.conv2d.default."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet).rsplit(".", 1)[-1] if packet is not None else getattr(node.target, "__name__", str(node.target))


def module_of(node: Node) -> str:
    """The path of the innermost module that a node was traced in; '' for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def channel_groups(walk: Walk) -> tuple[tuple[ChannelGroup, ...], tuple[Frozen, ...]]:
    """Partition the channels that may be cut into groups of equal surroundings; name the other layers, and why."""
    places = _places(walk)
    families: dict[tuple[tuple[str, int, int], ...], list[int]] = defaultdict(list)
    for root, spots in places.items():
        if walk.channels.frozen(root) is None:
            families[tuple(sorted((tensor, dim, len(where)) for (tensor, dim), where in spots.items()))].append(root)
    order = {use.name: number for number, use in enumerate(walk.layers)}
    groups: list[ChannelGroup] = []
    for family, roots in families.items():
        axes = {(tensor, dim) for tensor, dim, _ in family}
        producers = [use.name for use in _unique(walk) if (use.weight, use.out_axis) in axes]
        consumers = [
            use.name for use in _unique(walk) if use.in_axis != use.out_axis and (use.weight, use.in_axis) in axes
        ]
        makers = [name for name in producers if name in consumers or not _depthwise(walk, name)]
        if not makers or not consumers or len(roots) < _MINIMUM_CHANNELS:
            continue
        groups.append(
            ChannelGroup(
                name=min(producers, key=order.__getitem__),
                size=len(roots),
                places=tuple(
                    Place(
                        tensor=tensor,
                        dim=dim,
                        positions=tuple(places[root][tensor, dim] for root in roots),
                        role=_role(walk, tensor, dim),
                    )
                    for tensor, dim, _ in family
                ),
                producers=tuple(sorted(producers, key=order.__getitem__)),
                consumers=tuple(sorted(consumers, key=order.__getitem__)),
            )
        )
    groups.sort(key=lambda group: order[group.name])
    return _distinct_names(groups), _frozen_layers(walk)


def _places(walk: Walk) -> dict[int, dict[tuple[str, int], tuple[int, ...]]]:
    """Class of channels -> (tensor, dim) -> its positions there. Classes come in the order of their first position."""
    found: dict[int, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for tensor, labels in walk.stored.items():
        for dim, ids in enumerate(labels):
            if ids is not None:
                for position, root in enumerate(walk.channels.root(ids).tolist()):
                    found[root][tensor, dim].append(position)
    return {root: {spot: tuple(where) for spot, where in spots.items()} for root, spots in sorted(found.items())}


def _unique(walk: Walk) -> Iterator[LayerUse]:
    seen: set[str] = set()
    for use in walk.layers:
        if use.name not in seen:
            seen.add(use.name)
            yield use


def _depthwise(walk: Walk, name: str) -> bool:
    return any(use.name == name and use.in_axis == use.out_axis for use in walk.layers)


def _role(walk: Walk, tensor: str, dim: int) -> Literal["producer", "follower", "consumer"]:
    for use in walk.layers:
        if tensor == use.weight and use.in_axis != use.out_axis:
            return "producer" if dim == use.out_axis else "consumer" if dim == use.in_axis else "follower"
    return "follower"


def _distinct_names(groups: list[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """A layer whose channels fall into several groups gives them numbered names."""
    from dataclasses import replace

    count: dict[str, int] = defaultdict(int)
    result = []
    for group in groups:
        count[group.name] += 1
        result.append(group if count[group.name] == 1 else replace(group, name=f"{group.name}#{count[group.name]}"))
    return tuple(result)


def _frozen_layers(walk: Walk) -> tuple[Frozen, ...]:
    result = []
    for use in _unique(walk):
        ids: Ids | None = walk.stored[use.weight][use.out_axis]
        reasons = (
            [walk.channels.frozen(int(root)) for root in np.unique(walk.channels.root(ids))] if ids is not None else []
        )
        named = [reason for reason in reasons if reason]
        if named:
            result.append(Frozen(layer=use.name, reason=named[0]))
    return tuple(result)


def residual_blocks(walk: Walk) -> tuple[Block, ...]:
    """Branches that end in an addition whose other side has the sum's shape and doesn't need the branch."""
    blocks = []
    for node in walk.program.graph.nodes:
        if node.op != "call_function" or operator(node) not in ("add", "add_") or len(walk.tensors(node)) != 2:
            continue
        sides = walk.tensors(node)
        if any(walk.shape(side) != walk.shape(node) or side.op != "call_function" for side in sides):
            continue
        branches = [_branch(side, node) for side in sides]
        candidates = [
            (side, branch)
            for side, branch in zip(sides, branches, strict=True)
            if any(use.node in branch for use in walk.layers)
        ]
        if candidates:
            # Where both sides hold layers, the longer one is the branch and the other the (projected) shortcut.
            blocks.append(_block(walk, *max(candidates, key=lambda pair: len(pair[1])), node))
    return tuple(block for block in blocks if block.layers and block.modules)


def _branch(side: Node, addition: Node) -> set[Node]:
    """The nodes that nothing but this side of the addition uses."""
    members: set[Node] = set()
    for node in reversed(list(addition.graph.nodes)):
        if node.op != "call_function" or node is addition or not node.users:
            continue
        if (node is side and set(node.users) == {addition}) or node.users.keys() <= members:
            members.add(node)
    return members


def _block(walk: Walk, side: Node, branch: set[Node], addition: Node) -> Block:
    inside: dict[str, list[Node]] = defaultdict(list)
    outside: set[str] = set()
    for node in walk.program.graph.nodes:
        if node.op == "call_function":
            path = module_of(node)
            inside[path].append(node) if node in branch else outside.add(path)
    layers = [use.name for use in walk.layers if use.node in branch]
    leaves = [path for path in inside if path and path not in outside and not _has_children(path, inside, outside)]
    last = inside[leaves[-1]][-1] if leaves else side
    parent = _common_prefix(layers) or layers[0]
    return Block(
        name=parent,
        layers=tuple(dict.fromkeys(layers)),
        modules=tuple(leaves),
        output=side.name,
        addition=addition.name,
        shape=(1, *walk.shape(last)[1:]),
    )


def _has_children(path: str, inside: dict[str, list[Node]], outside: set[str]) -> bool:
    return any(other.startswith(path + ".") for other in (*inside, *outside))


def _common_prefix(names: list[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    prefix: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        prefix.append(column[0])
    return ".".join(prefix)
