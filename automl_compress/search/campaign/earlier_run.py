"""What an earlier run found out about the same trained model, for a run that asks for something else.

Sensitivities, evaluated trials and trained candidates don't depend on the budget, nor on the device as long as it runs
the same bit-widths in the same way. What was measured holds for the device that it was measured on. So another budget
starts from all of it, and another device from what is not about devices.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from automl_compress.core.budget import METRICS
from automl_compress.core.plan import Plan
from automl_compress.deploy.run_folder import RunFolder
from automl_compress.errors import InputError, PlanError, RunFolderError
from automl_compress.model.task import Task
from automl_compress.model.trace import trace
from automl_compress.recovery.transfer import STORED as TRANSFERRED
from automl_compress.recovery.transfer import read_transferred
from automl_compress.search.campaign.campaign import MEASURED, SENSITIVITY, SPACE, Campaign
from automl_compress.search.campaign.options import Options
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.evaluation.identity import digest_of
from automl_compress.search.evaluation.lines import read_lines
from automl_compress.search.sampling.storage import JOURNAL, open_storage
from automl_compress.search.sampling.study import ADOPTED
from automl_compress.search.space.space import plan_of
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS, Executions

_ORIGINAL = ("original.json", "original.onnx", MEASURED)
_CANDIDATES, _METRIC = "candidates", "original-metric.json"
_UNFINISHED = ".training"


@dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """An earlier run, as its folder tells it. `options`: with which it was started; `identity`: what it belongs to."""

    folder: Path
    options: Mapping[str, Any]
    identity: Mapping[str, str]
    space: Mapping[str, Any]

    def lend(self, campaign: Campaign) -> str:
        """Give a campaign that hasn't begun whatever holds for it, too; says what that was.

        Raises RunFolderError if the run was of another model.
        """
        for name in ("task", "graph"):
            if self.identity.get(name) != campaign.identity[name]:
                raise RunFolderError(f"{self.folder} is a run of another {name}: nothing of it holds here")
        same_way = self.executions == dict(campaign.bench.executions)
        same_choice = (
            self.identity.get("seed") == campaign.identity["seed"] and self.importance == campaign.space.importance
        )
        same_device = self.identity.get("profile") == campaign.identity["profile"]
        _copy(self.folder / _METRIC, campaign.folder.file(_METRIC))
        if same_device:
            for name in _ORIGINAL:
                _copy(self.folder / name, campaign.folder.file(name))
        lent = []
        if same_choice:
            lent.append(f"{self._lend_sensitivities(campaign, bits=same_way)} sensitivities")
        if same_choice and same_way:
            campaign.borrowed = tuple(self.evaluated())
            lent.append(f"{len(campaign.borrowed)} trials")
            lent.append(f"{self._lend_candidates(campaign)} trained models")
        return f"from {self.folder}: {', '.join(lent)}" if lent else f"nothing of {self.folder} holds here"

    def lend_transferred(self, folder: RunFolder) -> None:
        """What training a pretrained model on the task's data gave, before anything is compressed."""
        for name in (f"{TRANSFERRED}.safetensors", f"{TRANSFERRED}.json"):
            _copy(self.folder / name, folder.file(name))

    def evaluated(self) -> Iterator[tuple[Plan, float]]:
        """Plans of all budgets that were evaluated, with their one-shot metrics."""
        seen: set[str] = set()
        for _, trial in self.trials():
            if trial.state == TrialState.COMPLETE and "repeat_of" not in trial.user_attrs:
                plan = self.plan(trial)
                if plan.key not in seen:
                    seen.add(plan.key)
                    yield plan, float(trial.values[0])

    def trials(self) -> Iterator[tuple[str, FrozenTrial]]:
        """(budget's label, '' where there was one budget; trial), in order."""
        location = self.options.get("storage")
        if location is None and not (self.folder / JOURNAL).exists():
            return
        storage = open_storage(location or self.folder)
        name = Campaign.study_name(self.identity, shared=location is not None)
        for study_name in optuna.get_all_study_names(storage):
            label = study_name.removeprefix(name).strip()
            if not study_name.startswith(name) or label.endswith("recovery"):
                continue
            study = optuna.load_study(study_name=study_name, storage=storage)
            yield from ((label, t) for t in study.get_trials(deepcopy=False) if ADOPTED not in t.user_attrs)

    def plan(self, trial: FrozenTrial) -> Plan:
        """A trial's plan. Raises PlanError where the trial ended before it had one."""
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        missing = [name for name in self.space.get("options", {}) if name not in params]
        if missing or not self.space:
            raise PlanError(f"trial {trial.number} of {self.folder} has no plan: it was not begun")
        return plan_of({**params, **self.space["fixed"]})

    def trial(self, text: str) -> Plan:
        """The plan of trial '12', or 'LABEL:12' where the run searched under several budgets. Raises PlanError."""
        label, _, number = text.rpartition(":")
        found = {(name, str(trial.number)): trial for name, trial in self.trials()}
        if (label, number) not in found:
            last = {name: int(count) for name, count in found}  # they come in order
            known = ", ".join(f"{name}:0 to {count}".removeprefix(":") for name, count in last.items())
            raise PlanError(f"{self.folder} has no trial {text!r}; it has: {known or 'none'}")
        return self.plan(found[label, number])

    def bench(self, task: Task) -> Workbench:
        """The workbench that the run's trials were evaluated on. Raises RunFolderError for another model's task."""
        graph = trace(task.model, task.example_inputs)
        for name, value in (("task", digest_of(task)), ("graph", graph.fingerprint)):
            if self.identity.get(name) != value:
                raise RunFolderError(f"{self.folder} is a run of another {name}")
        return Workbench(
            read_transferred(self.folder, task),
            graph,
            importance=self.importance or "l2",
            seed=int(self.options.get("seed") or 0),
            executions=self.executions or DEFAULT_EXECUTIONS,
        )

    @property
    def executions(self) -> Executions:
        """How the run's device ran each bit-width."""
        return {(str(kind), int(bits)): how for kind, bits, how in self.space.get("executions", [])}

    @property
    def importance(self) -> str | None:
        return self.space.get("importance")

    def _lend_sensitivities(self, campaign: Campaign, *, bits: bool) -> int:
        source, target = self.folder / SENSITIVITY, campaign.folder.file(SENSITIVITY)
        if target.exists() or not source.exists():
            return 0
        entries = [entry for entry in read_lines(source) if "option" in entry]
        kept = [entry for entry in entries if bits or not entry["option"].startswith("bits.")]
        campaign.folder.write_bytes(SENSITIVITY, "".join(f"{json.dumps(entry)}\n" for entry in kept).encode())
        return len(kept)

    def _lend_candidates(self, campaign: Campaign) -> int:
        records = list((self.folder / _CANDIDATES).glob("*.json"))
        for record in records:
            # The record last, as it says that the others are complete.
            for path in [*sorted(record.parent.glob(f"{record.stem}.*")), record]:
                if _UNFINISHED not in path.suffixes:
                    _copy(path, campaign.folder.file(_CANDIDATES, path.name))
        return len(records)


def _copy(source: Path, target: Path) -> None:
    """A whole file, where there is one and the target isn't there yet."""
    if source.exists() and not target.exists():
        draft = target.with_name(f".lent-{target.name}")
        shutil.copyfile(source, draft)
        draft.replace(target)


def read_run(folder: Path) -> EarlierRun:
    """What a run folder knows. Raises RunFolderError where it isn't one."""
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such run folder")
    try:
        identity = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        space = json.loads((folder / SPACE).read_text(encoding="utf-8")) if (folder / SPACE).exists() else {}
        address = options["device"]["address"]
    except FileNotFoundError as error:
        raise RunFolderError(f"{folder} is not a run's folder: it has no {Path(error.filename).name}") from error
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise RunFolderError(f"{folder}: can't be read as a run ({error})") from error
    return EarlierRun(folder=folder, options={**options, "device": address}, identity=identity, space=space)


# What another question asks anew: budgets and directions, and how long it may take; a shared study is the run's own.
_ASKED = {*METRICS, "max_drop", "min_metric", "front", "minimise", "trials", "timeout", "storage"}
_FEWER_TRIALS = 4


def rebudgeted(
    known: EarlierRun, task: Task | str | None, asked: Mapping[str, Any]
) -> tuple[Task | str, dict[str, Any]]:
    """Task and options of a run that asks for something else; a quarter of the trials unless said otherwise.

    Raises InputError where the run's task was an object and none is given.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    inherited = [option.name for option in fields(Options) if option.name not in _ASKED]
    options = {name: known.options[name] for name in inherited if known.options.get(name) is not None}
    options["trials"] = max(1, int(known.options.get("trials") or _FEWER_TRIALS) // _FEWER_TRIALS)
    if task is None and known.options.get("task_from") != "name":
        raise InputError(f"{known.folder}: its task was handed over in Python; name it: rebudget RUN TASK")
    return task if task is not None else str(known.options["task"]), {**options, **given}


def profile_names(profiles: Sequence[str]) -> dict[str, str]:
    """Name of the subfolder -> profile. Raises InputError for a profile that is named twice."""
    names = {Path(profile).name.removesuffix(".yaml"): profile for profile in profiles}
    if len(names) < len(profiles):
        raise InputError(f"--profile: {', '.join(profiles)} name a device twice; each gets a folder of its name")
    return names
