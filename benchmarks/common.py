"""What every benchmark shares: its options, the facts of the machine, and the file of figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("automl-compress", "numpy", "onnx", "onnxruntime", "optuna", "torch")
CPUINFO = Path("/proc/cpuinfo")


def parser(question: str, *, data: bool = False, weights: bool = False) -> argparse.ArgumentParser:
    """The options of a benchmark that answers `question`; --data and --weights where it reads them."""
    options = argparse.ArgumentParser(description=question)
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE under stable names")
    options.add_argument("--quick", action="store_true", help="the same figures from less work: a minute or two")
    for wanted, name, variable in ((data, "--data", "AC_DATA_DIR"), (weights, "--weights", "AC_WEIGHTS_DIR")):
        if wanted:
            default = Path(os.environ[variable]) if variable in os.environ else None
            text = f"folder to read (default: ${variable})"
            options.add_argument(name, type=Path, metavar="DIR", default=default, required=default is None, help=text)
    return options


def machine() -> dict[str, Any]:
    """Processor, usable cores, system, and the versions that figures depend on (None: not installed)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {library: _version(library) for library in LIBRARIES},
    }


def write_figures(path: Path | None, benchmark: str, figures: Mapping[str, float], *, quick: bool) -> None:
    """Print the figures; with a path, write them there with the facts of the machine as well.

    A dot in a name is a level in the file: `ours.accuracy` is `accuracy` of `ours`.
    """
    for name, value in figures.items():
        print(f"{name:48} {value:.6g}")
    levels: dict[str, Any] = {}
    for name, value in figures.items():
        *outer, last = name.split(".")
        level = levels
        for part in outer:
            level = level.setdefault(part, {})
        level[last] = value
    _write(path, benchmark, quick, "figures", levels)


def write_rows(path: Path | None, benchmark: str, rows: Sequence[Mapping[str, Any]], *, quick: bool) -> None:
    """Print rows of figures; with a path, write them there with the facts of the machine as well."""
    for row in rows:
        print("  ".join(_cells(row)))
    _write(path, benchmark, quick, "rows", [dict(row) for row in rows])


def _cells(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    cells = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            cells += _cells(value, f"{prefix}{name}.")
        else:
            cells.append(f"{prefix}{name} {f'{value:.4g}' if isinstance(value, float) else value}")
    return cells


def _write(path: Path | None, benchmark: str, quick: bool, name: str, found: Any) -> None:
    if path is not None:
        facts = {"benchmark": benchmark, "quick": quick, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        path.write_text(json.dumps({**facts, "machine": machine(), name: found}, indent=2) + "\n")


def _processor() -> str:
    if CPUINFO.exists():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
