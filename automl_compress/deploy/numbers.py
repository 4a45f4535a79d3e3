"""Numbers in an exported graph that follow channel counts: shapes, amounts of padding, ends of slices, parts of splits.

The trace says which numbers each module's operators contain and what they count; the exporter says which module each
node comes from. A constant is one of those numbers if its values are. Where that is wrong, the comparison of the filled
model with PyTorch notices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from automl_compress.core.graph import Cells, Graph
from automl_compress.deploy.normalise import module_scope, shape_constant
from automl_compress.techniques.onnx_graph import GraphView

_INPUTS = {
    "Reshape": (1, "shape"),
    "Expand": (1, "shape"),
    "Pad": (1, "pad"),
    "Slice": (2, "end"),
    "Split": (1, "split"),
}


@dataclass(frozen=True, kw_only=True)
class Constant:
    """An input of a node, by the node's output, whose value at some entries counts channels."""

    output: str
    position: int
    values: tuple[int, ...]
    cells: tuple[Cells, ...]


def modules_of(graph: onnx.GraphProto) -> dict[str, str]:
    """Output of a node -> the module that the exporter says it comes from."""
    return {node.output[0]: module_scope(node) for node in graph.node if node.op_type in _INPUTS}


def find_numbers(onnx_graph: onnx.GraphProto, modules: Mapping[str, str], graph: Graph) -> tuple[Constant, ...]:
    """The constants of an exported graph that follow channel counts."""
    view = GraphView(onnx_graph)
    result = []
    for node in view.nodes:
        if node.op_type not in _INPUTS or node.output[0] not in modules:
            continue
        position, kind = _INPUTS[node.op_type]
        value = view.constant(node.input[position]) if len(node.input) > position else None
        if value is None:
            continue
        values = tuple(int(part) for part in value.reshape(-1))
        cells = _matching(graph, modules[node.output[0]], kind, values)
        if cells is not None and any(cells):
            result.append(Constant(output=node.output[0], position=position, values=values, cells=cells))
    return tuple(result)


def _matching(graph: Graph, module: str, kind: str, values: Sequence[int]) -> tuple[Cells, ...] | None:
    for numbers in graph.numbers:
        if numbers.module != module:
            continue
        if numbers.kind == kind and _same(kind, values, numbers.values):
            return numbers.cells
        if numbers.kind == "groups" and kind == "shape" and tuple(values) == (0, numbers.values[0], -1):
            return ((), numbers.cells[0], ())
    return None


def _same(kind: str, values: Sequence[int], known: Sequence[int]) -> bool:
    if len(values) != len(known):
        return False
    # In a shape, -1 and 0 stand for a size that follows the data; the batch, first, may be anything.
    free = (-1, 0) if kind == "shape" else ()
    start = 1 if kind == "shape" else 0
    return all(a == b or a in free for a, b in zip(values[start:], known[start:], strict=True))


def fill_numbers(
    onnx_graph: onnx.GraphProto, constants: Sequence[Constant], graph: Graph, kept: Mapping[str, int]
) -> None:
    """Set the constants to what is left when each group keeps `kept[group]` channels, in place."""
    nodes = {node.output[0]: node for node in onnx_graph.node if node.output}
    for constant in constants:
        node = nodes.get(constant.output)
        if node is None:
            continue  # it was in a removed branch
        values = [
            graph.count(cells, kept) if cells and value > 0 else value
            for value, cells in zip(constant.values, constant.cells, strict=True)
        ]
        if tuple(values) != constant.values:
            node.input[constant.position] = shape_constant(onnx_graph, values)
