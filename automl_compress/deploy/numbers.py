"""Numbers in an exported graph that follow channel counts: shapes, amounts of padding, ends of slices, parts of splits.

The trace says which numbers each module's operators contain and what they count; the exporter says which module each
node comes from. A constant is one of those numbers if its values are. Where that is wrong, the comparison of the filled
model with PyTorch notices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import numpy_helper

from automl_compress.core.graph import Cells, Graph, Numbers
from automl_compress.deploy.normalise import module_scope, shape_constant
from automl_compress.model.trace import TRACE_BATCH
from automl_compress.techniques.onnx_graph import GraphView

_INPUTS = {
    "Reshape": (1, "shape"),
    "Expand": (1, "shape"),
    "Pad": (1, "pad"),
    "Slice": (2, "end"),
    "Split": (1, "split"),
    "Mul": (1, "scale"),
}
# The exporter scales queries and keys each by the fourth root of the width, their product thus by the square root.
_SCALE_POWER = -0.25


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
    found: dict[tuple[str, str, tuple[int, ...]], list[tuple[str, int]]] = {}
    for node in view.nodes:
        if node.op_type not in _INPUTS or node.output[0] not in modules:
            continue
        position, kind = _INPUTS[node.op_type]
        value = view.constant(node.input[position]) if len(node.input) > position else None
        if value is None:
            continue
        values = _integers(kind, value)
        if values is None:
            continue
        found.setdefault((modules[node.output[0]], kind, values), []).append((node.output[0], position))
    result = []
    for (module, kind, values), nodes in found.items():
        calls = _matching(graph, module, kind, values)
        if -1 in values:
            # It stands for what grows with the batch, so the numbers that are written out don't.
            calls = [call for call in calls if not _grows(graph, values, call)] or calls
        # Calls that look alike may count different channels, as those of keys and of values: then their order tells.
        # The last ones may be of operators that the exporter writes without numbers.
        ordered = calls[: len(nodes)] if len(calls) >= len(nodes) else calls[:1] * len(nodes)
        for (output, position), cells in zip(nodes, ordered, strict=False):
            if any(cells):
                result.append(Constant(output=output, position=position, values=values, cells=cells))
    return tuple(result)


def _integers(kind: str, value: np.ndarray) -> tuple[int, ...] | None:
    """What a constant counts; None if that isn't a whole number."""
    if kind != "scale":
        return tuple(int(part) for part in value.reshape(-1))
    factor = float(value.reshape(-1)[0]) if value.size == 1 else 0.0
    width = round(factor ** (1 / _SCALE_POWER)) if 0.0 < factor < 1.0 else 0
    return (width,) if width > 0 and abs(width**_SCALE_POWER / factor - 1) < 1e-5 else None


def _matching(graph: Graph, module: str, kind: str, values: Sequence[int]) -> list[tuple[Cells, ...]]:
    """What the numbers count, for each call of the module whose numbers they can be."""
    calls: list[tuple[Cells, ...]] = []
    for numbers in graph.numbers:
        if numbers.module != module:
            continue
        if numbers.kind == kind and _same(kind, values, numbers):
            calls.append(numbers.cells)
        elif numbers.kind == "groups" and kind == "shape" and tuple(values) == (0, numbers.values[0], -1):
            calls.append(((), numbers.cells[0], ()))
    return calls


def _grows(graph: Graph, values: Sequence[int], call: tuple[Cells, ...]) -> bool:
    """Whether a number that is written out seems to count channels once for each sample of the traced batch."""
    for value, cells in zip(values, call, strict=True):
        repeats = [count // prod(graph.group[name].size for name in names) for count, names in cells if names]
        if value > 0 and repeats and all(n > 1 and n % TRACE_BATCH == 0 for n in repeats):
            return True
    return False


def _same(kind: str, values: Sequence[int], known: Numbers) -> bool:
    if len(values) != len(known.values):
        return False
    # In a shape, -1 and 0 stand for a size that follows the data; the batch, first and no channels, may be anything.
    free = (-1, 0) if kind == "shape" else ()
    start = 1 if kind == "shape" and not known.cells[0] else 0
    return all(a == b or a in free for a, b in zip(values[start:], known.values[start:], strict=True))


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
            node.input[constant.position] = (
                _scale_constant(onnx_graph, values[0]) if node.op_type == "Mul" else shape_constant(onnx_graph, values)
            )


def _scale_constant(graph: onnx.GraphProto, width: int) -> str:
    """The name of an initializer that scales for this width, which equal users share."""
    name = f"scale_{width}"
    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.array([width**_SCALE_POWER], np.float32), name))
    return name
