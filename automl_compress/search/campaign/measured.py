"""Costs of plans as measured on the device, kept in a file of the run folder: a line a plan."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from automl_compress.core.budget import Cost
from automl_compress.core.plan import Plan
from automl_compress.search.evaluation.lines import append_line, read_lines


class MeasuredCosts(dict[str, Cost]):
    """Plan's key -> its cost, at the speed that the machine had when the original was measured."""

    path: Path | None = None

    def load(self, path: Path) -> None:
        """Keep costs in this file from now on, and take those that it has; a line that a kill cut short is left out."""
        self.path = path
        for entry in read_lines(path):
            with suppress(ValueError, TypeError, KeyError):
                key = entry.pop("plan")
                self[key] = Cost(**entry)

    def remember(self, plan: Plan, cost: Cost) -> None:
        """From now on this is the plan's cost."""
        self[plan.key] = cost
        if self.path is not None:
            append_line(self.path, {"plan": plan.key, **asdict(cost)})
