"""Quantization of graphs that are small enough to be written down: what runs in integers, and what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest
from numpy.testing import assert_allclose
from onnx import TensorProto, helper, numpy_helper

from automl_compress.errors import InputError, PlanError
from automl_compress.techniques.quantization.calibrate import activation_tensors, calibrate
from automl_compress.techniques.quantization.formats import Executions
from automl_compress.techniques.quantization.placement import place, scale_and_zero_point
from automl_compress.techniques.quantization.ranges import RangeObserver
from automl_compress.techniques.quantization.rewrite import quantize
from tests.techniques.quantization.graphs import CHANNELS, INPUT, Builder, data, executed, run


def quantized(model: onnx.ModelProto, bits: dict[str, int], shape: tuple[int, ...] = INPUT) -> onnx.ModelProto:
    batches = [{"x": data(shape)}, {"x": data(shape, 5, seed=2)}]
    ranges = calibrate(model, batches, activation_tensors(model, bits), percentile=100)
    result = quantize(model, bits, ranges)
    onnx.checker.check_model(result, full_check=True)
    return result


def assert_same(model: onnx.ModelProto, low: onnx.ModelProto, shape: tuple[int, ...] = INPUT) -> None:
    """Close to the float model, and the optimized kernels close to the graph as written; at several batch sizes."""
    tolerance = 0.06
    for rows in (1, 5):
        x = data(shape, rows, seed=2)
        wanted, found, written = run(model, x), run(low, x), run(low, x, optimize=False)
        scale = np.abs(wanted).max()
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= tolerance * scale
        assert np.abs(found - written).max() <= 0.03 * scale


def between_convs(middle: Callable[[Builder, str], str]) -> onnx.ModelProto:
    b = Builder()
    inner = middle(b, b.node("Relu", b.conv("x", "a")))
    return b.model(b.conv(inner, "b"))


def _pad(b: Builder, v: str) -> str:
    return b.node("Pad", v, b.ints("pads", 0, 0, 1, 1, 0, 0, 1, 1))


def _slice(b: Builder, v: str) -> str:
    return b.node("Slice", v, b.ints("s", 0, 0), b.ints("e", 99, 99), b.ints("ax", 2, 3), b.ints("st", 2, 2))


def _split(b: Builder, v: str) -> str:
    b.nodes.append(helper.make_node("Split", [v], ["left", "right"], name="split", axis=1, num_outputs=2))
    return b.node("Concat", "right", "left", axis=1)


STAYS_INTEGER: dict[str, Callable[[Builder, str], str]] = {
    "add": lambda b, v: b.node("Relu", b.node("Add", b.conv(v, "c"), v)),
    "mul": lambda b, v: b.node("Mul", b.conv(v, "c"), v),
    "concat": lambda b, v: _slice_channels(b, b.node("Concat", v, b.conv(v, "c"), axis=1)),
    "split": _split,
    "max pool": lambda b, v: b.node("MaxPool", v, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "average pool": lambda b, v: b.node("AveragePool", v, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "padded average": lambda b, v: b.node("AveragePool", v, kernel_shape=[2, 2], pads=[1] * 4, count_include_pad=1),
    "pad": _pad,
    "pad value": lambda b, v: b.node("Pad", v, b.ints("p", 0, 0, 1, 1, 0, 0, 1, 1), b.constant("f", np.float32(0.5))),
    "reflect": lambda b, v: b.node("Pad", v, b.ints("p", 0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"),
    "slice": _slice,
    "option A shortcut": lambda b, v: b.node("Add", b.conv(_pad(b, _slice(b, v)), "c"), _pad2(b, _slice2(b, v))),
    "transpose": lambda b, v: b.node("Transpose", b.node("Transpose", v, perm=[0, 2, 3, 1]), perm=[0, 3, 2, 1]),
    "reshape": lambda b, v: b.node("Reshape", v, b.ints("shape", 0, 8, 4, 16)),
    "pixel shuffle": lambda b, v: b.node("SpaceToDepth", b.node("DepthToSpace", v, blocksize=2), blocksize=2),
    "relu6": lambda b, v: _clip(b, b.conv(v, "c"), 0),
    "relu twice used": lambda b, v: _preactivation(b, b.conv(v, "c")),
    "hard tanh": lambda b, v: _clip(b, b.conv(v, "c"), -1),
    "leaky relu": lambda b, v: b.node("LeakyRelu", b.conv(v, "c"), alpha=0.1),
    "depthwise": lambda b, v: b.node("Relu", b.conv(v, "c", group=CHANNELS)),
    "batch norm": lambda b, v: b.node("Relu", _batch_norm(b, b.node("Add", b.conv(v, "c"), v))),
    "silu": lambda b, v: _gated(b, b.conv(v, "c"), "Sigmoid"),
    "hard swish": lambda b, v: _gated(b, b.conv(v, "c"), "HardSigmoid", alpha=1 / 6, beta=0.5),
    "steep hard swish": lambda b, v: _gated(b, b.conv(v, "c"), "HardSigmoid", alpha=0.7, beta=0.3),
    "gate by channel": lambda b, v: b.node("Mul", v, b.node("HardSigmoid", _squeezed(b, v), alpha=1 / 6, beta=0.5)),
    "soft gate by channel": lambda b, v: b.node("Mul", b.node("Sigmoid", _squeezed(b, v)), v),
}


def _batch_norm(b: Builder, v: str, seed: int = 3) -> str:
    random = np.random.default_rng(seed)
    numbers = {"scale": random.normal(size=CHANNELS), "shift": random.normal(size=CHANNELS)}
    numbers |= {"mean": random.normal(size=CHANNELS), "variance": random.uniform(0.5, 2, CHANNELS)}
    return b.node(
        "BatchNormalization", v, *(b.constant(f"{k}{seed}", x.astype(np.float32)) for k, x in numbers.items())
    )


def _gated(b: Builder, v: str, gate: str, **attributes: float) -> str:
    return b.node("Mul", v, b.node(gate, v, **attributes))


def _squeezed(b: Builder, v: str) -> str:
    return b.conv(b.node("GlobalAveragePool", v), "c")


def _clip(b: Builder, v: str, low: float) -> str:
    return b.node("Clip", v, b.constant("lo", np.float32(low)), b.constant("hi", np.float32(1)))


def _pad2(b: Builder, v: str) -> str:
    return b.node("Pad", v, "pads")


def _slice2(b: Builder, v: str) -> str:
    return b.node("Slice", v, "s", "e", "ax", "st")


def _slice_channels(b: Builder, v: str) -> str:
    return b.node("Slice", v, b.ints("s", 4), b.ints("e", 12), b.ints("ax", 1), b.ints("st", 1))


def _preactivation(b: Builder, v: str) -> str:
    return b.node("Add", b.conv(b.node("Relu", v), "d"), v)


@pytest.mark.parametrize("name", STAYS_INTEGER)
def test_operators_between_int8_layers_stay_in_integers(name: str) -> None:
    model = between_convs(STAYS_INTEGER[name])
    low = quantized(model, dict.fromkeys("abcd", 8))
    assert_same(model, low)
    operators = executed(low)
    assert operators.count("QuantizeLinear") == 1, operators
    assert operators.count("DequantizeLinear") == 1, operators
    assert not {"Conv", "Relu", "Add", "Mul", "Concat"} & set(operators)


def test_a_hard_sigmoid_of_integers_is_exact() -> None:
    model = between_convs(lambda b, v: _gated(b, b.conv(v, "c"), "HardSigmoid", alpha=1 / 6, beta=0.5))
    low = quantized(model, dict.fromkeys("abc", 8))
    (clip,) = [node for node in low.graph.node if node.op_type == "Clip"]
    numbers = {tensor.name: numpy_helper.to_array(tensor) for tensor in low.graph.initializer}
    (before,) = [
        node for node in low.graph.node if node.op_type == "DequantizeLinear" and node.input[0] == clip.input[0]
    ]
    (after,) = [
        node for node in low.graph.node if node.op_type == "DequantizeLinear" and node.input[0] == clip.output[0]
    ]
    integers = np.arange(256)
    clamped = np.clip(integers, *(int(numbers[name]) for name in clip.input[1:]))
    read, gate = (
        (each - float(numbers[node.input[2]])) * float(numbers[node.input[1]])
        for each, node in ((integers, before), (clamped, after))
    )
    assert_allclose(gate, np.clip(read / 6 + 0.5, 0, 1), atol=1e-6)


@pytest.mark.parametrize("gate", ["Sigmoid", "HardSigmoid"])
def test_probabilities_that_are_an_output_are_not_rounded_to_eight_bits(gate: str) -> None:
    b = Builder()
    v = b.node("Relu", b.conv("x", "a"))
    model = b.model(b.node(gate, b.conv(v, "b")))
    low = quantized(model, dict.fromkeys("ab", 8))
    assert gate in executed(low)
    assert set(activation_tensors(model, {"b": 8})) == {v, "v2"}


def test_every_mixture_of_bits_executes_as_asked() -> None:
    b = Builder()
    v = b.node("Relu", b.conv("x", "a"))
    w = b.node("Relu", b.node("Add", b.conv(b.node("Relu", b.conv(v, "b")), "c"), v))
    model = b.model(b.gemm(b.node("Flatten", b.node("GlobalAveragePool", w)), "d", CHANNELS))
    names = activation_tensors(model, dict.fromkeys("abcd", 8))
    ranges = calibrate(model, [{"x": data(rows=5, seed=2)}], names, percentile=100)
    for choice in range(16):
        bits = {layer: 8 if choice >> index & 1 else 32 for index, layer in enumerate("abcd")}
        low = quantize(model, bits, ranges)
        assert_same(model, low)
        operators = executed(low)
        assert operators.count("QLinearConv") == sum(bits[layer] == 8 for layer in "abc"), bits
        assert operators.count("QGemm") == (bits["d"] == 8)
        assert sum("Conv" in operator for operator in operators) == 3


def test_nothing_is_changed_without_int8_layers() -> None:
    model = between_convs(_pad)
    assert activation_tensors(model, {"a": 32}) == []
    assert quantize(model, {"a": 32, "b": 32}, {}) == model


def test_layers_of_removed_blocks_are_ignored() -> None:
    model = between_convs(_pad)
    low = quantized(model, {"a": 8, "gone.conv": 8})
    assert_same(model, low)


@pytest.mark.parametrize("activation", ["", "Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSwish", "Gelu", "Softplus"])
@pytest.mark.parametrize("low_bits", ["ab", "a", "b"])
def test_linear_layers_run_as_integer_kernels(activation: str, low_bits: str) -> None:
    b = Builder((16,))
    hidden = b.gemm("x", "a", 16, 32)
    model = b.model(b.gemm(b.node(activation, hidden) if activation else hidden, "b", 32))
    low = quantized(model, dict.fromkeys(low_bits, 8), (16,))
    assert_same(model, low, (16,))
    assert executed(low).count("QGemm") == len(low_bits)


def test_products_with_constant_weights_run_as_integer_kernels() -> None:
    b = Builder((6, 16))
    model = b.model(b.matmul(b.node("Gelu", b.matmul("x", "a", 16, 32)), "b", 32, 8))
    low = quantized(model, {"a": 8, "b": 8}, (6, 16))
    assert_same(model, low, (6, 16))
    operators = executed(low)
    assert "MatMul" not in operators
    assert sum(operator in ("MatMulIntegerToFloat", "QLinearMatMul") for operator in operators) == 2


def test_batch_norms_without_names_keep_their_weights_apart() -> None:
    b = Builder()
    first = b.conv(_batch_norm(b, b.node("Add", b.conv("x", "a"), "x")), "b")
    model = b.model(b.conv(_batch_norm(b, b.node("Add", first, "x"), seed=4), "c"))
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            node.name = ""
    assert_same(model, quantized(model, {"a": 8, "b": 8, "c": 8}))


def test_a_gate_is_quantized_where_its_product_is_needed_in_integers() -> None:
    def gated(b: Builder, v: str) -> str:
        return b.node("Mul", v, b.node("HardSigmoid", b.conv(b.node("GlobalAveragePool", v), "c")))

    model = between_convs(gated)
    low = quantized(model, {"a": 8, "b": 8, "c": 8})
    assert_same(model, low)
    assert "QLinearMul" in executed(low)


def test_inner_values_that_are_outputs_keep_their_names_and_are_float() -> None:
    b = Builder()
    inner = b.node("Relu", b.conv("x", "a"), output="features")
    model = b.model(inner, b.conv(b.node("MaxPool", inner, kernel_shape=[2, 2], output="pooled"), "b"), "pooled")
    low = quantized(model, {"a": 8, "b": 8})
    assert [value.name for value in low.graph.output] == [value.name for value in model.graph.output]
    assert_same(model, low)


def test_a_shared_weight_is_stored_once_as_integers() -> None:
    b = Builder()
    first = b.node("Relu", b.conv("x", "a"))
    again = b.node("Conv", first, "a.weight", "a.bias", name="a::1", pads=[1, 1, 1, 1])
    model = b.model(again)
    low = quantized(model, {"a": 8})
    assert_same(model, low)
    weights = [tensor for tensor in low.graph.initializer if len(tensor.dims) == 4]
    assert [tensor.data_type for tensor in weights] == [TensorProto.INT8]
    assert not [tensor for tensor in low.graph.initializer if tensor.name == "a.weight"]


def test_channels_without_weights_keep_their_bias() -> None:
    b = Builder()
    model = b.model(b.node("Identity", b.conv("x", "a")))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weight = numpy_helper.to_array(tensors["a.weight"]).copy()
    weight[:3] = [[[[0.0]]], [[[1e-30]]], [[[1e-12]]]]
    tensors["a.weight"].CopyFrom(numpy_helper.from_array(weight, "a.weight"))
    assert_same(model, quantized(model, {"a": 8}))


def test_constant_activations_are_quantized() -> None:
    b = Builder()
    zero = b.node("Mul", "x", b.constant("nothing", np.float32(0)))
    model = b.model(b.conv(zero, "a"))
    low = quantized(model, {"a": 8})
    assert np.isfinite(run(low, data())).all()
    assert_same(model, low)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0), (0.0, 6.0), (-1e-9, 0)])
def test_zero_is_exact_and_the_range_is_covered(low: float, high: float) -> None:
    scale, zero = scale_and_zero_point(low, high)
    assert scale > 0
    assert np.isfinite(scale)
    assert (0 - int(zero)) * scale <= min(low, 0) + scale * 0.6
    assert (255 - int(zero)) * scale >= max(high, 0) - scale * 0.6
    if low >= 0:
        assert zero == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_biases_never_overflow(bits: int) -> None:
    b = Builder((2,))
    weight = b.constant("a.weight", np.array([[0.0, 0.0], [1e-20, 0], [1.0, -2.0]], np.float32))
    bias = np.array([5.0, -1e4, 1.0], np.float32)
    model = b.model(b.node("Gemm", "x", weight, b.constant("a.bias", bias), name="a", transB=1))
    executions: Executions = {("linear", bits): "emulated"}
    low = quantize(model, {"a": bits}, {"x": (-1e-3, 1e-3)}, executions=executions)
    assert_allclose(run(low, np.zeros((1, 2), np.float32))[0], bias, rtol=1e-4)


def test_calibration_sees_all_batches_whatever_their_size() -> None:
    model = between_convs(_pad)
    names = activation_tensors(model, {"a": 8, "b": 8})
    x = data(rows=70)
    whole = calibrate(model, [{"x": x}], names, percentile=100)
    parts = calibrate(model, ({"x": part} for part in np.array_split(x, 9)), names, percentile=100)
    assert whole == parts
    assert whole["x"] == (x.min(), x.max())


def test_percentiles_come_from_all_values() -> None:
    observer, values = RangeObserver(), np.random.default_rng(0).normal(size=50_000)
    for part in np.array_split(values, 7):
        observer.update(part)
    observer.update(np.array([1000.0, -300.0]))
    low, high = observer.range(percentile=99.0)
    assert low == pytest.approx(np.percentile(values, 0.5), abs=1.0)
    assert high == pytest.approx(np.percentile(values, 99.5), abs=1.0)
    assert RangeObserver().range() == (float("inf"), -float("inf"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    x = data()
    x[3, 0, 0, 0] = bad
    model = between_convs(_pad)
    with pytest.raises(InputError, match="'x' is NaN or infinite for a training sample; leave such samples out"):
        calibrate(model, [{"x": x}], activation_tensors(model, {"a": 8}))


def test_calibration_without_samples_is_refused() -> None:
    def nothing() -> Iterator[dict[str, np.ndarray]]:
        yield from ()

    with pytest.raises(InputError, match="no samples"):
        calibrate(between_convs(_pad), nothing(), ["x"])


def test_unsupported_bits_and_missing_ranges_are_refused() -> None:
    model = between_convs(_pad)
    with pytest.raises(PlanError, match="3 bits for a conv layer: the device has 2, 4, 8, 16, 32"):
        activation_tensors(model, {"a": 3})
    with pytest.raises(PlanError, match="4 bits for a conv layer: the device has 8, 32"):
        activation_tensors(model, {"a": 4}, {("conv", 8): "native"})
    with pytest.raises(InputError, match="no range"):
        quantize(model, {"a": 8}, {"x": (0.0, 1.0)})


def test_placement_of_fewer_layers_is_contained_in_that_of_more() -> None:
    model = between_convs(STAYS_INTEGER["option A shortcut"])
    everything = set(activation_tensors(model, dict.fromkeys("abc", 8)))
    for choice in range(8):
        bits = {layer: 8 if choice >> index & 1 else 32 for index, layer in enumerate("abc")}
        assert set(place(model, bits).roots) <= everything
