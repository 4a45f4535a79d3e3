"""How requests and answers travel: one JSON object a line, which a payload of bytes may follow.

    {"do": "put", "digest": "…", "bytes": 1234}\\n<1234 bytes, deflated>

A part of the measuring program (see `probe.py`), used on both sides: standard library only, Python 3.9.
"""

from __future__ import annotations

import json
import zlib
from typing import IO, Any


def write_message(stream: IO[bytes], message: dict[str, Any], payload: bytes | None = None) -> None:
    """One message at once. Raises OSError where nobody reads any more."""
    if payload is None:
        stream.write(json.dumps(message).encode() + b"\n")
    else:
        # Level 1: weights hardly shrink however hard one tries, the structure of a model shrinks at once.
        packed = zlib.compress(payload, 1)
        stream.write(json.dumps({**message, "bytes": len(packed)}).encode() + b"\n" + packed)
    stream.flush()


def read_message(stream: IO[bytes]) -> tuple[dict[str, Any], bytes | None] | None:
    """The next message and its payload, None where the stream ends, even in the middle of one.

    Raises ValueError for a line that isn't a JSON object, or a payload that can't be inflated.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError(f"expected an object, found {line[:60]!r}")
    size = message.pop("bytes", None)
    if size is None:
        return message, None
    packed = stream.read(size)
    if len(packed) < size:
        return None
    try:
        return message, zlib.decompress(packed)
    except zlib.error as error:
        raise ValueError(f"a payload of {size} bytes can't be unpacked: {error}") from error
