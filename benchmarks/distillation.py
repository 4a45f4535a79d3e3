"""What does a training step cost with each distillation loss, and what does a remembered teacher save of it?

A ResNet-20 that lost 27 % of its blocks' inner channels learns from the whole one, in batches of 128 images without
augmentation, one thread. `milliseconds` is the median of a step's processor time in the second epoch, `remembered` that
with a cache that has seen all images in the first, `saved` the difference as a share of the former. Beside them a step
without a teacher.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

from common import parser, write_rows

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cifar10_resnet20" / "task.py"
LOSSES = ("task", "soft", "logit", "dkd", "dist", "soft+features", "soft+attention")
BATCH = 128


def main() -> None:
    options = parser(__doc__.splitlines()[0], data=True, weights=True)
    options.add_argument("--losses", action="append", help=f"may be repeated (default: {' '.join(LOSSES)})")
    options.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    given = options.parse_args()
    batches = 8 if given.quick else 30

    import torch

    from automl_compress.model.task import load_task

    torch.set_num_threads(1)
    os.environ |= {"AC_DATA_DIR": str(given.data), "AC_WEIGHTS_DIR": str(given.weights)}
    task = load_task(str(EXAMPLE))
    rows = []
    for losses in given.losses or LOSSES:
        asked = step_ms(task, losses, batches, given.precision, limit_bytes=0)
        row: dict[str, Any] = {"losses": losses, "milliseconds": asked}
        if losses != "task":
            known = step_ms(task, losses, batches, given.precision, limit_bytes=4 << 30)
            row |= {"remembered": known, "saved": 1 - known / asked}
        rows.append(row)
    write_rows(given.json, "distillation", rows, quick=given.quick)


def step_ms(task: Any, losses: str, batches: int, precision: Any, *, limit_bytes: int) -> float:
    """Median milliseconds of processor time of a step in the second of two epochs."""
    from dataclasses import replace

    from automl_compress.core.plan import Plan
    from automl_compress.model.trace import trace
    from automl_compress.techniques.distillation.cache import AnswerCache
    from automl_compress.techniques.distillation.losses import parse_losses
    from automl_compress.techniques.distillation.objective import Distillation
    from automl_compress.techniques.distillation.pairing import pair_layers
    from automl_compress.techniques.prune import apply_plan
    from automl_compress.techniques.training.loop import train
    from automl_compress.techniques.training.settings import Resources, Training

    graph = trace(task.model, task.example_inputs)
    kept = {g.name: tuple(range(round(g.size * 0.73))) for g in graph.groups if ".conv1" in g.name}
    student = apply_plan(task.model, graph, Plan(kept=kept))
    images, classes = task.train.images[: batches * BATCH], task.train.labels[: batches * BATCH]
    pairs = list(zip(images.split(BATCH), classes.split(BATCH), strict=True))
    some = replace(task, train=[((x,), y) for x, y in pairs])
    cache = AnswerCache(limit_bytes)
    cache.begin(len(images))
    features = pair_layers(graph, Plan(kept=kept), task.model)
    objective = Distillation(some, task.model, parse_losses(losses), features, cache)
    times = [time.process_time()]
    train(
        student,
        some,
        objective,
        Training(epochs=2),
        on_step=lambda _: times.append(time.process_time()),
        resources=Resources(device="cpu", precision=precision),
    )
    if limit_bytes and losses != "task" and cache.hits < len(images):
        raise SystemExit(f"{losses}: only {cache.words}")
    return 1e3 * statistics.median(b - a for a, b in zip(times[batches:], times[batches + 1 :], strict=False))


if __name__ == "__main__":
    main()
