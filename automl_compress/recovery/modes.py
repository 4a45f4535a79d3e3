"""The modes of recovery; `names` says in a few words what each does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from automl_compress.recovery.end_to_end import end_to_end
from automl_compress.recovery.fine_tune import fine_tune
from automl_compress.recovery.gradual import gradual
from automl_compress.recovery.job import Job, Recovered
from automl_compress.recovery.names import check_mode
from automl_compress.recovery.students import of_fresh_weights

Mode = Callable[[Job], Recovered]


def curriculum(job: Job) -> Recovered:
    """Gradual recovery that begins with what is easy for the teacher."""
    return gradual(replace(job, easy_first=True))


def from_scratch(job: Job) -> Recovered:
    """End-to-end recovery from fresh weights."""
    return end_to_end(replace(job, scratch=True, training=of_fresh_weights(job.training)))


MODES: dict[str, Mode] = {
    "fine-tune": fine_tune,
    "gradual": gradual,
    "curriculum": curriculum,
    "end-to-end": end_to_end,
    "from-scratch": from_scratch,
}


def mode_of(name: str) -> Mode:
    """The mode of this name. Raises InputError."""
    return MODES[check_mode(name)]
