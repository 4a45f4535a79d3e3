"""How the weights of quantized layers are written into a graph: constants, and the nodes that unpack them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from automl_compress.errors import InputError
from automl_compress.techniques.onnx_graph import WEIGHT_SUFFIX, GraphView, attribute, layer_of
from automl_compress.techniques.quantization.formats import Format, fused_first, weight_axis
from automl_compress.techniques.quantization.weights import Array, QuantizedWeight, limits, nearest, packed

# With less room than this, an int32 bias would overflow where the sum of products is added to it.
_BIAS_STEPS = 2.0**30
# ONNX Runtime 1.32 mixes up 2-bit columns whose number isn't a multiple of this when it packs them for MatMulNBits.
_COLUMNS = 4
_LARGEST_HALF = 65504.0
_OPSETS = {2: 25, 4: 21, 8: 20, 16: 20}


def as_matrix(weight: NDArray[np.float32], axis: int) -> Array:
    """A stored weight as [outputs, inputs], given the axis of its output channels."""
    return np.ascontiguousarray(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1))


def from_matrix(matrix: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The reverse of `as_matrix` for a weight of that shape."""
    moved = (shape[axis], *(size for d, size in enumerate(shape) if d != axis))
    return np.ascontiguousarray(np.moveaxis(matrix.reshape(moved), 0, axis))


class Constants:
    """Initializers to be added to a graph. Equal ones are stored once: the file's size is a budget."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[int, tuple[int, ...], bytes], onnx.TensorProto] = {}

    def add(self, name: str, value: np.ndarray | np.generic) -> str:
        """The name under which a constant is stored: `name`, or that of an equal one."""
        return self.add_tensor(numpy_helper.from_array(np.asarray(value), name))

    def add_tensor(self, tensor: onnx.TensorProto) -> str:
        content = (tensor.data_type, tuple(tensor.dims), tensor.raw_data)
        return self._tensors.setdefault(content, tensor).name

    def tensors(self) -> Iterable[onnx.TensorProto]:
        return self._tensors.values()


class LayerWriter:
    """Turns layers' nodes into those of their formats; `opset` is the lowest that what was written needs."""

    def __init__(
        self, view: GraphView, constants: Constants, weights: Mapping[str, QuantizedWeight], *, draft: bool = False
    ) -> None:
        self._view, self._constants, self._weights, self._draft = view, constants, weights, draft
        self.opset = 0

    def integer(self, node: onnx.NodeProto, bits: int, inputs: list[str], input_scale: float) -> list[onnx.NodeProto]:
        """The layer between Dequantize nodes of weight and bias, which the runtime makes one integer kernel of."""
        weight, axis = self._weight(node)
        bias = self._view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        found = self._quantized(node, weight, axis, bits, "integer")
        return self._integer(node, weight, axis, bias, found, inputs[0], input_scale)

    def affine(self, node: onnx.NodeProto, rank: int, source: str, input_scale: float) -> list[onnx.NodeProto]:
        """A batch-norm as a convolution of every channel alone: an integer and a scale hold its one weight exactly."""
        parameters = [self._view.constant(name) for name in node.input[1:5]]
        scale, shift, mean, variance = (np.asarray(each, np.float64) for each in parameters)
        factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        weight = factor.astype(np.float32).reshape(-1, *[1] * (rank - 1))
        bias = (shift - mean * factor).astype(np.float32)
        name = node.name or node.output[0]  # constants are named after it
        convolution = helper.make_node("Conv", node.input[:1], node.output[:1], name=name, group=len(factor))
        found = nearest(as_matrix(weight, 0), 8, "integer")
        return self._integer(convolution, weight, 0, bias, found, source, input_scale)

    def _integer(
        self,
        node: onnx.NodeProto,
        weight: np.ndarray,
        axis: int,
        bias: np.ndarray | None,
        found: QuantizedWeight,
        source: str,
        input_scale: float,
    ) -> list[onnx.NodeProto]:
        found = _with_room(found, as_matrix(weight, axis), bias, input_scale)
        new: list[onnx.NodeProto] = []
        unpacked = self._integers(node, found, weight.shape, axis, new, TensorProto.INT8)
        count = len(found.scales)
        zeros = self._constants.add(f"s8_zeros_{count}", np.zeros(count, np.int8))
        scales = self._constants.add(f"{node.name}.weight_scale", found.scales)
        name = f"{node.name}.weight_dq"
        new.append(helper.make_node("DequantizeLinear", [unpacked, scales, zeros], [name], name=name, axis=axis))
        layer_inputs = [source, name]
        if bias is not None:
            layer_inputs.append(self._bias(node, bias, found.scales, input_scale, new))
        return [*new, _with_inputs(node, layer_inputs)]

    def _bias(
        self, node: onnx.NodeProto, bias: np.ndarray, scales: Array, input_scale: float, new: list[onnx.NodeProto]
    ) -> str:
        units = (np.float32(input_scale) * scales).astype(np.float32)
        steps = np.clip(np.rint(bias.astype(np.float64) / units), -(2**31) + 1, 2**31 - 1).astype(np.int32)
        zeros = self._constants.add(f"s32_zeros_{len(scales)}", np.zeros(len(scales), np.int32))
        stored = self._constants.add(f"{node.name}.bias_q", steps)
        name = f"{node.name}.bias_dq"
        inputs = [stored, self._constants.add(f"{node.name}.bias_scale", units), zeros]
        new.append(helper.make_node("DequantizeLinear", inputs, [name], name=name, axis=0))
        return name

    def blocks(self, node: onnx.NodeProto, bits: int, inputs: list[str]) -> list[onnx.NodeProto]:
        """A product with weights dequantized by block, [inputs, outputs] as the runtime's fusion wants it."""
        weight, axis = self._weight(node)
        found = self._quantized(node, weight, axis, bits, "blocks")
        assert found.zeros is not None
        self._need(max(21, _OPSETS[bits]))
        outputs = len(found.integers)
        spare = -outputs % _COLUMNS if bits == 2 else 0
        if spare:
            found = _padded(found, spare)
        assert found.zeros is not None
        name, product = f"{node.name}.weight_dq", f"{node.output[0]}_product"
        constants = [
            self._constants.add_tensor(packed(f"{node.name}{WEIGHT_SUFFIX}", found.integers.T, bits, signed=False)),
            self._constants.add(f"{node.name}.weight_scale", np.ascontiguousarray(found.scales.T)),
            self._constants.add_tensor(packed(f"{node.name}.weight_zero", found.zeros.T, bits, signed=False)),
        ]
        # A product of two dequantized values is none that the fusion takes.
        apart = [("Sum", [inputs[0]], f"{node.name}/input")] if inputs[0] != node.input[0] else []
        chain = [*apart, ("MatMul", ["" if apart else inputs[0], name], node.name)]
        if spare:
            ends = self._constants.add(f"int_{outputs}", np.array([outputs], np.int64))
            zero, last = (self._constants.add(f"int_{i}".replace("-", "m"), np.array([i], np.int64)) for i in (0, -1))
            chain.append(("Slice", ["", zero, ends, last], f"{node.name}/own"))
        if len(node.input) > 2 and node.input[2]:
            # Product, Add and activation would become one float kernel before the weights are looked at.
            chain.append(("Sum" if fused_first(node, self._view) else "Add", ["", node.input[2]], f"{node.name}/bias"))
        new = [helper.make_node("DequantizeLinear", constants, [name], name=name, axis=0, block_size=found.block)]
        for step, (operator, arguments, called) in enumerate(chain):
            result = node.output[0] if step == len(chain) - 1 else f"{product}{step or ''}"
            before = new[-1].output[0]
            new.append(helper.make_node(operator, [value or before for value in arguments], [result], name=called))
        return new

    def folded(self, node: onnx.NodeProto, bits: int) -> list[onnx.NodeProto]:
        """Nodes that the runtime evaluates once, when it loads the model; `node` is made to read their result."""
        weight, axis = self._weight(node)
        name = f"{node.name}.weight_f"
        new: list[onnx.NodeProto] = []
        if bits == 16:
            largest = float(np.abs(weight).max(initial=0.0))
            if largest > _LARGEST_HALF:
                raise InputError(f"{layer_of(node.name)}: a weight of {largest:.3g} exceeds 16 bits; leave it in 32")
            stored = self._constants.add(f"{node.name}{WEIGHT_SUFFIX}", weight.astype(np.float16))
            new.append(helper.make_node("Cast", [stored], [name], name=name, to=TensorProto.FLOAT))
        else:
            found = self._quantized(node, weight, axis, bits, "folded")
            unpacked = self._integers(node, found, weight.shape, axis, new, TensorProto.FLOAT)
            shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
            scales = self._constants.add(f"{node.name}.weight_scale", found.scales.reshape(shape))
            new.append(helper.make_node("Mul", [unpacked, scales], [name], name=name))
        self._need(_OPSETS[bits])
        node.input[1] = name
        return new

    def _integers(
        self,
        node: onnx.NodeProto,
        found: QuantizedWeight,
        shape: tuple[int, ...],
        axis: int,
        new: list[onnx.NodeProto],
        wanted: int,
    ) -> str:
        """The name of the stored integers after they were cast to the type `wanted`."""
        self._need(_OPSETS[found.bits])
        integers = from_matrix(found.integers, shape, axis)
        stored = self._constants.add_tensor(packed(f"{node.name}{WEIGHT_SUFFIX}", integers, found.bits, signed=True))
        if found.bits == 8 and wanted == TensorProto.INT8:
            return stored
        cast = f"{node.name}.weight_cast"
        new.append(helper.make_node("Cast", [stored], [cast], name=cast, to=wanted))
        return cast

    def _quantized(
        self, node: onnx.NodeProto, weight: np.ndarray, axis: int, bits: int, form: Format
    ) -> QuantizedWeight:
        known = self._weights.get(layer_of(node.name))
        return known if known is not None else nearest(as_matrix(weight, axis), bits, form, draft=self._draft)

    def _weight(self, node: onnx.NodeProto) -> tuple[np.ndarray, int]:
        axis, weight = weight_axis(node, self._view), self._view.constant(node.input[1])
        if weight is None:  # a folded layer's node is a copy whose weight keeps its name
            raise InputError(f"{node.name}: its weight {node.input[1]!r} is not a constant")
        assert axis is not None
        return weight, axis

    def _need(self, opset: int) -> None:
        self.opset = max(self.opset, opset)


def _padded(found: QuantizedWeight, outputs: int) -> QuantizedWeight:
    """With so many outputs more, whose weights are zero; by block."""
    assert found.zeros is not None
    more = ((0, outputs), (0, 0))
    return replace(
        found,
        integers=np.pad(found.integers, more),
        scales=np.pad(found.scales, more, constant_values=1.0),
        zeros=np.pad(found.zeros, more),
    )


def _with_inputs(node: onnx.NodeProto, inputs: list[str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    del copy.input[:]
    copy.input.extend(inputs)
    return copy


def _with_room(found: QuantizedWeight, weight: Array, bias: np.ndarray | None, input_scale: float) -> QuantizedWeight:
    """Scales so large that the bias, kept as int32 in units of input scale x weight scale, can't overflow.

    That matters for channels whose weights are (nearly) zero; only those are rounded again.
    """
    smallest = np.full(len(found.scales), float(np.finfo(np.float32).tiny) * 2.0**24 / min(input_scale, 1.0))
    if bias is not None:
        smallest = np.maximum(smallest, np.abs(bias).astype(np.float64) / (input_scale * _BIAS_STEPS))
    short = found.scales < smallest
    if not short.any():
        return found
    scales = np.where(short, np.maximum(smallest, 1e-8), found.scales).astype(np.float32)
    integers = found.integers.copy()
    integers[short] = np.clip(np.rint(weight[short] / scales[short, None]), *limits(found.bits))
    return QuantizedWeight(bits=found.bits, integers=integers, scales=scales)
