"""How fast is the training loop beside a bare PyTorch loop that makes the same steps?

Both train the pretrained ResNet-20 on CIFAR-10 by the default recipe: same losses, batches, precision, layout,
optimizer, schedule and clipping. They take turns in bursts, so that a drift of the machine meets both; a burst's first
steps, with what is set up once, are not counted. The figure is the median over the bursts of bare time over the loop's.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time

import torch
from common import parser, write_figures
from one_shot import EXAMPLE
from torch import nn

from automl_compress.core.plan import Plan
from automl_compress.model.surgery import copy_model
from automl_compress.model.task import Task, load_task
from automl_compress.model.trace import trace
from automl_compress.techniques.distillation.losses import DEFAULT, parse_losses
from automl_compress.techniques.distillation.objective import Distillation
from automl_compress.techniques.distillation.pairing import pair_layers
from automl_compress.techniques.training.log import StepReport
from automl_compress.techniques.training.loop import train
from automl_compress.techniques.training.optimizers import make_optimizer
from automl_compress.techniques.training.placement import Placement
from automl_compress.techniques.training.settings import Resources, Training

SKIPPED = 5


def throughput(task: Task, *, bursts: int, steps: int, training: Training | None = None) -> dict[str, float]:
    """Images per second of both loops, and the loop's share of the bare one's speed."""
    training = training or Training()
    ratios, ours, theirs = [], [], []
    samples = len(next(task.batches("train"))[1])
    for _ in range(bursts):
        theirs.append(_bare(task, steps, training))
        ours.append(_loop(task, steps, training))
        ratios.append(theirs[-1] / ours[-1])
    return {
        "images_per_second_bare": samples / statistics.median(theirs),
        "images_per_second_loop": samples / statistics.median(ours),
        "loop_share_of_bare": statistics.median(ratios),
        "loop_share_lowest": min(ratios),
        "loop_share_highest": max(ratios),
    }


def _loop(task: Task, steps: int, training: Training) -> float:
    """Seconds a step."""
    moments: list[float] = []

    def on_step(report: StepReport) -> None:
        moments.append(time.perf_counter())
        if report.step == steps + SKIPPED:
            raise StopIteration

    with contextlib.suppress(StopIteration):
        train(copy_model(task.model), task, _objective(task), training, on_step=on_step)
    return (moments[-1] - moments[SKIPPED - 1]) / steps


def _objective(task: Task) -> Distillation:
    """What candidates of a search learn, for a student from which nothing was cut."""
    pairs = pair_layers(trace(task.model, task.example_inputs), Plan(), task.model)
    return Distillation(task, task.model, parse_losses(DEFAULT), pairs)


def _bare(task: Task, steps: int, training: Training) -> float:
    """Seconds a step of what one would write by hand."""
    student, objective = copy_model(task.model), _objective(task)
    placement = Placement.choose(student, Resources())
    bfloat16 = placement.precision == torch.bfloat16
    student.to(placement.device)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    student.train()
    optimizer = make_optimizer(student, None, training)
    total = round(training.epochs * len(task.train))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=training.learning_rate, total_steps=total)
    torch.manual_seed(0)
    start = 0.0
    for number, (inputs, targets) in enumerate(itertools.islice(task.batches("train"), steps + SKIPPED)):
        if number == SKIPPED:
            start = time.perf_counter()
        images = tuple(part.to(placement.device, memory_format=torch.channels_last) for part in inputs)
        optimizer.zero_grad()
        with torch.autocast(placement.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            loss = objective(student, (images, targets.to(placement.device))).total
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(student.parameters(), training.clip)
        optimizer.step()
        schedule.step()
    return (time.perf_counter() - start) / steps


def main() -> None:
    options = parser(__doc__.splitlines()[0], data=True, weights=True)
    given = options.parse_args()
    os.environ |= {"AC_DATA_DIR": str(given.data), "AC_WEIGHTS_DIR": str(given.weights)}
    task = load_task(str(EXAMPLE))
    figures = throughput(task, bursts=4 if given.quick else 12, steps=10 if given.quick else 20)
    write_figures(given.json, "throughput", figures, quick=given.quick)


if __name__ == "__main__":
    main()
