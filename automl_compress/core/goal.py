"""What can be asked for beside the best model within budgets: the cheapest good enough one, and a front of models."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from automl_compress.core.budget import METRICS, format_metric
from automl_compress.errors import InfeasibleError, InputError

_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(%?)\s*", re.IGNORECASE)
_ROUNDING = 1e-9
MOST_POINTS = 50


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The model with the least latency, size or memory (`minimise`) among those that are good enough.

    bound     what the metric may lose, or what it must be at least, if `is_drop` is False
    relative  whether `bound` is a share of the original's metric (else it is in the metric's own units)
    text      the bound as it was written, with its option's name
    """

    minimise: str
    bound: float
    is_drop: bool
    relative: bool
    text: str

    def least_metric(self, original: float) -> float:
        """The lowest validation metric that will do. InputError where a share of the original's means nothing."""
        if self.relative and original == 0:
            raise InputError(f"{self.text}: the original's metric is 0, a share of it means nothing; use --min-metric")
        if not self.is_drop:
            return self.bound
        return original - self.bound * (abs(original) if self.relative else 1.0)

    def require_reachable(self, original: float) -> None:
        """Raise InfeasibleError where more is asked for than the original has."""
        if self.least_metric(original) > original:
            raise InfeasibleError(
                f"{self.text}: the original itself has {format_metric('metric', original)} on validation",
                nearest={"metric": original},
            )

    def reached(self, metric: float, original: float) -> bool:
        """Whether a metric is good enough beside the original's."""
        return metric >= self.least_metric(original) - _ROUNDING


@dataclass(frozen=True, kw_only=True)
class Front:
    """So many models between the cheapest plan and the original, by latency, size or memory (`minimise`)."""

    points: int
    minimise: str

    @property
    def text(self) -> str:
        return f"front of {self.points} by {self.minimise}"


def parse_front(points: int | None, minimise: str | None) -> Front | None:
    """Read `--front 5`; None where it wasn't given. Raises InputError for nonsense."""
    if points is None:
        return None
    if not 2 <= points <= MOST_POINTS:
        raise InputError(f"--front {points}: a front has 2 to {MOST_POINTS} models")
    return Front(points=points, minimise=_metric(minimise))


def parse_goal(max_drop: str | None, min_metric: str | float | None, minimise: str | None) -> Goal | None:
    """Read `--max-drop 1%` (of the original's metric) or `0.01` (in its own units), or `--min-metric 0.91`.

    None where neither was given. Raises InputError for nonsense.
    """
    if max_drop is None and min_metric is None:
        return None
    if max_drop is not None and min_metric is not None:
        raise InputError("--max-drop and --min-metric say the same thing twice: give one of them")
    what = _metric(minimise)
    if max_drop is not None:
        value, relative = _number("--max-drop", max_drop, "1% of the original's metric, or 0.01 in its own units")
        if not 0 <= value < (1 if relative else math.inf):
            raise InputError(f"--max-drop {max_drop!r} must be at least 0{' and below 100%' if relative else ''}")
    else:
        value, relative = _number("--min-metric", str(min_metric), "a number in the metric's own units, such as 0.91")
        if relative:
            raise InputError(
                f"--min-metric {min_metric!r}: write it in the metric's own units, such as 0.91; what may be lost in "
                "percent of the original's is --max-drop"
            )
    option, text = ("--max-drop", max_drop) if max_drop is not None else ("--min-metric", min_metric)
    return Goal(
        minimise=what,
        bound=value,
        is_drop=max_drop is not None,
        relative=relative,
        text=f"{option} {str(text).strip()}",
    )


def parse_aim(
    max_drop: str | None, min_metric: str | float | None, front: int | None, minimise: str | None
) -> Goal | Front | None:
    """What is asked for; None for the best model within budgets. Raises InputError for nonsense and contradictions."""
    goal, points = parse_goal(max_drop, min_metric, minimise), parse_front(front, minimise)
    if goal is not None and points is not None:
        raise InputError(f"{goal.text.split()[0]} asks for one model and --front for several: give one of them")
    if minimise is not None and goal is None and points is None:
        raise InputError("--minimise is for --max-drop, --min-metric and --front: give one of them, or budgets alone")
    return goal or points


def _metric(minimise: str | None) -> str:
    what = minimise or "latency"
    if what not in METRICS:
        raise InputError(f"--minimise {what!r} is unknown: use one of {', '.join(METRICS)}")
    return what


def _number(option: str, text: str, ways: str) -> tuple[float, bool]:
    match = _NUMBER.fullmatch(text)
    if not match or not math.isfinite(float(match[1])):
        raise InputError(f"{option} {text!r} can't be read: write {ways}")
    return (float(match[1]) / 100, True) if match[2] else (float(match[1]), False)
