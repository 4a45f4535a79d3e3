"""What a command works on: a device, a task traced, a search. Opened in the order of what is cheapest to get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from automl_compress.deploy.run_folder import RunFolder
from automl_compress.errors import InputError, did_you_mean
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.remote import link_to
from automl_compress.hardware.prediction.estimated import device_for
from automl_compress.hardware.profile.profile import load_profile
from automl_compress.model.task import Task, load_task, prepare, scarcity
from automl_compress.model.task_file import require_task_file
from automl_compress.model.trace import trace
from automl_compress.progress import Progress
from automl_compress.recovery.own_student import require_exportable
from automl_compress.recovery.students import OWN, parse_students
from automl_compress.recovery.transfer import in_words, transfer_in
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.settings import Settings
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.evaluation.identity import digest_of
from automl_compress.search.sampling.sampler import SAMPLERS
from automl_compress.search.space.rules import SpaceFile
from automl_compress.search.space.space import SearchSpace, load_space, offered_bits, resolve
from automl_compress.search.table.forecast import Forecast
from automl_compress.search.table.profiling import forecast_of
from automl_compress.techniques.distillation.outputs import answers, matched
from automl_compress.techniques.distillation.teacher import worth_of_teaching
from automl_compress.techniques.training.log import shown_by

_TEACHING = "teaching.json"


@contextmanager
def open_device(profile: str, device: str, progress: Progress, *, threads: int | None = None) -> Iterator[Device]:
    """A profile's device, reached; what is to be known about it is said."""
    link = link_to(device)
    progress.stage("reaching the device")
    found = load_profile(profile, facts=link.facts(), host=link.host, threads=threads)
    for warning in found.warnings:
        progress.note(f"warning: {warning}")
    with device_for(found, link=link, notice=progress.note) as place:
        yield place


@contextmanager
def open_forecast(
    task: Task | str, device: Device, progress: Progress, *, space: str, weights: str | Path | None, seed: int
) -> Iterator[Forecast]:
    rules = load_space(space)
    progress.stage("loading the task")
    loaded = load(task, weights)
    progress.stage("tracing the model")
    yield forecast_of(loaded, trace(loaded.model, loaded.example_inputs), device, rules, seed=seed)


@contextmanager
def open_campaign(
    task: Task | str,
    settings: Settings,
    folder: Path,
    progress: Progress,
    *,
    opened: Callable[[RunFolder], None] = lambda _: None,
) -> Iterator[Campaign]:
    """Everything that a search needs, checked in the order of what is cheapest to get wrong.

    opened  called with the run folder before anything is trained or measured for it
    """
    options = settings.options
    if options["sampler"] not in SAMPLERS:
        name = options["sampler"]
        raise InputError(f"unknown sampler {name!r}: use one of {', '.join(SAMPLERS)}{did_you_mean(name, SAMPLERS)}")
    if isinstance(task, str):
        require_task_file(task)
    rules = load_space(options["space"])
    with open_device(options["profile"], options["device"], progress) as device:
        yield from _campaign_on(device, rules, task, settings, folder, progress, opened)


def _campaign_on(
    device: Device,
    rules: SpaceFile,
    task: Task | str,
    settings: Settings,
    folder: Path,
    progress: Progress,
    opened: Callable[[RunFolder], None],
) -> Iterator[Campaign]:
    options, device_profile = settings.options, device.profile
    progress.stage("loading the task")
    loaded = load(task, options["weights"])
    if OWN in parse_students(options["students"], has_own=loaded.student is not None):
        require_exportable(loaded, int(options["seed"]))  # told of now, not when all else is done
    progress.stage("tracing the model")
    graph = trace(loaded.model, loaded.example_inputs)
    offered, held_back = offered_bits(device_profile.executions, size_limited="size" in settings.searched)
    space = resolve(rules, graph, offered, held_back)
    space.require_effect()
    scarce = scarcity(loaded)
    if scarce:
        progress.note(f"warning: {scarce}")
        space = replace(space, notes=(*space.notes, scarce))
    identity = {
        "task": digest_of(loaded),
        "graph": graph.fingerprint,
        "space": space.fingerprint,
        "profile": device_profile.path.stem,
        "budget": settings.asked,
        "seed": str(options["seed"]),
    }
    with RunFolder(folder, identity) as run_folder:
        opened(run_folder)
        loaded, space = _transferred(run_folder, loaded, space, progress, seed=int(options["seed"]))
        if told := told_of_teaching(run_folder, loaded):
            progress.note(told)
            space = replace(space, notes=(*space.notes, told))
        yield Campaign(
            bench=Workbench(
                loaded,
                graph,
                importance=space.importance,
                seed=int(options["seed"]),
                executions=device_profile.executions,
            ),
            space=space,
            device=device,
            limits=settings.searched,
            clock=settings.clock,
            max_failed=float(options["max_failed"]),
            folder=run_folder,
            progress=progress,
            identity=identity,
            seed=int(options["seed"]),
            sampler=options["sampler"],
            storage=options["storage"],
        )


def _transferred(
    folder: RunFolder, task: Task, space: SearchSpace, progress: Progress, *, seed: int
) -> tuple[Task, SearchSpace]:
    """The task with a model that was trained on its data, where it names a pretrained one; the report says so."""
    done, known = transfer_in(folder, task, seed=seed, on_step=shown_by(progress))
    if known is None:
        return done, space
    progress.note(in_words(known))
    return done, replace(space, notes=(*space.notes, in_words(known)))


def told_of_teaching(folder: RunFolder, task: Task) -> str:
    """`worth_of_teaching`, found out once for a run folder."""
    if task.teacher is None and not task.views:
        return ""
    known = folder.read_json(_TEACHING)
    if known is None:
        known = {"note": worth_of_teaching(task)}
        folder.write_json(_TEACHING, known)
    return str(known["note"])


def load(task: Task | str, weights: str | Path | None) -> Task:
    path = Path(weights) if weights else None
    loaded = load_task(task, weights=path) if isinstance(task, str) else prepare(task, weights=path)
    if loaded.teacher is not None:
        matched(answers(loaded.model, loaded, "the model"), answers(loaded.teacher, loaded, "the teacher"))
    return loaded


def task_name(task: Task | str) -> str:
    return Path(task.partition(":")[0]).stem if isinstance(task, str) else type(task.model).__name__.lower()
