"""How accurate is a pretrained ResNet-20 on CIFAR-10 when cut to 73 % and 50 % of its multiply-adds without training?

Everything is chosen and repaired on at most 1,024 training images: widths, channels, and weights by least squares in
closed form. The test images are read once, for the final figures. `seconds` is all the work for both models together.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from common import parser, write_figures

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cifar10_resnet20" / "task.py"
SHARES = (73, 50)
CALIBRATION_IMAGES = 1024
REPAIR_IMAGES = 768
REPAIR_ROWS = 16384
SEARCH_IMAGES, SEARCH_ROWS = 256, 4096


def main() -> None:
    options = parser(__doc__.splitlines()[0], data=True, weights=True)
    options.add_argument("--rounds", type=int, help="plans measured for each share (default 4; 1 with --quick)")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    rounds = given.rounds if given.rounds is not None else (1 if given.quick else 4)

    from automl_compress.model.task import load_task

    os.environ |= {"AC_DATA_DIR": str(given.data), "AC_WEIGHTS_DIR": str(given.weights)}
    task = load_task(str(EXAMPLE))
    begun = time.perf_counter()
    models = compress_one_shot(task, rounds=rounds, seed=given.seed)
    seconds = time.perf_counter() - begun
    figures: dict[str, float] = {}
    for share, (student, left) in models.items():
        figures[f"accuracy_at_{share}"] = test_accuracy(student.model, task)
        figures[f"macs_left_at_{share}"] = left
    write_figures(given.json, "one_shot", figures | {"seconds": seconds}, quick=given.quick)


def compress_one_shot(task: Any, *, rounds: int, seed: int) -> dict[int, tuple[Any, float]]:
    """Share of the multiply-adds in percent -> (repaired student, share that is really left)."""
    import torch

    from automl_compress.model.trace import trace
    from automl_compress.search.evaluation.student import Students
    from automl_compress.search.solvers.widths import anchored_sensitivity, macs_table, refine
    from automl_compress.search.space.rules import SpaceFile
    from automl_compress.search.space.space import resolve

    torch.manual_seed(seed)
    batches = first_images(task, CALIBRATION_IMAGES)
    graph = trace(task.model, next(iter(task.batches("validation")))[0])
    rules = [
        # The blocks' inner channels, finely. The residual streams stay whole: what they cost reaches every block.
        {"match": {"kind": "channel-group", "name": "layer*.conv1"}, "sparsity": [i / 32 for i in range(32)]},
        {"match": {"kind": "block"}, "drop": True},
    ]
    space = resolve(SpaceFile.model_validate({"name": "one-shot", "importance": "obs", "rules": rules}), graph, {})

    def students(images: int, rows: int) -> Students:
        return Students(
            task.model.eval(),
            graph,
            lambda: batches,
            loss=task.loss_of,
            classifies=task.classifies,
            repair_samples=images,
            rows=rows,
        )

    quick, thorough = students(SEARCH_IMAGES, SEARCH_ROWS), students(REPAIR_IMAGES, REPAIR_ROWS)
    thorough.evidence = quick.evidence
    table = macs_table(graph, anchored_sensitivity(quick, space))
    result = {}
    for share in SHARES:
        plan = refine(quick, space, table, {"latency": share / 100 * graph.macs}, rounds=rounds, seed=seed)
        if plan is None:
            raise SystemExit(f"no plan leaves {share} % of the multiply-adds")
        student = thorough.make(plan)
        left = table.plan_cost(graph, student.plan).latency_us / graph.macs
        print(f"{share} %: {left:.2%} left, repair: {student.repair}, widths {describe(student.plan, graph)}")
        result[share] = (student, left)
    return result


def first_images(task: Any, count: int) -> list[tuple[Any, Any]]:
    """The first `count` training images in batches, as the task augments them."""
    result, left = [], count
    for inputs, targets in task.batches("train"):
        result.append((tuple(part[:left] for part in inputs), targets[:left]))
        left -= len(targets)
        if left <= 0:
            return result
    return result


def describe(plan: Any, graph: Any) -> str:
    gone = set(plan.drop)
    kept = (f"{g.name} {plan.kept_count(g.name, g.size)}/{g.size}" for g in graph.groups if not gone & set(g.blocks))
    return ", ".join([*kept, *(f"{block} removed" for block in sorted(gone))])


def test_accuracy(model: Any, task: Any) -> float:
    """Fraction of test images with the right class."""
    import torch

    with torch.no_grad():
        right = [(model(*inputs).argmax(1) == labels).float() for inputs, labels in task.batches("test")]
    return float(torch.cat(right).mean())


if __name__ == "__main__":
    main()
