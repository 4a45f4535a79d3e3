"""The same seed, profile and trials with one worker give the same plans, in whatever process and hash order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from tests.same_run import run

ROOT = Path(__file__).resolve().parent.parent


def proposals(folder: Path) -> list[tuple[dict[str, Any], str, list[float] | None]]:
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    trials = optuna.load_study(study_name="one-shot", storage=storage).get_trials()
    return [(trial.params, trial.state.name, trial.values) for trial in trials]


def test_two_processes_with_other_hash_seeds_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOML_COMPRESS_HOME", str(tmp_path / "home"))
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    other = [sys.executable, "-m", "tests.same_run", str(tmp_path / "other")]
    done = subprocess.run(other, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run(tmp_path / "here")
    here, there = tmp_path / "here" / "run", tmp_path / "other" / "run"
    assert proposals(here) == proposals(there)
    for name in ("plan.json", "milp.json", "space.json", "sensitivity.jsonl", "best.safetensors"):
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    delivered = [json.loads((folder / "result.json").read_text())["delivered"] for folder in (here, there)]
    assert delivered[0] == delivered[1]
