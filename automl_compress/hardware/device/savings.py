"""What lowers the memory of a model that is there: ways of running it, each measured, to be offered to its user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from automl_compress.core.budget import format_bytes
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.timer import ratio

HOW = {
    "no-prepacking": "session option session.disable_prepacking = 1",
    "no-arena": "session option enable_cpu_mem_arena = False",
    "malloc-threshold": "environment variable MALLOC_MMAP_THRESHOLD_=65536",
    "ort-format": "the runtime's own file format (python -m onnxruntime.tools.convert_onnx_models_to_ort)",
}
# Peaks of fresh processes repeat to a few percent: less than this is nothing to speak of.
_WORTH = 0.95


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Peak memory of a fresh process in bytes if a model is run in some way, and its latency as a multiple of the
    default's; None where the way can't change it."""

    way: str
    memory_bytes: int
    latency_ratio: float | None


def measure_savings(device: Device, model: Path) -> list[Saving]:
    """The default first, then what was measured for each way. Raises DeviceError if measuring fails."""
    peaks, timings = device.savings(model)
    return [
        Saving(way=way, memory_bytes=peak, latency_ratio=ratio(timings, way, "default") if way in timings else None)
        for way, peak in peaks.items()
    ]


def offers(savings: Sequence[Saving]) -> list[str]:
    """A line for each way that needs less memory than the default, the best first."""
    default = next(saving for saving in savings if saving.way == "default")
    better = [s for s in savings if s.way in HOW and s.memory_bytes < _WORTH * default.memory_bytes]
    return [_offer(saving, default) for saving in sorted(better, key=lambda saving: saving.memory_bytes)]


def _offer(saving: Saving, default: Saving) -> str:
    figures = f"{format_bytes(saving.memory_bytes)} instead of {format_bytes(default.memory_bytes)}"
    latency = f", at {saving.latency_ratio:.2f} of the latency" if saving.latency_ratio is not None else ""
    return f"memory: {figures} with {HOW[saving.way]}{latency}"
