"""One pass over an exported graph that gives every value its channel labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from automl_compress.model.labels import Channels, Ids, Labels
from automl_compress.model.rules import RULES

NumberKind = Literal["shape", "pad", "end", "split", "groups", "scale"]
_CONVOLUTIONS = {f"conv{n}d" for n in (1, 2, 3)}
_TRANSPOSED = {f"conv_transpose{n}d" for n in (1, 2, 3)}
_PRODUCTS = {"matmul", "mm", "addmm"}
_LAYERS = _CONVOLUTIONS | _TRANSPOSED | _PRODUCTS | {"linear"}


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


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A number in the traced code, in an operator of `module`, that is the size of a dimension labelled `ids`."""

    module: str
    size: int
    ids: Ids | None


@dataclass
class Walk:
    """The labels of every value, and what the operators do with labelled dimensions.

    aliases     names of tensors that have several -> the one to use
    equal       modules whose code takes a size from their input where they could have another: equal sizes are tied
    alike       modules in `equal` whose operators of one kind have equal sizes at equal places
    contracted  node -> (operand, dimension) pairs over which it sums products, so that a removed channel counts as zero
    statistics  nodes that compute means, maxima and the like over labelled dimensions, so that a removed channel must
                not take part
    numbers     (module, kind, values, labels of what each counts), as `core.graph.Numbers`
    constants   numbers in the code that follow channel counts
    unknown     operators without a rule -> how often they met channels
    """

    program: ExportedProgram
    aliases: Mapping[str, str] = field(default_factory=dict)
    equal: frozenset[str] = frozenset()
    alike: frozenset[str] = frozenset()
    channels: Channels = field(default_factory=Channels)
    stored: dict[str, Labels] = field(default_factory=dict)  # parameter or buffer -> labels
    layers: list[LayerUse] = field(default_factory=list)
    contracted: dict[Node, list[tuple[Node, int]]] = field(default_factory=lambda: defaultdict(list))
    statistics: set[Node] = field(default_factory=set)
    constants: list[Constant] = field(default_factory=list)
    numbers: list[tuple[str, NumberKind, tuple[int, ...], Labels]] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _labels: dict[Node, Any] = field(default_factory=dict)
    _constant_nodes: list[Node] = field(default_factory=list)
    _by_line: dict[tuple[str, str, int, int], Ids | None] = field(default_factory=dict)
    _entering: dict[str, list[Ids]] = field(default_factory=lambda: defaultdict(list))

    def run(self) -> Walk:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs if hasattr(spec.arg, "name")}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._labels[node] = self._stored(node, specs.get(node.name))
            elif node.op == "call_function":
                if self.equal:
                    self._note_entering(node)
                self._labels[node] = self._call(node)
                if isinstance(node.meta.get("val"), torch.Tensor):
                    self.note_numbers(node, "shape", self.shape(node), self.labels(node))
            elif node.op == "output":
                for value in self.tensors(node):
                    for ids in self.labels(value):
                        self.channels.freeze(ids, "it is the model's output")
            else:
                self._labels[node] = (None,) * len(self.shape(node))
        return self

    def labels(self, node: Node) -> Labels:
        found: Labels = self._labels[node]
        return found

    def parts(self, node: Node) -> Sequence[Labels]:
        """The labels of each value that an operator with several results returns."""
        found: Sequence[Labels] = self._labels[node]
        return found

    def every_label(self, node: Node) -> Sequence[Labels]:
        """The labels of a value, or of each of several."""
        found = self._labels.get(node, ())
        return found if isinstance(found, list) else [found]

    def shape(self, node: Node) -> tuple[int, ...]:
        value = node.meta.get("val")
        return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()

    def shapes(self, node: Node) -> list[tuple[int, ...]]:
        """The shapes of each value that an operator with several results returns."""
        return [tuple(int(s) for s in v.shape) if isinstance(v, torch.Tensor) else () for v in node.meta["val"]]

    def tensors(self, node: Node) -> list[Node]:
        """The tensor-valued arguments of a node in order, those inside lists included."""
        return [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor)]

    def title(self, node: Node) -> str:
        """The operator and the module that called it, for messages."""
        return f"{operator(node)} in {module_of(node) or 'the model'}"

    def contract(self, node: Node, operand: Node, dim: int) -> None:
        """Note that the node sums products over a dimension of an operand."""
        if self.labels(operand)[dim] is not None:
            self.contracted[node].append((operand, dim % len(self.shape(operand))))

    def note_statistics(self, node: Node) -> None:
        self.statistics.add(node)

    def note_numbers(self, node: Node, kind: NumberKind, values: Sequence[int], labels: Sequence[Ids | None]) -> None:
        """Note numbers that the operator contains, and the labels of what each of them counts."""
        if any(ids is not None for ids in labels):
            self.numbers.append((module_of(node), kind, tuple(values), tuple(labels)))

    def note_constant(self, node: Node, size: int, ids: Ids | None) -> None:
        """Note that the code around this node contains the size of a dimension, and that dimension's labels."""
        path = module_of(node)
        self.constants.append(Constant(module=path, size=size, ids=ids))
        if path not in self.equal:
            return
        # A line that runs several times (a loop over heads) reads the same number each time.
        line = operator(node) if path in self.alike else str(node.meta.get("stack_trace"))
        place = (path, line, sum(1 for one in self._constant_nodes if one is node))
        self._constant_nodes = [*(one for one in self._constant_nodes if one is node), node]
        known = self._by_line.setdefault((*place, size), ids)
        if ids is not None:
            for other in (*self._entering.get(path, ()), *([known] if known is not None else [])):
                # The same channels in another order are as many already.
                if len(other) == size and Counter(self.channels.sets(other)) != Counter(self.channels.sets(ids)):
                    self.channels.tie(other, ids)

    def _note_entering(self, node: Node) -> None:
        """Remember the labels of what enters the modules in `equal` from outside."""
        for path in module_stack(node):
            if path in self.equal:
                for value in self.tensors(node):
                    if value.op == "call_function" and path not in module_stack(value):
                        self._entering[path] += [ids for ids in self.labels(value) if ids is not None]

    def _stored(self, node: Node, spec: Any) -> Labels:
        if spec is None or spec.kind == InputKind.USER_INPUT or not self.shape(node):
            return (None,) * len(self.shape(node))
        name = self.aliases.get(str(spec.target), str(spec.target))
        if name not in self.stored:
            self.stored[name] = tuple(self.channels.fresh(size) if size > 1 else None for size in self.shape(node))
        return self.stored[name]

    def _call(self, node: Node) -> Any:
        name = base_operator(node)
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, list, tuple)):
            return self._unknown(node) if self.tensors(node) and name not in _HARMLESS else ()
        self._note_layer(node, name)
        rule = RULES.get(name)
        return rule(self, node) if rule else self._unknown(node)

    def _unknown(self, node: Node) -> Any:
        frozen = False
        for value in node.all_input_nodes:
            labels = self._labels.get(value, ())
            for part in labels if isinstance(labels, list) else [labels]:
                for ids in part:
                    if ids is not None:
                        frozen = True
                        self.channels.freeze(ids, f"{self.title(node)} is not understood")
        if frozen:
            self.unknown[operator(node)] += 1
        if isinstance(node.meta.get("val"), (list, tuple)):
            return [(None,) * len(shape) for shape in self.shapes(node)]
        return (None,) * len(self.shape(node))

    def _note_layer(self, node: Node, name: str) -> None:
        if name not in _LAYERS:
            return
        operands: tuple[Any, ...] = node.args[1:] if name == "addmm" else node.args
        weight = self._source(operands[1])
        if weight is None or (name in _PRODUCTS and len(self.shape(operands[1])) != 2):
            return
        bias_node = node.args[0] if name == "addmm" else node.args[2] if len(node.args) > 2 else None
        bias = self._target(bias_node)
        arguments: tuple[Any, ...] = node.args
        at = 5 if name in _TRANSPOSED else 6
        at += name in _TRANSPOSED  # output_padding comes before groups
        groups = int(arguments[at]) if "conv" in name and len(arguments) > at else 1
        depthwise = groups > 1 and groups == self.shape(node.args[0])[1]  # type: ignore[arg-type]
        into, out = (0, 1) if name in _TRANSPOSED | _PRODUCTS else (1, 0)
        self.layers.append(
            LayerUse(
                name=weight.removesuffix(".weight"),
                node=node,
                weight=weight,
                bias=bias,
                kind="conv" if "conv" in name else "linear",
                groups=groups,
                in_axis=out if depthwise and name not in _TRANSPOSED else into,
                out_axis=into if depthwise and name in _TRANSPOSED else out,
            )
        )

    def _source(self, value: Any) -> str | None:
        """The parameter that a weight is, or is computed from without a change of shape (weight standardisation)."""
        direct = self._target(value)
        if direct is not None or not isinstance(value, Node):
            return direct
        shape, seen, frontier = self.shape(value), {value}, [value]
        found: set[str] = set()
        while frontier:
            for node in frontier.pop().all_input_nodes:
                if node in seen:
                    continue
                seen.add(node)
                target = self._target(node)
                if node.op == "placeholder" and target is None:
                    return None  # it depends on the input
                if target is not None and self.shape(node) == shape and self._learned(target):
                    found.add(target)
                frontier.append(node)
            if len(seen) > 64:
                return None
        return found.pop() if len(found) == 1 else None

    def _target(self, value: Any) -> str | None:
        if not isinstance(value, Node) or value.op != "placeholder":
            return None
        return self._targets.get(value.name)

    def _learned(self, target: str) -> bool:
        return target in self._parameters

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(self.aliases.get(name, name) for name in self.program.graph_signature.parameters)

    @cached_property
    def _targets(self) -> Mapping[str, str]:
        signature = self.program.graph_signature
        found = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
        return {node: self.aliases.get(name, name) for node, name in found.items()}


_HARMLESS = frozenset({"sym_size", "_assert_tensor_metadata", "_assert_scalar", "sym_numel"})


def operator(node: Node) -> str:
    """'conv2d' for aten.conv2d.default."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet).rsplit(".", 1)[-1] if packet is not None else getattr(node.target, "__name__", str(node.target))


def base_operator(node: Node) -> str:
    """The operator's name without the underscore of the in-place form."""
    name = operator(node)
    return name.rstrip("_") if not name.startswith("__") else name


def module_of(node: Node) -> str:
    """The path of the innermost module that a node was traced in; '' for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def module_stack(node: Node) -> tuple[str, ...]:
    """The paths of all modules that a node was traced in, outermost first."""
    return tuple(str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values())
