"""A run that asks a finished one for something else is otherwise as that one was."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from automl_compress.core.budget import METRICS
from automl_compress.search.campaign.earlier_run import EarlierRun, rebudgeted
from automl_compress.search.campaign.options import Options


def test_what_is_not_asked_anew_is_as_in_the_run() -> None:
    options: dict[str, Any] = {option.name: f"the run's {option.name}" for option in fields(Options)}
    known = EarlierRun(folder=Path("run"), options={**options, "trials": 100}, identity={}, space={})
    task, found = rebudgeted(known, "task.py", {"latency": "30%", "epochs": 2.0, "size": None})
    assert task == "task.py"
    anew = {"latency": "30%", "epochs": 2.0, "trials": 25}
    assert {name: found[name] for name in anew} == anew
    left_out = {*METRICS, "max_drop", "min_metric", "front", "minimise", "timeout", "storage"} - set(anew)
    assert found == {name: options[name] for name in options if name not in left_out} | anew
