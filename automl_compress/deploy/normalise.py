"""Bringing an exported graph into the form that everything else relies on.

Nodes of layers are named like their modules, their weights `<layer>.weight`; shapes that depend on channel counts are
written so that they follow them; nothing is left that only costs bytes or kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from automl_compress.core.graph import Graph
from automl_compress.techniques.onnx_graph import (
    LAYER_OPERATORS,
    GraphView,
    attribute,
    call_name,
    remove_unused,
    replace_uses,
    set_nodes,
)

BATCH = "batch"
_KEEP_SIGN = frozenset(
    {"MaxPool", "AveragePool", "GlobalAveragePool", "Slice", "Reshape", "Squeeze", "Transpose", "Identity"}
)
_SCOPES = "pkg.torch.onnx.name_scopes"


def normalise(model: onnx.ModelProto, graph: Graph) -> None:
    """Rewrite an exported model in place; what it computes stays the same."""
    _name_layers(model.graph, graph)
    _pool_globally(model.graph)
    _open_hard_swish(model.graph)
    _free_reshapes(model.graph)
    _merge_slices(model.graph)
    _name_batch(model.graph)
    _strip(model)
    remove_unused(model.graph)


def _name_layers(onnx_graph: onnx.GraphProto, graph: Graph) -> None:
    """Name each layer's nodes by its module path: by the scope that the exporter noted, or by the weight's name."""
    by_weight = {layer.weight: layer.name for layer in graph.layers}
    calls: dict[str, int] = {}
    weights = {tensor.name for tensor in onnx_graph.initializer}
    for node in onnx_graph.node:
        if node.op_type in LAYER_OPERATORS and len(node.input) > 1 and node.input[1] in weights:
            layer = _scope(node, graph) or by_weight.get(node.input[1])
            if layer is not None:
                calls[layer] = calls.get(layer, -1) + 1
                node.name = call_name(layer, calls[layer])
                _name_bias(node, onnx_graph)
                continue
        if node.name in graph.layer:
            node.name = f"{node.name}/{node.op_type}"


def _name_bias(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    """Give the bias that a folded batch-norm left, which the exporter calls 'conv.weight_bias', its usual name."""
    if len(node.input) > 2 and node.input[2] == f"{node.input[1]}_bias":
        rename_initializer(graph, node.input[2], bias_name(node.input[1]))


def bias_name(weight: str) -> str:
    """'conv.weight' -> 'conv.bias'."""
    return weight.removesuffix("weight") + "bias"


def rename_initializer(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename an initializer wherever it is used, unless the name is taken."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    if old in tensors and new not in tensors:
        tensors[old].name = new
        replace_uses(graph, old, new)


def module_scope(node: onnx.NodeProto) -> str:
    """The path of the innermost module that the exporter noted for a node; '' for the model itself."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            paths = [part.strip(" '\"") for part in entry.value.strip("[]").split(",")]
            return paths[-2] if len(paths) > 1 else ""
    return ""


def _scope(node: onnx.NodeProto, graph: Graph) -> str | None:
    """The innermost layer among the module paths that the exporter noted for a node."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            paths = [part.strip(" '\"") for part in entry.value.strip("[]").split(",")]
            # The last entry is the operator's own name, which may happen to be that of a layer.
            return next((path for path in reversed(paths[:-1]) if path in graph.layer), None)
    return None


def _pool_globally(graph: onnx.GraphProto) -> None:
    """Write a mean over all spatial axes as GlobalAveragePool, for which there is an integer kernel."""
    view = GraphView(graph)
    nodes: list[onnx.NodeProto] = []
    for node in view.nodes:
        rank = len(view.shapes.get(node.input[0], ())) if node.op_type == "ReduceMean" else 0
        axes = view.constant(node.input[1]) if rank > 2 and len(node.input) > 1 else None
        if axes is None or sorted(int(axis) % rank for axis in axes) != list(range(2, rank)):
            nodes.append(node)
            continue
        pooled = node.output[0]
        if not attribute(node, "keepdims", 1):
            pooled = f"{pooled}_pooled"
        nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name))
        if pooled != node.output[0]:
            nodes.append(_squeeze(graph, pooled, node.output[0], rank))
    set_nodes(graph, nodes)


def _open_hard_swish(graph: onnx.GraphProto) -> None:
    """Write a HardSwish as the product that the runtime makes of it: both factors have integer kernels."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "HardSwish":
            nodes.append(node)
            continue
        gate, value = f"{node.output[0]}_gate", node.input[0]
        nodes.append(helper.make_node("HardSigmoid", [value], [gate], name=gate, alpha=1 / 6, beta=0.5))
        nodes.append(helper.make_node("Mul", [value, gate], [node.output[0]], name=node.name))
    set_nodes(graph, nodes)


def _free_reshapes(graph: onnx.GraphProto) -> None:
    """Let constant shapes follow the data: leading sizes that stay are copied, the last one is whatever remains.

    A flattening of [batch, channels, 1, 1] becomes Squeeze, through which the runtime moves its layout changes.
    """
    view = GraphView(graph)
    nodes: list[onnx.NodeProto] = []
    for node in view.nodes:
        before, after = view.shapes.get(node.input[0]) if node.input else None, view.shapes.get(node.output[0])
        if node.op_type not in ("Reshape", "Flatten") or before is None or after is None:
            nodes.append(node)
            continue
        same = 0
        while same < min(len(before), len(after)) and _same_size(before, after, same):
            same += 1
        if len(after) == 2 and same == 2 and len(before) > 2 and all(size == 1 for size in before[2:]):
            nodes.append(_squeeze(graph, node.input[0], node.output[0], len(before), name=node.name))
        elif 0 < same == len(after) - 1 and None not in before[same:]:
            shape = shape_constant(graph, [0] * same + [-1])
            nodes.append(helper.make_node("Reshape", [node.input[0], shape], [node.output[0]], name=node.name))
        else:
            nodes.append(node)
    set_nodes(graph, nodes)


def _same_size(before: tuple[int | None, ...], after: tuple[int | None, ...], axis: int) -> bool:
    """Whether an axis keeps its size. The batch, always first, is the one axis whose size may be unknown."""
    if axis:
        return before[axis] is not None and before[axis] == after[axis]
    inner = [[size for size in shape[1:] if size is not None] for shape in (before, after)]
    known = len(inner[0]) == len(before) - 1 and len(inner[1]) == len(after) - 1
    return known and before[0] == after[0] and math.prod(inner[0]) == math.prod(inner[1])


def _squeeze(graph: onnx.GraphProto, value: str, output: str, rank: int, name: str = "") -> onnx.NodeProto:
    axes = shape_constant(graph, list(range(2, rank)))
    return helper.make_node("Squeeze", [value, axes], [output], name=name or f"{output}_squeeze")


def shape_constant(graph: onnx.GraphProto, values: list[int]) -> str:
    """The name of an int64 initializer with these values, which equal users share."""
    name = "ints_" + "_".join(str(value).replace("-", "m") for value in values)
    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return name


def _merge_slices(graph: onnx.GraphProto) -> None:
    """Make one Slice of two that follow each other on different axes: x[:, :, ::2, ::2] is exported as two."""
    merged = True
    while merged:
        merged = False
        view = GraphView(graph)
        for first in view.nodes:
            second = view.only_user(first.output[0]) if first.op_type == "Slice" else None
            if second is None or second.op_type != "Slice" or second.input[0] != first.output[0]:
                continue
            one, two = _slice_arguments(first, view), _slice_arguments(second, view)
            if one is None or two is None:
                continue
            if set(one[2]) & set(two[2]) or min(one[2] + two[2]) < 0:
                continue
            del second.input[:]
            joined = [shape_constant(graph, a + b) for a, b in zip(one, two, strict=True)]
            second.input.extend([first.input[0], *joined])
            graph.node.remove(first)
            merged = True
            break


def _slice_arguments(node: onnx.NodeProto, view: GraphView) -> tuple[list[int], list[int], list[int], list[int]] | None:
    """(starts, ends, axes, steps) of a Slice if all are constant."""
    values: list[list[int]] = []
    for name in node.input[1:]:
        value = view.constant(name) if name else None
        if value is None:
            return None
        values.append([int(part) for part in value.reshape(-1)])
    if len(values) == 3:
        values.append([1] * len(values[0]))
    return (values[0], values[1], values[2], values[3]) if len(values) == 4 else None


def _name_batch(graph: onnx.GraphProto) -> None:
    """Call the free first dimension of the inputs "batch", wherever it occurs in inputs and outputs."""
    symbols = set()
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_param"):
            symbols.add(dims[0].dim_param)
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = BATCH


def _strip(model: onnx.ModelProto) -> None:
    """Remove what is not needed to run the model: doc strings, the exporter's notes, shapes of inner values."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    model.doc_string = graph.doc_string = ""
    parts: tuple[Any, ...] = (*graph.node, *graph.initializer, *graph.input, *graph.output)
    for part in parts:
        del part.metadata_props[:]
        part.doc_string = ""


def take_shortcuts(graph: onnx.GraphProto, shortcuts: Mapping[str, str]) -> None:
    """Remove what lies between values; `shortcuts`: the value that vanishes -> the one that stands in for it."""
    taken: dict[str, str] = {}
    for node in list(graph.node):
        output = node.output[0]
        if output not in shortcuts:
            continue
        # It may have vanished itself: producers come first.
        taken[output] = shortcut = taken.get(shortcuts[output], shortcuts[output])
        if any(value.name == output for value in graph.output):
            node.op_type = "Identity"
            del node.input[:], node.attribute[:]
            node.input.append(shortcut)
        else:
            replace_uses(graph, output, shortcut)
    _drop_idle_relus(graph)
    remove_unused(graph)


def _drop_idle_relus(graph: onnx.GraphProto) -> None:
    """Remove a Relu of values that can't be negative, which is left where a removed branch was added before it."""
    view = GraphView(graph)
    positive: set[str] = set()
    for node in view.nodes:
        kept = node.op_type in _KEEP_SIGN and node.input[0] in positive
        padded = node.op_type == "Pad" and node.input[0] in positive and (len(node.input) < 3 or not node.input[2])
        if node.op_type == "Relu" and node.input[0] in positive and node.output[0] not in view.outputs:
            replace_uses(graph, node.output[0], node.input[0])
        if node.op_type == "Relu" or kept or padded:
            positive.update(node.output)


def find_additions(graph: onnx.GraphProto, layers: Mapping[str, frozenset[str]]) -> dict[str, tuple[str, str]]:
    """Block name -> (output of the Add that ends it, its input that isn't the branch), given block -> its layers.

    The branch is the input from which exactly the block's layers are reached that the other input doesn't depend on.
    """
    names = {name for part in layers.values() for name in part}
    behind: dict[str, frozenset[str]] = {}
    found: dict[str, tuple[str, str]] = {}
    for node in graph.node:
        parts = [behind.get(value, frozenset()) for value in node.input]
        if node.op_type == "Add" and len(parts) == 2:
            for branch in (0, 1):
                own = parts[branch] - parts[1 - branch]
                for block, wanted in layers.items():
                    if own == wanted and block not in found:
                        found[block] = (node.output[0], node.input[1 - branch])
        own_layer = frozenset({node.name}) & names
        reached = frozenset().union(*parts, own_layer)
        behind.update(dict.fromkeys(node.output, reached))
    return found


def find_bypasses(graph: onnx.GraphProto, modules: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Block name -> (the value that leaves its module, the one that enters it), given block -> its module, while the
    exporter's notes are there. Without modules that several values enter or leave."""
    constants = {tensor.name for tensor in graph.initializer}
    found: dict[str, tuple[str, str]] = {}
    for block, path in modules.items():
        within = [f"{module_scope(node)}.".startswith(f"{path}.") for node in graph.node]
        inside = [node for node, inner in zip(graph.node, within, strict=True) if inner]
        made = {value for node in inside for value in node.output}
        entering = {value for node in inside for value in node.input if value} - made - constants
        used = {value for node, inner in zip(graph.node, within, strict=True) if not inner for value in node.input}
        leaving = made & (used | {value.name for value in graph.output})
        if len(entering) == len(leaving) == 1:
            found[block] = (leaving.pop(), entering.pop())
    return found
