"""What `profile` was asked for, checked before anything slow: without torch, and without starting a runtime."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from automl_compress.errors import InputError, TaskError
from automl_compress.hardware.device.dialogue import LOCAL
from automl_compress.hardware.device.remote import link_to
from automl_compress.hardware.profile.profile import load_profile, locate
from automl_compress.model.task_file import require_task_file
from automl_compress.search.space.rules import load_space


def require_sense(
    tasks: Iterable[object],
    *,
    kernels: str | None,
    space: str,
    weights: str | Path | None,
) -> None:
    """Raise CompressError for whatever the arguments alone show to be wrong; see `api.profile`."""
    wanted = list(tasks)
    if kernels not in (None, "standard"):
        raise InputError(f"unknown kernels {kernels!r}: the only set is 'standard'")
    if not wanted and kernels is None:
        raise InputError("nothing to profile: name a task, or kernels='standard' (--kernels standard)")
    for task in wanted:
        if isinstance(task, str):
            require_task_file(task)
    if weights is not None and not Path(weights).is_file():
        raise TaskError(f"--weights {weights}: no such file")
    load_space(space)


def require_profile(profile: str, device: str, threads: int | None) -> None:
    """Raise CompressError for a profile that can't be read, or is another machine's.

    A device elsewhere isn't reached for that, so whether a profile is of it is found out later.
    """
    if link_to(device) is LOCAL:
        load_profile(profile, threads=threads).require_match()
    else:
        locate(profile)
