"""Rewriting a float ONNX model so that chosen layers are stored in fewer bits and run in the kernels made for them.

`formats` says what a bit-width means, `placement.place` which values become integers, `calibrate` their ranges, and
`weights` (or what was found better: `rounding`) the integers of each layer. Activations are uint8 with one scale,
biases of integer layers int32 in units of both scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from automl_compress.errors import InputError
from automl_compress.techniques.onnx_graph import GraphView, attribute, remove_unused, set_nodes
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS, Executions, layer_formats
from automl_compress.techniques.quantization.placement import (
    Placement,
    bend_of,
    clamp_bounds,
    convolution_behind,
    data_inputs,
    input_channels,
    place,
    scale_and_zero_point,
    too_coarse,
)
from automl_compress.techniques.quantization.storage import Constants, LayerWriter
from automl_compress.techniques.quantization.weights import QuantizedWeight


def quantize(
    model: onnx.ModelProto,
    bits: Mapping[str, int],
    ranges: Mapping[str, tuple[float, float]],
    *,
    weights: Mapping[str, QuantizedWeight] | None = None,
    executions: Executions = DEFAULT_EXECUTIONS,
    draft: bool = False,
) -> onnx.ModelProto:
    """The model with the layers of `bits` (layer -> bit-width) in fewer bits; `model` itself is not changed.

    ranges      value -> (low, high) for every value that `activation_tensors` lists
    weights     layer -> its integers, where they are already known; others are rounded to the nearest
    executions  how the device runs each kind of layer at each bit-width, which decides about the format

    draft       whether only the structure counts: weights are rounded without care

    Node names of layers, inputs and outputs stay. Raises PlanError for an unsupported bit-width and InputError for a
    missing range.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    if not layer_formats(GraphView(result.graph), bits, executions):
        return result
    placement = place(model, bits, executions)
    missing = [value for value in placement.roots if value not in ranges]
    if missing:
        raise InputError(f"quantization: {len(missing)} values have no range, like {missing[0]!r}; calibrate first")
    opset = _Rewriter(result.graph, placement, bits, ranges, weights or {}, executions, draft).run()
    _raise_opset(result, opset)
    return result


def _raise_opset(model: onnx.ModelProto, opset: int) -> None:
    """2-bit tensors came with opset 25, 4-bit tensors and blocks with 21; the older, the more runtimes read it."""
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version < opset:
            entry.version = opset
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(model.opset_import))


class _Rewriter:
    """Rewrites one graph according to a placement. Shared constants are stored once: the file's size is a budget."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        placement: Placement,
        bits: Mapping[str, int],
        ranges: Mapping[str, tuple[float, float]],
        weights: Mapping[str, QuantizedWeight],
        executions: Executions,
        draft: bool,
    ) -> None:
        self.graph = graph
        self.view = GraphView(graph)
        self.placement = placement
        self.formats = layer_formats(self.view, bits, executions)
        self.scales = {
            value: scale_and_zero_point(*self._within(value, ranges[value]), placement.bends.get(value, 0.0))
            for value in placement.roots
        }
        self.new: list[onnx.NodeProto] = []
        self.constants = Constants()
        self.writer = LayerWriter(self.view, self.constants, weights, draft=draft)
        self.sources = {source: value for value, source in placement.roots.items()}
        self.dequantized: set[str] = set()

    def run(self) -> int:
        """Rewrite; returns the opset that the result needs."""
        for value in self.view.inputs:
            if value in self.placement.roots:
                self._quantize(value, value)
        for node in self.view.nodes:
            if node.output[0] in self.placement.omitted:
                continue
            if node.output[0] in self.placement.shared:
                self._moving(node)
            elif node.output[0] in self.placement.rescaled:
                self._rescaling(node)
            else:
                self._computing(node)
        for value in self.view.outputs:
            if self._as_float(value) != value:
                self._restore_output(value)
        set_nodes(self.graph, self.new)
        self.graph.initializer.extend(self.constants.tensors())
        remove_unused(self.graph)
        del self.graph.value_info[:]
        return self.writer.opset

    def _within(self, value: str, seen: tuple[float, float]) -> tuple[float, float]:
        """The range, inside the bounds of the clamp that saturation has to replace."""
        if value not in self.placement.omitted:
            return seen
        return 0.0, min(max(seen[1], 0.0), self.placement.omitted[value])

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.new.append(helper.make_node(operator, inputs, [output], name=output, **attributes))

    def _parameters(self, value: str) -> list[str]:
        root = self.placement.root(value)
        scale, zero = self.scales[root]
        return [self.constants.add(f"{root}_scale", scale), self.constants.add(f"u8_{zero}", zero)]

    def _quantize(self, source: str, value: str) -> None:
        self._add("QuantizeLinear", [source, *self._parameters(value)], f"{value}_q")

    def _as_float(self, value: str) -> str:
        """The name under which a float operator reads `value`: itself where a float operator or the user made it."""
        root = self.placement.roots.get(value)
        made = value in self.placement.shared or value in self.placement.rescaled
        if not made and (root is None or root not in self.placement.integer):
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
                self.constants.add(f"{name}_scale", np.full(channels, scale)),
                self.constants.add(f"u8_{zero}_{channels}", np.full(channels, zero)),
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
        form, bits = self.formats.get(node.output[0], ("float", 32))
        integer = node.output[0] in self.placement.integer
        carried = set(data_inputs(node)) if integer else set()
        inputs = [self._dequantize(v) if v in carried else self._as_float(v) if v else v for v in node.input]
        if form == "integer":
            scale = self.scales[self.placement.root(node.input[0])][0]
            self.new += self.writer.integer(node, bits, inputs, float(scale))
        elif integer and node.op_type == "BatchNormalization":
            convolution = convolution_behind(node.output[0], self.view)
            assert convolution is not None  # or the placement would have left it in floating point
            rank = len(self.view.initializers[convolution.input[1]].dims)
            scale = self.scales[self.placement.root(node.input[0])][0]
            self.new += self.writer.affine(node, rank, inputs[0], float(scale))
        elif form == "blocks":
            self.new += self.writer.blocks(node, bits, inputs)
        else:
            channels = input_channels(node, self.view)
            if channels is not None and inputs[0] != node.input[0]:
                inputs[0] = self._dequantize_by_channel(node.input[0], channels)
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            del copy.input[:]
            copy.input.extend(inputs)
            self.new += [*self.writer.folded(copy, bits), copy] if form == "folded" else [copy]
        for value in node.output:
            if value in self.sources:
                self._quantize(value, self.sources[value])

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

    def _rescaling(self, node: onnx.NodeProto) -> None:
        """A hard sigmoid: the input's integers between its bends, read with its slope and from its lower bend."""
        source, output = node.input[0], node.output[0]
        slope, step = float(attribute(node, "alpha", 0.2)), float(self.scales[self.placement.root(source)][0])
        if too_coarse(step, bend_of(node)):
            self.scales[output] = np.float32(1 / 255), np.uint8(0)
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[0] = self._dequantize(source)
            self.new.append(copy)
            self._quantize(output, output)
            return
        bounds = [self._step(source, number) for number in (-bend_of(node), 1 / slope - bend_of(node))]
        self.scales[output] = np.float32(step * slope), np.uint8(bounds[0])
        names = [self.constants.add(f"u8_{bound}", np.uint8(bound)) for bound in bounds]
        self._add("Clip", [f"{source}_q", *names], f"{output}_q")

    def _clamp(self, copy: onnx.NodeProto, node: onnx.NodeProto) -> None:
        bounds = clamp_bounds(node, self.view)
        assert bounds is not None
        steps = [self._step(node.input[0], bound) for bound in bounds]
        copy.op_type = "Clip"
        del copy.input[1:]
        copy.input.extend(self.constants.add(f"u8_{step}", np.uint8(step)) for step in steps)

    def _pad_value(self, copy: onnx.NodeProto, node: onnx.NodeProto) -> None:
        given = self.view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        step = self._step(node.input[0], 0.0 if given is None else float(given))
        inputs = [*copy.input[:2], self.constants.add(f"u8_{step}", np.uint8(step)), *node.input[3:]]
        del copy.input[:]
        copy.input.extend(inputs)

    def _step(self, value: str, number: float) -> int:
        scale, zero = self.scales[self.placement.root(value)]
        return int(np.clip(np.rint(np.clip(number / float(scale), -1e6, 1e6)) + int(zero), 0, 255))
