"""The ranges of activations, from running the float model on calibration samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from automl_compress.errors import ExportError, InputError
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS, Executions
from automl_compress.techniques.quantization.placement import place
from automl_compress.techniques.quantization.ranges import RangeObserver

_ROWS_AT_ONCE = 32


def activation_tensors(
    model: onnx.ModelProto, bits: Mapping[str, int], executions: Executions = DEFAULT_EXECUTIONS
) -> list[str]:
    """The values that become integers for this choice of bits; `quantize` needs the ranges of these at most.

    The values for a choice contain those for every choice with fewer integer layers, so that ranges calibrated for all
    layers serve every mixture.
    """
    placement = place(model, bits, executions)
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
