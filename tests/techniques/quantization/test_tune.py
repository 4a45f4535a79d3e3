"""What calibration decides: rounding, ranges and equalisation lower the error, and bad samples are named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from automl_compress.errors import InputError
from automl_compress.techniques.quantization.equalise import equalised, pairs
from automl_compress.techniques.quantization.files import from_tensors, to_tensors
from automl_compress.techniques.quantization.formats import Executions
from automl_compress.techniques.quantization.inputs import InputMoments, input_moments
from automl_compress.techniques.quantization.onnx_module import OnnxModule
from automl_compress.techniques.quantization.ranges import RULES, RangeObserver
from automl_compress.techniques.quantization.rounding import corrected_bias, rounded
from automl_compress.techniques.quantization.tune import Calibration, Quantization, quantized, tune, with_tensors
from automl_compress.techniques.quantization.weights import nearest
from tests.techniques.quantization.graphs import Builder, data, run

EXECUTIONS: Executions = {
    ("conv", 2): "emulated",
    ("conv", 4): "emulated",
    ("conv", 8): "native",
    ("linear", 4): "weight-only",
    ("linear", 8): "native",
}


def correlated(outputs: int = 12, inputs: int = 64, rows: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """A weight and inputs that depend on each other, as activations do."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(outputs, inputs)).astype(np.float32)
    x = random.normal(size=(rows, inputs // 4)) @ random.normal(size=(inputs // 4, inputs))
    return weight, (x + 0.3 * random.normal(size=x.shape) + 0.5).astype(np.float32)


def moments_of(x: np.ndarray) -> InputMoments:
    x = x.astype(np.float64)
    return InputMoments(gram=(x.T @ x / len(x))[None], mean=x.mean(0)[None])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("form", ["integer", "blocks"])
def test_rounding_by_moments_keeps_outputs_better_than_the_nearest_integers(bits: int, form: str) -> None:
    weight, x = correlated()
    plain, found = nearest(weight, bits, form), rounded(weight, bits, form, moments_of(x))  # type: ignore[arg-type]
    before, after = (float(((x @ (each.values() - weight).T) ** 2).mean()) for each in (plain, found))
    assert after < 0.6 * before


def test_groups_are_rounded_by_their_own_inputs() -> None:
    weight, x = correlated(outputs=8, inputs=16)
    one, two = moments_of(x), moments_of(x[:, ::-1])
    both = InputMoments(gram=np.concatenate([one.gram, two.gram]), mean=np.concatenate([one.mean, two.mean]))
    found = rounded(weight, 4, "integer", both)
    assert np.array_equal(found.integers[:4], rounded(weight[:4], 4, "integer", one).integers)
    assert np.array_equal(found.integers[4:], rounded(weight[4:], 4, "integer", two).integers)


def test_corrected_biases_keep_the_means_of_outputs() -> None:
    weight, x = correlated()
    found, bias = nearest(weight, 2, "integer"), np.zeros(len(weight), np.float32)
    after = corrected_bias(weight, found, bias, moments_of(x))
    assert np.allclose((x @ found.values().T + after).mean(0), (x @ weight.T + bias).mean(0), atol=1e-3)


@pytest.mark.parametrize("form", ["integer", "blocks"])
def test_weights_that_a_mask_took_stay_zero(form: str) -> None:
    weight, x = correlated()
    weight[:, ::3] = 0
    assert not rounded(weight, 4, form, moments_of(x)).values()[:, ::3].any()  # type: ignore[arg-type]


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, x = correlated()
    x[:, 5] = 0
    assert np.isfinite(rounded(weight, 4, "integer", moments_of(x)).values()).all()


def test_moments_are_those_of_the_unfolded_inputs() -> None:
    b = Builder((4, 6, 6))
    model = b.model(b.gemm(b.node("Flatten", b.conv("x", "a", 8, 4, group=2)), "b", 288))
    x = data((4, 6, 6), rows=5)
    module = OnnxModule(model)
    import torch

    found = input_moments(module, [(torch.from_numpy(x),)], {"a", "b"})
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    columns = np.stack([padded[:, :2, i : i + 6, j : j + 6] for i in range(3) for j in range(3)], axis=2)
    rows = columns.reshape(5, 18, 36).transpose(0, 2, 1).reshape(-1, 18)
    assert found["a"].gram.shape == (2, 18, 18)
    assert np.allclose(found["a"].gram[0], rows.T @ rows / len(rows), atol=1e-4)
    assert np.allclose(found["a"].mean[0], rows.mean(0), atol=1e-5)
    assert found["b"].gram.shape == (1, 288, 288)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_stays_within_what_was_seen(rule: str) -> None:
    observer = RangeObserver()
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    observer.update(values)
    low, high = observer.range(rule)  # type: ignore[arg-type]
    assert values.min() <= low < -2 < 2 < high <= values.max()
    empty = RangeObserver()
    empty.update(np.zeros(5, np.float32))
    assert empty.range(rule) == (0.0, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sign", [1, -1])
def test_values_that_are_all_but_constant_have_a_range_that_holds_them(rule: str, sign: int) -> None:
    observer, values = RangeObserver(), sign * np.array([1.0, 1.0 - 1e-6], np.float32)
    observer.update(values)
    low, high = observer.range(rule)  # type: ignore[arg-type]
    assert -1 <= low <= high <= 1
    assert np.allclose(max(abs(low), abs(high)), 1, atol=1e-3)


def test_mean_square_cuts_off_what_costs_more_than_it_brings() -> None:
    observer = RangeObserver()
    observer.update(np.random.default_rng(0).normal(size=50_000).astype(np.float32))
    observer.update(np.array([60.0], np.float32))
    assert observer.range("minmax")[1] == 60
    assert observer.range("mse")[1] < 59


def depthwise(clip: float | None = None) -> onnx.ModelProto:
    """Channels of very different ranges between two convolutions, as in networks that were folded badly."""
    b = Builder()
    spread = np.logspace(-2, 1, 8).astype(np.float32)

    def act(v: str) -> str:
        if clip is None:
            return b.node("Relu", v)
        low, high = b.constant(f"lo{v}", np.float32(0)), b.constant(f"hi{v}", np.float32(clip))
        return b.node("Clip", v, low, high)

    middle = act(b.conv(act(b.conv("x", "a")), "b", group=8))
    model = b.model(b.conv(middle, "c"))
    for tensor in model.graph.initializer:
        if tensor.name in ("a.weight", "a.bias"):
            value = onnx.numpy_helper.to_array(tensor)
            scaled = value * spread.reshape(-1, *[1] * (value.ndim - 1))
            tensor.CopyFrom(onnx.numpy_helper.from_array(scaled.astype(np.float32), tensor.name))
        if tensor.name == "b.weight":
            value = onnx.numpy_helper.to_array(tensor) / spread.reshape(-1, 1, 1, 1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float32), tensor.name))
    return model


def largest(model: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    seen: dict[str, np.ndarray] = {}
    wanted = {pair.activation for pair in pairs(OnnxModule(model).view)}

    def each(node: onnx.NodeProto, inputs: list[torch.Tensor]) -> None:
        if node.input[0] in wanted:
            seen[node.input[0]] = inputs[0].abs().amax(dim=(0, 2, 3)).numpy()

    with torch.no_grad():
        OnnxModule(model)(torch.from_numpy(x), each=each)
    return seen


@pytest.mark.parametrize("clip", [None, 6.0])
def test_equalisation_changes_nothing_but_the_ranges(clip: float | None) -> None:
    model, x = depthwise(clip), data(rows=32)
    view = OnnxModule(model).view
    assert [(p.first.name, p.second.name) for p in pairs(view)] == [("a", "b"), ("b", "c")]
    changed = with_tensors(model, equalised(view, largest(model, x)))
    wanted = run(model, x)
    assert np.abs(run(changed, x) - wanted).max() < 1e-4 * np.abs(wanted).max()
    before, after = (largest(m, x)[view.nodes[2].input[0]] for m in (model, changed))
    assert after.max() / after.min() < before.max() / before.min()


def test_equalisation_and_rules_are_kept_where_they_pay() -> None:
    model, bits = depthwise(), dict.fromkeys("abc", 8)
    feeds, unseen = [{"x": data(rows=32)}], data(rows=32, seed=5)
    wanted = run(model, unseen)

    def judge(low: onnx.ModelProto) -> float:
        return float(((run(low, unseen) - wanted) ** 2).mean())

    calibration = Calibration(model, feeds, EXECUTIONS)
    quick, best = tune(calibration, bits), tune(calibration, bits, judge)
    assert judge(quantized(model, bits, best, EXECUTIONS)) < 0.5 * judge(quantized(model, bits, quick, EXECUTIONS))
    assert any("equalisation" in note for note in best.notes)
    assert tune(calibration, {}) == Quantization()


def test_fewer_bits_are_rounded_by_what_the_layers_read() -> None:
    b = Builder((6, 64))
    hidden = b.node("Gelu", b.matmul("x", "a", 64, 64))
    model = b.model(b.matmul(hidden, "b", 64, 16))
    x = correlated(rows=60)[1].reshape(-1, 6, 64)
    bits = {"a": 4, "b": 4}
    found = tune(Calibration(model, [{"x": x[:6]}, {"x": x[6:]}], EXECUTIONS), bits)
    assert found.weights.keys() == bits.keys()
    assert found.tensors.keys() == {"a.bias", "b.bias"}
    wanted = run(model, x)
    errors = [
        float(((run(quantized(model, bits, q, EXECUTIONS), x) - wanted) ** 2).mean()) for q in (Quantization(), found)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_what_was_found_survives_a_file() -> None:
    b = Builder((6, 64))
    model = b.model(b.matmul("x", "a", 64, 16))
    bits, x = {"a": 4}, data((6, 64))
    found = tune(Calibration(model, [{"x": x}], EXECUTIONS), bits)
    again = from_tensors({"layer.weight": None, **to_tensors(found)}, found.ranges)  # type: ignore[dict-item]
    assert quantized(model, bits, again, EXECUTIONS) == quantized(model, bits, found, EXECUTIONS)


def _wrong_shape(x: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": x[:, :, :-1]}


def _wrong_rank(x: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": x[0]}


def _wrong_name(x: np.ndarray) -> dict[str, np.ndarray]:
    return {"y": x}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wrong_shape, r"input 'x' has shape \[16, 8, 7, 8\], the model takes \['batch', 8, 8, 8\]"),
        (_wrong_rank, r"input 'x' has shape"),
        (_wrong_name, r"a batch lacks input 'x'; it has y"),
    ],
)
def test_samples_that_do_not_fit_are_named(change: Callable[[np.ndarray], dict[str, np.ndarray]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tune(Calibration(depthwise(), [change(data())], EXECUTIONS), dict.fromkeys("abc", 8))


def test_dead_channels_and_constant_zeros_are_quantized() -> None:
    b = Builder()
    model = b.model(b.conv(b.node("Relu", b.conv("x", "a")), "b"))
    for tensor in model.graph.initializer:
        if tensor.name.startswith("a."):
            value = np.array(onnx.numpy_helper.to_array(tensor))
            value[:4] = 0.0
            value[4:] = -abs(value[4:]) * 0 - 1e-3 if tensor.name == "a.bias" else 0.0
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    for width in (2, 4, 8):
        bits = {"a": width, "b": width}
        found = tune(Calibration(model, [{"x": data()}], EXECUTIONS), bits)
        low = run(quantized(model, bits, found, EXECUTIONS), data())
        assert np.abs(low - run(model, data())).max() < 1e-2
