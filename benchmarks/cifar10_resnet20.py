"""What does a search deliver for a pretrained ResNet-20 on CIFAR-10 at several budgets, against simpler choices?

For each budget one search; every model in its report (original, uniform int8, the additive table's optimum, delivered)
is then tested on the test images and measured on this machine in one run of alternating bursts.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import parser, write_figures

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cifar10_resnet20" / "task.py"
BUDGETS = ("latency=40%", "latency=30%", "size=30%")


def main() -> None:
    options = parser(__doc__.splitlines()[0], data=True, weights=True)
    options.add_argument(
        "--budget", action="append", help=f"METRIC=LIMIT, may be repeated (default: {' '.join(BUDGETS)})"
    )
    options.add_argument("--epochs", type=float, help="of the final distillation (default 3; 0.5 with --quick)")
    options.add_argument("--trials", type=int, help="one-shot trials (default 100; 24 with --quick)")
    options.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders go (default: runs)")
    given = options.parse_args()
    epochs = given.epochs if given.epochs is not None else (0.5 if given.quick else 3.0)
    trials = given.trials or (24 if given.quick else 100)

    from automl_compress.model.task import load_task

    os.environ |= {"AC_DATA_DIR": str(given.data), "AC_WEIGHTS_DIR": str(given.weights)}
    task = load_task(str(EXAMPLE))
    figures: dict[str, float] = {}
    for budget in given.budget or BUDGETS[: 1 if given.quick else None]:
        metric, _, limit = budget.partition("=")
        folder = given.runs / f"cifar10-{metric}-{limit.rstrip('%')}-{epochs:g}"
        rows = search(task, {metric: limit}, folder, epochs, trials)
        name = f"{metric}_{limit.rstrip('%')}"
        figures |= {f"{name}.{model}.{figure}": value for model, row in rows.items() for figure, value in row.items()}
        show(budget, rows)
    write_figures(given.json, "cifar10_resnet20", figures, quick=given.quick)


def search(task: Any, budget: dict[str, str], folder: Path, epochs: float, trials: int) -> dict[str, dict[str, float]]:
    """Model -> accuracy on test, ratios of latency and size to the original."""
    from automl_compress import compress
    from automl_compress.hardware.device.device import Device
    from automl_compress.hardware.device.timer import ratio
    from automl_compress.hardware.profile.profile import load_profile
    from automl_compress.progress import make_progress

    limits: Any = budget
    with make_progress(sys.stderr) as progress:
        result = compress(task, output=folder, epochs=epochs, trials=trials, progress=progress, **limits)
    if result.delivered is None or result.delivered.plan is None:
        raise SystemExit(f"{folder}: {result.status}; nearest {dict(result.nearest)}")
    models = {"original": folder / "original.onnx", "delivered": folder / "best.onnx"}
    for name, figures in result.baselines.items():
        assert figures.plan is not None
        trained = folder / "candidates" / f"full-{figures.plan.key}.onnx"
        if trained.exists():  # others were only repaired
            models[name] = trained
    with Device(load_profile("local")) as device:
        timings = device.compare(models, bursts=40)
    size = models["original"].stat().st_size
    return {
        name: {
            "accuracy": test_accuracy(path, task),
            "latency_ratio": ratio(timings, name, "original"),
            "latency_us": timings[name].median_us,
            "latency_spread": timings[name].spread,
            "size_ratio": path.stat().st_size / size,
        }
        for name, path in models.items()
    }


def test_accuracy(path: Path, task: Any) -> float:
    """Fraction of test images with the right class, computed with nothing but ONNX Runtime and numpy."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    right = [
        session.run(None, {name: images.numpy()})[0].argmax(1) == labels.numpy()
        for (images,), labels in task.batches("test")
    ]
    return float(np.concatenate(right).mean())


def show(budget: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{budget}\n{'model':16} {'test':>8} {'latency':>8} {'spread':>7} {'size':>7}")
    for name, row in rows.items():
        share, spread = f"{row['latency_ratio']:8.3f}", f"{row['latency_spread']:7.1%}"
        print(f"{name:16} {row['accuracy']:8.2%} {share} {spread} {row['size_ratio']:7.3f}")


if __name__ == "__main__":
    main()
