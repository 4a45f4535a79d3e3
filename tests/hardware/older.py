"""Profile files as earlier versions of the program wrote them."""

from __future__ import annotations

import re

_ADDED = ("provenance", "sources", "device", "memory", "roofline")


def as_version_1(text: str) -> str:
    """A file of today without what version 2 added, its measurements as they are."""
    text = re.sub(r"(?m)^version: 2$", "version: 1", text)
    text = re.sub(r"(?m)^  (must_agree|provider_options):.*\n", "", text)
    for section in _ADDED:
        text = re.sub(rf"(?m)^{section}:.*\n(?:[ ]+.*\n)*", "", text)
    return text
