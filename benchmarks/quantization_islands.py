"""Does a network in 8 bits stay in integers from its input to its output?

    python benchmarks/quantization_islands.py --models DIR --make-only     (any core: makes the models)
    python benchmarks/quantization_islands.py --models DIR [--json FILE]   (an idle core: their latency as well)

Architectures of timm and torchvision at 64x64 (Swin 56x56) with ten classes, trained for two dozen steps so that
activations have ranges, every layer in 8 bits. A row: `layers` and how many of them run `int8`, the `quantize`,
`dequantize` and `transpose` nodes that are left in the graph that the runtime executes, `deviation` of its kernels from
the graph as written, `agreement` of the trainable quantized model with the file on the class, and `latency_ratio` to
the same network in 32 bits. Needs the `benchmarks` extra.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from common import parser, write_rows
from quantization import latencies, workbench
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CLASSES, SAMPLES, STEPS, BATCH = 10, 256, 24, 32


def architectures() -> dict[str, Callable[[], nn.Module]]:
    """Name -> what makes it: small variants, so that an analysis takes seconds."""
    from torchvision_ops import declare

    declare()
    import timm
    from torchvision import models

    vit: dict[str, Any] = {"img_size": 64, "depth": 2, "num_classes": CLASSES}
    swin: dict[str, Any] = {"img_size": 56, "window_size": 7, "depths": (1, 1, 1, 1), "num_classes": CLASSES}
    dense: dict[str, Any] = {"growth_rate": 12, "block_config": (2, 3, 2), "num_init_features": 24}
    return {
        "ResNet-18": lambda: models.resnet18(num_classes=CLASSES),
        "MobileNetV2": lambda: models.mobilenet_v2(num_classes=CLASSES),
        "MobileNetV3-small": lambda: models.mobilenet_v3_small(num_classes=CLASSES),
        "EfficientNet-B0": lambda: timm.create_model("efficientnet_b0", num_classes=CLASSES),
        "RegNetY-002": lambda: timm.create_model("regnety_002", num_classes=CLASSES),
        "DenseNet (7 layers deep)": lambda: models.DenseNet(**dense, num_classes=CLASSES),
        "ShuffleNetV2 x0.5": lambda: models.shufflenet_v2_x0_5(num_classes=CLASSES),
        "GoogLeNet": lambda: models.GoogLeNet(num_classes=CLASSES, aux_logits=False, init_weights=False),
        "ViT-tiny (2 layers)": lambda: timm.create_model("vit_tiny_patch16_224", **vit),
        "Swin-tiny (4 layers)": lambda: timm.create_model("swin_tiny_patch4_window7_224", **swin),
    }


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--models", type=Path, required=True, metavar="DIR", help="where made models are kept")
    options.add_argument("--make-only", action="store_true", help="measure no latency")
    options.add_argument("--only", nargs="*", help="architectures (default: all; ResNet-18 with --quick)")
    given = options.parse_args()
    torch.set_num_threads(1)
    known = architectures()
    given.models.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in given.only or (["ResNet-18"] if given.quick else known):
        row = made(name, known[name], given.models)
        if not given.make_only:
            files = {way: onnx.load(file_of(given.models, name, way)) for way in ("float", "int8")}
            with tempfile.TemporaryDirectory() as folder:
                row["latency_ratio"] = latencies(files, Path(folder))["int8"]
        rows.append(row)
    write_rows(given.json, "quantization_islands", rows, quick=given.quick)


def file_of(folder: Path, name: str, way: str) -> Path:
    return folder / f"{name.split(' ')[0].lower()}.{way}.onnx"


def made(name: str, build: Callable[[], nn.Module], folder: Path) -> dict[str, Any]:
    """The architecture's row, from the folder where it was made before."""
    known = file_of(folder, name, "row").with_suffix(".json")
    if not known.exists():
        known.write_text(json.dumps({"architecture": name, **make(build, folder, name)}))
    row: dict[str, Any] = json.loads(known.read_text())
    return row


def make(build: Callable[[], nn.Module], folder: Path, name: str) -> dict[str, Any]:
    from automl_compress.core.plan import Plan
    from automl_compress.deploy.runtime import OnnxModel
    from automl_compress.deploy.verify import agreement, executed_operators
    from automl_compress.model.task import Task

    torch.manual_seed(0)
    model = build()
    x, y = patterns(56 if name.startswith("Swin") else 64)
    train(model, x, y)
    bench = workbench(Task(model=model.eval(), train=(x, y), validation=(x, y)))
    layers = [layer.name for layer in bench.graph.layers]
    plan = Plan(bits=dict.fromkeys(layers, 8))
    found = bench.quantization(bench.teacher, plan)
    int8 = bench.export(bench.teacher, plan, found)
    onnx.save(bench.original, file_of(folder, name, "float"))
    onnx.save(int8, file_of(folder, name, "int8"))
    left = Counter(node.op_type for node in executed_graph(int8).node)
    session, student = OnnxModel(int8), bench.trainable(bench.teacher, plan, found)
    parts, few = [x[i : i + 64] for i in range(0, SAMPLES, 64)], x[:16].numpy()
    with torch.no_grad():
        pairs = [(session((part.numpy(),))[0], student(part).numpy()) for part in parts]
    same = np.concatenate([one.argmax(1) == other.argmax(1) for one, other in pairs])
    return {
        "layers": len(layers),
        "int8": sum(layer.ok for layer in executed_operators(int8, layers, plan.bits, bench.executions)),
        "quantize": left["QuantizeLinear"],
        "dequantize": left["DequantizeLinear"],
        "transpose": left["Transpose"],
        "deviation": agreement(session((few,)), OnnxModel(int8, optimize=False)((few,))),
        "agreement": float(same.mean()),
    }


def patterns(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [SAMPLES, 3, size, size] of ten blurred patterns under noise, and which of them each is."""
    generator = torch.Generator().manual_seed(0)
    blurred = nn.functional.avg_pool2d(torch.randn(CLASSES, 3, size, size, generator=generator), 9, 1, 4) * 6
    y = torch.arange(SAMPLES) % CLASSES
    return blurred[y] + 0.7 * torch.randn(SAMPLES, 3, size, size, generator=generator), y


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """A few steps: activations get ranges, batch-norms the statistics of the data, classes their outputs."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    for _ in range(STEPS):
        chosen = torch.randperm(SAMPLES, generator=generator)[:BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def executed_graph(model: onnx.ModelProto) -> onnx.GraphProto:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path).graph


if __name__ == "__main__":
    main()
