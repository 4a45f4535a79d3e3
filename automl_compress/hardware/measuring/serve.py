"""The serving side of the measuring program: requests in, answers out, and nothing left behind.

A part of the measuring program (see `probe.py`): standard library only, Python 3.9.

One measurement at a time runs on a machine, whoever asks for it and from wherever: `turn` holds a lock that all
measuring processes of the machine share ($AUTOML_COMPRESS_LOCK, else a file in its folder for temporary files).
"""

from __future__ import annotations

import errno
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .wire import read_message, write_message

Say = Callable[[dict[str, Any]], None]
Answer = Callable[[dict[str, Any], dict[str, Any], Say], dict[str, Any]]

# A sign of life while there is nothing to do: a connection that has silently gone is noticed only by writing to it.
IDLE_S = 60.0
WAITING_S = 10.0
LONGEST_TURN_S = 3600.0
LONGEST_CHILD_S = 600.0
# A limit on the size of files is the third way in which there can be no more room.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_children: set[subprocess.Popen[str]] = set()


def serve(program: str, folder: str, answer: Answer) -> None:
    """Answer requests until stdin closes, even in the middle of a measurement; then remove `folder` and end.

    `folder` holds what the other side puts there. The first message is `{"settings": ...}`.
    """
    out = os.fdopen(os.dup(1), "wb")
    # The runtime's own chatter must not get between the answers.
    os.dup2(2, 1)
    speaking = threading.Lock()

    def say(message: dict[str, Any], payload: bytes | None = None) -> None:
        try:
            with speaking:
                write_message(out, message, payload)
        except OSError:
            leave(folder)

    def listen() -> None:
        try:
            message = read_message(sys.stdin.buffer)
            while message is not None:
                messages.put(message)
                message = read_message(sys.stdin.buffer)
        finally:
            leave(folder)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: leave(folder))
    messages: queue.Queue[tuple[dict[str, Any], bytes | None]] = queue.Queue()
    say({"hello": os.getpid(), "folder": folder})
    # Not before: a stdin that closes at once would end the process while it greets.
    threading.Thread(target=listen, daemon=True).start()
    settings: dict[str, Any] = {}
    trouble = ""
    while True:
        try:
            message, payload = messages.get(timeout=IDLE_S)
        except queue.Empty:
            say({"progress": "idle"})
            continue
        if "settings" in message:
            settings = {**message["settings"], "program": program}
        elif "remove" in message:
            discard(message["remove"])
        elif "put" in message:
            trouble = trouble or store(message["put"], payload or b"")
        elif trouble:
            say({"ok": False, "error": trouble})
            trouble = ""
        else:
            wanted = message.pop("fetch", None)
            found = answer(message, settings, say)
            say(*(fetched(wanted, found) if wanted and found["ok"] else (found,)))


def discard(paths: list[str]) -> None:
    for path in paths:
        with suppress(OSError):
            os.unlink(path)


def store(path: str, content: bytes) -> str:
    """Write what the other side put; returns what went wrong, which the next request is answered with."""
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        discard([path])
        return in_one_line(error)
    return ""


def fetched(path: str, found: dict[str, Any]) -> tuple[dict[str, Any], bytes | None]:
    """An answer together with a file that came of it, which is then removed here."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        os.unlink(path)
    except OSError as error:
        return {"ok": False, "error": in_one_line(error)}, None
    return found, content


def in_one_line(error: Exception) -> str:
    """What went wrong, for a person at the other side."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed for {sys.executable}: {sys.executable} -m pip install {error.name}"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"the disk is full, {error.filename or tempfile.gettempdir()} can't be written; free some space there"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def leave(folder: str) -> None:
    """End at once, and leave neither a process nor a file behind."""
    for child in list(_children):
        child.kill()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def run_again(
    arguments: list[str], settings: dict[str, Any], say: Say, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """This program in a fresh process, `python program *arguments`; returns the JSON object of its last line.

    `environment` adds variables to those of this process.
    """
    command = [sys.executable, settings["program"], *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            universal_newlines=True,
            env={**os.environ, **(environment or {})},
        )
        _children.add(child)
        try:
            out = _output(child, say)
        finally:
            child.kill()
            child.wait()
            _children.discard(child)
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"its process failed: {last_line(errors.read()) or f'exit code {child.returncode}'}")
    found: dict[str, Any] = json.loads(last_line(out))
    return found


def _output(child: subprocess.Popen[str], say: Say) -> str:
    waited = 0.0
    while True:
        try:
            return child.communicate(timeout=WAITING_S)[0]
        except subprocess.TimeoutExpired:
            waited += WAITING_S
            if waited >= LONGEST_CHILD_S:
                raise RuntimeError(f"its process took longer than {LONGEST_CHILD_S:g} s") from None
            say({"progress": f"waiting for a process, {waited:g} s"})


@contextmanager
def turn(say: Say, path: str | None = None) -> Iterator[None]:
    """Hold the machine. Says so once where it has to wait; raises RuntimeError after waiting for an hour."""
    path = path or lock_path()
    try:
        # Opened for reading only, so that the file of another user will do.
        lock = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        lock = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        os.fchmod(lock, 0o644)
    try:
        _lock(lock, path, say)
        yield
    finally:
        os.close(lock)


def lock_path() -> str:
    """The lock that all who measure on this machine share. Containers on one machine can be given a common one."""
    common = "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()
    return os.environ.get("AUTOML_COMPRESS_LOCK") or os.path.join(common, "automl-compress-measuring.lock")


def _lock(lock: int, path: str, say: Say) -> None:
    try:
        import fcntl
    except ImportError:
        say({"notice": "this system has no file locks: see to it that only one program measures at a time"})
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        say({"notice": "another process is measuring on this device; waiting for it to finish"})
    # Waiting in the kernel's queue, since whoever only looks from time to time may never find the lock free.
    held = threading.Event()

    def wait(own: int) -> None:
        fcntl.flock(own, fcntl.LOCK_EX)
        os.close(own)  # the lock stays with the original, unless nobody waits for it any more
        held.set()

    threading.Thread(target=wait, args=(os.dup(lock),), daemon=True).start()
    waited = 0.0
    while not held.wait(WAITING_S):
        waited += WAITING_S
        if waited >= LONGEST_TURN_S:
            raise RuntimeError(f"another process has been measuring for an hour (it holds {path}); end it")
        say({"progress": f"waiting for another process, {waited:g} s"})


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
