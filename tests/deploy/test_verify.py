"""The checks must fail where they should: wrong numbers, wrong shapes, and float kernels in place of integer ones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from automl_compress.deploy.runtime import OnnxModel
from automl_compress.deploy.verify import (
    agreement,
    check_float,
    executed_operators,
    metric_of,
    torch_outputs,
)
from automl_compress.errors import ExportError
from automl_compress.techniques.quantization.weights import packed


def linear_model(weight: np.ndarray, operator: str = "Gemm") -> onnx.ModelProto:
    node = helper.make_node(operator, ["x", "fc.weight"], ["y"], name="fc")
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight, "fc.weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


@pytest.fixture
def twin(weight: np.ndarray) -> nn.Module:
    layer = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight.T.copy()))
    return layer


def test_agreement_is_relative_to_the_scale_of_the_outputs() -> None:
    a = np.array([[1.0, -100.0]], np.float32)
    assert agreement([a], [a]) == 0
    assert agreement([a + 1], [a]) == pytest.approx(0.01)
    assert agreement([a], [a[:, :1]]) == float("inf")
    assert agreement([a, a], [a]) == float("inf")
    assert agreement([a * np.nan], [a]) == float("inf")


def test_float_check_accepts_the_same_and_refuses_other_weights(weight: np.ndarray, twin: nn.Module) -> None:
    inputs = (torch.randn(3, 6),)
    assert check_float(linear_model(weight), twin, inputs) < 1e-5
    with pytest.raises(ExportError, match="differ from PyTorch"):
        check_float(linear_model(weight * 1.01), twin, inputs)


def test_outputs_of_nested_structures_are_flattened_and_modes_restored() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2).eval()

        def forward(self, x: Tensor) -> dict[str, object]:
            assert not self.training
            return {"a": x, "b": (x + 1, [x + 2])}

    model = Nested().train()
    model.norm.eval()
    outputs = torch_outputs(model, (torch.zeros(1, 2),))
    assert [part.max() for part in outputs] == [0, 1, 2]
    assert model.training
    assert not model.norm.training


def test_the_metric_is_weighted_by_samples(weight: np.ndarray, twin: nn.Module) -> None:
    x, y = torch.randn(10, 6), torch.randint(0, 4, (10,))

    def accuracy(outputs: Tensor, target: Tensor) -> float:
        return float((outputs.argmax(1) == target).float().mean())

    batches = [((x[:7],), y[:7]), ((x[7:],), y[7:])]
    assert metric_of(OnnxModel(linear_model(weight)), batches, accuracy) == pytest.approx(accuracy(twin(x), y))
    with pytest.raises(ExportError, match="no samples"):
        metric_of(OnnxModel(linear_model(weight)), [], accuracy)


@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
def test_a_float_kernel_is_not_taken_for_an_integer_one(weight: np.ndarray, operator: str) -> None:
    model = linear_model(weight, operator)
    (asked,) = executed_operators(model, ["fc", "gone"], {"fc": 8})
    assert not asked.ok
    assert asked.operator == operator
    assert asked.reason.startswith(f"asked int8, runs fp32 ({operator}) because ")
    (plain,) = executed_operators(model, ["fc"], {})
    assert plain.ok
    assert plain.reason == f"asked fp32, runs fp32 ({operator})"


def test_refusals_of_the_runtime_are_one_line(weight: np.ndarray) -> None:
    model = linear_model(weight)
    session = OnnxModel(model)
    with pytest.raises(ExportError, match="could not run") as caught:
        session((np.zeros((1, 5), np.float32),))
    assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="takes 1 inputs"):
        session(())
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match="refuses the model") as refused:
        OnnxModel(model)
    assert "\n" not in str(refused.value)


def test_a_refusal_names_the_bits_that_the_runtime_may_lack(weight: np.ndarray) -> None:
    model = linear_model(weight)
    model.graph.initializer.append(packed("q", np.array([1, -1], np.int16), 2, signed=True))
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match=r"if it lacks 2 bits, leave them out of the search space"):
        OnnxModel(model)
