"""What does each part of recovery win back of a pretrained ResNet-20 on CIFAR-10, cut to 73 % and 50 % of its MACs?

Every row is a recipe: 3 epochs on all 25,000 training images, from the one-shot models of the same seed, then 8 bits in
every layer. Accuracy is that of the ONNX file in ONNX Runtime on the test images, which are read for nothing else; no
model is selected by it, and nothing is validated in between. `seconds` are processor seconds of a training. Trainings
are kept in the folder of runs: the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cifar10_resnet20 import test_accuracy
from common import parser, write_rows
from one_shot import EXAMPLE, SHARES, compress_one_shot

from automl_compress.techniques.training.settings import Optimizer, Training

SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What differs from the product's own recovery: nothing, by default.

    losses    what is learned, as --distillation writes it
    optimizer as `Training` has it
    mode      the way to the plan, as --recovery writes it
    repair    whether the cut model's weights are refitted by least squares before; None: as the product decides
    rounding  share of the epochs, at the end, that are trained with rounding
    views     whether the teacher answers for the mirror image, too, as the example's task asks
    """

    losses: str | None = None
    optimizer: Optimizer = Training.optimizer
    mode: str = "fine-tune"
    repair: bool | None = None
    rounding: float = 0.0
    views: bool = True


# The most important first: a run that is stopped has those.
RECIPES = {
    "default": Recipe(),
    "default without mirror images": Recipe(views=False),
    "soft labels": Recipe(losses="soft"),
    "cross-entropy": Recipe(losses="task"),
    "default by SGD": Recipe(optimizer="sgd"),
    "gradual": Recipe(mode="gradual"),
    "default with repair before": Recipe(repair=True),
    "default and mixtures": Recipe(losses="soft+features+mixed"),
    "default with rounding at the end": Recipe(rounding=1 / 6),
}


def main() -> None:
    options = parser(__doc__.splitlines()[0], data=True, weights=True)
    options.add_argument("--recipe", action="append", choices=RECIPES, help="one row alone, may be repeated")
    options.add_argument("--seeds", type=int, help=f"trainings a row (default {SEEDS}; 1 with --quick)")
    options.add_argument("--epochs", type=float, help="of each training (default 3; 0.1 with --quick)")
    options.add_argument("--runs", type=Path, default=Path("runs/recovery"), help="where trainings are kept")
    options.add_argument("--finished", action="store_true", help="train nothing: rows of the trainings that are there")
    given = options.parse_args()
    epochs = given.epochs if given.epochs is not None else (0.1 if given.quick else 3.0)
    seeds = given.seeds or (1 if given.quick else SEEDS)

    os.environ |= {"AC_DATA_DIR": str(given.data), "AC_WEIGHTS_DIR": str(given.weights)}
    laboratory = Laboratory(given.runs, epochs, rounds=1 if given.quick else 4)
    rows = []
    for name in given.recipe or RECIPES:
        for share in SHARES:
            ask = laboratory.known if given.finished else laboratory.trained
            found = [training for seed in range(seeds) if (training := ask(name, share, seed)) is not None]
            rows += [row(name, found)] if found else []
    write_rows(given.json, "recovery", rows, quick=given.quick)


def row(recipe: str, trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Spread is the standard deviation over the seeds; 0 for a single one."""
    accuracies = [training["accuracy"] for training in trainings]
    return {
        "macs_left": statistics.mean(training["macs_left"] for training in trainings),
        "recipe": recipe,
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_spread": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "seeds": len(accuracies),
        "float_accuracy_mean": statistics.mean(training["float_accuracy"] for training in trainings),
        "seconds": statistics.mean(training["seconds"] for training in trainings),
    }


class Laboratory:
    """Trains one-shot models by recipes, and remembers what came of it in a folder."""

    def __init__(self, folder: Path, epochs: float, rounds: int) -> None:
        import torch

        from automl_compress.model.task import load_task
        from automl_compress.model.trace import trace
        from automl_compress.search.evaluation.evaluate import Workbench

        self.folder, self.epochs, self.rounds = folder, epochs, rounds
        folder.mkdir(parents=True, exist_ok=True)
        task = load_task(str(EXAMPLE))
        # The example holds 2,500 images out; nothing is selected here, so all 25,000 are trained on.
        train, held_out = task.train, list(task.batches("validation"))
        images = torch.cat([train.images, *(inputs[0] for inputs, _ in held_out)])
        labels = torch.cat([train.labels, *(targets for _, targets in held_out)])
        self.task = replace(task, train=type(train)(images, labels, train.batch_size))
        self.graph = trace(task.model, task.example_inputs)
        self.bench = Workbench(self.task, self.graph)

    def known(self, name: str, share: int, seed: int) -> dict[str, Any] | None:
        """What came of a training by the same recipe and number of epochs, if it was done."""
        path = self._record(name, share, seed)
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("asked") == self._asked(name) else None

    def trained(self, name: str, share: int, seed: int) -> dict[str, Any]:
        """What came of a training; it is done if that isn't known."""
        known = self.known(name, share, seed)
        if known is not None:
            return known
        found = {**self._train(RECIPES[name], share, seed), "asked": self._asked(name)}
        write(self._record(name, share, seed), json.dumps(found, indent=1).encode())
        print(f"{share} % {name}, seed {seed}: {found['accuracy']:.2%} ({found['seconds']:.0f} s)", flush=True)
        return found

    def _record(self, name: str, share: int, seed: int) -> Path:
        return self.folder / f"{share}-{name.replace(' ', '-')}-{seed}.json"

    def _asked(self, name: str) -> dict[str, Any]:
        return {"epochs": self.epochs, "rounds": self.rounds, **asdict(RECIPES[name])}

    def _train(self, recipe: Recipe, share: int, seed: int) -> dict[str, Any]:
        from automl_compress.core.plan import Plan
        from automl_compress.recovery.modes import mode_of
        from automl_compress.search.ladder.ladder import PRECISE, ROUNDING_RATE
        from automl_compress.techniques.training.loop import train

        record, weights = self._one_shot(share, seed)
        plan = Plan.from_json(record["plan"], self.graph)
        plan = replace(plan, bits={layer.name: 8 for layer in self.graph.layers})
        job = self._job(recipe, plan, weights, seed)
        begun = time.process_time()
        model = mode_of(recipe.mode)(job).model
        seconds = time.process_time() - begun
        found = self.bench.quantization(model, plan, thorough=True)
        if recipe.rounding:
            student = self.bench.trainable(model, plan, found)
            begun = time.process_time()
            last = replace(
                job.training,
                epochs=self.epochs * recipe.rounding,
                learning_rate=job.training.learning_rate * ROUNDING_RATE,
            )
            train(student, self.task, job.objective(plan), last, seed=seed, resources=PRECISE)
            seconds += time.process_time() - begun
            found = student.quantization()
        return {
            "macs_left": record["macs_left"],
            "seconds": seconds,
            "accuracy": self._accuracy(model, plan, found),
            "float_accuracy": self._accuracy(model, replace(plan, bits={}), None),
        }

    def _job(self, recipe: Recipe, plan: Any, weights: Path, seed: int) -> Any:
        from automl_compress.recovery.job import Job
        from automl_compress.search.evaluation.candidate import rebuild
        from automl_compress.techniques.distillation.losses import DEFAULT, parse_losses
        from automl_compress.techniques.distillation.objective import Distillation
        from automl_compress.techniques.distillation.pairing import pair_layers
        from automl_compress.techniques.prune import apply_plan

        def objective(followed: Any) -> Distillation:
            pairs = pair_layers(self.graph, followed, self.bench.teacher)
            task = self.task if recipe.views else replace(self.task, views=())
            return Distillation(task, self.bench.teacher, parse_losses(recipe.losses or DEFAULT), pairs)

        cut = recipe.repair is False
        start = apply_plan(self.bench.teacher, self.graph, plan).eval() if cut else rebuild(self.bench, plan, weights)
        epochs = self.epochs if recipe.repair is None else 0.0  # a short training starts from what it is given
        return Job(
            task=self.task,
            teacher=self.bench.teacher,
            graph=self.graph,
            plan=plan,
            make=self.bench.starts(plan, start, epochs),
            objective=objective,
            training=Training(epochs=self.epochs * (1 - recipe.rounding), optimizer=recipe.optimizer),
            seed=seed,
        )

    def _accuracy(self, model: Any, plan: Any, found: Any) -> float:
        """Of the ONNX file, on the test images."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(self.bench.export(model, plan, found).SerializeToString())
            return test_accuracy(path, self.task)

    def _one_shot(self, share: int, seed: int) -> tuple[dict[str, Any], Path]:
        """Plan and share of the multiply-adds, and the file of weights, of the repaired model before training."""
        from safetensors.torch import save

        name = f"one-shot-{share}-{seed}-{self.rounds}"
        record, weights = self.folder / f"{name}.json", self.folder / f"{name}.safetensors"
        if not record.exists():
            for each, (student, left) in compress_one_shot(self.task, rounds=self.rounds, seed=seed).items():
                stem = f"one-shot-{each}-{seed}-{self.rounds}"
                tensors = {key: value.contiguous() for key, value in student.model.state_dict().items()}
                write(self.folder / f"{stem}.safetensors", save(tensors))
                facts = {"macs_left": left, "plan": student.plan.to_json(self.graph)}
                write(self.folder / f"{stem}.json", json.dumps(facts).encode())
        facts = json.loads(record.read_text())
        return facts, weights


def write(path: Path, content: bytes) -> None:
    """Beside and renamed, so that a kill leaves the file as it was, or whole."""
    beside = path.with_suffix(".part")
    beside.write_bytes(content)
    beside.replace(path)


if __name__ == "__main__":
    main()
