"""Costs of plans as measured on the device, kept in a file of the run folder: a line a plan."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from automl_compress.core.budget import Cost
from automl_compress.core.plan import Plan


class MeasuredCosts(dict[str, Cost]):
    """Plan's key -> its cost, at the speed that the machine had when the original was measured."""

    path: Path | None = None

    def load(self, path: Path) -> None:
        """Keep costs in this file from now on, and take those that it has; a line that a kill cut short is left out."""
        self.path = path
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                key = entry.pop("plan")
                self[key] = Cost(**entry)

    def remember(self, plan: Plan, cost: Cost) -> None:
        """From now on this is the plan's cost."""
        self[plan.key] = cost
        if self.path is not None:
            torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * torn + json.dumps({"plan": plan.key, **asdict(cost)}) + "\n")
