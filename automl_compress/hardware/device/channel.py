"""A running measuring process, on this machine or behind any command that connects stdin and stdout with a Python.

The program travels over stdin together with the requests, and its files go when it ends: nothing has to be installed on
the other side, and nothing stays there.
"""

from __future__ import annotations

import io
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from automl_compress.errors import DeviceError
from automl_compress.hardware.measuring.wire import read_message, write_message

_PROGRAM = Path(__file__).parents[1] / "measuring"
OLDEST_PYTHON = (3, 9)
# Runs in whatever Python is called; older ones must understand it well enough to say that they are too old. No line
# breaks and no single quotes: it has to pass through shells.
BOOTSTRAP = (
    f"import sys; sys.version_info >= {OLDEST_PYTHON} or "
    f'sys.exit("Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or later is needed, found " + sys.version.split()[0]); '
    "exec(sys.stdin.buffer.read(int(sys.argv[1])))"
)
# What runs next: unpacks the program into a folder that it removes when it ends. A process that was killed could not;
# nobody holds the lock in its folder any more, by which the next one knows. argv: -c, size of this text, size of the
# program, folder for temporary files (or nothing).
LOADER = """
import sys
sys.path[:] = [path for path in sys.path if path]  # a file of the user's could shadow a standard module
import glob, os, runpy, shutil, tempfile
program = sys.stdin.buffer.read(int(sys.argv[2]))
folder = tempfile.mkdtemp(prefix="automl-compress-", dir=sys.argv[3] if len(sys.argv) > 3 else None)
try:
    import fcntl
    own = open(os.path.join(folder, "unlocked"), "w")
    fcntl.flock(own, fcntl.LOCK_EX)
    os.rename(own.name, os.path.join(folder, "held"))
    for path in glob.glob(os.path.join(os.path.dirname(folder), "automl-compress-*", "held")):
        try:
            with open(path) as other:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(os.path.dirname(path), ignore_errors=True)
        except OSError:
            pass
except ImportError:
    pass
os.environ["TMPDIR"] = tempfile.tempdir = folder
try:
    path = os.path.join(folder, "probe.pyz")
    with open(path, "wb") as file:
        file.write(program)
    sys.argv[:] = [path, folder]
    runpy.run_path(path, run_name="__main__")
finally:
    shutil.rmtree(folder, ignore_errors=True)
"""
_MAIN = "import sys\nfrom measuring.probe import main\nmain(sys.argv)\n"
_GRACE_S = 2.0


class ConnectionLost(DeviceError):
    """The way to the measuring process broke while it was in use; it may be there again at once."""


class Channel(Protocol):
    """A running measuring process.

    `send` one request; `receive` one message of its answer, None when the process has ended, TimeoutError when nothing
    came, ConnectionLost when the way to it broke. `close` ends it and returns its last words.
    """

    def send(self, request: Mapping[str, Any]) -> None: ...
    def receive(self, timeout_s: float) -> dict[str, Any] | None: ...
    def close(self) -> str: ...


Launcher = Callable[[Mapping[str, Any]], Channel]


def program() -> bytes:
    """The measuring program in one file that Python runs; the same bytes each time."""
    buffer = io.BytesIO()
    sources = {f"measuring/{path.name}": path.read_bytes() for path in sorted(_PROGRAM.glob("*.py"))}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, source in {"__main__.py": _MAIN.encode(), **sources}.items():
            archive.writestr(zipfile.ZipInfo(name), source, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def hold(folder: Path) -> IO[str] | None:
    """Mark a folder as in use for as long as the file is open, however this process ends; see LOADER."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    own = open(folder / "unlocked", "w")  # noqa: SIM115 - it stays open
    fcntl.flock(own, fcntl.LOCK_EX)
    os.rename(own.name, folder / "held")
    return own


def here(arguments: Sequence[str]) -> list[str]:
    """The command that runs Python with these arguments on this machine."""
    return [sys.executable, *arguments]


class ProcessChannel:
    """The measuring program as a process.

    `command` turns Python's arguments into the command to start (default: this machine's own Python). Raises
    DeviceError if it can't be started; what happens to it later shows in `receive`.
    """

    def __init__(
        self, settings: Mapping[str, Any], *, command: Callable[[Sequence[str]], Sequence[str]] = here, folder: str = ""
    ) -> None:
        code = program()
        # The sizes are arguments, so that nothing else on the way can decide what is read as code.
        words = command(["-c", BOOTSTRAP, str(len(LOADER)), str(len(code)), *([folder] if folder else [])])
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._messages: queue.Queue[tuple[dict[str, Any], bytes | None] | ValueError | None] = queue.Queue()
        self._is_here = command is here
        self._ready = threading.Event()
        self._words = ""
        self.folder = ""
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                # Ctrl-C must reach this program only, which then ends the process in an orderly way.
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise DeviceError(f"can't start the measuring process with {words[0]}: {error.strerror}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        threading.Thread(target=self._listen, daemon=True).start()
        with suppress(OSError):  # it has ended; `receive` reports that, with its reason
            self._stdin.write(LOADER.encode() + code)
        self.send({"settings": dict(settings)})

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int:
        """Of the command, once it has ended."""
        return int(self._process.returncode)

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Whether the program runs; False if it has ended, or isn't there in time."""
        return self._ready.wait(timeout_s) and bool(self.folder)

    def send(self, request: Mapping[str, Any], payload: bytes | None = None) -> None:
        with suppress(OSError):
            write_message(self._stdin, dict(request), payload)

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        received = self.receive_all(timeout_s)
        return received[0] if received else None

    def receive_all(self, timeout_s: float) -> tuple[dict[str, Any], bytes | None] | None:
        """The next message with the payload that came with it, None when the process has ended."""
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty as error:
            raise TimeoutError from error
        if isinstance(message, ValueError):
            raise message
        return message

    def close(self) -> str:
        """End the process; returns the last line that it wrote to stderr, or its exit code."""
        return self.last_words().rstrip().rpartition("\n")[2].strip() or f"exit code {self.exit_code}"

    def last_words(self) -> str:
        """End the process; returns all that it wrote to stderr."""
        with suppress(OSError):
            self._stdin.close()  # which is how it is told to end
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            if self._is_here and self.folder:
                shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self._stdout.close()
        if not self._errors.closed:
            self._errors.seek(0)
            self._words = self._errors.read().decode(errors="replace")
            self._errors.close()
        return self._words

    def _listen(self) -> None:
        greeted = False
        while True:
            try:
                received = read_message(self._stdout)
            except ValueError as error:
                if self._stdout.closed:
                    return
                if greeted:  # before that a login shell may say what it likes
                    self._messages.put(error)
                continue
            if received and "hello" in received[0]:
                greeted, self.folder = True, str(received[0]["folder"])
                self._ready.set()
                continue
            self._messages.put(received)
            if received is None:
                self._ready.set()
                return
