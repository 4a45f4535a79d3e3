"""Do fewer bits keep the accuracy, and do they run in faster kernels than the runtime's own quantization gives?

ResNet-20 on CIFAR-10 beside ONNX Runtime's static quantization; latency of MobileNetV2 and of a transformer encoder;
agreement of the trainable quantized model with the file; mixed bit-widths on a small transformer; cross-layer
equalisation on a depthwise network; the memory that calibration takes. Nothing is trained after quantization.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from common import parser, write_figures
from networks import NETWORKS, build
from quantization_models import depthwise_task, spread_channels, transformer_task
from torch import Tensor, nn

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cifar10_resnet20" / "task.py"
CALIBRATION = 256
BURSTS = 40
SIZES = (0.3, 0.25, 0.2, 0.16, 0.13, 0.11)
Figures = dict[str, float]


def main() -> None:
    options = parser(__doc__.splitlines()[0], data=True, weights=True)
    options.add_argument("--only", action="append", choices=PARTS, help="one part of the figures, may be repeated")
    options.add_argument("--peak-of", help="for this program's own use: measure the memory of calibrating that file")
    given = options.parse_args()
    if given.peak_of:
        print(peak_of(Path(given.peak_of)))
        return
    os.environ |= {"AC_DATA_DIR": str(given.data), "AC_WEIGHTS_DIR": str(given.weights)}
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only or PARTS:
            figures |= PARTS[name](Path(folder), given.quick)
    write_figures(given.json, "quantization", figures, quick=given.quick)


def resnet20(folder: Path, quick: bool) -> Figures:
    """Accuracy and latency of uniform int8 beside the runtime's own; agreement with the trainable model; 4 bits."""
    from automl_compress.core.plan import Plan
    from automl_compress.model.task import load_task

    task = load_task(str(EXAMPLE))
    bench = workbench(task)
    layers = [layer.name for layer in bench.graph.layers]
    images, labels = test_data(task, 1000 if quick else None)
    int8 = Plan(bits=dict.fromkeys(layers, 8))
    found = bench.quantization(bench.teacher, int8, thorough=True)
    models = {"float": bench.original, "ours": bench.export(bench.teacher, int8, found)}
    int4 = Plan(bits={name: 8 if name in (layers[0], layers[-1]) else 4 for name in layers})
    models["ours_int4"] = bench.export(bench.teacher, int4)
    models["ours_int2"] = bench.export(
        bench.teacher, Plan(bits={k: min(v, 2) if v == 4 else v for k, v in int4.bits.items()})
    )
    calibration = np.concatenate([inputs[0].numpy() for inputs, _ in task.batches("validation")])[:CALIBRATION]
    models |= runtimes_own(bench.teacher, task.example_inputs, calibration, folder)
    outputs = {name: run(model, images) for name, model in models.items()}
    times = latencies(models, folder)
    figures = {f"{name}.accuracy": float((outputs[name].argmax(1) == labels).mean()) for name in models}
    figures |= {f"{name}.divergence": divergence(outputs[name], outputs["float"]) for name in models}
    same = {name: found.argmax(1) == outputs["float"].argmax(1) for name, found in outputs.items()}
    figures |= {f"{name}.same_class_as_float": float(equal.mean()) for name, equal in same.items()}
    figures |= {f"{name}.latency_ratio": times[name] for name in models}
    figures |= {f"{name}.size_bytes": float(model.ByteSize()) for name, model in models.items()}
    figures["ours_over_onnxruntime.latency"] = times["ours"] / times["onnxruntime"]
    figures["ours_over_onnxruntime_uint8.latency"] = times["ours"] / times["onnxruntime_uint8"]
    with torch.no_grad():
        student = bench.trainable(bench.teacher, int8, found)
        parts = np.array_split(images, -(-len(images) // 500))
        trainable = np.concatenate([student(torch.from_numpy(part)).numpy() for part in parts])
    step = float(outputs["ours"].max() - outputs["ours"].min()) / 255
    figures["agreement"] = float((trainable.argmax(1) == outputs["ours"].argmax(1)).mean())
    figures["mean_difference_in_steps"] = float(np.abs(trainable - outputs["ours"]).mean()) / step
    return figures


def divergence(outputs: np.ndarray, reference: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the classes' probabilities from the reference's, in nats."""
    one, other = (torch.log_softmax(torch.from_numpy(part).double(), 1) for part in (outputs, reference))
    return float((other.exp() * (other - one)).sum(1).mean())


def mobilenet(folder: Path, quick: bool) -> Figures:
    """Latency of uniform int8 MobileNetV2 at 96x96, random weights, beside the runtime's own quantization."""
    return {f"mobilenetv2.{name}": value for name, value in latency_of("mobilenetv2-96", {"int8": 8}, folder).items()}


def encoder(folder: Path, quick: bool) -> Figures:
    """Latency of a transformer encoder: 8 bits, and 4-bit weights in each of the ways in which they can run."""
    ways = {"int8": 8, "int4_weights_only": 4, "int4_in_int8_kernels": 4, "int4_stored": 4}
    return {f"encoder.{name}": value for name, value in latency_of("encoder", ways, folder).items()}


EXECUTIONS = {"int4_in_int8_kernels": "emulated", "int4_stored": "storage", "int4_weights_only": "weight-only"}


def latency_of(name: str, ways: Mapping[str, int], folder: Path) -> Figures:
    from automl_compress.core.plan import Plan
    from automl_compress.deploy.verify import executed_operators
    from automl_compress.model.task import Task
    from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS

    torch.manual_seed(1)
    x = torch.randn(64, *NETWORKS[name][1])
    model = build(name)
    bench = workbench(Task(model=model, train=(x, torch.zeros(64).long()), validation=(x, torch.zeros(64).long())))
    layers = [layer.name for layer in bench.graph.layers]
    models: dict[str, onnx.ModelProto] = {"float": bench.original}
    asked: dict[str, float] = {}
    for way, bits in ways.items():
        execution: Any = EXECUTIONS.get(way)
        bench.executions = {**DEFAULT_EXECUTIONS, **({("linear", bits): execution} if execution else {})}
        plan = Plan(bits=dict.fromkeys(layers, bits))
        calibrated = workbench(bench.task, bench.executions)
        models[way] = calibrated.export(calibrated.teacher, plan)
        executed = executed_operators(models[way], layers, plan.bits, bench.executions)
        asked[f"{way}.layers_as_asked"] = sum(layer.ok for layer in executed) / len(executed)
    models |= runtimes_own(model, (x[:2],), x.numpy(), folder)
    times = latencies(models, folder)
    first = next(iter(ways))
    ratio = {f"{first}_over_onnxruntime.latency": times[first] / times["onnxruntime"]}
    return {**{f"{name}.latency_ratio": value for name, value in times.items()}, **ratio, **asked}


def mixed(folder: Path, quick: bool) -> Figures:
    """Accuracy of a transformer on digits against its size: one bit-width for all, and mixed by sensitivity."""
    from automl_compress.core.plan import Plan

    bench = workbench(transformer_task(epochs=8 if quick else 40))
    task = bench.task
    layers = [layer.name for layer in bench.graph.layers]
    images, labels = test_data(task, None)
    plans = {f"all_{bits}": dict.fromkeys(layers, bits) for bits in (32, 8, 4, 2)}
    costs = {}
    for name in layers:
        for bits in (8, 4, 2):
            model = bench.export(bench.teacher, Plan(bits={name: bits}))
            costs[name, bits] = (bench.distortion(model), float(model.ByteSize() - bench.original.ByteSize()))
    for share in SIZES:
        plans[f"mixed_{share:.0%}".rstrip("%")] = cheapest(layers, costs, (share - 1) * bench.original.ByteSize())
    figures: Figures = {}
    for name, chosen in plans.items():
        model = bench.export(bench.teacher, Plan(bits=chosen)) if name != "all_32" else bench.original
        figures[f"transformer.{name}.accuracy"] = float((run(model, images).argmax(1) == labels).mean())
        figures[f"transformer.{name}.size_ratio"] = model.ByteSize() / bench.original.ByteSize()
    return figures


def cheapest(layers: list[str], costs: Mapping[tuple[str, int], tuple[float, float]], change: float) -> dict[str, int]:
    """Layer -> bits with the least sum of distortions that saves that many bytes, over a range of prices a byte."""
    best, least = dict.fromkeys(layers, 2), float("inf")
    for price in np.geomspace(1e-12, 1e-2, 200):
        chosen = {n: min((8, 4, 2), key=lambda b, n=n: costs[n, b][0] + price * costs[n, b][1]) for n in layers}  # type: ignore[misc]
        loss, saved = (sum(costs[n, b][i] for n, b in chosen.items()) for i in (0, 1))
        if saved <= change and loss < least:
            best, least = chosen, loss
    return best


def depthwise(folder: Path, quick: bool) -> Figures:
    """Int8 accuracy of a depthwise network whose channels differ widely in range, with and without equalisation."""
    from automl_compress.core.plan import Plan
    from automl_compress.techniques.quantization.tune import Calibration, equalisations, quantized, with_tensors

    raw = depthwise_task(epochs=6 if quick else 30)
    spread_channels(raw.model)
    bench = workbench(raw)
    task = bench.task
    bits = {layer.name: 8 for layer in bench.graph.layers}
    images, labels = test_data(task, None)
    feeds = [{bench.original.graph.input[0].name: part[0].numpy()} for part in bench.samples]
    plain = Calibration(bench.original, feeds, bench.executions)
    (tensors,) = equalisations(plain, bits)
    other = Calibration(with_tensors(bench.original, tensors), feeds, bench.executions)
    tuned = bench.quantization(bench.teacher, Plan(bits=bits), thorough=True)
    models = {
        "float": bench.original,
        "plain": quantized(plain.model, bits, plain.quantization(bits)),
        "equalised": quantized(other.model, bits, other.quantization(bits)),
        "chosen": bench.export(bench.teacher, Plan(bits=bits), tuned),
    }
    return {f"depthwise.{n}.accuracy": float((run(m, images).argmax(1) == labels).mean()) for n, m in models.items()}


def memory(folder: Path, quick: bool) -> Figures:
    """Peak memory of calibrating, over twice the model and one batch of activations."""
    figures = {}
    for name in ("mobilenetv2-96", "encoder"):
        x = torch.randn(2, *NETWORKS[name][1])
        path = folder / f"{name}-memory.onnx"
        torch.onnx.export(build(name), (x,), path, external_data=False, dynamic_shapes=({0: torch.export.Dim.AUTO},))
        done = subprocess.run(
            [sys.executable, __file__, "--peak-of", str(path)], capture_output=True, text=True, check=True
        )
        figures[f"memory.{name}.peak_over_allowed"] = float(done.stdout.split()[-1])
    return figures


def peak_of(path: Path) -> float:
    """In a process of its own: the peak while calibrating, over what is allowed."""
    from automl_compress.hardware.measuring.weighing import peak_bytes
    from automl_compress.techniques.quantization.calibrate import activation_tensors, observe

    warm = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    assert activation_tensors(warm, {}) == []
    batch = 32
    before = peak_bytes()
    model = onnx.load(path)
    weights = model.ByteSize()
    source = model.graph.input[0]
    shape = [dim.dim_value for dim in source.type.tensor_type.shape.dim][1:]
    values = [
        output for node in model.graph.node for output in node.output if node.op_type in ("Conv", "MatMul", "Gemm")
    ]
    x = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    observers = observe(model, [{source.name: x}], values)
    peak = peak_bytes() - before
    import onnxruntime

    model.graph.output.extend(onnx.helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, None) for v in observers)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    activations = sum(part.nbytes for part in session.run(list(observers), {source.name: x}))
    return float(peak / (2 * weights + activations + x.nbytes))


def workbench(task: Any, executions: Any = None) -> Any:
    from automl_compress.model.task import prepare
    from automl_compress.model.trace import trace
    from automl_compress.search.evaluation.evaluate import Workbench
    from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS

    ready = prepare(task)
    graph = trace(ready.model, ready.example_inputs)
    return Workbench(ready, graph, executions=executions or DEFAULT_EXECUTIONS)


def runtimes_own(
    model: nn.Module, example: tuple[Tensor, ...], calibration: np.ndarray, folder: Path
) -> dict[str, onnx.ModelProto]:
    """ONNX Runtime's static quantization of the plain export: as it comes (by channel), and with uint8 activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    raw, ready = folder / "raw.onnx", folder / "ready.onnx"
    batch = ({0: torch.export.Dim.AUTO},)
    x = example[0][:2]
    torch.onnx.export(model.eval(), (x,), raw, external_data=False, dynamic_shapes=batch, verbose=False)
    quant_pre_process(str(raw), str(ready))
    name = onnx.load(ready).graph.input[0].name

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            sample = next(self.left, None)
            return None if sample is None else {name: sample[None]}

    found = {}
    for label, kinds in (("onnxruntime", {}), ("onnxruntime_uint8", {"activation_type": QuantType.QUInt8})):
        path = folder / f"{label}.onnx"
        quantize_static(str(ready), str(path), Samples(), per_channel=True, **kinds)
        found[label] = onnx.load(path)
    return found


def latencies(models: Mapping[str, onnx.ModelProto], folder: Path) -> Figures:
    """Ratio to the float model, all in one run of alternating bursts on this machine."""
    from automl_compress.hardware.device.device import Device
    from automl_compress.hardware.device.timer import ratio
    from automl_compress.hardware.profile.profile import load_profile

    paths = {}
    for name, model in models.items():
        paths[name] = folder / f"{name}.timed.onnx"
        onnx.save(model, paths[name])
    with Device(load_profile("local")) as device:
        timings = device.compare(paths, bursts=BURSTS)
    return {name: ratio(timings, name, "float") for name in models}


def test_data(task: Any, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    parts = [(inputs[0].numpy(), labels.numpy()) for inputs, labels in task.batches("test")]
    images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return images[:limit], labels[:limit]


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    from automl_compress.deploy.runtime import OnnxModel

    session = OnnxModel(model)
    return np.concatenate([session((part,))[0] for part in np.array_split(images, -(-len(images) // 250))])


PARTS = {
    "resnet20": resnet20,
    "mobilenetv2": mobilenet,
    "encoder": encoder,
    "transformer": mixed,
    "depthwise": depthwise,
    "memory": memory,
}


if __name__ == "__main__":
    main()
