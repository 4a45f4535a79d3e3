"""Reading, locking and writing profile files, with what goes wrong as one line that says what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from automl_compress.errors import CompressError, ProfileError

APPEND_TIMEOUT_S = 60.0
_ELSEWHERE = "set AUTOML_COMPRESS_HOME to a folder of yours"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def unwritable(path: Path, error: OSError) -> CompressError:
    """What to raise for a file that can't be written."""
    if error.errno == errno.ENOENT:
        return ProfileError(f"{path}: can't be written, there is no folder {path.parent}; make it, or name another")
    if error.errno in _FULL:
        kept = "what was measured before is kept; free some space and run the same again"
        return CompressError(f"{path}: can't be written ({error.strerror}); {kept}")
    return ProfileError(f"{path}: can't be written ({error.strerror}); {_ELSEWHERE}")


def read_bytes(path: Path, offset: int = 0) -> bytes:
    """The file from `offset` on. Raises ProfileError."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read()
    except OSError as error:
        raise ProfileError(f"{path}: can't be read ({error.strerror})") from error


def decode(data: bytes, path: Path) -> str:
    """Bytes as text, of which the last line may be cut off in the middle of a character. Raises ProfileError."""
    if b"\r\n" in data:
        raise ProfileError(f"{path}: its lines end in CR LF; save it with LF alone, which is what the program appends")
    complete, newline, rest = data.rpartition(b"\n")
    try:
        return (complete + newline).decode() + rest.decode(errors="replace")
    except UnicodeDecodeError as error:
        line = complete[: error.start].count(b"\n") + 1
        raise ProfileError(f"{path}, line {line}: not a text in UTF-8; restore the file or delete it") from error


def append(path: Path, offset: int, data: bytes) -> None:
    """Make `data` what follows `offset`, on the disk when this returns; if it doesn't fit, the file stays as it was.

    What stood after `offset` is lost: the rest of a line that a kill cut off. Raises CompressError if it can't be
    written.
    """
    try:
        with open(path, "r+b", buffering=0) as file:
            file.truncate(offset)
            file.seek(offset)
            try:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(offset)
                raise
    except OSError as error:
        raise unwritable(path, error) from error


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file, or leave the one that is there. Raises CompressError if it can't be written."""
    part = path.with_name(path.name + ".part")
    try:
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def locked(path: Path, timeout_s: float, otherwise: Exception) -> Iterator[None]:
    """Hold a lock file; `otherwise` is raised when another process holds it for longer than `timeout_s`."""
    try:
        lock = FileLock(path)
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise otherwise from error
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock of one profile file for as long as it is written or read."""
    lock = path.with_name(path.name + ".lock")
    busy = ProfileError(f"{path}: another process has held {lock} for a minute; end it")
    with locked(lock, APPEND_TIMEOUT_S, busy):
        yield
