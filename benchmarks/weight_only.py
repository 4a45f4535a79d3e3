"""4-bit weight-only products (MatMulNBits) beside 32-bit ones, by shape, block length and the kernel's accuracy level.

Level 0 multiplies in 32 bits, level 4 rounds what is read to 8 bits. Shapes and the 64 rows are those of the encoder of
the quantization benchmark. All models of a shape are timed in turns, and the median ratio of the turns counts.

    python benchmarks/weight_only.py [--json FILE]
"""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime
from common import parser, write_figures
from onnx import TensorProto, helper, numpy_helper

SHAPES = ((256, 256), (256, 1024), (1024, 256))
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
LEVELS = (0, 4)
ROWS = 64
TURNS, QUICK_TURNS, RUNS, WARM = 25, 8, 10, 3


def model(inputs: int, outputs: int, rows: int, block: int = 0, level: int = 0) -> onnx.ModelProto:
    """A product with random weights: in 32 bits, or with a block length in 4."""
    random = np.random.default_rng(0)
    constants: dict[str, Any]
    if block:
        blocks = -(-inputs // block)
        constants = {
            "weight": random.integers(0, 256, (outputs, blocks, block // 2), dtype=np.uint8),
            "scale": (random.random((outputs, blocks)) / 100).astype(np.float32),
            "zero": np.full((outputs, (blocks + 1) // 2), 0x88, np.uint8),
        }
        options: dict[str, Any] = {"K": inputs, "N": outputs, "bits": 4, "block_size": block, "accuracy_level": level}
        node = helper.make_node("MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", **options)
    else:
        constants = {"weight": random.standard_normal((inputs, outputs)).astype(np.float32)}
        node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width])
        for name, width in (("x", inputs), ("y", outputs))
    ]
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(made: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ratios(inputs: int, outputs: int, turns: int) -> tuple[float, dict[str, float]]:
    """Microseconds in 32 bits, and 'level_L.block_B' -> time in 4 bits over that in 32 bits."""
    ways = {"fp32": session(model(inputs, outputs, ROWS))}
    for level, block in product(LEVELS, BLOCKS):
        if block <= inputs:
            ways[f"level_{level}.block_{block}"] = session(model(inputs, outputs, ROWS, block, level))
    x = np.random.default_rng(1).standard_normal((ROWS, inputs)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, runtime in ways.items():
            for _ in range(WARM):
                runtime.run(None, {"x": x})
            begun = time.perf_counter()
            for _ in range(RUNS):
                runtime.run(None, {"x": x})
            times[name].append((time.perf_counter() - begun) / RUNS)
    reference = np.array(times.pop("fp32"))
    return float(np.median(reference) * 1e6), {
        name: float(np.median(np.array(each) / reference)) for name, each in times.items()
    }


def main() -> None:
    options = parser("What 4-bit weight-only products take beside 32-bit ones").parse_args()
    figures: dict[str, float] = {}
    for inputs, outputs in SHAPES:
        reference, found = ratios(inputs, outputs, QUICK_TURNS if options.quick else TURNS)
        figures[f"{inputs}x{outputs}.fp32_us"] = reference
        figures |= {f"{inputs}x{outputs}.{name}": ratio for name, ratio in found.items()}
    write_figures(options.json, "weight_only", figures, quick=options.quick)


if __name__ == "__main__":
    main()
