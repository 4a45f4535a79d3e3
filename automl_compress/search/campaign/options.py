"""The options that decide what a search does, with their defaults: what `compress` and the command line take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from automl_compress.recovery.names import DEFAULT_MODE
from automl_compress.techniques.distillation.losses import DEFAULT

TRIALS = 100
EPOCHS = 3.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """As `api.compress` explains them. None for `trials` and `epochs`: `TRIALS` and `EPOCHS`."""

    latency: str | None = None
    size: str | None = None
    memory: str | None = None
    max_drop: str | None = None
    min_metric: str | float | None = None
    front: int | None = None
    minimise: str | None = None
    profile: str = "local"
    device: str = "local"
    space: str = "cnn"
    trials: int | None = None
    epochs: float | None = None
    timeout: float | None = None
    seed: int = 0
    sampler: str = "budget"
    distillation: str = DEFAULT
    recovery: str = DEFAULT_MODE
    training: str = ""
    students: str | None = None
    baselines: str = "quick"
    weights: str | Path | None = None
    storage: str | None = None
    max_failed: float = 0.5
