"""Part (e): is every delivered model within its budget? Short searches of the digits network, 20 seeds and budgets.

What a run delivered is measured again, in a run of bursts of its own beside the original. Two measurements of one model
differ by a percent or so, so a model right at its budget may be on either side the second time: both are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from search_evaluator import Lines

from automl_compress import compress
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.timer import ratio
from automl_compress.hardware.profile.profile import load_profile
from automl_compress.progress import Progress

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits" / "task.py"
RUNS = 20
_TRIALS, _EPOCHS = 10, 0.5


def run(cache: Path, *, runs: int = RUNS, profile: str = "local", progress: Progress) -> list[dict[str, Any]]:
    """Rows `run, budget, status, latency_ratio, size_ratio, met` (as the run measured) and `met_again`."""
    done = Lines(cache / "budgets.jsonl")
    rows = []
    for number in range(runs):
        progress.stage(f"search {number + 1} of {runs}", None)
        limits = limits_of(number)
        budget = ", ".join(f"{metric} {limit}" for metric, limit in limits.items())
        key = f"{number} {budget}"
        if key not in done.known:
            output = cache / "budgets" / key.replace("%", "").replace(",", "").replace(" ", "-")
            done.add(key, {"run": number, "budget": budget, **_one(output, number, limits, profile)})
        rows.append(done.known[key])
    return rows


def limits_of(number: int) -> dict[str, str]:
    """Latency, size or both, as shares of the original's, by the run's number: what 8 bits alone give, or less."""
    rng = np.random.default_rng(number)
    drawn = {"latency": f"{rng.integers(10, 38)}%", "size": f"{rng.integers(8, 30)}%"}
    kinds: Sequence[Sequence[str]] = (("latency",), ("latency", "size"), ("size",))
    return {metric: drawn[metric] for metric in kinds[number % 3]}


def _one(output: Path, number: int, limits: dict[str, str], profile: str) -> dict[str, Any]:
    options: Any = limits
    result = compress(
        str(DIGITS), profile=profile, trials=_TRIALS, epochs=_EPOCHS, seed=number, output=output, **options
    )
    row: dict[str, Any] = {"status": result.status}
    if result.delivered is None or result.original is None:
        return {**row, "latency_ratio": None, "size_ratio": None, "met": None, "met_again": None}
    delivered, original = result.delivered, result.original
    with Device(load_profile(profile)) as device:
        models = {name: output / f"{name}.onnx" for name in ("original", "best")}
        again = ratio(device.compare(models, bursts=40), "best", "original")
    shares = {
        "latency": delivered.latency_us / original.latency_us,
        "size": delivered.size_bytes / original.size_bytes,
    }
    allowed = {metric: float(limit.rstrip("%")) / 100 for metric, limit in limits.items()}
    return {
        **row,
        "latency_ratio": shares["latency"],
        "size_ratio": shares["size"],
        "met": all(shares[metric] <= limit for metric, limit in allowed.items()),
        "met_again": all((again if m == "latency" else shares[m]) <= limit for m, limit in allowed.items()),
    }
