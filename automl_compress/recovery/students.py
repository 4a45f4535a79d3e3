"""Students that compete with the one that inherits the teacher's weights, and students of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from automl_compress.errors import InputError, did_you_mean
from automl_compress.techniques.training.settings import Training

INHERITED, SCRATCH, OWN = "inherited", "scratch", "own"
NAMES = {
    INHERITED: "cut from the teacher, with its weights; always there",
    SCRATCH: "the best plan's structure from fresh weights",
    OWN: "made by student(width) of the task",
}
# What student(width) is asked for, widest first; the first that fits the budget is trained.
WIDTHS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)


def parse_students(text: str | None, *, has_own: bool = False) -> tuple[str, ...]:
    """`scratch+own` -> ('scratch', 'own'); None: 'own' where the task has a student of its own, else nothing.

    `inherited` may be named, and isn't returned. Raises InputError.
    """
    if text is None:
        return (OWN,) if has_own else ()
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in NAMES:
            near = did_you_mean(name, NAMES)
            raise InputError(f"students {text!r}: unknown student {name!r}; there are: {', '.join(NAMES)}{near}")
    return tuple(name for name in dict.fromkeys(names) if name != INHERITED)


def of_fresh_weights(training: Training) -> Training:
    """The same at five times the learning rate: fresh weights have further to go than those that knew the task. In a
    whole network that many steps train, Muon stays ahead of SGD, other than in a fresh head alone (see `transfer`)."""
    return replace(training, learning_rate=5 * training.learning_rate)


def require_own(factory: Callable[..., object] | None) -> None:
    """Raise InputError where the task has no student of its own."""
    if factory is None:
        raise InputError(
            "students 'own': the task has none; define student(width) beside task() in the task file, or give "
            "Task(student=...)"
        )
