"""A device that needs no clock: a runtime in which a node takes as long as its operator and width say."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from automl_compress.hardware.profile.host import HostFacts

FACTS = HostFacts(
    architecture="x86_64", cpu="Imaginary 9000", flags=("avx2", "fma"), cores=4, system="Linux 1", onnxruntime="1.32.0"
)
OVERHEAD_US = 2.0
PROFILING_US = 3.0
RUNS = 9
PACE_US = 64.0


def chain(*widths: int) -> onnx.ModelProto:
    """x -> Gemm -> Relu -> Gemm ... with the given widths; layers are called fc0, fc1 ..."""
    nodes, initializers, value = [], [], "x"
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        weight = np.full((before, after), 0.1, dtype=np.float32)
        initializers.append(numpy_helper.from_array(weight, f"fc{i}.weight"))
        nodes.append(helper.make_node("Gemm", [value, f"fc{i}.weight"], [f"y{i}"], name=f"fc{i}"))
        value = f"y{i}"
        if i < len(widths) - 2:
            nodes.append(helper.make_node("Relu", [value], [f"z{i}"], name=f"relu{i}"))
            value = f"z{i}"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", widths[0]])],
        [helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, ["batch", widths[-1]])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def node_us(node: onnx.NodeProto, shapes: Mapping[str, int], inputs: int) -> float:
    return inputs * shapes[node.output[0]] / 8 if node.op_type == "Gemm" else shapes[node.output[0]] / 4


def node_times(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, int, int, float]]:
    """(node, width read, width written, microseconds)."""
    weights = {i.name: tuple(i.dims) for i in model.graph.initializer}
    widths = {"x": model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value}
    found = []
    for node in model.graph.node:
        read = widths[node.input[0]]
        widths[node.output[0]] = weights[node.input[1]][1] if node.op_type == "Gemm" else read
        found.append((node, read, widths[node.output[0]], node_us(node, widths, read)))
    return found


def whole_us(path: str) -> float:
    nodes = node_times(onnx.load(path))
    return sum(us for _, _, _, us in nodes) + OVERHEAD_US * len(nodes)


class SimulatedRuntime:
    """A channel whose answers follow from the models alone. `drift` slows everything down from request to request."""

    def __init__(self, settings: Mapping[str, Any], *, drift: float = 0.0) -> None:
        self.settings = settings
        self.asked: Counter[str] = Counter()
        self.closed = False
        self._drift = drift
        self._answer: dict[str, Any] | None = None

    def send(self, request: Mapping[str, Any]) -> None:
        assert not self.closed
        self.asked[request["do"]] += 1
        slowness = 1.0 + self._drift * sum(self.asked.values())
        self._answer = {"ok": True, **getattr(self, request["do"])(request, slowness)}

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        return self._answer

    def close(self) -> str:
        self.closed = True
        return "closed"

    def facts(self, request: Mapping[str, Any], slowness: float) -> dict[str, Any]:
        return {**vars(FACTS), "pinned": [0]}

    def lower(self, request: Mapping[str, Any], slowness: float) -> dict[str, Any]:
        model = onnx.load(request["model"])
        shutil.copy(request["model"], request["optimized"])
        kernels = [
            {
                "op": node.op_type,
                "name": node.name,
                "inputs": [f"float[1,{read}]"],
                "outputs": [f"float[1,{written}]"],
                "us": [us] * RUNS,
                "steps": [us + PROFILING_US] * RUNS,
            }
            for node, read, written, us in node_times(model)
        ]
        return {"kernels": kernels, "inputs": {"x": f"float[1,{node_times(model)[0][1]}]"}}

    def trace(self, request: Mapping[str, Any], slowness: float) -> dict[str, Any]:
        answer = self.lower(request, slowness)
        for kernel in answer["kernels"]:
            kernel["us"] *= request["rounds"]
            kernel["steps"] = [slowness * (us + OVERHEAD_US) + PROFILING_US for us in kernel["us"]]
        whole, pace = ([slowness * us] * request["rounds"] for us in (whole_us(request["model"]), PACE_US))
        return {**answer, "runs": RUNS, "whole_us": whole, "pace_us": pace}

    def compare(self, request: Mapping[str, Any], slowness: float) -> dict[str, Any]:
        bursts = {}
        for name, path in request["models"].items():
            bursts[name] = [slowness * whole_us(path)] * request["bursts"]
        return {"bursts_us": bursts, "runs": dict.fromkeys(bursts, 30)}

    def memory(self, request: Mapping[str, Any], slowness: float) -> dict[str, Any]:
        size = len(onnx.load(request["model"]).SerializeToString())
        return {"peak_bytes": 60_000_000 + (0 if size < 100 else 1_000_000 + 3 * size)}
