"""What a bit-width means for a layer: how its weights are stored, and what computes it.

| format  | bits    | weights in the file                     | computed by                                         |
|---------|---------|-----------------------------------------|-----------------------------------------------------|
| integer | 8, 4, 2 | signed, a scale for each output channel | integer kernels, on uint8 activations               |
| blocks  | 8, 4, 2 | unsigned, scale and zero point by block | MatMulNBits, which unpacks them as it goes          |
| folded  | 16      | half precision                          | floating point: unpacked once, as the model is read |
| folded  | 8, 4, 2 | signed, a scale for each output channel | the same                                            |

Integer weights of fewer than 8 bits are cast to int8 by a node that the runtime evaluates when it loads the model (seen
in ONNX Runtime 1.32), so that they take the integer kernels of 8 bits: as fast, and the file is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import onnx

from automl_compress.core.plan import FULL_BITS
from automl_compress.errors import PlanError
from automl_compress.techniques.onnx_graph import GraphView, attribute

Format = Literal["float", "integer", "blocks", "folded"]
Execution = Literal["native", "emulated", "weight-only", "storage"]
Executions = Mapping[tuple[str, int], Execution]
"""(kind of layer, bits) -> how a device runs it, in the words of a device profile."""

BITS = (2, 4, 8, 16, 32)
DEFAULT_EXECUTIONS: Executions = {
    ("conv", 2): "emulated",
    ("conv", 4): "emulated",
    ("conv", 8): "native",
    ("conv", 16): "storage",
    ("linear", 2): "weight-only",
    ("linear", 4): "weight-only",
    ("linear", 8): "native",
    ("linear", 16): "storage",
}
_FORMATS: Mapping[Execution, Format] = {
    "native": "integer",
    "emulated": "integer",
    "weight-only": "blocks",
    "storage": "folded",
}
_FUSED_INTO_GEMM = frozenset(
    {
        *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "Selu", "HardSigmoid", "Softplus", "Softsign"),
        "ThresholdedRelu",
    }
)
_KINDS = {"Conv": "conv", "ConvTranspose": "conv", "Gemm": "linear", "MatMul": "linear"}


def format_of(kind: str, bits: int, executions: Executions = DEFAULT_EXECUTIONS) -> Format:
    """The format of a layer of that kind ("conv" or "linear") at a bit-width.

    Raises PlanError for a bit-width that has no format or that `executions` doesn't list.
    """
    if bits == FULL_BITS:
        return "float"
    execution = executions.get((kind, bits))
    if bits not in BITS or execution is None:
        offered = sorted({b for k, b in executions if k == kind and b in BITS} | {FULL_BITS})
        raise PlanError(f"plan: {bits} bits for a {kind} layer: the device has {', '.join(map(str, offered))}")
    if bits == 16:
        return "folded"
    if execution == "weight-only" and kind == "conv":
        raise PlanError(f"plan: {bits} bits for a conv layer: weight-only kernels exist for linear layers")
    return _FORMATS[execution]


def described(form: Format, bits: int) -> str:
    """What a layer of that format and bit-width is asked to be, in words."""
    if form == "float":
        return "fp32"
    if form == "integer":
        return "int8" if bits == 8 else f"int{bits} weights in int8 kernels"
    if form == "blocks":
        return f"int{bits} weights only"
    return f"{'fp' if bits == 16 else 'int'}{bits} stored, fp32 computed"


def kind_of(node: onnx.NodeProto) -> str | None:
    """ "conv" or "linear"; None for a node that is no layer."""
    return _KINDS.get(node.op_type)


def layer_formats(view: GraphView, bits: Mapping[str, int], executions: Executions) -> dict[str, tuple[Format, int]]:
    """First output -> (format, bits) of the layers' nodes that are not to stay as they are and can be changed.

    A layer without a node belongs to a removed block and is skipped; one whose node has no kernel of the format (a
    transposed convolution, a product of two activations) stays in floating point, and `deploy.verify` tells.
    """
    found: dict[str, tuple[Format, int]] = {}
    for layer, node in view.layers:
        width = bits.get(layer, FULL_BITS)
        if width == FULL_BITS:
            continue
        chosen = format_of(_KINDS[node.op_type], width, executions)
        axis = weight_axis(node, view)
        if axis is None or (chosen != "folded" and not _has_kernel(node, view)):
            continue
        if chosen == "blocks" and node.op_type == "Conv":
            continue
        found[node.output[0]] = (chosen, width)
    return found


def weight_axis(node: onnx.NodeProto, view: GraphView) -> int | None:
    """The axis of the output channels in a layer's constant weight; None where there is no such weight or axis."""
    if len(node.input) < 2 or node.input[1] not in view.initializers:
        return None
    rank = len(view.initializers[node.input[1]].dims)
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if attribute(node, "group", 1) == 1 else None
    if node.op_type == "MatMul":
        return 1 if rank == 2 else None
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return None


def fused_first(node: onnx.NodeProto, view: GraphView) -> bool:
    """Whether the runtime would merge a Gemm and the activation behind it before it looks for other kernels."""
    user = view.only_user(node.output[0])
    return node.op_type == "Gemm" and user is not None and user.op_type in _FUSED_INTO_GEMM


def _has_kernel(node: onnx.NodeProto, view: GraphView) -> bool:
    """Whether integer and weight-only kernels can take the node."""
    if len(node.input) > 2 and node.input[2] and node.input[2] not in view.initializers:
        return False
    if node.op_type == "Gemm":
        factors = (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0))
        plain = factors == (1.0, 1.0) and not attribute(node, "transA", 0)
        return plain and (len(node.input) < 3 or not node.input[2] or len(view.initializers[node.input[2]].dims) == 1)
    return node.op_type in ("Conv", "MatMul")
