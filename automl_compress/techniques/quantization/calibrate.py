"""The ranges of activations, from running the float model on calibration samples."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from automl_compress.errors import ExportError, InputError, first_line
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS, Executions
from automl_compress.techniques.quantization.placement import place
from automl_compress.techniques.quantization.ranges import PERCENTILE, RangeObserver

_ROWS_AT_ONCE = 8


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
    percentile: float = PERCENTILE,
) -> dict[str, tuple[float, float]]:
    """Run the float model over `batches` (input name -> array) and return value -> (low, high).

    `percentile` 100 takes the lowest and highest value seen; below, that percentage of all values lies within.
    ResNet-20 on CIFAR-10 is closest to the float model at the default, and far from it at 99.9. Raises what `observe`
    does.
    """
    observers = observe(model, batches, tensors)
    return {name: observer.range("percentile", percentile) for name, observer in observers.items()}


def observe(
    model: onnx.ModelProto, batches: Iterable[Mapping[str, np.ndarray]], tensors: Sequence[str]
) -> dict[str, RangeObserver]:
    """Run the float model over `batches` (input name -> array); value -> what was seen of it.

    Only a few samples' values are held in memory at a time.
    Raises InputError if there are no batches, an input has a wrong shape, or a value is NaN or infinite.
    """
    if not tensors:
        return {}
    session = _session_with_outputs(model, tensors)
    free = not isinstance(session.get_inputs()[0].shape[0], int)
    observers = {name: RangeObserver() for name in tensors}
    seen = 0
    for batch in batches:
        _check(session, batch)
        rows = len(next(iter(batch.values())))
        step = _ROWS_AT_ONCE if free else 1
        for start in range(0, rows, step):
            part = {name: np.ascontiguousarray(array[start : start + step]) for name, array in batch.items()}
            for name, values in zip(tensors, session.run(list(tensors), part), strict=True):
                if not np.isfinite(values).all():
                    way_out = "leave such samples out" + ("" if name in part else ", or layers around it in 32 bits")
                    raise InputError(f"calibration: {name!r} is NaN or infinite for a training sample; {way_out}")
                observers[name].update(values)
        seen += rows
    if not seen:
        raise InputError("calibration: there are no samples; give training data with at least one batch")
    return observers


def _check(session: onnxruntime.InferenceSession, batch: Mapping[str, np.ndarray]) -> None:
    """Raise InputError where a batch doesn't fit the model's inputs."""
    for item in session.get_inputs():
        if item.name not in batch:
            raise InputError(f"calibration: a batch lacks input {item.name!r}; it has {', '.join(batch) or 'nothing'}")
        found, wanted = batch[item.name].shape, tuple(item.shape)
        fits = len(found) == len(wanted) and all(
            f == w or not isinstance(w, int) for f, w in zip(found[1:], wanted[1:], strict=True)
        )
        if not fits:
            raise InputError(
                f"calibration: input {item.name!r} has shape {list(found)}, the model takes {list(wanted)}; "
                f"give samples of the task's own shape"
            )


def _session_with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnxruntime.InferenceSession:
    """A session whose outputs are the watched values too. The model goes through a file, so that it is held twice, not
    four times: as it came, and as the session's weights, which are not packed for speed either."""
    present = [value.name for value in model.graph.output]
    added = [name for name in dict.fromkeys(tensors) if name not in present]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    with tempfile.TemporaryDirectory(prefix="automl-compress-") as folder:
        path = str(Path(folder) / "watched.onnx")
        model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in added)
        try:
            onnx.save(model, path)
        finally:
            del model.graph.output[len(present) :]
        try:
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"calibration: ONNX Runtime refuses the model: {first_line(error)}") from error
