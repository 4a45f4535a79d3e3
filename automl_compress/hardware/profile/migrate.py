"""Older versions of the profile file, brought up to date as text, so that people's comments stay.

Keys of kernels that were written when defaults of later opsets still were part of them mean what they mean without.
"""

from __future__ import annotations

import re

from automl_compress.errors import ProfileError

VERSION = 2
_VERSION_LINE = re.compile(r"(?m)^version:[ \t]*(\d+)")
# Defaults of Quantize and Dequantize that only opsets from 21 on write out: what is executed is the same.
UNSAID = frozenset({"block_size=0", "output_dtype=0", "precision=0"})
_FROM_1_TO_2 = """
# What version 2 of the format added; the values are what version 1 stood for.
provenance: measured
device:
  memory_bytes: null
  storage_bytes: null
memory:
  model: process
"""


def upgraded(head: str, where: str) -> str:
    """A header's text in today's version. Measurement lines of version 1 are lines of version 2 as they are.

    `where` names the file. Raises ProfileError if the line that says the version isn't found.
    """
    found = _VERSION_LINE.search(head)
    if not found:
        raise ProfileError(
            f"{where}: no line begins with 'version:', write it as one, or this older file can't be read"
        )
    if int(found[1]) == 1:
        head = f"{_VERSION_LINE.sub('version: 2', head, count=1).rstrip()}\n{_FROM_1_TO_2}"
    return head


def upgraded_key(key: str) -> str:
    """A kernel's key as it is written today."""
    if not any(word in key for word in UNSAID):
        return key
    parts = ([word for word in part.split(" ") if word not in UNSAID] for part in key.split("|"))
    return "|".join(" ".join(words) for words in parts if words)
