"""Everything that can go wrong in a way that a user can act on.

Every error that reaches a user is a `CompressError`; its text is one line that names what was wrong, the value that was
found, and the way out. The command line prints that line and ends with the error's `exit_code`. Anything else that is
raised is a defect of this program.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CompressError(Exception):
    """Base of all errors that a user can act on. `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(CompressError):
    """Something that the user wrote or named is wrong: a path, an option, a budget, a file's content."""

    exit_code = 2


class TaskError(InputError):
    """The task file, or what its function returned, can't be used."""


class ProfileError(InputError):
    """A device profile is missing, damaged, foreign, or doesn't describe this device."""


class SpaceError(InputError):
    """A search space file is wrong, or one of its rules matches nothing."""


class PlanError(InputError):
    """A plan doesn't fit the model that it is applied to."""


class RunFolderError(InputError):
    """The run folder belongs to another task, can't be written, or is damaged."""


class StorageError(RunFolderError):
    """What a run leaves behind can't be written: the disk is full, or the folder is gone."""

    exit_code = 1


class DeviceError(CompressError):
    """The device could not be measured: the measuring process failed or the device is unreachable."""


class ExportError(CompressError):
    """The model could not be turned into ONNX, or the runtime refuses the result."""


class TrainingError(CompressError):
    """Training diverged or the data loader failed."""


class InfeasibleError(CompressError):
    """No reachable model meets the budget.

    `nearest` maps each budget's name to the lowest value that the space can reach; `binding` names the layers that
    take most of what is left.
    """

    exit_code = 3

    def __init__(self, message: str, *, nearest: dict[str, float] | None = None, binding: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.nearest = dict(nearest or {})
        self.binding = binding


class Interrupted(CompressError):
    """The user stopped the run; everything up to here is in the run folder."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """What an error says, without what follows the first line of it; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def raised(error: BaseException) -> str:
    """`OSError: gone`, of something that the user's code raised."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


# What evaluating or training one plan may end with.
FAILURES = (CompressError, RuntimeError, MemoryError)


def ends_all(failure: Exception) -> bool:
    """Whether no other plan would do better: the run was stopped, or something is to be mended first. What a user's
    own functions raise they may raise on one model alone."""
    if not isinstance(failure, CompressError) or isinstance(failure, (TaskError, PlanError)):
        return False
    return failure.exit_code != CompressError.exit_code or isinstance(failure, StorageError)


def passed_over(failure: Exception) -> str:
    """The line that says why one plan failed. Raises `failure` again where others wouldn't do better."""
    if ends_all(failure):
        raise failure
    return first_line(failure)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that isn't known: the nearest of those that are, nothing where none is near."""
    near = get_close_matches(name.lower(), list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""
