"""Measure a run's models again with nothing but ONNX Runtime and numpy: `python measure_again.py RUN [samples.npz]`.

samples.npz holds `x` (inputs, batch first) and `y` (class numbers); without it only latency and size are measured.
"""

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def burst_us(model: ort.InferenceSession, runs: int = 30) -> float:
    """Mean time of a run in microseconds; the first third warms up."""
    first = model.get_inputs()[0]
    feed = {first.name: np.random.default_rng(0).standard_normal([1, *first.shape[1:]], np.float32)}
    for _ in range(runs // 3):
        model.run(None, feed)
    start = time.perf_counter()
    for _ in range(runs - runs // 3):
        model.run(None, feed)
    return (time.perf_counter() - start) * 1e6 / (runs - runs // 3)


run = Path(sys.argv[1])
models = {name: session(run / f"{name}.onnx") for name in ("original", "best")}
bursts = [{name: burst_us(model) for name, model in models.items()} for _ in range(40)]
print(f"latency_ratio {np.median([turn['best'] / turn['original'] for turn in bursts]):.4f}")
print(f"latency_us {np.median([turn['best'] for turn in bursts]):.1f}")
print(f"size_bytes {(run / 'best.onnx').stat().st_size}")
if len(sys.argv) > 2:
    samples = np.load(sys.argv[2])
    scores = models["best"].run(None, {models["best"].get_inputs()[0].name: samples["x"]})[0]
    print(f"accuracy {(scores.argmax(1) == samples['y']).mean():.4f}")
