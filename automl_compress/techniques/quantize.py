"""8-bit quantization of chosen layers of a float ONNX model, after calibration on data.

Weights become symmetric int8 with a scale for each output channel, activations uint8 with one scale, biases int32 in
units of both scales. `qdq.place` decides which activations; `calibrate` watches their ranges; `quantize` rewrites.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from automl_compress.errors import ExportError, InputError
from automl_compress.techniques.onnx_graph import WEIGHT_SUFFIX, GraphView, attribute, remove_unused, set_nodes
from automl_compress.techniques.qdq import (
    Placement,
    clamp_bounds,
    data_inputs,
    input_channels,
    int8_layers,
    place,
    scale_and_zero_point,
    weight_axis,
    weight_scales,
)
from automl_compress.techniques.ranges import RangeObserver

_ROWS_AT_ONCE = 32


def activation_tensors(model: onnx.ModelProto, bits: Mapping[str, int]) -> list[str]:
    """The values that become integers for this choice of bits; `quantize` needs the ranges of these at most.

    The values for a choice contain those for every choice with fewer int8 layers, so that ranges calibrated for all
    layers serve every mixture.
    """
    placement = place(model, bits)
    return [*placement.roots, *placement.shared]


def calibrate(
    model: onnx.ModelProto,
    batches: Iterable[Mapping[str, np.ndarray]],
    tensors: Sequence[str],
    *,
    percentile: float = 99.999,
) -> dict[str, tuple[float, float]]:
    """Run the float model over `batches` (input name -> array) and return value -> (low, high).

    `percentile` 100 takes the lowest and highest value seen; below, that percentage of all values lies within.
    ResNet-20 on CIFAR-10 is closest to the float model at the default, and far from it at 99.9. Only a few samples'
    values are held in memory at a time.
    Raises InputError if there are no batches or a value is NaN or infinite.
    """
    if not tensors:
        return {}
    session = _session_with_outputs(model, tensors)
    free = not isinstance(session.get_inputs()[0].shape[0], int)
    observers = {name: RangeObserver(percentile) for name in tensors}
    seen = 0
    for batch in batches:
        rows = len(next(iter(batch.values())))
        step = _ROWS_AT_ONCE if free else max(rows, 1)
        for start in range(0, rows, step):
            part = {name: np.ascontiguousarray(array[start : start + step]) for name, array in batch.items()}
            for name, values in zip(tensors, session.run(list(tensors), part), strict=True):
                if not np.isfinite(values).all():
                    raise InputError(f"calibration: {name!r} is NaN or infinite for a sample; check data and model")
                observers[name].update(values)
        seen += rows
    if not seen:
        raise InputError("calibration: there are no samples; give training data with at least one batch")
    return {name: observer.range() for name, observer in observers.items()}


def _session_with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnxruntime.InferenceSession:
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    present = {value.name for value in watched.graph.output}
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in dict.fromkeys(tensors)
        if name not in present
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"calibration: ONNX Runtime refuses the model: {str(error).splitlines()[0]}") from error


def quantize(
    model: onnx.ModelProto, bits: Mapping[str, int], ranges: Mapping[str, tuple[float, float]]
) -> onnx.ModelProto:
    """The model with the layers of `bits` (layer -> 8 or 32) in 8-bit integers; `model` itself is not changed.

    `ranges` must hold every value that `activation_tensors` lists. Node names of layers, inputs and outputs stay.
    Raises PlanError for an unsupported bit-width and InputError for a missing range.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    placement = place(model, bits)
    if placement.roots:
        missing = [value for value in placement.roots if value not in ranges]
        if missing:
            raise InputError(f"quantization: {len(missing)} values have no range, like {missing[0]!r}; calibrate first")
        _Rewriter(result.graph, placement, bits, ranges).run()
    return result


class _Rewriter:
    """Rewrites one graph according to a placement. Shared constants are stored once: the file's size is a budget."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        placement: Placement,
        bits: Mapping[str, int],
        ranges: Mapping[str, tuple[float, float]],
    ) -> None:
        self.graph = graph
        self.view = GraphView(graph)
        self.placement = placement
        self.layers = int8_layers(self.view, bits)
        self.scales = {value: scale_and_zero_point(*self._within(value, ranges[value])) for value in placement.roots}
        self.new: list[onnx.NodeProto] = []
        self.constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self.sources = {source: value for value, source in placement.roots.items()}
        self.dequantized: set[str] = set()

    def run(self) -> None:
        for value in self.view.inputs:
            if value in self.placement.roots:
                self._quantize(value, value)
        for node in self.view.nodes:
            if node.output[0] in self.placement.omitted:
                continue
            if node.output[0] in self.placement.shared:
                self._moving(node)
            else:
                self._computing(node)
        for value in self.view.outputs:
            if self._as_float(value) != value:
                self._restore_output(value)
        set_nodes(self.graph, self.new)
        self.graph.initializer.extend(self.constants.values())
        remove_unused(self.graph)
        del self.graph.value_info[:]

    def _within(self, value: str, seen: tuple[float, float]) -> tuple[float, float]:
        """The range, inside the bounds of the clamp that saturation has to replace."""
        if value not in self.placement.omitted:
            return seen
        return 0.0, min(max(seen[1], 0.0), self.placement.omitted[value])

    def _constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """The name under which a constant is stored: `name`, or that of an equal one."""
        array = np.asarray(value)
        content = (str(array.dtype), array.shape, array.tobytes())
        if content not in self.constants:
            self.constants[content] = numpy_helper.from_array(array, name)
        return self.constants[content].name

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.new.append(helper.make_node(operator, inputs, [output], name=output, **attributes))

    def _parameters(self, value: str) -> list[str]:
        root = self.placement.root(value)
        scale, zero = self.scales[root]
        return [self._constant(f"{root}_scale", scale), self._constant(f"u8_{zero}", zero)]

    def _quantize(self, source: str, value: str) -> None:
        self._add("QuantizeLinear", [source, *self._parameters(value)], f"{value}_q")

    def _as_float(self, value: str) -> str:
        """The name under which a float operator reads `value`: itself where a float operator or the user made it."""
        root = self.placement.roots.get(value)
        if value not in self.placement.shared and (root is None or root not in self.placement.integer):
            return value
        return self._dequantize(value)

    def _dequantize(self, value: str) -> str:
        name = f"{value}_dq"
        if name not in self.dequantized:
            self.dequantized.add(name)
            self._add("DequantizeLinear", [f"{value}_q", *self._parameters(value)], name)
        return name

    def _dequantize_by_channel(self, value: str, channels: int) -> str:
        """Dequantize for a layer that is to stay in floating point.

        ONNX Runtime rounds a float layer's weights to 8 bits, with one scale for all, where it sits between Dequantize
        and Quantize; one scale for each channel, all equal, keeps it from doing so.
        """
        name = f"{value}_f{channels}"
        if name not in self.dequantized:
            self.dequantized.add(name)
            scale, zero = self.scales[self.placement.root(value)]
            constants = [
                self._constant(f"{name}_scale", np.full(channels, scale)),
                self._constant(f"u8_{zero}_{channels}", np.full(channels, zero)),
            ]
            self._add("DequantizeLinear", [f"{value}_q", *constants], name, axis=1)
        return name

    def _restore_output(self, value: str) -> None:
        """Give a graph output its name back: its Dequantize node, or the node that made it, had to take another."""
        for node in self.new:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == value:
                        names[index] = f"{value}_f"
        for node in self.new:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == f"{value}_dq":
                        names[index] = value

    def _computing(self, node: onnx.NodeProto) -> None:
        integer = node.output[0] in self.placement.integer
        carried = set(data_inputs(node)) if integer else set()
        inputs = [self._dequantize(v) if v in carried else self._as_float(v) if v else v for v in node.input]
        if node.output[0] in self.layers:
            inputs[1:] = self._layer_constants(node)
        elif (channels := input_channels(node, self.view)) is not None and inputs[0] != node.input[0]:
            inputs[0] = self._dequantize_by_channel(node.input[0], channels)
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(inputs)
        self.new.append(copy)
        for value in node.output:
            if value in self.sources:
                self._quantize(value, self.sources[value])

    def _layer_constants(self, node: onnx.NodeProto) -> list[str]:
        """Dequantize nodes for weight and bias of an int8 layer; returns the inputs that replace them."""
        axis = weight_axis(node, self.view)
        weight = self.view.constant(node.input[1])
        assert axis is not None
        assert weight is not None
        bias = self.view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        input_scale = self.scales[self.placement.root(node.input[0])][0]
        scales = weight_scales(weight, axis, bias, float(input_scale))
        shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
        integers = np.clip(np.rint(weight / scales.reshape(shape)), -127, 127).astype(np.int8)
        zeros = self._constant(f"s8_zeros_{len(scales)}", np.zeros(len(scales), np.int8))
        name = node.name
        stored = self._constant(f"{name}{WEIGHT_SUFFIX}", integers)
        inputs = [stored, self._constant(f"{name}.weight_scale", scales), zeros]
        self._add("DequantizeLinear", inputs, f"{name}.weight_dq", axis=axis)
        if bias is None:
            return [f"{name}.weight_dq"]
        units = (np.float32(input_scale) * scales).astype(np.float32)
        steps = np.clip(np.rint(bias.astype(np.float64) / units), -(2**31) + 1, 2**31 - 1).astype(np.int32)
        zeros = self._constant(f"s32_zeros_{len(scales)}", np.zeros(len(scales), np.int32))
        inputs = [self._constant(f"{name}.bias_q", steps), self._constant(f"{name}.bias_scale", units), zeros]
        self._add("DequantizeLinear", inputs, f"{name}.bias_dq", axis=0)
        return [f"{name}.weight_dq", f"{name}.bias_dq"]

    def _moving(self, node: onnx.NodeProto) -> None:
        """Apply a moving operator to the integers themselves."""
        source = node.input[0]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[0] = f"{source}_q"
        for index, value in enumerate(node.output):
            copy.output[index] = f"{value}_q" if value else ""
        if node.op_type in ("Relu", "Clip"):
            self._clamp(copy, node)
        elif node.op_type == "Pad" and attribute(node, "mode", b"constant") == b"constant":
            self._pad_value(copy, node)
        self.new.append(copy)

    def _clamp(self, copy: onnx.NodeProto, node: onnx.NodeProto) -> None:
        bounds = clamp_bounds(node, self.view)
        assert bounds is not None
        steps = [self._step(node.input[0], bound) for bound in bounds]
        copy.op_type = "Clip"
        del copy.input[1:]
        copy.input.extend(self._constant(f"u8_{step}", np.uint8(step)) for step in steps)

    def _pad_value(self, copy: onnx.NodeProto, node: onnx.NodeProto) -> None:
        given = self.view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        step = self._step(node.input[0], 0.0 if given is None else float(given))
        inputs = [*copy.input[:2], self._constant(f"u8_{step}", np.uint8(step)), *node.input[3:]]
        del copy.input[:]
        copy.input.extend(inputs)

    def _step(self, value: str, number: float) -> int:
        scale, zero = self.scales[self.placement.root(value)]
        return int(np.clip(np.rint(np.clip(number / float(scale), -1e6, 1e6)) + int(zero), 0, 255))
