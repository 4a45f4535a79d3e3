"""Small ONNX graphs written node by node, and running them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 8
INPUT = (CHANNELS, 8, 8)


class Builder:
    """Writes a chain of nodes; every method returns the name of the value that it made."""

    def __init__(self, shape: tuple[int, ...] = INPUT) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.shape = shape

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, operator: str, *inputs: str, name: str = "", output: str = "", **attributes: object) -> str:
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=name or f"n_{output}", **attributes))
        return output

    def conv(self, source: str, name: str, out: int = CHANNELS, into: int = CHANNELS, group: int = 1) -> str:
        weight = self.random.normal(size=(out, into // group, 3, 3)).astype(np.float32) / 5
        names = [self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", self._bias(out))]
        return self.node("Conv", source, *names, name=name, pads=[1, 1, 1, 1], group=group)

    def gemm(self, source: str, name: str, into: int, out: int = 4) -> str:
        weight = self.random.normal(size=(out, into)).astype(np.float32) / 5
        names = [self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", self._bias(out))]
        return self.node("Gemm", source, *names, name=name, transB=1)

    def matmul(self, source: str, name: str, into: int, out: int) -> str:
        weight = self.random.normal(size=(into, out)).astype(np.float32) / 5
        product = self.node("MatMul", source, self.constant(f"{name}.weight", weight), name=name)
        return self.node("Add", product, self.constant(f"{name}.bias", self._bias(out)))

    def ints(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    def _bias(self, size: int) -> np.ndarray:
        return self.random.normal(size=size).astype(np.float32)

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *self.shape])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        del model.graph.value_info[:]
        return model


def data(shape: tuple[int, ...] = INPUT, rows: int = 16, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, *shape)).astype(np.float32)


def run(model: onnx.ModelProto, x: np.ndarray, optimize: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def executed(model: onnx.ModelProto) -> list[str]:
    """Operators of the graph that the runtime executes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [node.op_type for node in onnx.load(path).graph.node]
