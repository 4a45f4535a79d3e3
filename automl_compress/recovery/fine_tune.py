"""Fine-tuning: the plan is in force from the start, and the smaller model trains; masked weights stay zero."""

from __future__ import annotations

from automl_compress.recovery.job import Job, Recovered


def fine_tune(job: Job) -> Recovered:
    """Cut, repair, train."""
    model = job.make(job.plan, job.teacher)
    log = job.train(model, job.objective(job.plan), "", job.held(model, job.plan), validate=job.validate)
    return Recovered(model=model, plan=job.plan, logs=(log,))
