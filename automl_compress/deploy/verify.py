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

from automl_compress.core.plan import FULL_BITS
from automl_compress.deploy.runtime import OnnxModel, open_session
from automl_compress.errors import ExportError
from automl_compress.techniques.onnx_graph import LAYER_OPERATORS, layer_of
from automl_compress.techniques.quantization.formats import (
    DEFAULT_EXECUTIONS,
    Executions,
    Format,
    described,
    format_of,
    kind_of,
)

FLOAT_TOLERANCE = 1e-3
INTEGER_TOLERANCE = 0.1
INTEGER_OPERATORS = frozenset(
    {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"}
)
WEIGHT_ONLY_OPERATORS = frozenset({"MatMulNBits"})
_RUNS_AS: Mapping[Format, str] = {"integer": "int8", "blocks": "weight-only", "folded": "fp32", "float": "fp32"}
_ADDED_SUFFIX = re.compile(r"(_nchwc|_token_\d+|_quant|/MatMulAddFusion)+$")
_WEIGHT = re.compile(r"(.+)\.weight(?:_q|_cast)(?:_T|_transposed|_token_\d+)*$")

Batch = tuple[tuple[Tensor, ...], Tensor]


@dataclass(frozen=True, kw_only=True)
class ExecutedLayer:
    """What became of one layer.

    asked     what was to run, in words ("int8", "int4 weights only", ...)
    operator  what the runtime executes; `ok` whether that is what was asked for
    reason    both in a sentence, with why they differ if they do
    """

    layer: str
    bits: int
    asked: str
    operator: str
    ok: bool
    reason: str


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


def check_quantized(
    model: onnx.ModelProto | Path, inputs: Sequence[np.ndarray], found: Sequence[np.ndarray] | None = None
) -> float:
    """Deviation of the integer kernels from the same graph computed in floating point, node by node as written.

    `found` is what the device computes for the inputs (default: what this machine does).

    Both round to the same 8-bit steps, so only rounding ties and sums of them may differ: a kernel that saturates or
    applies another scale shows here. Raises ExportError above INTEGER_TOLERANCE.
    """
    arrays = tuple(inputs)
    deviation = agreement(found or OnnxModel(model)(arrays), OnnxModel(model, optimize=False)(arrays))
    if not deviation <= INTEGER_TOLERANCE:
        raise ExportError(
            f"the runtime's integer kernels differ from the quantized model by {deviation:.2g} of the outputs' scale; "
            f"at most {INTEGER_TOLERANCE} is accepted: keep the layers in 32 bits on this device"
        )
    return deviation


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
    model: onnx.ModelProto | Path,
    layers: Iterable[str],
    bits: Mapping[str, int],
    executions: Executions = DEFAULT_EXECUTIONS,
    optimized: onnx.GraphProto | None = None,
) -> tuple[ExecutedLayer, ...]:
    """What ONNX Runtime executes for each layer, read from its optimized graph (default: the one it makes here).

    Layers without a node (those of removed blocks) are left out. A layer that was asked to run in integers is `ok` only
    as an integer kernel, one of which only the weights are to be in integers only as MatMulNBits, and one that is to
    compute in floating point as neither.
    """
    source = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    lowered: dict[str, str] = {}
    for node in (optimized or _optimized(model).graph).node:
        if node.op_type in INTEGER_OPERATORS | WEIGHT_ONLY_OPERATORS:
            lowered[_ADDED_SUFFIX.sub("", node.name)] = node.op_type
            lowered.update({match[1]: node.op_type for name in node.input if (match := _WEIGHT.match(name))})
    result = []
    for layer in layers:
        calls = [node for node in source.graph.node if node.op_type in LAYER_OPERATORS and layer_of(node.name) == layer]
        if calls:
            width = bits.get(layer, FULL_BITS)
            form = format_of(kind_of(calls[0]) or "", width, executions)
            result.append(_executed(layer, form, width, [lowered.get(call.name, call.op_type) for call in calls]))
    return tuple(result)


def _executed(layer: str, form: Format, bits: int, operators: list[str]) -> ExecutedLayer:
    asked = described(form, bits)
    wrong = [operator for operator in operators if _ran_as(operator) != _RUNS_AS[form]]
    operator = wrong[0] if wrong else operators[0]
    runs = f"{_ran_as(operator)} ({operator})"
    reason = f"asked {asked}, runs {runs} because {_why(operator, form)}" if wrong else f"asked {asked}, runs {runs}"
    return ExecutedLayer(layer=layer, bits=bits, asked=asked, operator=operator, ok=not wrong, reason=reason)


def _ran_as(operator: str) -> str:
    if operator in INTEGER_OPERATORS:
        return "int8"
    return "weight-only" if operator in WEIGHT_ONLY_OPERATORS else "fp32"


def _why(operator: str, form: Format) -> str:
    if _ran_as(operator) != "fp32":
        return "the runtime merged the layer with integers around it"
    if operator == "ConvTranspose":
        return "ConvTranspose has no integer kernel"
    return f"the runtime has no {_RUNS_AS[form]} kernel for this {operator} or did not find its pattern"


def _optimized(model: onnx.ModelProto | Path) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(path)
        open_session(model, options)
        return onnx.load(path)
