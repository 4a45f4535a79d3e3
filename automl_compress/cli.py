"""The commands. They read options, call `automl_compress.api` and turn its outcome into an exit code; no logic here.

Standard output carries the result alone (with --json: one JSON object); everything else, whatever a library or the task
prints included, goes to standard error. torch and the like are imported only when a command runs.

Exit codes: 0 met and verified, 1 error, 2 usage or bad input, 3 no feasible model, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from automl_compress.core.budget import parse_budget
from automl_compress.deploy.summary import nearest_text, read_result, summarize
from automl_compress.errors import CompressError, InfeasibleError, InputError
from automl_compress.progress import Progress, SilentProgress, make_progress

PROG = "automl-compress"
EXIT_CODES = {"met": 0, "infeasible": 3, "interrupted": 130}
INTERRUPTED = 130
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smhd])\s*")
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
    """What the command line asks for: parsed, not yet begun. `run` gets the api module and returns the exit code."""

    run: Callable[[Any], int]
    folder: Path | None = None
    debug: bool = False


app = typer.Typer(
    name=PROG,
    help="Compress a trained PyTorch network until it meets a budget that is measured on the device.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 met and verified, 1 error, 2 usage or bad input, 3 no feasible model, 130 interrupted.",
)

Task = Annotated[str, typer.Argument(metavar="TASK", help="path/task.py[:function] or package.module[:function]")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Weights = Annotated[Path | None, typer.Option(metavar="FILE", help="Weights: .pt (tensors only) or .safetensors.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Run folder; the same one resumes.")]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress display.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")]


def _print_version(value: bool) -> None:
    if value:
        from automl_compress import __version__

        typer.echo(f"{PROG} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("worker", help="Join the search in --storage, with the same options.")
@app.command("search", help="Find and deliver the best model within a budget.")
def _search(
    ctx: typer.Context,
    task: Task,
    latency: Annotated[str | None, typer.Option(metavar="BUDGET", help="0.8ms, 350us or 40% of the original.")] = None,
    size: Annotated[str | None, typer.Option(metavar="BUDGET", help="Of the ONNX file: 300KB, 2MB or 60%.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="BUDGET", help="Peak of a fresh process: 2MB or 60%.")] = None,
    output: Output = None,
    profile: Annotated[str, typer.Option(metavar="NAME", help="Device profile: a name or a file.")] = "local",
    space: Annotated[str, typer.Option(metavar="NAME", help="Search space: a name or a file.")] = "cnn",
    trials: Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after so many trials.")] = None,
    epochs: Annotated[float | None, typer.Option(metavar="N", min=0, help="Epochs of the final distillation.")] = None,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Stop searching after 90s, 30m or 2h.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of everything that is random.")] = 0,
    sampler: Annotated[
        str, typer.Option(metavar="NAME", help="'budget', or the name of an Optuna sampler.")
    ] = "budget",
    weights: Weights = None,
    storage: Annotated[str | None, typer.Option(metavar="URL", help="Optuna storage to share the study in.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Action:
    worker = ctx.info_name == "worker"

    def run(api: Any) -> int:
        parse_budget(latency, size, memory)
        if worker and storage is None:
            raise InputError("worker: --storage is missing: name the storage of the search to join")
        options = {
            "latency": latency,
            "size": size,
            "memory": memory,
            "profile": profile,
            "space": space,
            "trials": trials,
            "epochs": epochs,
            "timeout": None if timeout is None else parse_seconds(timeout),
            "seed": seed,
            "sampler": sampler,
            "weights": weights,
            "storage": storage,
            "output": output,
        }
        with _stdout_to_stderr(), _display(quiet) as progress:
            api = api or import_module("automl_compress.api")
            outcome = (api.work if worker else api.compress)(task, progress=progress, **options)
        return _report_worker(outcome, as_json) if worker else _report(outcome.to_json(), as_json)

    return Action(run=run, folder=output, debug=debug)


@app.command("show", help="Show what a finished run found.")
def _show(run: Run, as_json: Json = False, debug: Debug = False) -> Action:
    def show(_api: Any) -> int:
        result = read_result(run)
        _print(json.dumps(result, indent=2) if as_json else summarize(result))
        return 0

    return Action(run=show, debug=debug)


@app.command("replay", help="Build a delivered model again from its plan.json.")
def _replay(
    run: Run, task: Task, output: Output = None, weights: Weights = None, quiet: Quiet = False, debug: Debug = False
) -> Action:
    def replay(api: Any) -> int:
        with _stdout_to_stderr(), _display(quiet) as progress:
            api = api or import_module("automl_compress.api")
            model = api.replay(run, task, output=output, weights=weights, progress=progress)
        _print(str(model))
        return 0

    return Action(run=replay, folder=output, debug=debug)


_command = typer.main.get_command(app)


def main(argv: Sequence[str] | None = None, *, api: Any = None) -> int:
    """Run one command line and return its exit code. `api` stands in for `automl_compress.api` (tests)."""
    try:
        action = _command.main(args=None if argv is None else list(argv), prog_name=PROG, standalone_mode=False)
    except typer.TyperException as error:
        return _fail(f"{' '.join(error.format_message().split())} (see {PROG} --help)", error.exit_code)
    return _guarded(action, api) if isinstance(action, Action) else int(action or 0)


def parse_seconds(text: str) -> float:
    """'90s', '30m', '1.5h', '2d' -> seconds. Raises InputError for anything else and for zero."""
    match = _DURATION.fullmatch(text)
    if not match or float(match[1]) == 0:
        raise InputError(f"--timeout {text!r} is not a duration: write 90s, 30m or 2h")
    return float(match[1]) * _SECONDS[match[2]]


def _guarded(action: Action, api: Any) -> int:
    """Run an action; whatever ends it early becomes one line on standard error and an exit code."""
    try:
        with _sigterm_as_interrupt():
            return action.run(api)
    except KeyboardInterrupt:
        again = " (the same command resumes it)" if action.folder else ""
        return _fail(f"interrupted{again}", INTERRUPTED)
    except InfeasibleError as error:
        return _fail("; ".join(filter(None, [str(error), nearest_text(error.nearest, error.binding)])), error.exit_code)
    except CompressError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        _abandon_stdout()
        return _fail("whoever read this program's output has stopped reading", 1)
    except OSError as error:
        if error.errno not in _OS_ERRORS:
            return _unexpected(error, action)
        _abandon_stdout()
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{(error.strerror or str(error)).lower()}{where}", _OS_ERRORS[error.errno])
    except MemoryError:
        return _fail("out of memory", 1)
    except (Exception, SystemExit) as error:
        return _unexpected(error, action)


def _unexpected(error: BaseException, action: Action) -> int:
    """A defect: one line for the user, the traceback in a file."""
    trace = "".join(traceback.format_exception(error))
    if action.debug:
        sys.stderr.write(trace)
    text = " ".join(str(error).split())
    where = _write_log(trace, action.folder)
    return _fail(f"unexpected {type(error).__name__}: {text[:300]}; the traceback is in {where} (--debug shows it)", 1)


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


def _report(result: Mapping[str, Any], as_json: bool) -> int:
    """Print a result; its status decides the exit code."""
    status = result["status"]
    _print(json.dumps(result, indent=2) if as_json else summarize(result))
    if status == "infeasible":
        found = nearest_text(result["nearest"], result["binding"])
        _fail("; ".join(filter(None, ["no reachable model meets the budget", found])), EXIT_CODES[status])
    return EXIT_CODES[status]


def _report_worker(trials: Mapping[str, int], as_json: bool) -> int:
    """Print how many trials a worker ran, by state."""
    text = ", ".join(f"{count} {state}" for state, count in trials.items()) or "none; nothing was left to do"
    _print(json.dumps(dict(trials)) if as_json else f"trials run by this worker: {text}")
    return 0


def _print(text: str) -> None:
    # Flushed here, so that a full disk or a closed pipe is noticed while it can still become an exit code.
    print(text, flush=True)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"error: {message}" if code != INTERRUPTED else message, file=sys.stderr, flush=True)
    return code


def _display(quiet: bool) -> Progress:
    return SilentProgress() if quiet else make_progress(sys.stderr)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
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


def _abandon_stdout() -> None:
    """Point standard output at nothing, or Python would fail again on flushing it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
