"""Quantization-aware training: the quantized graph in floating point, with rounding that passes gradients on.

The module computes what the delivered graph computes: the same values become integers (`placement`), with the same
scales and zero points, moving operators work on rounded values, biases are rounded to their units. Scales are learned
beside the weights (LSQ: Esser et al. 2020, "Learned step size quantization"; zero points stay where calibration put
them). It is made from the graph after batch-norms were folded, so that what is trained is what is stored, and
`quantization` hands scales and integers over exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from automl_compress.model.outputs import arranged
from automl_compress.techniques.onnx_graph import LAYER_OPERATORS, attribute, layer_of
from automl_compress.techniques.quantization.formats import (
    DEFAULT_EXECUTIONS,
    Executions,
    Format,
    layer_formats,
    weight_axis,
)
from automl_compress.techniques.quantization.onnx_module import OnnxModule
from automl_compress.techniques.quantization.placement import (
    bent,
    clamp_bounds,
    data_inputs,
    place,
    scale_and_zero_point,
    too_coarse,
)
from automl_compress.techniques.quantization.storage import as_matrix
from automl_compress.techniques.quantization.tune import Quantization, with_tensors
from automl_compress.techniques.quantization.weights import QuantizedWeight, limits, nearest, positive

_SMALLEST = 1e-12


def straight(value: Tensor) -> Tensor:
    """Rounded to the nearest integer (halves to even, as the runtime does), with the gradient of the identity."""
    return value + (value.round() - value).detach()


def fake_quantized(value: Tensor, scale: Tensor, zero: Tensor | float, low: int, high: int) -> Tensor:
    """`value` at the nearest step; the scale's gradient is LSQ's (equation 3), `scale` broadcast to the value."""
    return (torch.clamp(straight(value / scale) + zero, low, high) - zero) * scale


def _with_gradient_scale(scale: Tensor, factor: float) -> Tensor:
    """The scale itself, with its gradient multiplied by a factor (LSQ, section 2.2)."""
    return scale * factor + (scale - scale * factor).detach()


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer's fixed choices; its scales [outputs] or [outputs, blocks] are a parameter of the module."""

    node: onnx.NodeProto
    form: Format
    bits: int
    axis: int
    key: str
    zeros: Tensor | None
    block: int


class FakeQuantized(OnnxModule):
    """A float graph that computes as its quantized version does.

    model  float, as `Template.fill` makes it
    bits   layer -> bit-width
    found  ranges of every value that becomes an integer, and what is known about weights
    like   what the original returns: outputs come in the same container

    `watcher`, if it is set, is told of each layer's name and input, rounded as it is, when the model runs.

    Raises ExportError for an operator without a PyTorch counterpart.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        bits: Mapping[str, int],
        found: Quantization,
        executions: Executions = DEFAULT_EXECUTIONS,
        like: Any = None,
    ) -> None:
        super().__init__(with_tensors(model, found.tensors))
        self._like = like
        self.watcher: Callable[[str, Tensor], None] | None = None
        self.placement = place(self.model, bits, executions)
        self._layers: dict[str, _Layer] = {}
        self._values: dict[str, str] = {}
        self._zeros: dict[str, float] = {}
        # Value whose steps are too coarse for its bend -> the least that they may become in training.
        self._coarse: dict[str, float] = {}
        for name in self.placement.roots:
            low, high = found.ranges[name]
            if name in self.placement.omitted:
                low, high = 0.0, min(max(high, 0.0), self.placement.omitted[name])
            bend = self.placement.bends.get(name, 0.0)
            scale, zero = scale_and_zero_point(low, high, bend)
            if bend and too_coarse(float(scale), bend):
                self._coarse[name] = bend * 1.001
            self._values[name], self._zeros[name] = f"s{len(self._values)}", float(zero)
            self.register_parameter(self._values[name], nn.Parameter(torch.tensor(float(scale))))
        formats = layer_formats(self.view, bits, executions)
        for node in self.view.nodes:
            if node.output and node.output[0] in formats:
                self._add_layer(node, *formats[node.output[0]], found.weights.get(layer_of(node.name)))

    def _add_layer(self, node: onnx.NodeProto, form: Format, bits: int, known: QuantizedWeight | None) -> None:
        axis, layer = weight_axis(node, self.view), layer_of(node.name)
        assert axis is not None
        weight = self.parameter(node.input[1])
        zeros, block, key = None, 0, f"w_{len({entry.key for entry in self._layers.values()})}"
        earlier = next((entry for entry in self._layers.values() if layer_of(entry.node.name) == layer), None)
        if earlier is not None:
            zeros, block, key = earlier.zeros, earlier.block, earlier.key
        elif bits < 16:
            matrix = as_matrix(weight.detach().numpy(), axis)
            start = known or nearest(matrix, bits, form)
            # One-dimensional, as weight decay is for weights alone.
            self.register_parameter(key, nn.Parameter(torch.from_numpy(start.scales.reshape(-1).copy())))
            zeros = None if start.zeros is None else torch.from_numpy(start.zeros.astype(np.float32))
            block = start.block
            if known is not None:
                with torch.no_grad():
                    weight.copy_(_like(torch.from_numpy(known.values()), weight, axis))
        self._layers[node.output[0]] = _Layer(
            node=node, form=form, bits=bits, axis=axis, key=key, zeros=zeros, block=block
        )

    def forward(self, *inputs: Tensor, each: Any = None) -> Any:
        """The quantized graph's outputs, in the original's container; by default one alone, or a tuple."""
        plain: dict[str, Any] = dict(zip(self.view.inputs, inputs, strict=True))
        steps: dict[str, Tensor] = {
            name: self._value(name, plain[name]) for name in self.view.inputs if name in self.placement.roots
        }
        for index, node in enumerate(self.view.nodes):
            if node.output[0] in self.placement.shared:
                arguments = [steps[node.input[0]], *(self.read(plain, name) for name in node.input[1:])]
                steps.update(zip(node.output, self._moved(node, arguments), strict=False))
            elif node.output[0] in self.placement.rescaled:
                steps[node.output[0]] = self._rescaled(node, steps[node.input[0]])
            else:
                carried = set(data_inputs(node)) if node.output[0] in self.placement.integer else set()
                arguments = [steps[n] if n in carried else self._float(plain, steps, n) for n in node.input]
                if self.watcher is not None and node.op_type in LAYER_OPERATORS:
                    self.watcher(layer_of(node.name), arguments[0])
                self._replace_weights(node, arguments)
                if node.op_type == "BatchNormalization" and carried:
                    self._round_shift(node, arguments)
                for name, value in zip(node.output, self.run_node(node, arguments), strict=False):
                    plain[name] = value
                    if name in self.placement.roots:
                        steps[name] = self._value(name, value)
            self.let_go(plain, index)
            self.let_go(steps, index)
        return arranged([self._float(plain, steps, name) for name in self.view.outputs], self._like)

    def zeros(self, layers: Iterable[str]) -> dict[str, Tensor]:
        """Parameter -> which of its numbers aren't zero, for the weights of these layers: what a mask left."""
        wanted = set(layers)
        nodes = [node for node in self.view.nodes if layer_of(node.name) in wanted and len(node.input) > 1]
        return {key: self.parameter(name).detach() != 0 for node in nodes if (key := self.key(name := node.input[1]))}

    def quantization(self) -> Quantization:
        """What was learned, as `tune.quantized` takes it: the ONNX model then has these scales and integers exactly."""
        ranges = {}
        for name in self.placement.roots:
            scale, zero = float(self._scale(name).detach()), self._zeros[name]
            # The range that `scale_and_zero_point` turns into this scale and zero point, without an error of rounding.
            ranges[name] = (-zero * scale, (255 - zero) * scale)
        weights, stored = {}, set()
        for entry in self._layers.values():
            if entry.bits < 16:
                weights[layer_of(entry.node.name)] = self._integers(entry)
                stored.add(entry.node.input[1])
        tensors = {name: value for name, value in self.tensors().items() if name not in stored}
        return Quantization(ranges=ranges, weights=weights, tensors=tensors)

    def _float(self, plain: Mapping[str, Any], steps: Mapping[str, Tensor], name: str) -> Any:
        """What a float operator reads: the value as it was made, or from its integers where only those exist."""
        source = self.placement.roots.get(name)
        taken_over = name in self.placement.shared or name in self.placement.rescaled
        if taken_over or (source is not None and source in self.placement.integer):
            return steps[name]
        return self.read(plain, name)

    def _scale(self, name: str) -> Tensor:
        scale: Tensor = getattr(self, self._values[name]).clamp_min(_SMALLEST)
        if name in self._coarse:
            return scale.clamp_min(self._coarse[name])
        bend = self.placement.bends.get(name)
        if bend is not None:
            whole = float(bent(float(scale.detach()), bend, most=self._zeros[name]))
            return scale + (whole - scale).detach()
        bound = self.placement.omitted.get(name, math.inf)
        # Saturation stands for a clamp there, which must not move up.
        return scale if math.isinf(bound) else scale.clamp_max(bound / 255)

    def _value(self, name: str, value: Tensor) -> Tensor:
        factor = 1 / math.sqrt(max(value[:1].numel(), 1) * 255)
        return fake_quantized(value, _with_gradient_scale(self._scale(name), factor), self._zeros[name], 0, 255)

    def _rescaled(self, node: onnx.NodeProto, steps: Tensor) -> Tensor:
        """A hard sigmoid of integers; it is rounded only where their steps are too coarse to make it exact."""
        gate: Tensor = self.run_node(node, [steps])[0]
        exact = self.placement.root(node.input[0]) not in self._coarse
        return gate if exact else fake_quantized(gate, torch.tensor(1 / 255), 0.0, 0, 255)

    def _moved(self, node: onnx.NodeProto, arguments: list[Any]) -> list[Any]:
        """A moving operator's outputs, its constants at the steps of its input, as the integers have them."""
        root = self.placement.root(node.input[0])
        scale, zero = self._scale(root).detach(), self._zeros[root]

        def step(number: float) -> Tensor:
            limited = torch.tensor(number).clamp(-1e30, 1e30)
            return (torch.clamp((limited / scale).round() + zero, 0, 255) - zero) * scale

        if node.op_type in ("Relu", "Clip"):
            bounds = clamp_bounds(node, self.view)
            assert bounds is not None
            return [torch.clamp(arguments[0], *(step(bound) for bound in bounds))]
        if node.op_type == "Pad" and len(arguments) > 2 and arguments[2] is not None:
            arguments[2] = step(float(arguments[2]))
        return self.run_node(node, arguments)

    def _replace_weights(self, node: onnx.NodeProto, arguments: list[Any]) -> None:
        entry = self._layers.get(node.output[0])
        if entry is None:
            return
        weight = arguments[1]
        if entry.bits == 16:
            arguments[1] = weight + (weight.half().float() - weight).detach()
            return
        matrix = weight.movedim(entry.axis, 0).flatten(1)
        scale, zero = self._weight_scale(entry, matrix)
        arguments[1] = _like(fake_quantized(matrix, scale, zero, *_limits(entry)), weight, entry.axis)
        if entry.form == "integer" and len(arguments) > 2 and arguments[2] is not None:
            unit = self._scale(self.placement.root(node.input[0])).detach() * scale[:, 0].detach()
            arguments[2] = straight(arguments[2] / unit) * unit

    def _round_shift(self, node: onnx.NodeProto, arguments: list[Any]) -> None:
        """A batch-norm in integers has one bias a channel, in units of its input's scale times its factor's."""
        _, scale, shift, mean, variance = arguments
        factor = scale / torch.sqrt(variance + attribute(node, "epsilon", 1e-5))
        step = torch.from_numpy(positive(factor.detach().abs().double().numpy() / limits(8)[1]))
        unit = self._scale(self.placement.root(node.input[0])).detach() * step
        arguments[2], arguments[3] = straight((shift - mean * factor) / unit) * unit, torch.zeros_like(mean)

    def _weight_scale(self, entry: _Layer, matrix: Tensor) -> tuple[Tensor, Tensor | float]:
        """Scale and zero point of each number of a weight [outputs, inputs]."""
        scales, high = self._scales(entry), _limits(entry)[1]
        if entry.zeros is None:
            factor = 1 / math.sqrt(matrix.shape[1] * high)
            return _with_gradient_scale(scales, factor)[:, None], 0.0
        columns = torch.arange(matrix.shape[1]) // entry.block
        scales = _with_gradient_scale(scales, 1 / math.sqrt(entry.block * high))
        return scales[:, columns], entry.zeros[:, columns]

    def _scales(self, entry: _Layer) -> Tensor:
        scales: Tensor = getattr(self, entry.key).clamp_min(_SMALLEST)
        return scales if entry.zeros is None else scales.reshape(entry.zeros.shape)

    def _integers(self, entry: _Layer) -> QuantizedWeight:
        with torch.no_grad():
            matrix = self.parameter(entry.node.input[1]).movedim(entry.axis, 0).flatten(1)
            scale, zero = self._weight_scale(entry, matrix)
            low, high = _limits(entry)
            steps = torch.clamp((matrix / scale).round() + zero, low, high).numpy().astype(np.int16)
            scales = self._scales(entry).numpy().copy()
        zeros = None if entry.zeros is None else entry.zeros.numpy().astype(np.int16)
        return QuantizedWeight(bits=entry.bits, integers=steps, scales=scales, zeros=zeros, block=entry.block)


def _limits(entry: _Layer) -> tuple[int, int]:
    return (0, 2**entry.bits - 1) if entry.form == "blocks" else limits(entry.bits)


def _like(matrix: Tensor, weight: Tensor, axis: int) -> Tensor:
    """A matrix [outputs, inputs] in the shape of a stored weight whose output channels lie along `axis`."""
    moved = (weight.shape[axis], *(size for d, size in enumerate(weight.shape) if d != axis))
    return matrix.reshape(moved).movedim(0, axis)
