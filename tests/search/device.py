"""The real runtime with invented times: kernels and fusions are what they are, but no clock is read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from automl_compress.hardware.measuring import probe

_PROFILING_US = 2.0
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def node_us(kernel: Mapping[str, Any]) -> float:
    """A node takes two microseconds and more, the more values it reads and writes; convolutions are dearer."""
    reads, writes = (
        [math.prod(int(d) for d in shape.split(",") if d) for _, shape in _SHAPE.findall(" ".join(kernel[end]))]
        for end in ("inputs", "outputs")
    )
    work = sum(writes) * 1e-3 + sum(reads) * 1e-3
    if "Conv" in kernel["op"]:
        work = max(reads, default=1) * max(writes, default=1) * 2e-5
    return 2.0 + work * (0.4 if kernel["op"].startswith("QLinear") else 1.0)


class TimelessRuntime:
    """A channel to `Device`. `asked` counts over all of them what was asked."""

    asked: ClassVar[Counter[str]] = Counter()

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)
        self._answer: dict[str, Any] | None = None

    def send(self, request: Mapping[str, Any]) -> None:
        self.asked[request["do"]] += 1
        self._answer = {"ok": True, **getattr(self, request["do"])(request)}

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        return self._answer

    def close(self) -> str:
        return "closed"

    def lower(self, request: Mapping[str, Any]) -> dict[str, Any]:
        found = probe.lower(dict(request), self._settings, lambda _: None)
        for kernel in found["kernels"]:
            kernel["us"] = [node_us(kernel)] * len(kernel["us"])
            kernel["steps"] = [us + 0.5 + _PROFILING_US for us in kernel["us"]]
        return found

    def optimize(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return probe.optimize(dict(request), self._settings, lambda _: None)

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return probe.run(dict(request), self._settings, lambda _: None)

    def trace(self, request: Mapping[str, Any]) -> dict[str, Any]:
        found = self.lower(request)
        for kernel in found["kernels"]:
            kernel["us"], kernel["steps"] = ((kernel[name] * request["rounds"]) for name in ("us", "steps"))
        whole_us = [self._model_us(request["model"])] * request["rounds"]
        return {**found, "runs": 2, "whole_us": whole_us, "pace_us": [64.0] * request["rounds"]}

    def compare(self, request: Mapping[str, Any]) -> dict[str, Any]:
        bursts = {name: [self._model_us(path)] * request["bursts"] for name, path in request["models"].items()}
        return {"bursts_us": bursts, "runs": dict.fromkeys(bursts, 30)}

    def memory(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"peak_bytes": 60_000_000 + 3 * Path(request["model"]).stat().st_size}

    def savings(self, request: Mapping[str, Any]) -> dict[str, Any]:
        default = self.memory(request)["peak_bytes"]
        latency_us = self._model_us(request["model"])
        return {
            "peak_bytes": {"default": default, "no-prepacking": default - 1_000_000},
            "empty_bytes": dict.fromkeys(("default", "no-prepacking"), 50_000_000),
            "bursts_us": {"default": [latency_us] * 3, "no-prepacking": [1.2 * latency_us] * 3},
            "runs": dict.fromkeys(("default", "no-prepacking"), 30),
        }

    def _model_us(self, path: str) -> float:
        with TemporaryDirectory() as folder:  # the runtime writes weights beside the graph
            request = {"model": path, "optimized": f"{folder}/optimized.onnx"}
            kernels = probe.lower(request, self._settings, lambda _: None)["kernels"]
        return sum(node_us(kernel) + 0.5 for kernel in kernels) + 3.0
