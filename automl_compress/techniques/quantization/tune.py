"""Post-training quantization: everything that calibration samples decide about a model's integers.

One pass gives the histograms of activations and the moments of layers' inputs; from these come ranges, weights rounded
to keep the outputs (`rounding`) and corrected biases. With a judge, which says how far a quantized model is from the
one in 32 bits on samples that calibration has not seen, more is tried and kept where it pays: other rules for the
ranges, for all values and for single ones, and cross-layer equalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from automl_compress.errors import ExportError
from automl_compress.techniques.onnx_graph import GraphView, layer_of
from automl_compress.techniques.quantization.calibrate import activation_tensors, observe
from automl_compress.techniques.quantization.equalise import equalised, pairs
from automl_compress.techniques.quantization.formats import (
    DEFAULT_EXECUTIONS,
    Executions,
    Format,
    layer_formats,
    weight_axis,
)
from automl_compress.techniques.quantization.inputs import InputMoments, input_moments
from automl_compress.techniques.quantization.onnx_module import OnnxModule
from automl_compress.techniques.quantization.ranges import RULES, RangeObserver, Rule
from automl_compress.techniques.quantization.rewrite import quantize
from automl_compress.techniques.quantization.rounding import corrected_bias, rounded
from automl_compress.techniques.quantization.storage import as_matrix
from automl_compress.techniques.quantization.weights import QuantizedWeight, nearest

Feed = Mapping[str, np.ndarray]
Judge = Callable[[onnx.ModelProto], float]
Limits = tuple[float, float]
_SINGLE_VALUES = 6  # how many values may get a rule of their own
_PAYS = 0.99  # of the distance: what is less is noise


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What is known about a model's integers beside the plan's bit-widths; empty for a model without any.

    ranges   value -> (low, high) of activations that become integers
    weights  layer -> its integers; layers that are left out are rounded to the nearest
    tensors  initializer of the float model -> its new value (corrected biases, equalised or trained weights)
    notes    what was chosen and why, one line each
    """

    ranges: Mapping[str, Limits] = field(default_factory=dict)
    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def quantized(
    model: onnx.ModelProto,
    bits: Mapping[str, int],
    found: Quantization,
    executions: Executions = DEFAULT_EXECUTIONS,
    *,
    draft: bool = False,
) -> onnx.ModelProto:
    """The float model in the bit-widths of a plan. Parameters and errors as for `rewrite.quantize`."""
    changed = with_tensors(model, found.tensors)
    return quantize(changed, bits, found.ranges, weights=found.weights, executions=executions, draft=draft)


def with_tensors(model: onnx.ModelProto, tensors: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The model with other values in some of its initializers; the model itself where there are none."""
    if not tensors:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for stored in result.graph.initializer:
        if stored.name in tensors:
            stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(tensors[stored.name]), stored.name))
    return result


class Calibration:
    """What one pass over samples shows of one float model, and what follows from it; computed when first asked for.

    `feeds` are batches, input name -> array. The first question for values or layers takes a pass for all of those, so
    ask for all at first.
    """

    def __init__(self, model: onnx.ModelProto, feeds: Sequence[Feed], executions: Executions) -> None:
        self.model, self.feeds, self.executions = model, feeds, executions
        self.view = GraphView(model.graph)
        self._observers: dict[str, RangeObserver] = {}
        self._moments: dict[str, InputMoments] = {}
        self._passed: set[str] = set()
        self._rounded: dict[tuple[str, int, Format], QuantizedWeight] = {}

    def observers(self, bits: Mapping[str, int]) -> dict[str, RangeObserver]:
        """What was seen of the values that become integers for these bit-widths."""
        wanted = activation_tensors(self.model, bits, self.executions)
        self.watch(wanted)
        return {name: self._observers[name] for name in wanted}

    def watch(self, values: Iterable[str]) -> None:
        """Observe these values, in one pass for all that are new."""
        self._observers |= observe(self.model, self.feeds, [name for name in values if name not in self._observers])

    def ranges(self) -> dict[str, Limits]:
        """The ranges of all values that were watched so far."""
        return {name: observer.range() for name, observer in self._observers.items()}

    def moments(self, layers: Iterable[str]) -> dict[str, InputMoments]:
        """Moments of layers' inputs, without those that `input_moments` leaves out. Raises ExportError."""
        wanted = set(layers)
        if wanted - self._passed:
            module = OnnxModule(self.model)
            batches = (_inputs(module, feed) for feed in self.feeds)
            self._moments |= input_moments(module, batches, wanted - self._passed)
            self._passed |= wanted
        return {layer: self._moments[layer] for layer in wanted & self._moments.keys()}

    def rounded(self, node: onnx.NodeProto, bits: int, form: Format, moments: InputMoments) -> QuantizedWeight:
        """A layer's weights, rounded for the inputs that it has here."""
        key = (layer_of(node.name), bits, form)
        if key not in self._rounded:
            self._rounded[key] = rounded(self._weight(node), bits, form, moments)
        return self._rounded[key]

    def quantization(self, bits: Mapping[str, int], *, thorough: bool = False) -> Quantization:
        """Percentile ranges; weights below 8 bits rounded by their inputs' moments, and biases corrected for it.

        `thorough` does the same for layers of 8 bits.
        """
        ranges = {name: observer.range() for name, observer in self.observers(bits).items()}
        formats = layer_formats(self.view, bits, self.executions)
        nodes = {
            layer_of(node.name): node
            for node in self.view.nodes
            if node.output
            and (thorough or formats.get(node.output[0], ("", 8))[1] < 8)
            and formats.get(node.output[0], ("", 16))[1] <= 8
        }
        if not nodes:
            return Quantization(ranges=ranges)
        try:
            moments = self.moments(nodes)
        except ExportError as error:
            return Quantization(ranges=ranges, notes=(f"weights are rounded to the nearest: {error}",))
        weights: dict[str, QuantizedWeight] = {}
        tensors: dict[str, np.ndarray] = {}
        for layer in moments:
            form, width = formats[nodes[layer].output[0]]
            weight = self._weight(nodes[layer])
            if width < 8 or thorough:
                weights[layer] = self.rounded(nodes[layer], width, form, moments[layer])
            found = weights.get(layer) or nearest(weight, width, form)
            bias = bias_of(nodes[layer], self.view, len(weight))
            if bias is not None:
                before = self.view.constant(bias)
                assert before is not None
                after = corrected_bias(weight, found, before.reshape(-1), moments[layer])
                tensors[bias] = after.reshape(before.shape)
        return Quantization(ranges=ranges, weights=weights, tensors=tensors)

    def _weight(self, node: onnx.NodeProto) -> np.ndarray:
        stored, axis = self.view.constant(node.input[1]), weight_axis(node, self.view)
        assert stored is not None
        assert axis is not None
        return as_matrix(stored, axis)


def tune(calibration: Calibration, bits: Mapping[str, int], judge: Judge | None = None) -> Quantization:
    """What calibration decides for a float model and layer -> bits.

    Without a judge one way is taken, which is quick; with one, the best of several. Raises InputError for samples that
    don't fit the model or give values that aren't finite.
    """
    model, executions = calibration.model, calibration.executions
    if not layer_formats(calibration.view, bits, executions):
        return Quantization()
    best = calibration.quantization(bits)
    if judge is None:
        return best
    distance = first = judge(quantized(model, bits, best, executions))
    corrected = calibration.quantization(bits, thorough=True)
    reached = judge(quantized(model, bits, corrected, executions))
    if reached < _PAYS * distance:
        what = "8-bit weights rounded by what layers read, biases corrected"
        note = f"{what}: distance from 32 bits {distance:.3g} -> {reached:.3g}"
        best, distance = replace(corrected, notes=(note,)), reached
    for tensors in equalisations(calibration, bits):
        other = Calibration(with_tensors(model, tensors), calibration.feeds, executions)
        found = other.quantization(bits, thorough=True)
        found = replace(found, tensors={**tensors, **found.tensors})
        reached = judge(quantized(model, bits, found, executions))
        if reached < _PAYS * distance:
            note = f"cross-layer equalisation: distance from 32 bits {first:.3g} -> {reached:.3g}"
            best, distance, calibration = replace(found, notes=(note,)), reached, other
    return _best_ranges(model, bits, best, distance, calibration.observers(bits), executions, judge)


def _inputs(module: OnnxModule, feed: Feed) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.ascontiguousarray(feed[name])) for name in module.view.inputs)


def bias_of(node: onnx.NodeProto, view: GraphView, outputs: int) -> str | None:
    """The initializer that is added to a layer's output channels, in the node or by an Add behind it."""
    if len(node.input) > 2 and node.input[2]:
        name = node.input[2]
    else:
        user = view.only_user(node.output[0]) if node.op_type == "MatMul" else None
        if user is None or user.op_type != "Add":
            return None
        name = next((value for value in user.input if value in view.initializers), "")
    own = name in view.initializers and len(view.users[name]) == 1
    return name if own and int(np.prod(view.initializers[name].dims)) == outputs else None


def equalisations(calibration: Calibration, bits: Mapping[str, int]) -> list[dict[str, np.ndarray]]:
    """Changed weights to try: none where no two neighbouring layers of a depthwise network both run in integers."""
    view = calibration.view
    formats = layer_formats(view, bits, calibration.executions)
    integer = [
        pair.activation
        for pair in pairs(view)
        if all(formats.get(node.output[0], ("float",))[0] == "integer" for node in (pair.first, pair.second))
    ]
    if not integer:
        return []
    try:
        module = OnnxModule(calibration.model)
    except ExportError:
        return []
    wanted = {pair.activation for pair in pairs(view)}
    largest: dict[str, np.ndarray] = {}

    def each(node: onnx.NodeProto, inputs: list[Tensor]) -> None:
        name = node.input[0] if node.input else ""
        if name in wanted:
            seen = inputs[0].abs().amax(dim=(0, *range(2, inputs[0].ndim))).numpy()
            largest[name] = np.maximum(largest[name], seen) if name in largest else seen

    with torch.no_grad():
        for feed in calibration.feeds:
            module(*_inputs(module, feed), each=each)
    return [dict(equalised(view, largest))]


def _best_ranges(
    model: onnx.ModelProto,
    bits: Mapping[str, int],
    best: Quantization,
    distance: float,
    observers: Mapping[str, RangeObserver],
    executions: Executions,
    judge: Judge,
) -> Quantization:
    """The rule that suits all values best, then single values that do better with another one."""
    if not observers:
        return best
    choices: dict[Rule, dict[str, Limits]] = {
        rule: {name: observer.range(rule) for name, observer in observers.items()} for rule in RULES
    }
    notes = list(best.notes)

    def attempt(ranges: Mapping[str, Limits]) -> float:
        return judge(quantized(model, bits, replace(best, ranges=ranges), executions))

    ranges: Mapping[str, Limits] = best.ranges
    for rule in RULES[1:]:
        reached = attempt(choices[rule])
        if reached < _PAYS * distance:
            notes.append(f"ranges by {rule}: distance from 32 bits {distance:.3g} -> {reached:.3g}")
            ranges, distance = choices[rule], reached
    for name in sorted(observers, key=lambda name: -_disagreement(name, choices))[:_SINGLE_VALUES]:
        for rule in RULES:
            if choices[rule][name] == ranges[name]:
                continue
            tried = {**ranges, name: choices[rule][name]}
            reached = attempt(tried)
            if reached < _PAYS * distance:
                notes.append(f"range of {name} by {rule}: {distance:.3g} -> {reached:.3g}")
                ranges, distance = tried, reached
    return replace(best, ranges=ranges, notes=tuple(notes))


def _disagreement(name: str, choices: Mapping[Rule, Mapping[str, Limits]]) -> float:
    """How much the rules' widths of a value differ, relative to the widest."""
    widths = [high - low for low, high in (choices[rule][name] for rule in RULES)]
    return (max(widths) - min(widths)) / max(max(widths), 1e-30)
