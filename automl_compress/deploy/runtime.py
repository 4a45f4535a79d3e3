"""Running an ONNX model with ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from automl_compress.errors import ExportError, first_line
from automl_compress.hardware.device.refusal import way_out

_PROVIDERS = ["CPUExecutionProvider"]
_ERRORS_ONLY = 3


class OnnxModel:
    """A session for one model.

    threads   defaults to the machine's processors
    optimize  False runs the graph as it is written, operator by operator

    Raises ExportError if ONNX Runtime refuses the model or a run fails.
    """

    def __init__(self, model: onnx.ModelProto | Path, threads: int | None = None, *, optimize: bool = True) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        self._session = open_session(model, options)
        self.inputs = tuple(value.name for value in self._session.get_inputs())

    def __call__(self, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """Outputs for inputs in the graph's order, batch first."""
        if len(inputs) != len(self.inputs):
            names = ", ".join(self.inputs)
            raise ExportError(f"the ONNX model takes {len(self.inputs)} inputs ({names}), found {len(inputs)}")
        try:
            return tuple(self._session.run(None, dict(zip(self.inputs, inputs, strict=True))))
        except Exception as error:
            raise ExportError(f"ONNX Runtime could not run the model: {first_line(error)}") from error


def open_session(model: onnx.ModelProto | Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A CPU session; ExportError with one line if ONNX Runtime refuses the model."""
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=_PROVIDERS)
    except Exception as error:
        advice = way_out([model])
        advice = advice and f" (onnxruntime {onnxruntime.__version__}; {advice})"
        raise ExportError(f"ONNX Runtime refuses the model: {first_line(error)}{advice}") from error
