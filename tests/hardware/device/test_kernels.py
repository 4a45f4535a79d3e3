from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.executed import RawKernel, read_lowering, read_trace
from automl_compress.hardware.device.kernels import (
    Lowered,
    kernels_of,
    key_of,
    layer_nodes,
    live_bytes,
    structure_digest,
)
from automl_compress.hardware.prediction.kernel_key import read_key
from tests.hardware.simulated import chain


def raw(op: str, name: str, **more: object) -> RawKernel:
    values = {"inputs": ("float[1,4]",), "outputs": ("float[1,4]",), "mean_us": 1.0, "samples": 1, **more}
    return RawKernel(op=op, name=name, **values)  # type: ignore[arg-type]


def residual() -> onnx.ModelProto:
    """Two convolutions with a residual addition, as an exporter writes them."""
    tensors = [numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), f"block.conv{i}.weight") for i in (1, 2)]
    nodes = [
        helper.make_node("Conv", ["x", "block.conv1.weight"], ["getitem"], name="block.conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["getitem"], ["relu"], name="node_relu"),
        helper.make_node("Conv", ["relu", "block.conv2.weight"], ["getitem_3"], name="block.conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["getitem_3", "x"], ["add"], name="node_add"),
        helper.make_node("Relu", ["add"], ["relu_1"], name="node_relu_1"),
    ]
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 4, 8, 8]) for n in ("x", "relu_1")]
    graph = helper.make_graph(nodes, "residual", value[:1], value[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def layers(model: onnx.ModelProto, *kernels: RawKernel) -> list[str | None]:
    return [kernel.layer for kernel in kernels_of(model, kernels)]


def test_kernels_find_their_layer_through_what_the_runtime_does_to_names() -> None:
    model = residual()
    assert layers(model, raw("Conv", "block.conv1")) == ["block.conv1"]
    assert layers(model, raw("QLinearConv", "block.conv2_token_17")) == ["block.conv2"]
    assert layers(model, raw("Conv", "relu_nchwc")) == ["block.conv1"]
    assert layers(model, raw("Conv", "getitem_3_nchwc")) == ["block.conv2"]
    assert layers(model, raw("Conv", "relu_1_nchwc_token_3")) == ["block.conv2"]
    assert layers(model, raw("Conv", "new", constants=("reorder", "block.conv2.weight_token_4"))) == ["block.conv2"]
    assert layers(model, raw("FusedConv", "new", writes=("relu",))) == ["block.conv1"]


def test_helpers_are_charged_to_the_layer_before_and_leading_ones_to_the_first() -> None:
    kernels = kernels_of(
        residual(),
        [
            raw("ReorderInput", "ReorderInput"),
            raw("Conv", "relu_nchwc"),
            raw("ReorderOutput", "ReorderOutput_token_3"),
            raw("Conv", "getitem_3_nchwc"),
            raw("Relu", "node_relu_1"),
        ],
    )
    assert [kernel.layer for kernel in kernels] == ["block.conv1"] * 3 + ["block.conv2"] * 2
    assert [kernel.role for kernel in kernels] == ["helper", "layer", "helper", "layer", "helper"]


def test_products_of_two_activations_are_no_layers() -> None:
    model = residual()
    model.graph.node.append(helper.make_node("MatMul", ["relu", "relu"], ["scores"], name="attention"))
    assert list(layer_nodes(model.graph)) == ["block.conv1", "block.conv2"]


def test_keys_tell_apart_what_decides_the_time() -> None:
    one = raw("Conv", "a", detail="w float[4,4,3,3]|k3x3 s1x1 p1 g1")
    variants = [
        raw("Conv", "a", detail="w float[4,4,3,3]|k3x3 s1x1 p1 g1|relu"),
        raw("Conv", "a", detail="w float[4,4,3,3]|k3x3 s1x1 p1 g2"),
        raw("Conv", "a", detail=one.detail, layout="nchwc"),
        raw("Conv", "a", detail=one.detail, inputs=("float[1,4]", "float[1,4]")),
        raw("Conv", "a", detail=one.detail, outputs=("float[1,8]",)),
    ]
    assert len({key_of(kernel) for kernel in (one, *variants)}) == 6
    assert key_of(raw("Conv", "b", detail=one.detail, mean_us=9.0)) == key_of(one)
    assert key_of(one) == "Conv|float[1,4]>float[1,4]|w float[4,4,3,3]|k3x3 s1x1 p1 g1"


def test_defaults_that_only_later_opsets_write_out_are_no_part_of_a_key() -> None:
    event = {"op": "DequantizeLinear", "name": "q", "inputs": ["uint8[1,4]"], "outputs": ["float[1,4]"], "us": [3, 5]}
    answer = {"kernels": [event], "inputs": {"x": "uint8[1,4]"}}
    keys = []
    for attributes in ({}, {"block_size": 0, "output_dtype": 0, "axis": 1, "saturate": 1}, {"block_size": 2}):
        node = helper.make_node("DequantizeLinear", ["x", "s"], ["y"], name="q", **attributes)
        scale = numpy_helper.from_array(np.float32(0.1), "s")
        keys += [key_of(kernel) for kernel in read_lowering(answer, helper.make_graph([node], "g", [], [], [scale]))]
    assert keys[0] == keys[1]
    assert keys[2] == f"{keys[0]}|block_size=2"


def test_what_was_fused_is_read_from_the_optimized_graph() -> None:
    node = helper.make_node(
        "Conv", ["x", "w", "b", "skip"], ["y"], name="y_nchwc", domain="com.microsoft.nchwc",
        kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1], dilations=[1, 1], group=1, activation="Relu",
    )  # fmt: skip
    tensors = [numpy_helper.from_array(np.ones((16, 3, 3, 3), np.float32), "w")]
    tensors.append(numpy_helper.from_array(np.ones(16, np.float32), "b"))
    graph = helper.make_graph([node], "g", [], [], tensors)
    event = {
        "op": "Conv",
        "name": "y_nchwc",
        "inputs": ["float[1,3,8,8]"],
        "outputs": ["float[1,16,4,4]"],
        "us": [3, 5],
    }
    answer = {"kernels": [event], "inputs": {"x": "float[1,3,8,8]", "skip": "float[1,16,4,4]"}}
    (kernel,) = read_lowering(answer, graph)
    assert key_of(kernel) == (
        "Conv.nchwc|float[1,3,8,8],float[1,16,4,4]>float[1,16,4,4]|w float[16,3,3,3]|k3x3 s2x2 p0,0,1,1 g1|+add|relu"
    )
    assert kernel.op == "Conv"
    assert kernel.constants == ("w", "b")
    assert math.isnan(kernel.mean_us)


def test_what_profiling_adds_is_taken_off_so_that_kernels_add_up_to_the_whole() -> None:
    """Two nodes, two rounds of three runs; the first step is longer than the duration, the last node has none."""
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="y"), helper.make_node("Tanh", ["y"], ["z"], name="z")]
    graph = helper.make_graph(nodes, "g", [], [])
    kind = {"inputs": ["float[8]"], "outputs": ["float[8]"]}
    events = [
        {"op": "Relu", "name": "y", **kind, "us": [5] * 6, "steps": [8, 8, 8, 16, 16, 16]},
        {"op": "Tanh", "name": "z", **kind, "us": [5] * 3 + [9] * 3, "steps": [None] * 6},
    ]
    answer = {
        "kernels": events,
        "inputs": {"x": "float[8]"},
        "runs": 3,
        "whole_us": [9.5, 19.5],
        "pace_us": [4, 8],
    }
    trace = read_trace(answer, graph, discard=0.0)
    assert [kernel.bursts_us for kernel in trace.kernels] == [(6.0, 13.0), (3.5, 6.5)]
    assert [sum(k.bursts_us[i] for k in trace.kernels) for i in (0, 1)] == list(trace.whole_us)
    # The second round ran on a machine that was half as fast.
    assert trace.whole(4.0) == (pytest.approx(9.625), pytest.approx(0.25 / 9.625), (9.5, 9.75))
    assert [kernel.bursts_us for kernel in trace.timed(4.0)] == [(6.0, 6.5), (3.5, 3.25)]
    assert trace.whole(None)[2] == (9.5, 19.5)


def test_live_activations_are_those_still_needed() -> None:
    steps = [
        raw("A", "a", reads=("x",), writes=("p",), inputs=("float[10]",), outputs=("float[10]",)),
        raw("B", "b", reads=("p",), writes=("q",), inputs=("float[10]",), outputs=("uint8[100]",)),
        raw("C", "c", reads=("q", "p"), writes=("r",), inputs=("uint8[100]", "float[10]"), outputs=("float[1]",)),
    ]
    assert live_bytes(steps) == 40 + 100 + 4
    assert live_bytes([raw("A", "a", inputs=("float16[3]",), outputs=("int64[2]",))]) == 6 + 16
    assert live_bytes([]) == 0


def test_the_digest_follows_the_structure_and_not_the_weights() -> None:
    model, other = chain(4, 8, 2), chain(4, 8, 2)
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((4, 8), np.float32), "fc0.weight"))
    assert structure_digest(model) == structure_digest(other)
    assert structure_digest(model) != structure_digest(chain(4, 9, 2))


def test_the_digest_sees_which_scales_are_equal() -> None:
    def with_scales(*values: float) -> onnx.ModelProto:
        model = chain(4, 8, 2)
        model.graph.initializer.extend(
            numpy_helper.from_array(np.float32(value).reshape(()), f"s{i}") for i, value in enumerate(values)
        )
        return model

    assert structure_digest(with_scales(0.1, 0.2)) == structure_digest(with_scales(0.3, 0.4))
    assert structure_digest(with_scales(0.1, 0.1)) != structure_digest(with_scales(0.1, 0.2))


def test_a_structure_is_lowered_once(device: Device, tmp_path: Path) -> None:
    first = device.lowered(chain(4, 8, 2))
    assert isinstance(first, Lowered)
    assert device.lowered(chain(4, 8, 2)) is first
    assert device.requests == {"lower": 1}
    assert all(kernel.mean_us is None for kernel in first.kernels)
    assert [kernel.layer for kernel in first.kernels] == ["fc0", "fc0", "fc1"]


@pytest.mark.parametrize(("read", "written", "fits"), [(8, 72, True), (10, 72, False), (8, 42, False), (8, 12, False)])
def test_integer_convolutions_that_do_not_fill_vectors_are_a_family_of_their_own(
    read: int, written: int, fits: bool
) -> None:
    def family(op: str, kind: str, read: int, written: int) -> str:
        weight = f"w {kind}[{written},{read},1,1]"
        return read_key(f"{op}|{kind}[1,8,8,{read}]>{kind}[1,8,8,{written}]|{weight}|k1x1 s1x1 p0 g1").family

    assert (family("QLinearConv", "int8", read, written) == family("QLinearConv", "int8", 64, 64)) == fits
    assert family("Conv", "float", read, written) == family("Conv", "float", 64, 64)
