"""One step of the ladder: a plan's model, recovered as far as its rung says, and kept.

What was distilled is kept in the run folder, plan by plan and rung by rung, so that a run that was stopped trains
nothing twice.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from automl_compress.core.masks import NO_MASK
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.deploy.run_folder import RunFolder
from automl_compress.errors import ExportError, RunFolderError
from automl_compress.model.surgery import copy_model
from automl_compress.recovery.job import Job
from automl_compress.recovery.modes import mode_of
from automl_compress.recovery.names import DEFAULT_MODE, check_mode
from automl_compress.recovery.transfer import validation_metric
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.techniques.distillation.cache import AnswerCache
from automl_compress.techniques.distillation.losses import DEFAULT, Losses, parse_losses
from automl_compress.techniques.distillation.mixing import mixable
from automl_compress.techniques.distillation.objective import Distillation
from automl_compress.techniques.distillation.pairing import pair_layers
from automl_compress.techniques.distillation.teacher import samples_per_epoch
from automl_compress.techniques.quantization.files import to_tensors
from automl_compress.techniques.quantization.tune import Quantization
from automl_compress.techniques.training.data import batches_in
from automl_compress.techniques.training.log import OnStep, TrainingLog
from automl_compress.techniques.training.loop import train
from automl_compress.techniques.training.settings import Resources, Training

FULL = "full"
UNTRAINED = "untrained"
# Training with rounding starts from a distilled model: less of it, and at a smaller rate, since batch-norms are folded.
ROUNDING_SHARE = 1 / 3
ROUNDING_RATE = 1 / 4
# Steps of a quantized value are finer than bfloat16, and the quantized graph is computed on the processor.
PRECISE = Resources(device="cpu", precision="float32")


class Recovery:
    """Recovers plans and keeps each result in the run folder, so that none is ever trained twice.

    contender  what is recovered competes under this name with the plans' own models: it is kept apart from them, and
               the repaired model doesn't stand in for it
    """

    def __init__(
        self,
        bench: Workbench,
        folder: RunFolder,
        losses: Losses | None = None,
        mode: str = DEFAULT_MODE,
        *,
        contender: str = "",
        resources: Resources | None = None,
    ) -> None:
        self._bench, self._folder, self._mode = bench, folder, check_mode(mode)
        self._losses = losses or parse_losses(DEFAULT)
        self._contender, self._resources = contender, resources or Resources()
        self.cache = AnswerCache()

    def rehearse(self) -> None:
        """Raise now what the first step of a training would: losses that don't fit the task, outputs that differ."""
        with torch.no_grad():
            self._objective(Plan())(self._bench.teacher, next(self._bench.task.batches("validation")))

    def has(self, plan: Plan, rung: str, schedule: Training) -> bool:
        """Whether `recover` would find the model in the run folder."""
        return self._load(f"candidates/{rung}-{plan.key}", schedule, self._mode_at(rung)) is not None

    def recover(self, plan: Plan, rung: str, schedule: Training, on_step: OnStep | None = None) -> Candidate:
        """The recovered model of a plan at a rung, from the run folder if it is there.

        Its metric is that of the ONNX model on all validation data. Should distillation make it worse than the one-shot
        repair, it is the repaired model that counts.
        """
        stem = "-".join(filter(None, (self._contender, rung, plan.key)))
        name = f"candidates/{stem}"
        known = self._load(name, schedule, self._mode_at(rung))
        if known is not None:
            return known
        bench = self._bench
        model, full = bench.student(plan)
        found = bench.quantization(model, full, thorough=rung == FULL)
        exported = bench.export(model, full, found)
        metric = bench.metric(exported, "validation")
        logs: list[TrainingLog] = []
        worse = ""
        if schedule.epochs > 0:
            recovered = mode_of(self._mode_at(rung))(self._job(name, rung, full, model, schedule, on_step))
            model, full = recovered.model, recovered.plan
            logs += recovered.logs
            better = bench.quantization(model, full, thorough=rung == FULL)
            trained = bench.export(model, full, better)
            reached = bench.metric(trained, "validation")
            if rung == FULL and reached < self._unrounded(model, full):
                learned, log = self._with_rounding(name, model, full, better, schedule, on_step)
                rounded = bench.export(model, full, learned)
                after = bench.metric(rounded, "validation")
                if log is not None:
                    logs.append(log)
                if after > reached:
                    better, trained, reached = learned, rounded, after
            if reached >= metric or self._contender:
                exported, metric, found = trained, reached, better
            else:  # a schedule that is too short or too hot can undo what the one-shot repair had reached
                worse = f"training ended at {reached:.4f} on validation: the repaired model, at {metric:.4f}, was kept"
                model, full = bench.student(plan)
        state = {key: value.contiguous() for key, value in model.state_dict().items()} | to_tensors(found)
        weights = self._folder.write_bytes(f"{name}.safetensors", save(_apart(state)))
        path = self._folder.write_bytes(f"{name}.onnx", exported.SerializeToString())
        training = tuple(log.to_json() for log in logs)
        notes = (
            *(f"quantization: {note}" for note in found.notes),
            *(f"{log.label}: {note}" for log in logs for note in log.notes),
            *filter(None, [worse, self._unmixed]),
        )
        seconds = sum(log.seconds for log in logs)
        record = {
            "plan": full.to_json(self._bench.graph),
            "ranges": {value: list(limits) for value, limits in found.ranges.items()},
            "notes": list(notes),
            "metric": metric,
            "training": list(training),
            "seconds": seconds,
            "epochs": schedule.epochs,
            "settings": asdict(schedule),
            "distillation": str(self._losses),
            "recovery": self._mode_at(rung),
        }
        self._folder.write_json(f"{name}.json", record)  # last: its presence says that the others are complete
        for part in ("training", "rounding"):
            for checkpoint in self._folder.file(*name.split("/")).parent.glob(f"{stem}.{part}*"):
                checkpoint.unlink()
        return Candidate(
            plan=full,
            ranges=found.ranges,
            notes=notes,
            metric=metric,
            weights=weights,
            onnx=path,
            training=training,
            seconds=seconds,
            contender=self._contender,
        )

    @property
    def _unmixed(self) -> str:
        task = self._bench.task
        if not self._losses.mixed or mixable(task, task.example_inputs):
            return ""
        return "distillation loss mixed did nothing: only images and signals that are classified can be mixed"

    def _mode_at(self, rung: str) -> str:
        """Short recoveries only compare plans: the way there is too long for them."""
        return self._mode if rung == FULL else DEFAULT_MODE

    def _job(
        self, name: str, rung: str, plan: Plan, student: nn.Module, schedule: Training, on_step: OnStep | None
    ) -> Job:
        bench = self._bench
        return Job(
            task=bench.task,
            teacher=bench.teacher,
            graph=bench.graph,
            plan=plan,
            make=bench.starts(plan, student, schedule.epochs),
            objective=self._objective,
            training=schedule,
            seed=bench.seed,
            resources=replace(self._resources, checkpoint=self._folder.file(*f"{name}.training".split("/"))),
            on_step=on_step,
            label=self.label(rung),
            validate=validation_metric(bench.task) if schedule.average or schedule.patience else None,
        )

    def label(self, rung: str) -> str:
        """A training's name. It says what is learned and how where that isn't the default: a checkpoint of other
        losses, or of another mode, is another training's."""
        told = {str(self._losses): DEFAULT, self._mode_at(rung): DEFAULT_MODE}
        other = ", ".join(what for what, default in told.items() if what != default)
        what = f" ({other})" if other else ""
        return f"{f'{self._contender}, ' if self._contender else ''}{rung} distillation{what}"

    def time_steps(self, steps: int, schedule: Training, on_step: OnStep) -> None:
        """Train a copy of the original for some steps, for nothing but the time that they take."""
        bench = self._bench
        epochs = steps / batches_in(bench.task)
        train(
            copy_model(bench.teacher),
            bench.task,
            self._objective(Plan()),
            replace(schedule, epochs=epochs),
            seed=bench.seed,
            on_step=on_step,
            label="timing training",
        )

    def _objective(self, plan: Plan) -> Distillation:
        bench = self._bench
        losses = self._losses
        pairs = pair_layers(bench.graph, plan, bench.teacher) if losses.features else ()
        if losses.features and not pairs and str(losses) == DEFAULT:  # nobody has asked for features by name
            losses = losses.without_features()
        self.cache.begin(samples_per_epoch(bench.task))
        teacher = bench.task.teacher or bench.teacher
        return Distillation(bench.task, teacher, losses, pairs, self.cache, original=bench.teacher)

    def _unrounded(self, model: nn.Module, plan: Plan) -> float:
        """The metric on validation data before quantization; training with rounding can win back what lies between."""
        if all(bits == FULL_BITS for bits in plan.bits.values()):
            return -math.inf
        return self._bench.metric(self._bench.export(model, replace(plan, bits={})), "validation")

    def _with_rounding(
        self, name: str, model: nn.Module, plan: Plan, found: Quantization, schedule: Training, on_step: OnStep | None
    ) -> tuple[Quantization, TrainingLog | None]:
        """The last part of distillation, with rounding and learned scales; nothing where the graph doesn't allow it."""
        bench = self._bench
        try:
            student = bench.trainable(model, plan, found)
        except ExportError as error:
            note = f"no training with rounding: {error}"
            return replace(found, notes=(*found.notes, note)), None
        rounding = replace(
            schedule, epochs=schedule.epochs * ROUNDING_SHARE, learning_rate=schedule.learning_rate * ROUNDING_RATE
        )
        masks = student.zeros(layer for layer, mask in plan.masks.items() if mask != NO_MASK)
        log = train(
            student,
            bench.task,
            self._objective(plan),
            rounding,
            seed=bench.seed,
            masks=masks,
            on_step=on_step,
            resources=replace(PRECISE, checkpoint=self._folder.file(*f"{name}.rounding".split("/"))),
            label="training with rounding",
        )
        note = f"scales and weights trained with rounding for {rounding.epochs:g} epochs"
        return replace(student.quantization(), notes=(*found.notes, note)), log

    def _load(self, name: str, schedule: Training, mode: str) -> Candidate | None:
        record: dict[str, Any] | None = self._folder.read_json(f"{name}.json")
        if record is None or record.get("epochs") != schedule.epochs:
            return None
        asked = {"distillation": str(self._losses), "recovery": mode, "settings": asdict(schedule)}
        known = {"settings": asdict(schedule), **record}
        if schedule.epochs > 0 and any(known.get(name) != value for name, value in asked.items()):
            return None
        try:
            return Candidate(
                plan=Plan.from_json(record["plan"], self._bench.graph),
                ranges={value: (float(low), float(high)) for value, (low, high) in record["ranges"].items()},
                notes=tuple(record.get("notes", ())),
                metric=float(record["metric"]),
                weights=self._folder.file(*f"{name}.safetensors".split("/")),
                onnx=self._folder.file(*f"{name}.onnx".split("/")),
                training=tuple(record.get("training", ())),
                seconds=float(record["seconds"]),
                contender=self._contender,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(
                f"{self._folder.path / name}.json: damaged ({error}); delete it and run again"
            ) from error


def _apart(state: dict[str, Any]) -> dict[str, Any]:
    """Tied parameters share memory, which the file format refuses: write each with its own copy."""
    seen: set[int] = set()
    result = {}
    for key, value in state.items():
        result[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return result
