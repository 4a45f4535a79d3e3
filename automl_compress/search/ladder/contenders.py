"""Finished models that weren't cut from the teacher with its weights: they compete with the best that was.

From scratch: the structure of the best plan, trained from fresh weights. Own: a network of the user's, made by
`student(width)`, at the widest width whose model fits the budget *when measured*: a plan of the teacher tells nothing
about it. It learns from the teacher like any student, is quantized, exported, verified and delivered by the same code,
on a workbench of its own, whose original is the trained student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace

from safetensors.torch import load_file, save
from torch import nn

from automl_compress.core.budget import Cost
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.errors import FAILURES, passed_over
from automl_compress.hardware.device.timer import ratio
from automl_compress.model.surgery import copy_model
from automl_compress.model.task import Task
from automl_compress.model.trace import trace
from automl_compress.recovery.own_student import make_student
from automl_compress.recovery.students import OWN, SCRATCH, WIDTHS, of_fresh_weights, parse_students
from automl_compress.recovery.transfer import validation_metric
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.settings import Settings
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.ladder.ladder import FULL, Recovery
from automl_compress.techniques.distillation.losses import DEFAULT
from automl_compress.techniques.distillation.objective import Distillation
from automl_compress.techniques.distillation.pairing import pair_by_resolution
from automl_compress.techniques.training.log import OnStep, shown_by
from automl_compress.techniques.training.loop import train
from automl_compress.techniques.training.settings import Resources, Training

_QUANTIZED = 8
FROM_SCRATCH = "from-scratch"


class Contenders:
    """The contenders of one run; each is trained once."""

    def __init__(self, campaign: Campaign, settings: Settings) -> None:
        self._campaign, self._settings = campaign, settings
        has_own = campaign.bench.task.student is not None
        self.names = parse_students(settings.options.get("students"), has_own=has_own)
        self.told: dict[str, None] = {}  # what became of them, for the report
        self._own: Candidate | None = None
        self._own_is_known = False

    def finished(self, best: Candidate) -> list[Candidate]:
        """Those that are within the budget, beside the best inherited model, whose plan the one from scratch has. One
        that fails leaves what was found without it."""
        schedule = self._settings.schedule
        if not self.names or schedule.epochs == 0 or not self._time_left():
            return []
        found: list[Candidate | None] = []
        if SCRATCH in self.names:
            recovery = Recovery(
                self._campaign.bench, self._campaign.folder, self._settings.losses, FROM_SCRATCH, contender=SCRATCH
            )
            plan, show = replace(best.plan, kept={}), shown_by(self._campaign.progress)
            found.append(self._attempted(SCRATCH, lambda: recovery.recover(plan, FULL, schedule, show)))
        if OWN in self.names:
            if not self._own_is_known:
                self._own = self._attempted(OWN, lambda: self._train_own(of_fresh_weights(schedule)))
                self._own_is_known = True
            found.append(self._own)
        able = [candidate for candidate in found if candidate is not None]
        for candidate in able:
            what = "the student from scratch" if candidate.width is None else f"student({candidate.width:g})"
            self._tell(f"{what} reached {candidate.metric:.4f} on validation, the inherited one {best.metric:.4f}")
        return able

    def _tell(self, what: str) -> None:
        self.told[what] = None
        self._campaign.progress.note(what)

    def _attempted(self, name: str, train: Callable[[], Candidate | None]) -> Candidate | None:
        try:
            return train()
        except FAILURES as error:
            self._tell(f"student {name} failed, and doesn't compete: {passed_over(error)}")
            return None

    def reject(self, candidate: Candidate) -> None:
        """It was finished, and can't be delivered."""
        if candidate is self._own:
            self._own = None

    def _time_left(self) -> bool:
        clock = self._campaign.clock
        needed = (clock.typical("epoch") or 0.0) * self._settings.schedule.epochs * len(self.names)
        if clock.left is None or needed <= clock.left:
            return True
        clock.cuts.append(f"no time for students {' and '.join(self.names)}")
        return False

    def _train_own(self, schedule: Training) -> Candidate | None:
        campaign = self._campaign
        campaign.progress.stage("measuring students of the task's own")
        chosen = next(self._fitting(), None)
        if chosen is None:
            self._tell(f"no student of the task's own fits the budget, down to width {WIDTHS[-1]:g}")
            return None
        width, untrained, plans = chosen
        model, log, seconds = self._trained(width, untrained, schedule, shown_by(self._campaign.progress))
        bench = workbench_of(replace(campaign.bench.task, model=model), campaign.bench)
        recovery = Recovery(bench, campaign.folder, contender=f"{OWN}-{width:g}")
        done = [recovery.recover(plan, FULL, replace(schedule, epochs=0.0)) for plan in plans]
        best = max(done, key=lambda candidate: candidate.metric)
        return replace(best, bench=bench, width=width, training=(log,), seconds=seconds)

    def _fitting(self) -> Iterator[tuple[float, Workbench, list[Plan]]]:
        """Width, the untrained student, and the plans (in 32 and 8 bits) that are within the budget, widest first."""
        campaign = self._campaign
        task, device, budget = campaign.bench.task, campaign.device, campaign.budget
        for width in WIDTHS:
            bench = workbench_of(replace(task, model=make_student(task, width, campaign.seed)), campaign.bench)
            plans = {str(FULL_BITS): Plan(), str(_QUANTIZED): Plan(bits=_uniform(bench))}
            with ExitStack() as files:
                paths = {
                    name: files.enter_context(device.saved(bench.structure(plan)))
                    for name, plan in plans.items()
                    if plan.bits or name == str(FULL_BITS)
                }
                timings = device.compare({"original": campaign.folder.path / "original.onnx", **paths})
                fits = []
                for name, path in paths.items():
                    cost = Cost(
                        latency_us=ratio(timings, name, "original") * campaign.original.latency_us,
                        size_bytes=path.stat().st_size,
                        memory_bytes=device.memory_bytes(path) if "memory" in budget.limits else 0,
                        provenance=timings[name].provenance,
                    )
                    fits += [plans[name]] if budget.met(cost) else []
            if fits:
                yield width, bench, fits

    def _trained(
        self, width: float, untrained: Workbench, schedule: Training, on_step: OnStep
    ) -> tuple[nn.Module, dict[str, object], float]:
        """The student of a width, trained against the teacher, from the run folder if it is there."""
        campaign, losses = self._campaign, self._settings.losses
        teacher, task, folder = campaign.bench.teacher, campaign.bench.task, campaign.folder
        name, what = f"candidates/{OWN}-{width:g}", {"settings": asdict(schedule), "distillation": str(losses)}
        student = copy_model(untrained.teacher)
        known = folder.read_json(f"{name}.json")
        if known is None or known["what"] != what:
            graphs = untrained.graph, campaign.bench.graph
            pairs = pair_by_resolution(*graphs, student, teacher) if losses.features else ()
            if losses.features and not pairs and str(losses) == DEFAULT:  # nobody has asked for features by name
                losses = losses.without_features()
            checkpoint = folder.file(*f"{name}.training".split("/"))
            log = train(
                student,
                task,
                Distillation(task, task.teacher or teacher, losses, pairs, original=teacher),
                schedule,
                seed=campaign.seed,
                validate=validation_metric(task),
                on_step=on_step,
                resources=Resources(checkpoint=checkpoint),
                label=f"student({width:g})",
            )
            state = {key: value.clone().contiguous() for key, value in student.state_dict().items()}
            folder.write_bytes(f"{name}.safetensors", save(state))
            known = {"what": what, "training": log.to_json(), "seconds": log.seconds}
            folder.write_json(f"{name}.json", known)
            checkpoint.unlink(missing_ok=True)
        student.load_state_dict(load_file(folder.file(*f"{name}.safetensors".split("/"))))
        return student.eval(), known["training"], float(known["seconds"])


def workbench_of(task: Task, like: Workbench) -> Workbench:
    """A workbench on which a student is the original; of its channels none is removed."""
    graph = trace(task.model.eval(), task.example_inputs)
    return Workbench(task, graph, importance="l2", seed=like.seed, executions=like.executions)


def _uniform(bench: Workbench) -> dict[str, int]:
    """Eight bits for every layer that the device runs in them."""
    return {
        layer.name: _QUANTIZED
        for layer in bench.graph.layers
        if bench.executions.get((layer.kind, _QUANTIZED)) == "native"
    }
