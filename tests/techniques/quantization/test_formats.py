"""Each bit-width's format: what the runtime executes for it, what it computes, and what it weighs."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from automl_compress.techniques.quantization.calibrate import activation_tensors, calibrate
from automl_compress.techniques.quantization.formats import Executions
from automl_compress.techniques.quantization.rewrite import quantize
from automl_compress.techniques.quantization.weights import block_of, nearest, packed
from tests.techniques.quantization.graphs import Builder, data, executed, run

TOLERANCE = {2: 1.0, 4: 0.25, 8: 0.06, 16: 2e-3}
ALL: Executions = {
    **{("conv", bits): "emulated" for bits in (2, 4, 8)},
    **{("linear", bits): "weight-only" for bits in (2, 4, 8)},
    ("conv", 16): "storage",
    ("linear", 16): "storage",
}
STORAGE: Executions = {(kind, bits): "storage" for kind in ("conv", "linear") for bits in (2, 4, 8, 16)}
INTEGER: Executions = {(kind, bits): "emulated" for kind in ("conv", "linear") for bits in (2, 4, 8)}


def low_bits(model: onnx.ModelProto, bits: dict[str, int], executions: Executions, x: np.ndarray) -> onnx.ModelProto:
    ranges = calibrate(model, [{"x": x}], activation_tensors(model, bits, executions), percentile=100)
    low = quantize(model, bits, ranges, executions=executions)
    onnx.checker.check_model(low, full_check=True)
    return low


def deviation(model: onnx.ModelProto, low: onnx.ModelProto, x: np.ndarray) -> float:
    wanted = run(model, x)
    return float(np.abs(run(low, x) - wanted).max() / np.abs(wanted).max())


def network() -> onnx.ModelProto:
    b = Builder()
    v = b.node("Relu", b.conv("x", "a"))
    w = b.node("Relu", b.node("Add", b.conv(v, "b"), v))
    return b.model(b.gemm(b.node("Flatten", b.node("MaxPool", w, kernel_shape=[2, 2], strides=[2, 2])), "c", 128, 32))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(6, 48), (48,)])
def test_weight_only_products_are_fused(bits: int, shape: tuple[int, ...]) -> None:
    b = Builder(shape)
    hidden = b.matmul("x", "a", 48, 64) if len(shape) == 2 else b.gemm("x", "a", 48, 64)
    output = b.node("Relu", hidden)
    model = b.model(b.matmul(output, "b", 64, 40) if len(shape) == 2 else b.gemm(output, "b", 64, 40))
    low = low_bits(model, {"a": bits, "b": bits}, ALL, data(shape))
    assert executed(low).count("MatMulNBits") == 2
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(executed(low))
    assert deviation(model, low, data(shape, seed=2)) < TOLERANCE[bits]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("outputs", [10, 32])
def test_weight_only_products_are_fused_behind_integer_layers(bits: int, outputs: int) -> None:
    b = Builder()
    pooled = b.node("Flatten", b.node("GlobalAveragePool", b.node("Relu", b.conv("x", "a", out=64))))
    model = b.model(b.gemm(pooled, "b", 64, outputs))
    low = low_bits(model, {"a": 8, "b": bits}, ALL | {("conv", 8): "native"}, data())
    assert executed(low).count("MatMulNBits") == 1
    assert executed(low).count("DequantizeLinear") == 1
    assert not {"MatMul", "Gemm"} & set(executed(low))
    assert deviation(model, low, data(seed=2)) < TOLERANCE[bits]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("outputs", [1, 10, 11, 12])
def test_weight_only_products_of_any_width_compute_what_is_written(bits: int, outputs: int) -> None:
    """The runtime itself confuses 2-bit columns when their number isn't a multiple of 4."""
    b = Builder((40,))
    model, x = b.model(b.gemm("x", "a", 40, outputs)), data((40,), seed=2)
    low = low_bits(model, {"a": bits}, ALL, data((40,)))
    found, written = run(low, x), run(low, x, optimize=False)
    assert "MatMulNBits" in executed(low)
    assert np.abs(found - written).max() < 0.03 * np.abs(written).max()


@pytest.mark.parametrize("bits", [2, 4])
def test_fewer_bits_than_eight_run_in_integer_kernels(bits: int) -> None:
    model = network()
    low = low_bits(model, dict.fromkeys("abc", bits), INTEGER, data())
    assert executed(low).count("QLinearConv") == 2
    assert executed(low).count("QGemm") == 1
    assert "Cast" not in executed(low)
    assert deviation(model, low, data(seed=2)) < TOLERANCE[bits]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_storage_only_weights_cost_nothing_when_the_model_runs(bits: int) -> None:
    model = network()
    low = low_bits(model, dict.fromkeys("abc", bits), STORAGE, data())
    assert executed(low) == executed(model)
    assert deviation(model, low, data(seed=2)) < TOLERANCE[bits]


@pytest.mark.parametrize("executions", [ALL, STORAGE, INTEGER | {("linear", 16): "storage", ("conv", 16): "storage"}])
def test_any_mixture_of_bits_runs_and_agrees_with_the_graph_as_written(executions: Executions) -> None:
    model, x = network(), data(seed=2)
    mixtures = list(itertools.product((2, 4, 8, 16, 32), repeat=3))
    for choice in mixtures[::7]:
        low = low_bits(model, dict(zip("abc", choice, strict=True)), executions, data())
        found, written = run(low, x), run(low, x, optimize=False)
        assert np.abs(found - written).max() <= 0.03 * np.abs(written).max(), choice


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_file_holds_as_many_bits_as_were_asked_for(bits: int) -> None:
    b = Builder((256,))
    model = b.model(b.matmul("x", "a", 256, 128))
    weights = 256 * 128
    for executions, overhead in ((ALL, 256 * 128 / 64 * 5), (STORAGE, 128 * 4), (INTEGER, 128 * 13)):
        size = len(low_bits(model, {"a": bits}, executions, data((256,))).SerializeToString())
        assert weights * bits / 8 < size < weights * bits / 8 + overhead + 2000


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("form", ["integer", "blocks"])
def test_rounding_is_near_and_better_with_more_bits(bits: int, form: str) -> None:
    weight = np.random.default_rng(0).normal(size=(16, 100)).astype(np.float32)
    weight[3] = 0.0
    found = nearest(weight, bits, form)  # type: ignore[arg-type]
    error = float(((found.values() - weight) ** 2).mean())
    assert error < {2: 0.15, 4: 0.02, 8: 1e-4}[bits]
    assert not found.values()[3].any()


def test_weights_of_inputs_that_matter_are_kept_more_exactly() -> None:
    weight = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    importance = np.where(np.arange(64) < 8, 100.0, 0.01).astype(np.float32)
    plain, weighed = nearest(weight, 2, "integer"), nearest(weight, 2, "integer", importance)
    errors = [float((((q.values() - weight) ** 2) * importance).sum()) for q in (plain, weighed)]
    assert errors[1] < errors[0]


def test_blocks_are_no_longer_than_they_need_to_be() -> None:
    assert [block_of(inputs, 4) for inputs in (8, 16, 40, 64, 100, 1000)] == [16, 16, 64, 64, 128, 128]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_are_packed_as_the_standard_says(bits: int) -> None:
    values = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.int16).repeat(3)
    tensor = packed("w", values, bits, signed=True)
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int16), values)
