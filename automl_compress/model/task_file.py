"""Where a task comes from, as it is written: `path/task.py[:function]` or `package.module[:function]`; no torch."""

from __future__ import annotations

from pathlib import Path

from automl_compress.errors import TaskError


def split_spec(spec: str) -> tuple[str, str]:
    """(file or module, function or ""). A colon behind a Windows drive doesn't separate."""
    if len(spec) > 2 and spec[1] == ":" and spec[2] in "\\/":
        drive, (source, _, function) = spec[:2], spec[2:].partition(":")
        return drive + source, function
    source, _, function = spec.partition(":")
    return source, function


def require_task_file(spec: str) -> None:
    """Raise TaskError at once, before anything slow, where a task file is named that doesn't exist."""
    source, _ = split_spec(spec)
    if (source.endswith(".py") or "/" in source) and not Path(source).is_file():
        raise TaskError(f"{source}: no such task file")
