"""What goes where: standard output carries the result alone (with --json: one JSON object); everything else, whatever
a library or the task prints included, goes to standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from automl_compress.progress import Progress, SilentProgress, make_progress

PROG = "automl-compress"
INTERRUPTED = 130


def print_result(text: str) -> None:
    # Flushed here, so that a full disk or a closed pipe is noticed while it can still become an exit code.
    print(text, flush=True)


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
