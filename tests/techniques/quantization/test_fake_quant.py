"""The trainable quantized module computes what the ONNX file does, learns, and hands its numbers over exactly."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from automl_compress.errors import ExportError
from automl_compress.techniques.quantization.fake_quant import FakeQuantized, fake_quantized
from automl_compress.techniques.quantization.formats import Executions
from automl_compress.techniques.quantization.onnx_module import OnnxModule
from automl_compress.techniques.quantization.tune import Calibration, Quantization, quantized, tune
from tests.techniques.quantization.graphs import Builder, data, run
from tests.techniques.quantization.test_rewrite import STAYS_INTEGER, between_convs

INTEGER: Executions = {(kind, bits): "emulated" for kind in ("conv", "linear") for bits in (2, 4, 8)}
MIXED: Executions = INTEGER | {("linear", 4): "weight-only", ("conv", 2): "storage", ("linear", 16): "storage"}


def network() -> onnx.ModelProto:
    b = Builder()
    v = b.node("Clip", b.conv("x", "a"), b.constant("lo", np.float32(0)), b.constant("hi", np.float32(2)))
    w = b.node("Relu", b.node("Add", b.conv(v, "b"), v))
    pooled = b.node("Flatten", b.node("GlobalAveragePool", w))
    return b.model(b.gemm(b.node("Relu", b.gemm(pooled, "c", 8, 24)), "d", 24))


def found_for(model: onnx.ModelProto, bits: dict[str, int], executions: Executions) -> Quantization:
    return tune(Calibration(model, [{"x": data(rows=64)}], executions), bits)


def deviation(module: FakeQuantized, low: onnx.ModelProto, x: np.ndarray) -> float:
    with torch.no_grad():
        found = module(torch.from_numpy(x)).numpy()
    wanted = run(low, x, optimize=False)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", STAYS_INTEGER)
def test_it_computes_what_the_file_says(name: str) -> None:
    model, bits = between_convs(STAYS_INTEGER[name]), dict.fromkeys("abcd", 8)
    found = found_for(model, bits, INTEGER)
    module = FakeQuantized(model, bits, found, INTEGER)
    # A step of the output is 1/255 of its range; ties may fall to either side.
    assert deviation(module, quantized(model, bits, found, INTEGER), data(rows=8, seed=3)) < 0.02


def test_the_bias_of_a_batch_norm_is_rounded_as_in_the_file() -> None:
    model, bits = between_convs(STAYS_INTEGER["batch norm"]), dict.fromkeys("abc", 8)
    found = found_for(model, bits, INTEGER)
    module, low, x = FakeQuantized(model, bits, found, INTEGER), quantized(model, bits, found, INTEGER), data(rows=64)
    with torch.no_grad():
        difference = np.abs(module(torch.from_numpy(x)).numpy() - run(low, x, optimize=False))
    # Of 32,768 outputs ties are few; a bias that is off by half a unit moves ten times as many.
    assert (difference > 1e-3).mean() < 2e-3


@pytest.mark.parametrize(
    "bits",
    [
        {"a": 8, "b": 8, "c": 8, "d": 8},
        {"a": 8, "b": 32, "c": 8, "d": 32},
        {"a": 32, "b": 4, "c": 32, "d": 8},
        {"a": 2, "b": 4, "c": 4, "d": 16},
        {"a": 8, "b": 2, "c": 2, "d": 4},
    ],
)
def test_any_mixture_computes_what_the_file_says_before_and_after_training(bits: dict[str, int]) -> None:
    model, x = network(), data(rows=8, seed=3)
    found = found_for(model, bits, MIXED)
    module = FakeQuantized(model, bits, found, MIXED)
    assert deviation(module, quantized(model, bits, found, MIXED), x) < 0.02
    with torch.no_grad():
        for key in (*module._values.values(), *(layer.key for layer in module._layers.values() if layer.bits < 16)):
            getattr(module, key).mul_(1.3)  # scales that training has to find again
    losses = train(module, model, steps=40)
    assert min(losses) < losses[0]
    assert deviation(module, quantized(model, bits, module.quantization(), MIXED), x) < 0.02


def train(module: FakeQuantized, model: onnx.ModelProto, steps: int = 1) -> list[float]:
    """The loss before each step towards the float model."""
    x = torch.from_numpy(data(rows=32, seed=7))
    wanted = torch.from_numpy(run(model, x.numpy()))
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(module(x), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_scales_are_handed_over_exactly() -> None:
    model, bits = network(), dict.fromkeys("abcd", 8)
    module = FakeQuantized(model, bits, found_for(model, bits, INTEGER), INTEGER)
    train(module, model, steps=3)
    low = quantized(model, bits, module.quantization(), INTEGER)
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in low.graph.initializer}
    for value, key in module._values.items():
        learned = module._scale(value).detach().numpy()
        assert stored[f"{value}_scale"] == learned, key
    assert np.array_equal(stored["b.weight_scale"], module._scales(module._layers["v2"]).detach().numpy())


def test_a_scale_that_a_hard_sigmoid_needs_stays_one_while_it_learns() -> None:
    model, bits = between_convs(STAYS_INTEGER["hard swish"]), dict.fromkeys("abc", 8)
    module = FakeQuantized(model, bits, found_for(model, bits, INTEGER), INTEGER)
    ((value, bend),) = module.placement.bends.items()
    for factor in (0.7, 1.0, 1.37, 3.0):
        with torch.no_grad():
            getattr(module, module._values[value]).mul_(factor)
        scale = float(module._scale(value).detach())
        assert bend / scale == pytest.approx(round(bend / scale), abs=1e-4)
        low = quantized(model, bits, module.quantization(), INTEGER)
        stored = {i.name: onnx.numpy_helper.to_array(i) for i in low.graph.initializer}
        assert stored[f"{value}_scale"] == np.float32(scale)
        assert deviation(module, low, data(rows=8, seed=3)) < 0.02
    train(module, model, steps=3)
    assert getattr(module, module._values[value]).grad.abs() > 0


@pytest.mark.parametrize("factor", [1, 30, 60, 100, 1000])
def test_a_hard_swish_of_large_values_is_as_near_as_of_small_ones(factor: float) -> None:
    model, bits, x = between_convs(STAYS_INTEGER["hard swish"]), dict.fromkeys("abc", 8), data(rows=8, seed=3)
    for stored in model.graph.initializer:
        if stored.name.startswith("c."):
            stored.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(stored) * factor, stored.name))
    found = found_for(model, bits, INTEGER)
    module, low = FakeQuantized(model, bits, found, INTEGER), quantized(model, bits, found, INTEGER)
    wanted = run(model, x)
    assert np.abs(run(low, x) - wanted).max() < 0.05 * np.abs(wanted).max()
    assert deviation(module, low, x) < 0.02
    (value,) = module.placement.bends
    for change in (1.1, 0.01):
        with torch.no_grad():
            getattr(module, module._values[value]).mul_(change)
        low = quantized(model, bits, module.quantization(), INTEGER)
        stored_scale = next(i for i in low.graph.initializer if i.name == f"{value}_scale")
        assert onnx.numpy_helper.to_array(stored_scale) == np.float32(module._scale(value).detach())
        assert deviation(module, low, x) < 0.02


def test_the_gradient_of_a_scale_is_that_of_the_paper() -> None:
    value = torch.tensor([0.26, -0.9, 5.0, -7.0])
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantized(value, scale, 0.0, -8, 7).sum().backward()  # type: ignore[no-untyped-call]
    inside = [round(float(v) / 0.5) - float(v) / 0.5 for v in value[:2]]
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(sum(inside) + 7 - 8)


def test_statistics_of_batch_norms_are_not_trained() -> None:
    b = Builder()
    v = b.node("Relu", "x")
    names = [b.constant(n, np.full(8, 0.5, np.float32)) for n in ("scale", "shift", "mean", "variance")]
    module = OnnxModule(b.model(b.conv(b.node("BatchNormalization", v, *names), "a")))
    assert set(module.tensors()) == {"scale", "shift", "a.weight", "a.bias"}


def test_an_operator_without_a_counterpart_is_named() -> None:
    b = Builder()
    model = b.model(b.node("Selu", b.conv("x", "a")))
    with pytest.raises(ExportError, match="no PyTorch counterpart of ONNX operators Selu"):
        OnnxModule(model)
    found = tune(Calibration(model, [{"x": data()}], INTEGER), {"a": 4})
    assert "no PyTorch counterpart" in found.notes[0]
    assert np.isfinite(run(quantized(model, {"a": 4}, found, INTEGER), data())).all()
