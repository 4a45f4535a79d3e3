"""What do the criteria for channels, and masks, leave of a pretrained ResNet-20 on CIFAR-10 without training?

Half of every prunable group by each criterion, and masks on every layer that can have them; as cut or masked, and after
the one-shot repair.
"""

from __future__ import annotations

import os
from typing import Any

from common import parser, write_figures
from one_shot import CALIBRATION_IMAGES, EXAMPLE, first_images, test_accuracy

MASKS = ("0.5", "0.75", "0.9", "0.75 by row", "2:4", "1:4")


def main() -> None:
    options = parser(__doc__.splitlines()[0], data=True, weights=True)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()

    import torch

    from automl_compress.core.masks import mask_problem
    from automl_compress.core.plan import Plan
    from automl_compress.model.task import load_task
    from automl_compress.model.trace import trace
    from automl_compress.techniques.importance import CRITERIA

    os.environ |= {"AC_DATA_DIR": str(given.data), "AC_WEIGHTS_DIR": str(given.weights)}
    task = load_task(str(EXAMPLE))
    torch.manual_seed(given.seed)
    batches = first_images(task, 256 if given.quick else CALIBRATION_IMAGES)
    graph = trace(task.model, next(iter(task.batches("validation")))[0])
    half = Plan(sparsity={group.name: 0.5 for group in graph.groups})
    figures: dict[str, float] = {}
    for name in ("l2", "obs") if given.quick else tuple(CRITERIA):
        figures |= {f"half_by_{name}.{k}": v for k, v in both(task, graph, batches, half, name, given.seed).items()}
        print({k: round(v, 4) for k, v in figures.items() if f"_{name}." in k}, flush=True)
    for mask in ("2:4",) if given.quick else MASKS:
        layers = [layer.name for layer in graph.layers if mask_problem(mask, layer) is None]
        plan = Plan(masks=dict.fromkeys(layers, mask))
        figures |= {f"mask_{mask}.{k}": v for k, v in both(task, graph, batches, plan, "l2", given.seed).items()}
        print({k: round(v, 4) for k, v in figures.items() if f"mask_{mask}." in k}, flush=True)
    write_figures(given.json, "criteria_and_masks", figures, quick=given.quick)


def both(task: Any, graph: Any, batches: Any, plan: Any, importance: str, seed: int) -> dict[str, float]:
    """Accuracy as cut and masked, accuracy repaired, and the repaired ONNX file's bytes as it is and compressed."""
    from automl_compress.deploy.export import Template
    from automl_compress.search.evaluation.student import Students
    from automl_compress.techniques.prune import apply_plan, select_channels
    from automl_compress.techniques.sparsify import apply_masks, compressed_bytes

    made = Students(
        task.model.eval(),
        graph,
        lambda: batches,
        loss=task.loss_of,
        classifies=task.classifies,
        importance=importance,
        seed=seed,
        repair_samples=768,
        rows=16384,
    )
    plain = apply_plan(made.teacher, graph, select_channels(graph, plan, made.ranking)).eval()
    apply_masks(plain, graph, plan)
    student = made.make(plan)
    found = {"plain": test_accuracy(plain, task), "repaired": test_accuracy(student.model, task)}
    if plan.masks:
        file = Template(made.teacher, task.example_inputs, graph).fill(student.model, student.plan).SerializeToString()
        found |= {"bytes": len(file), "compressed_bytes": compressed_bytes(file)}
    return found


if __name__ == "__main__":
    main()
