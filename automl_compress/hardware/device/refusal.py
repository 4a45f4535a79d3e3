"""What to do where a runtime refuses a model: the reason may be a type of numbers that it doesn't know."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import TensorProto

_TYPES = {
    2: {TensorProto.INT2, TensorProto.UINT2},
    4: {TensorProto.INT4, TensorProto.UINT4},
    8: {TensorProto.INT8, TensorProto.UINT8},
}


def way_out(models: Iterable[onnx.ModelProto | Path]) -> str:
    """Which bit-widths the models' constants have, and what to do about them; empty where there are none."""
    kinds = {kind for model in models for kind in _kinds(model)}
    found = [str(bits) for bits, types in _TYPES.items() if kinds & types]
    return f"if it lacks {' or '.join(found)} bits, leave them out of the search space" if found else ""


def _kinds(model: onnx.ModelProto | Path) -> set[int]:
    try:
        read = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
    except Exception:  # whatever its parser raises: the file is then the reason, and the runtime has said so
        return set()
    return {tensor.data_type for tensor in read.graph.initializer}
