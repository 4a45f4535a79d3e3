"""What the system tells in small text files (/proc, /sys); one that isn't there says nothing.

A part of the measuring program (see `probe.py`): standard library only, Python 3.9.
"""

from __future__ import annotations


def read_text(path: str) -> str:
    """The file's text; empty where it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def read_number(path: str) -> int | None:
    """The whole number that the file holds, None where it holds none."""
    try:
        return int(read_text(path))
    except ValueError:
        return None
