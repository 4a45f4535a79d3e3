"""What a run delivers, as values: the figures of each model, and the whole account of the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from automl_compress.core.budget import Cost, Provenance
from automl_compress.core.plan import Plan

Status = Literal["met", "estimated", "infeasible", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A latency. `values_us` are the raw means of bursts; the median is what counts.

    `provenance` is "measured" unless the device isn't here: then there is a single predicted value.
    """

    values_us: tuple[float, ...]
    median_us: float
    spread: float
    runs: int
    provenance: Provenance = "measured"

    @property
    def trusted(self) -> bool:
        """Whether the spread (interquartile range over median) is small enough to compare with."""
        return self.spread < 0.1


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One model as measured: validation metric, latency of one sample, file size, peak memory of a fresh process.

    `provenance` is that of latency and memory: "measured" unless the device isn't here; metric and size always are.
    `compressed_bytes` is the file's size after compression (deflate), where masks make that worth knowing.
    `latency_ratio` is to the original, measured beside it in alternating bursts of the same run.
    """

    metric: float
    latency_us: float
    size_bytes: int
    memory_bytes: int
    provenance: Provenance = "measured"
    latency_ratio: float = 1.0
    latency_spread: float = 0.0
    predicted_latency_us: float | None = None
    test_metric: float | None = None
    compressed_bytes: int | None = None
    plan: Plan | None = None
    note: str = ""

    @property
    def cost(self) -> Cost:
        """What budgets are held against."""
        return Cost(
            latency_us=self.latency_us,
            size_bytes=self.size_bytes,
            memory_bytes=self.memory_bytes,
            provenance=self.provenance,
        )

    def to_json(self) -> dict[str, Any]:
        data = {k: v for k, v in asdict(self).items() if k not in ("plan",) and v not in (None, "")}
        if self.plan is not None:
            data["plan"] = self.plan.to_json()
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Figures:
        """Read what `to_json` wrote."""
        plan = Plan.from_json(data["plan"]) if data.get("plan") else None
        return cls(**{**{k: v for k, v in data.items() if k != "plan"}, "plan": plan})


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a run. `folder` holds everything that docs/runs.md lists.

    status     "met": `delivered` was measured on the device and meets the budget; "estimated": the device isn't here,
               and by estimate it does; "infeasible": nothing reachable does; "interrupted"
    budget     metric -> limit in microseconds or bytes
    goal       the other direction: 'asked' in words, 'metric_at_least' on validation, 'minimise'; empty within budgets
    front      folder of a model within the run folder -> its figures, cheapest first; empty where one was asked for
    baselines  name -> figures of the models that the search has to beat
    standings  the search beside each baseline: 'baseline', 'rung', 'metric', 'search_metric', 'evaluations',
               'search_evaluations', 'within_budget', 'beaten' (None: no rival), and the same in words, 'text'
    nearest    infeasible only: metric -> the lowest figure that is reachable
    binding    infeasible only: the layers that take most of the cheapest plan's cost
    ladder     one entry a plan that was distilled: 'plan' (key), 'budget', 'metrics' (rung by rung), 'state', 'reason'
    trials     state -> how many trials ended so
    training   what was trained for the delivered model: curves and figures of each training, in order
    """

    status: Status
    budget: Mapping[str, float]
    original: Figures | None
    delivered: Figures | None = None
    baselines: Mapping[str, Figures] = field(default_factory=dict)
    standings: tuple[Mapping[str, Any], ...] = ()
    nearest: Mapping[str, float] = field(default_factory=dict)
    binding: tuple[str, ...] = ()
    trials: Mapping[str, int] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[Mapping[str, Any], ...] = ()
    ladder: tuple[Mapping[str, Any], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    training: tuple[Mapping[str, Any], ...] = ()
    goal: Mapping[str, Any] = field(default_factory=dict)
    front: Mapping[str, Figures] = field(default_factory=dict)
    folder: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "automl-compress/result",
            "version": 1,
            "status": self.status,
            "budget": dict(self.budget),
            **({"goal": dict(self.goal)} if self.goal else {}),
            **({"front": {name: figures.to_json() for name, figures in self.front.items()}} if self.front else {}),
            "original": self.original.to_json() if self.original else None,
            "delivered": self.delivered.to_json() if self.delivered else None,
            "baselines": {name: figures.to_json() for name, figures in self.baselines.items()},
            "standings": [dict(standing) for standing in self.standings],
            "nearest": dict(self.nearest),
            "binding": list(self.binding),
            "trials": dict(self.trials),
            "device": dict(self.device),
            "layers": [dict(layer) for layer in self.layers],
            "ladder": [dict(row) for row in self.ladder],
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
            "training": [dict(log) for log in self.training],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], folder: Path | None = None) -> Result:
        """Read what `to_json` wrote; `folder` is where it was found."""
        fields = {k: v for k, v in data.items() if k not in ("schema", "version")}
        models = {name: Figures.from_json(value) for name, value in fields["baselines"].items()}
        front = {name: Figures.from_json(value) for name, value in fields.get("front", {}).items()}
        ends = {name: Figures.from_json(fields[name]) if fields[name] else None for name in ("original", "delivered")}
        several = ("binding", "layers", "ladder", "notes", "training", "standings")
        lists = {name: tuple(fields.get(name, ())) for name in several}
        return cls(**{**fields, **ends, **lists, "baselines": models, "front": front, "folder": folder})
