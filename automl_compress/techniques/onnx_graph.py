"""Reading and tidying ONNX graphs: who produces a value, who uses it, what nobody needs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

LAYER_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
WEIGHT_SUFFIX = ".weight_q"
_CALL = "::"


def call_name(layer: str, call: int) -> str:
    """The node name of a layer's call: the layer itself for the first, 'layer::1' for the second, and so on."""
    return layer if call == 0 else f"{layer}{_CALL}{call}"


def layer_of(node_name: str) -> str:
    """The layer that a node name from `call_name` belongs to."""
    return node_name.split(_CALL, 1)[0]


class GraphView:
    """An index over a graph as it is now; make a new one after the graph was changed."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.producer: dict[str, onnx.NodeProto] = {}
        self.users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            self.producer.update({value: node for value in node.output if value})
            for value in dict.fromkeys(node.input):
                if value:
                    self.users[value].append(node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in self.initializers]
        self.outputs = [value.name for value in graph.output]

    @cached_property
    def layers(self) -> list[tuple[str, onnx.NodeProto]]:
        """(layer, node) of every node of `LAYER_OPERATORS`."""
        return [(layer_of(node.name), node) for node in self.nodes if node.op_type in LAYER_OPERATORS]

    @cached_property
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Value name -> shape as far as the graph states it; None stands for a size that is free."""
        result = {name: tuple(tensor.dims) for name, tensor in self.initializers.items()}
        for value in (*self.graph.input, *self.graph.value_info, *self.graph.output):
            if value.type.tensor_type.HasField("shape"):
                dims = value.type.tensor_type.shape.dim
                result[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
        return result

    @cached_property
    def scalars(self) -> dict[str, float]:
        """Name -> number of every initializer that is a single one."""
        single = (t for t in self.initializers.values() if math.prod(t.dims) == 1 and t.data_type != TensorProto.STRING)
        return {tensor.name: float(numpy_helper.to_array(tensor).item()) for tensor in single}

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initializer, or None if `name` is not one."""
        return numpy_helper.to_array(self.initializers[name]) if name in self.initializers else None

    def only_user(self, value: str) -> onnx.NodeProto | None:
        """The one node that uses `value`, or None if there are several or the value leaves the graph."""
        users = self.users.get(value, [])
        return users[0] if len(users) == 1 and value not in self.outputs else None


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or `default` if it isn't set."""
    for candidate in node.attribute:
        if candidate.name == name:
            return onnx.helper.get_attribute_value(candidate)
    return default


def replace_uses(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let every node that reads `old` read `new` instead. Graph outputs are not touched."""
    for node in graph.node:
        for index, value in enumerate(node.input):
            if value == old:
                node.input[index] = new


def set_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Make `nodes` the graph's nodes, in that order."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def remove_unused(graph: onnx.GraphProto) -> None:
    """Delete nodes, initializers and value descriptions that no output depends on."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(value for value in node.input if value)
            kept.append(node)
    if len(kept) != len(graph.node):
        set_nodes(graph, reversed(kept))
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    if len(initializers) != len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(initializers)
    described = [value for value in graph.value_info if value.name in needed]
    if len(described) != len(graph.value_info):
        del graph.value_info[:]
        graph.value_info.extend(described)
