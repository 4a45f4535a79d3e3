"""Checks on what is delivered: the same outputs, the same quality, and the kernels that were asked for."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from automl_compress.deploy.runtime import OnnxModel, open_session
from automl_compress.errors import ExportError
from automl_compress.techniques.onnx_graph import LAYER_OPERATORS, WEIGHT_SUFFIX, layer_of

FLOAT_TOLERANCE = 1e-3
INTEGER_TOLERANCE = 0.1
INTEGER_OPERATORS = frozenset(
    {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"}
)
_ADDED_SUFFIX = re.compile(r"(_nchwc|_token_\d+|_quant)+$")

Batch = tuple[tuple[Tensor, ...], Tensor]


@dataclass(frozen=True, kw_only=True)
class ExecutedLayer:
    """What became of one layer. `operator` is what the runtime executes; `ok` whether that is what was asked for."""

    layer: str
    bits: int
    operator: str
    ok: bool
    reason: str = ""


def torch_outputs(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[np.ndarray, ...]:
    """The model's outputs in evaluation mode as arrays: those of a tensor, tuple, list or dict, in order."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return tuple(part.detach().cpu().numpy() for part in _flatten(model(*inputs)))
    finally:
        for module, training in modes:
            module.training = training


def _flatten(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _flatten(part)]
    return []


def agreement(outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Largest absolute deviation divided by the largest absolute expected value, over all outputs; 0 is perfect.

    Infinity where the outputs' number, shapes or finiteness differ.
    """
    if len(outputs) != len(expected):
        return float("inf")
    worst = 0.0
    for found, wanted in zip(outputs, expected, strict=True):
        if found.shape != wanted.shape or not np.isfinite(found).all() or not np.isfinite(wanted).all():
            return float("inf")
        if wanted.size:
            scale = max(float(np.abs(wanted).max()), 1e-12)
            worst = max(worst, float(np.abs(found.astype(np.float64) - wanted).max()) / scale)
    return worst


def check_float(model: onnx.ModelProto | Path, reference: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Deviation of a float ONNX model from PyTorch on `inputs`. Raises ExportError above FLOAT_TOLERANCE."""
    found = OnnxModel(model)(tuple(part.detach().cpu().numpy() for part in inputs))
    deviation = agreement(found, torch_outputs(reference, inputs))
    if not deviation <= FLOAT_TOLERANCE:
        raise ExportError(
            f"the ONNX model's outputs differ from PyTorch's by {deviation:.2g} of their scale; "
            f"at most {FLOAT_TOLERANCE} is accepted"
        )
    return deviation


def check_quantized(model: onnx.ModelProto | Path, inputs: Sequence[np.ndarray]) -> float:
    """Deviation of the integer kernels from the same graph computed in floating point, node by node as written.

    Both round to the same 8-bit steps, so only rounding ties and sums of them may differ: a kernel that saturates or
    applies another scale shows here. Raises ExportError above INTEGER_TOLERANCE.
    """
    arrays = tuple(inputs)
    deviation = agreement(OnnxModel(model)(arrays), OnnxModel(model, optimize=False)(arrays))
    if not deviation <= INTEGER_TOLERANCE:
        raise ExportError(
            f"the runtime's integer kernels differ from the quantized model by {deviation:.2g} of the outputs' scale; "
            f"at most {INTEGER_TOLERANCE} is accepted: keep the layers in 32 bits on this machine"
        )
    return deviation


def top1_agreement(outputs: np.ndarray, expected: np.ndarray) -> float:
    """Fraction of samples, shape [batch, classes], for which both have the same highest class."""
    return float((outputs.argmax(1) == expected.argmax(1)).mean())


def metric_of(model: OnnxModel, batches: Iterable[Batch], metric: Callable[[Tensor, Tensor], float]) -> float:
    """The metric's mean over `batches` of (inputs, target), each weighted by its number of samples.

    `metric` is called as it is for the PyTorch model, with the model's first output if there is just one, else a tuple.
    Raises ExportError if there are no samples.
    """
    total, samples = 0.0, 0
    for inputs, target in batches:
        outputs = tuple(torch.from_numpy(part) for part in model(tuple(part.detach().cpu().numpy() for part in inputs)))
        rows = len(inputs[0])
        total += metric(outputs[0] if len(outputs) == 1 else outputs, target) * rows  # type: ignore[arg-type]
        samples += rows
    if not samples:
        raise ExportError("no samples to evaluate the ONNX model on")
    return total / samples


def executed_operators(
    model: onnx.ModelProto | Path, layers: Iterable[str], bits: Mapping[str, int]
) -> tuple[ExecutedLayer, ...]:
    """What ONNX Runtime executes for each layer, read from its optimized graph.

    Layers without a node (those of removed blocks) are left out. A layer for which int8 was asked is `ok` only as an
    integer kernel.
    """
    source = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    integer = {}
    for node in _optimized(model).graph.node:
        if node.op_type in INTEGER_OPERATORS:
            integer[_ADDED_SUFFIX.sub("", node.name)] = node.op_type
            weights = [name for name in node.input if name.endswith(WEIGHT_SUFFIX)]
            integer.update({name.removesuffix(WEIGHT_SUFFIX): node.op_type for name in weights})
    result = []
    for layer in layers:
        calls = [node for node in source.graph.node if node.op_type in LAYER_OPERATORS and layer_of(node.name) == layer]
        if calls:
            operators = [integer.get(call.name, call.op_type) for call in calls]
            result.append(_executed(layer, bits.get(layer, 32), operators))
    return tuple(result)


def _executed(layer: str, bits: int, operators: list[str]) -> ExecutedLayer:
    wrong = [operator for operator in operators if (operator in INTEGER_OPERATORS) != (bits == 8)]
    operator = wrong[0] if wrong else operators[0]
    reason = f"{bits} bits were asked for, the runtime executes {operator}" if wrong else ""
    return ExecutedLayer(layer=layer, bits=bits, operator=operator, ok=not wrong, reason=reason)


def _optimized(model: onnx.ModelProto | Path) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(path)
        open_session(model, options)
        return onnx.load(path)
