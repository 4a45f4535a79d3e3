"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from automl_compress.errors import InputError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smhd])\s*")

Task = Annotated[str, typer.Argument(metavar="TASK", help="path/task.py[:function] or package.module[:function]")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Weights = Annotated[Path | None, typer.Option(metavar="FILE", help="Weights: .pt (tensors only) or .safetensors.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Run folder; the same one resumes.")]
Device = Annotated[
    str, typer.Option(metavar="WHERE", help="Where to measure: local, or ssh://[user@]host[:port][?python=PATH].")
]
Training = Annotated[
    str,
    typer.Option(metavar="SETTINGS", help="Of the training loop: optimizer=adamw,average=0.999."),
]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress display.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")]


def parse_seconds(text: str) -> float:
    """'90s', '30m', '1.5h', '2d' -> seconds. Raises InputError for anything else and for zero."""
    match = _DURATION.fullmatch(text)
    if not match or float(match[1]) == 0:
        raise InputError(f"--timeout {text!r} is not a duration: write 90s, 30m or 2h")
    return float(match[1]) * _SECONDS[match[2]]
