"""The names of recovery modes, for those who only ask for one."""

from __future__ import annotations

from automl_compress.errors import InputError, did_you_mean

NAMES = {
    "fine-tune": "the plan is in force from the start",
    "gradual": "the plan comes into force step by step, with training in between",
    "curriculum": "gradual, and at first the easy samples of each batch",
    "end-to-end": "one training from the original's weights, in which masks close and bits get fewer",
    "from-scratch": "the same from fresh weights, at five times the learning rate",
}
DEFAULT_MODE = "fine-tune"


def check_mode(name: str) -> str:
    """The name itself. Raises InputError if there is no such mode."""
    if name not in NAMES:
        raise InputError(f"recovery {name!r} is unknown; choose one of {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    return name
