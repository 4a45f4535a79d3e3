"""What goes where: standard output carries the result alone (with --json: one JSON object); everything else, whatever
a library or the task prints included, goes to standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from automl_compress.progress import Progress, SilentProgress, make_progress

PROG = "automl-compress"
INTERRUPTED = 130


def print_result(text: str) -> None:
    # Flushed here, so that a full disk or a closed pipe is noticed while it can still become an exit code.
    print(text, flush=True)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, words: Sequence[str] = ()) -> str:
    """Rows as left-aligned columns, numbers to the right, except in the columns named by `words`."""
    lines = [tuple(headers), *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [
        header not in words and all(_is_number(line[i]) for line in lines[1:]) for i, header in enumerate(headers)
    ]
    cells = ([c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] == "-"


def fail(message: str, code: int) -> int:
    """Say in one line what ended the command, and return its exit code."""
    with contextlib.suppress(OSError):
        print(f"error: {message}" if code != INTERRUPTED else message, file=sys.stderr, flush=True)
    return code


def display(quiet: bool) -> Progress:
    return SilentProgress() if quiet else make_progress(sys.stderr)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what anybody prints to standard error: Python's `print`, C libraries and child processes alike."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def abandon_stdout() -> None:
    """Point standard output at nothing, or Python would fail again on flushing it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
