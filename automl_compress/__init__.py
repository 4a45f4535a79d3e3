"""Compress a trained PyTorch network until it meets a latency, size or memory budget that is measured on the device.

    from automl_compress import Task, compress
    result = compress(task, latency="40%", size="300KB")

The public names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from automl_compress.api import compress, compress_each, forecast, foreseen, profile, rebudget, replay, work
    from automl_compress.core.budget import Budget, Cost
    from automl_compress.core.plan import Plan
    from automl_compress.core.result import Figures, Result
    from automl_compress.errors import CompressError, InfeasibleError, InputError
    from automl_compress.hardware.profile.profile import DeviceProfile, load_profile
    from automl_compress.model.task import Task
    from automl_compress.model.transfer import Transfer
    from automl_compress.progress import Progress
    from automl_compress.search.campaign.overview import describe_space
    from automl_compress.search.ladder.recovering import recover

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CompressError",
    "Cost",
    "DeviceProfile",
    "Figures",
    "InfeasibleError",
    "InputError",
    "Plan",
    "Progress",
    "Result",
    "Task",
    "Transfer",
    "compress",
    "compress_each",
    "describe_space",
    "forecast",
    "foreseen",
    "load_profile",
    "profile",
    "rebudget",
    "recover",
    "replay",
    "work",
]

_HOME = {
    "api": ("compress", "compress_each", "forecast", "foreseen", "profile", "rebudget", "replay", "work"),
    "core.budget": ("Budget", "Cost"),
    "core.plan": ("Plan",),
    "core.result": ("Figures", "Result"),
    "errors": ("CompressError", "InfeasibleError", "InputError"),
    "hardware.profile.profile": ("DeviceProfile", "load_profile"),
    "model.task": ("Task",),
    "model.transfer": ("Transfer",),
    "progress": ("Progress",),
    "search.campaign.overview": ("describe_space",),
    "search.ladder.recovering": ("recover",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
