"""Running a command that was parsed: whatever ends it early becomes one line on standard error and an exit code."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from automl_compress.cli.output import INTERRUPTED, PROG, abandon_stdout, fail
from automl_compress.deploy.summary import nearest_text
from automl_compress.errors import CompressError, InfeasibleError

# An unwritable place was named by the user; a full disk was not.
_OS_ERRORS = {
    errno.EACCES: 2,
    errno.EPERM: 2,
    errno.EROFS: 2,
    errno.ENOSPC: 1,
    errno.EDQUOT: 1,
}


@dataclass(frozen=True, kw_only=True)
class Action:
    """What the command line asks for: parsed, not yet begun. `run` gets the api module and returns the exit code.

    folder   what it works in: the same command goes on there after an interruption
    resumes  whether it goes on without such a folder
    """

    run: Callable[[Any], int]
    folder: Path | None = None
    resumes: bool = False
    debug: bool = False


def guarded(action: Action, api: Any) -> int:
    """Run an action and return its exit code; `api` stands in for `automl_compress.api` where it isn't None."""
    try:
        with _sigterm_as_interrupt():
            return action.run(api)
    except KeyboardInterrupt:
        again = " (the same command resumes it)" if action.folder or action.resumes else ""
        return fail(f"interrupted{again}", INTERRUPTED)
    except InfeasibleError as error:
        return fail("; ".join(filter(None, [str(error), nearest_text(error.nearest, error.binding)])), error.exit_code)
    except CompressError as error:
        return fail(str(error), error.exit_code)
    except BrokenPipeError:
        abandon_stdout()
        return fail("whoever read this program's output has stopped reading", 1)
    except OSError as error:
        if error.errno not in _OS_ERRORS:
            return _unexpected(error, action)
        abandon_stdout()
        where = f": {error.filename}" if error.filename else ""
        return fail(f"{(error.strerror or str(error)).lower()}{where}", _OS_ERRORS[error.errno])
    except MemoryError:
        return fail("out of memory", 1)
    except (Exception, SystemExit) as error:
        return _unexpected(error, action)


def _unexpected(error: BaseException, action: Action) -> int:
    """A defect: one line for the user, the traceback in a file."""
    trace = "".join(traceback.format_exception(error))
    if action.debug:
        sys.stderr.write(trace)
    text = " ".join(str(error).split())
    where = _write_log(trace, action.folder)
    return fail(f"unexpected {type(error).__name__}: {text[:300]}; the traceback is in {where} (--debug shows it)", 1)


def _write_log(trace: str, folder: Path | None) -> str:
    """Into the run folder where there is one, else, or when that fails, among the temporary files."""
    if folder is not None and folder.is_dir():
        path = folder / "error.log"
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as log:
            log.write(trace)
            return str(path)
    try:
        with tempfile.NamedTemporaryFile("w", prefix=f"{PROG}-", suffix=".log", delete=False, encoding="utf-8") as log:
            log.write(trace)
            return log.name
    except OSError as error:
        return f"no file, for none could be written ({error.strerror})"


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
