"""How requests and answers travel: one JSON object a line, which a payload of bytes may follow.

    {"put": "/tmp/…/model.onnx", "bytes": 1234, "deflated": true}\\n<1234 bytes>

A part of the measuring program (see `probe.py`), used on both sides: standard library only, Python 3.9.
"""

from __future__ import annotations

import json
import zlib
from typing import IO, Any

_SAMPLE_BYTES = 16384


def write_message(stream: IO[bytes], message: dict[str, Any], payload: bytes | None = None) -> None:
    """One message at once. Raises OSError where nobody reads any more."""
    if payload is None:
        stream.write(json.dumps(message).encode() + b"\n")
    else:
        deflated = _shrinks(payload)
        packed = zlib.compress(payload, 1) if deflated else payload
        stream.write(json.dumps({**message, "bytes": len(packed), "deflated": deflated}).encode() + b"\n" + packed)
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
    deflated = message.pop("deflated", False)
    packed = stream.read(size)
    if len(packed) < size:
        return None
    try:
        return message, zlib.decompress(packed) if deflated else packed
    except zlib.error as error:
        raise ValueError(f"a payload of {size} bytes can't be unpacked: {error}") from error


def _shrinks(payload: bytes) -> bool:
    """Whether deflating is worth its time, by a sample: trained weights aren't, the structure of a model is."""
    middle = payload[len(payload) // 2 :][:_SAMPLE_BYTES]
    return len(zlib.compress(middle, 1)) < 0.8 * len(middle)
