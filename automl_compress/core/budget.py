"""Budgets as users write them, and costs that are held against them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from automl_compress.errors import InputError

Provenance = Literal["measured", "interpolated", "estimated"]
METRICS = ("latency", "size", "memory")
_UNITS = {
    "latency": {"ns": 1e-3, "us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6},
    "size": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1024.0, "mib": 1024.0**2, "gib": 1024.0**3},
}
_UNITS["memory"] = _UNITS["size"]
_EXAMPLES = {"latency": "0.8ms, 350us or 40%", "size": "300KB, 2MB or 60%", "memory": "2MB or 60%"}
_LIMIT = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-zµ%]*)\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model needs, predicted or measured: microseconds for one sample, bytes of file, bytes of peak memory.

    `latency_error` is the relative standard deviation of a predicted latency.
    """

    latency_us: float
    size_bytes: float
    memory_bytes: float
    provenance: Provenance = "estimated"
    latency_error: float | None = None

    def of(self, metric: str) -> float:
        """The figure behind a budget's name: 'latency' in microseconds, 'size' or 'memory' in bytes."""
        return {"latency": self.latency_us, "size": self.size_bytes, "memory": self.memory_bytes}[metric]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One budget as written. `value` is in microseconds or bytes, or a fraction of the original if `relative`."""

    metric: str
    value: float
    relative: bool
    text: str

    @classmethod
    def parse(cls, metric: str, text: str | float) -> Limit:
        """Read '40%', '0.8ms', '350us', '300KB', '2MB' (KB is 1000 bytes, KiB 1024). Raises InputError otherwise."""
        match = _LIMIT.fullmatch(str(text))
        ways = f"write {_EXAMPLES[metric]}"
        if not match:
            raise InputError(f"--{metric} {text!r} is not a budget: {ways}")
        value, unit = float(match[1]), match[2].lower()
        if not math.isfinite(value) or value <= 0:
            raise InputError(f"--{metric} {text!r} must be greater than zero: {ways}")
        if unit == "%":
            return cls(metric=metric, value=value / 100, relative=True, text=str(text).strip())
        if unit not in _UNITS[metric]:
            found = f"unit {match[2]!r} is unknown" if unit else "the unit is missing"
            raise InputError(f"--{metric} {text!r}: {found}; {ways}")
        return cls(metric=metric, value=value * _UNITS[metric][unit], relative=False, text=str(text).strip())


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is allowed, in absolute figures: metric name -> microseconds or bytes. At least one metric is limited."""

    limits: Mapping[str, float]

    @classmethod
    def resolve(cls, limits: Mapping[str, Limit], original: Cost) -> Budget:
        """Turn percentages into figures against the original's measured cost."""
        absolute = {m: limit.value * (original.of(m) if limit.relative else 1.0) for m, limit in limits.items()}
        return cls(limits=absolute)

    def constraints(self, cost: Cost) -> dict[str, float]:
        """Metric -> cost / budget - 1: zero or less where the budget is met. One entry per budget, in fixed order."""
        return {m: cost.of(m) / self.limits[m] - 1.0 for m in METRICS if m in self.limits}

    def met(self, cost: Cost) -> bool:
        return all(value <= 0 for value in self.constraints(cost).values())

    def scaled(self, factors: Mapping[str, float]) -> Budget:
        """The same budget with each limit multiplied by `factors[metric]` (1 where absent)."""
        return Budget(limits={m: v * factors.get(m, 1.0) for m, v in self.limits.items()})


def parse_budget(
    latency: str | None = None, size: str | None = None, memory: str | None = None, *, required: bool = True
) -> dict[str, Limit]:
    """Read the budgets that were given. Raises InputError if one is `required` and none was, or one can't be read."""
    given = {m: v for m, v in zip(METRICS, (latency, size, memory), strict=True) if v is not None}
    if not given and required:
        raise InputError(
            "no budget given: say at least one of --latency 40%, --size 60%, --memory 2MB, or what may be lost with "
            "--max-drop 1% or --min-metric 0.91"
        )
    return {m: Limit.parse(m, v) for m, v in given.items()}


def share_of(metric: str, share: float) -> Limit:
    """A limit relative to the original's figure."""
    return Limit(metric=metric, value=share, relative=True, text=f"{100 * share:.1f}%")


def format_bytes(value: float) -> str:
    """1234567 -> '1.23 MB'."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def format_us(value: float) -> str:
    """1234.5 -> '1.23 ms'."""
    for unit, scale in (("s", 1e6), ("ms", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} us"


def format_metric(metric: str, value: float) -> str:
    """A figure with its unit; 'metric' is the task's own and has none."""
    if metric == "metric":
        return f"{value:.4f}"
    return format_us(value) if metric == "latency" else format_bytes(value)
