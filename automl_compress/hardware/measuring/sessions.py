"""The runtime's sessions: opened with a profile's settings, and run with data of the right types.

A part of the measuring program (see `probe.py`), Python 3.9.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

OPTIMIZATION = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_FLOATS = {"float": "float32", "float16": "float16", "double": "float64"}
_OTHERS = {"bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"}

Settings = dict[str, Any]


def open_session(path: str, settings: Settings, *, whole: bool = False, **options: Any) -> Any:
    """An onnxruntime session with the profile's threads and optimizations.

    The settings' "session" and "entries" are further options and configuration entries. With `whole`, an optimized
    model that is written holds its weights.
    """
    import onnxruntime as ort

    if not os.path.exists(path):
        raise FileNotFoundError(f"no such model: {path}")
    so = ort.SessionOptions()
    so.intra_op_num_threads = int(settings["threads"])
    so.inter_op_num_threads = 1
    so.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    so.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMIZATION[settings["optimization"]])
    so.log_severity_level = 4
    options = {**settings.get("session", {}), **options}
    for name, value in options.items():
        setattr(so, name, value)
    for name, value in settings.get("entries", {}).items():
        so.add_session_config_entry(name, value)
    if "optimized_model_filepath" in options and not whole:
        # Weights go to a file of their own, which nobody reads: what is asked for is the graph.
        prefix = "session.optimized_model_external_initializers"
        so.add_session_config_entry(f"{prefix}_file_name", "weights.bin")
        so.add_session_config_entry(f"{prefix}_min_size_in_bytes", "1024")
    chosen = (settings["provider"], dict(settings.get("provider_options") or {}))
    return ort.InferenceSession(path, so, providers=[chosen])


def random_inputs(session: Any) -> dict[str, Any]:
    """One sample for every input: normal floats, zeros for other types; free dimensions are 1."""
    import numpy as np

    generator, inputs = np.random.default_rng(0), {}
    for item in session.get_inputs():
        shape = [d if isinstance(d, int) and d > 0 else 1 for d in item.shape]
        kind = item.type[len("tensor(") : -1]
        if kind in _FLOATS:
            inputs[item.name] = generator.standard_normal(shape).astype(_FLOATS[kind])
        elif kind in _OTHERS:
            inputs[item.name] = np.zeros(shape, dtype=kind)
        else:
            raise TypeError(f"input {item.name!r} has type {item.type}, which can't be filled with data")
    return inputs


def runner(session: Any) -> Callable[[], Any]:
    inputs = random_inputs(session)
    return lambda: session.run(None, inputs)
