"""Where Quantize and Dequantize nodes go, so that a runtime finds whole regions that it can run in integers.

`place` walks the graph once, in execution order, and decides which values exist as 8-bit integers:

* the input and the output of every integer convolution, the input of every integer linear layer, and its output where
  the runtime would otherwise not find the integer kernel;
* the output of an operator that has an integer kernel (`INTEGER_OPERATORS`) where all its inputs are already integers;
* the output of an operator that only moves values or compares them (`MOVING_OPERATORS`): it is applied to the integers
  themselves and shares their scale, so nothing depends on what the runtime manages to fuse;
* a batch-norm between integers and an int8 convolution, as a convolution of every channel for itself;
* a gate's factor. A hard sigmoid is a clamp of integers that are then read with another scale and zero point; it is
  exact where its lower bend lies on a step, so its input's scale is chosen like that. Of values so large that a step is
  longer than that, it's computed in floating point. A sigmoid has a table.

An activation that only clamps (Relu, Clip from 0) between a layer and its Quantize node is left out: saturation at the
zero point does the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from automl_compress.techniques.onnx_graph import GraphView, attribute
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS, Executions, fused_first, layer_formats

# Each was seen to run on integers in ONNX Runtime 1.32's CPU provider when Dequantize/Quantize surround it.
INTEGER_OPERATORS = frozenset({"Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool", "LeakyRelu"})
# Each takes uint8 tensors by the ONNX standard and by that provider. Relu becomes Clip, whose bounds are quantized.
MOVING_OPERATORS = frozenset(
    {
        *("Clip", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Relu", "Reshape"),
        *("Slice", "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    }
)
# Integer kernels that only pay, and are only fine enough, in front of a product.
_GATES = frozenset({"Sigmoid"})
# Below this, the product of an activation's and a weight's scale would leave float32's normal range.
_SMALLEST_SCALE = 1e-20


@dataclass(kw_only=True)
class Placement:
    """Which values of a graph become 8-bit integers.

    roots     value with a scale of its own -> the value that its Quantize node reads (another one where an activation
              was left out)
    shared    value -> the value whose scale and integers it takes over (output -> input of a moving operator)
    rescaled  output of a hard sigmoid -> its input, whose integers it takes over, clamped, at a scale of its own
    bends     value with a scale of its own -> how far below 0 it must have a step, for the hard sigmoid that reads it
    integer   first outputs of the nodes that are to run as integer kernels
    omitted   outputs of the clamps (from 0) that saturation replaces -> the upper bound
    """

    roots: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    rescaled: dict[str, str] = field(default_factory=dict)
    bends: dict[str, float] = field(default_factory=dict)
    integer: set[str] = field(default_factory=set)
    omitted: dict[str, float] = field(default_factory=dict)

    def quantized(self, value: str) -> bool:
        return value in self.roots or value in self.shared or value in self.rescaled

    def root(self, value: str) -> str:
        """The value whose range decides about the scale of `value`."""
        while value in self.shared:
            value = self.shared[value]
        return value


def input_channels(node: onnx.NodeProto, view: GraphView) -> int | None:
    """How many channels (axis 1) a Conv, ConvTranspose or Gemm with constant weight reads; None for other nodes."""
    weight = view.initializers.get(node.input[1]) if len(node.input) > 1 else None
    if weight is None or node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return None
    if node.op_type == "Conv":
        return int(weight.dims[1]) * int(attribute(node, "group", 1))
    if node.op_type == "Gemm":
        return int(weight.dims[1 if attribute(node, "transB", 0) else 0]) if not attribute(node, "transA", 0) else None
    return int(weight.dims[0])


def clamp_bounds(node: onnx.NodeProto, view: GraphView) -> tuple[float, float] | None:
    """(low, high) of a Relu or of a Clip with constant bounds; None for anything else."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type != "Clip":
        return None
    bounds = [-float("inf"), float("inf")]
    for index, name in enumerate(node.input[1:3]):
        if name:
            value = view.scalars.get(name)
            if value is None:
                return None
            bounds[index] = value
    return bounds[0], bounds[1]


def data_inputs(node: onnx.NodeProto) -> list[str]:
    """The inputs of an integer operator that carry activations."""
    return list(node.input) if node.op_type in ("Add", "Mul", "Concat") else [node.input[0]]


def place(
    model: onnx.ModelProto,
    bits: Mapping[str, int],
    executions: Executions = DEFAULT_EXECUTIONS,
    *,
    view: GraphView | None = None,
) -> Placement:
    """Decide for a float model which values become integers, given layer -> bits. See the module's text.

    `view` is that of the model's graph, for who asks often.
    """
    view = view or GraphView(model.graph)
    formats = layer_formats(view, bits, executions)
    layers = {node.output[0]: node for node in view.nodes if formats.get(node.output[0], ("float",))[0] == "integer"}
    wanted = {node.input[0] for node in layers.values()}
    placement = Placement()
    placement.roots.update({value: value for value in view.inputs if value in wanted})
    for node in view.nodes:
        output = node.output[0]
        if output in placement.omitted:
            continue
        if output in layers:
            placement.integer.add(output)
            behind, skipped = _behind_clamp(output, view)
            if node.op_type == "Conv" or behind in wanted or fused_first(node, view):
                placement.roots[behind] = output
                placement.omitted.update(skipped)
        elif _moves(node, view) and placement.quantized(node.input[0]):
            placement.shared.update({value: node.input[0] for value in node.output if value})
        elif node.op_type == "HardSigmoid" and _rescales(node, view, placement):
            placement.rescaled[output] = node.input[0]
            placement.bends[placement.root(node.input[0])] = bend_of(node)
        elif _runs_in_integers(node, view, placement, wanted):
            placement.roots.update({value: value for value in data_inputs(node) if not placement.quantized(value)})
            placement.integer.add(output)
            behind, skipped = _behind_clamp(output, view)
            placement.roots[behind] = output
            placement.omitted.update(skipped)
        elif output in wanted:
            placement.roots[output] = output
    return placement


def _behind_clamp(value: str, view: GraphView) -> tuple[str, dict[str, float]]:
    """The value behind the clamps that saturation can replace, and their outputs with the lowest upper bound so far."""
    skipped: dict[str, float] = {}
    high = float("inf")
    while (node := view.only_user(value)) is not None:
        bounds = clamp_bounds(node, view)
        if bounds is None or bounds[0] != 0.0 or bounds[1] <= 0.0:
            break
        value = node.output[0]
        high = min(high, bounds[1])
        skipped[value] = high
    return value, skipped


def _moves(node: onnx.NodeProto, view: GraphView) -> bool:
    if node.op_type not in MOVING_OPERATORS:
        return False
    if node.op_type == "Clip":
        return clamp_bounds(node, view) is not None
    if node.op_type == "MaxPool":
        return len([value for value in node.output if value]) == 1
    if node.op_type == "Pad":
        fill = node.input[2] if len(node.input) > 2 else ""
        return not fill or fill in view.initializers
    return True


def convolution_behind(value: str, view: GraphView) -> onnx.NodeProto | None:
    """A convolution that reads the value, clamps between them apart."""
    behind, _ = _behind_clamp(value, view)
    return next(
        (user for user in view.users.get(behind, []) if user.op_type == "Conv" and user.input[0] == behind), None
    )


def _runs_in_integers(node: onnx.NodeProto, view: GraphView, placement: Placement, wanted: set[str]) -> bool:
    if node.op_type == "BatchNormalization":
        convolution = convolution_behind(node.output[0], view)
        constant = all(name in view.initializers for name in node.input[1:]) and len(node.output) == 1
        needed = convolution is not None and convolution.input[0] in wanted
        return constant and needed and placement.quantized(node.input[0])
    if node.op_type not in INTEGER_OPERATORS and not (node.op_type in _GATES and _is_gate(node.output[0], view)):
        return False
    inputs = data_inputs(node)
    if any(value in view.initializers for value in inputs):
        return False
    quantized = [placement.quantized(value) for value in inputs]
    # A gate or a shortcut that is still float is worth quantizing where the sum is needed in integers anyway.
    return all(quantized) or (any(quantized) and _leads_to(node.output[0], view, wanted))


def _is_gate(value: str, view: GraphView) -> bool:
    """Whether nothing but products reads it."""
    users = view.users.get(value, [])
    return bool(users) and value not in view.outputs and all(user.op_type == "Mul" for user in users)


def _rescales(node: onnx.NodeProto, view: GraphView, placement: Placement) -> bool:
    """Whether a hard sigmoid can be a clamp of its input's integers: their scale has to be free to suit it."""
    if not _is_gate(node.output[0], view) or not placement.quantized(node.input[0]) or bend_of(node) <= 0:
        return False
    root = placement.root(node.input[0])
    taken = placement.bends.get(root, bend_of(node)) != bend_of(node)
    return root in placement.roots and root not in placement.omitted and not taken


def bend_of(node: onnx.NodeProto) -> float:
    """How far below 0 a hard sigmoid becomes 0."""
    slope = float(attribute(node, "alpha", 0.2))
    return float(attribute(node, "beta", 0.5)) / slope if slope > 0 else 0.0


def _leads_to(value: str, view: GraphView, wanted: set[str]) -> bool:
    """Whether integers made of `value` reach an int8 layer through clamps and moves alone."""
    open_values, seen = [value], set()
    while open_values:
        current = open_values.pop()
        if current in wanted:
            return True
        if current not in seen:
            seen.add(current)
            users = view.users.get(current, [])
            open_values += [user.output[0] for user in users if _moves(user, view) and user.input[0] == current]
    return False


def scale_and_zero_point(low: float, high: float, bend: float = 0.0) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 for [low, high], widened to contain 0 so that 0 is exact. A range of
    (nearly) 0 gets scale 1.

    With a `bend` the range is widened to contain minus that, too, and the scale so that it is a whole number of steps,
    unless even one step is `too_coarse` for that.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    bend = 0.0 if too_coarse((high - low) / 255, bend) else bend
    low = min(low, -bend)
    scale = np.float32((high - low) / 255)
    if not np.isfinite(scale) or scale < _SMALLEST_SCALE:
        scale = np.float32(1.0)
    if bend:
        scale = bent(float(scale), bend)
    return scale, np.uint8(np.clip(np.rint(-low / float(scale)), 0, 255))


def too_coarse(scale: float, bend: float) -> bool:
    """Whether a step is longer than the bend, so that no step can lie on it."""
    return scale > bend * (1 + 1e-5)


def bent(scale: float, bend: float, most: float = 255.0) -> np.float32:
    """The next larger scale of which `bend` is a whole number of steps, at most `most`; `bend` itself where that is the
    largest."""
    # A scale that already is one must come back as it was, whatever its last bit.
    return np.float32(bend / min(max(1.0, np.floor(bend / scale * (1 + 1e-5))), most))
