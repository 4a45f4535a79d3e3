"""The whole flow on one screen: a task and a budget in, a verified ONNX model out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from automl_compress.core.result import Result
from automl_compress.errors import InfeasibleError, Interrupted, PlanError
from automl_compress.model.task import Task
from automl_compress.model.trace import trace
from automl_compress.progress import Progress, SilentProgress
from automl_compress.recovery.own_student import make_student
from automl_compress.recovery.transfer import read_transferred
from automl_compress.search.campaign.asked import require_sense
from automl_compress.search.campaign.earlier_run import profile_names, read_run, rebudgeted
from automl_compress.search.campaign.foresight import Foreseen, foresee
from automl_compress.search.campaign.learning import learn
from automl_compress.search.campaign.measuring import calibrate
from automl_compress.search.campaign.opening import load, open_campaign, open_device, open_forecast, task_name
from automl_compress.search.campaign.options import TRIALS, Options
from automl_compress.search.campaign.settings import default_folder, effective_config, make_settings
from automl_compress.search.delivery import outcome
from automl_compress.search.delivery.cheapest import cheapest_model
from automl_compress.search.delivery.directions import best_model
from automl_compress.search.delivery.front import front_models
from automl_compress.search.evaluation.candidate import read_plan, rebuild, stored_quantization, student_width
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.ladder.ladder import Recovery
from automl_compress.search.sampling.study import trial_counts
from automl_compress.search.table.forecast import PROFILE, Forecast
from automl_compress.search.table.profiling import Profiled, profile_kernels, profile_network
from automl_compress.search.table.standard import standard_models


def compress(
    task: Task | str,
    *,
    latency: str | None = Options.latency,
    size: str | None = Options.size,
    memory: str | None = Options.memory,
    max_drop: str | None = Options.max_drop,
    min_metric: str | float | None = Options.min_metric,
    front: int | None = Options.front,
    minimise: str | None = Options.minimise,
    profile: str = Options.profile,
    device: str = Options.device,
    space: str = Options.space,
    trials: int | None = Options.trials,
    epochs: float | None = Options.epochs,
    timeout: float | None = Options.timeout,
    seed: int = Options.seed,
    sampler: str = Options.sampler,
    distillation: str = Options.distillation,
    recovery: str = Options.recovery,
    training: str = Options.training,
    students: str | None = Options.students,
    baselines: str = Options.baselines,
    weights: str | Path | None = Options.weights,
    storage: str | None = Options.storage,
    max_failed: float = Options.max_failed,
    reuse: str | Path | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Find, train, measure and deliver the best model of `task` within the budgets, or the cheapest good enough one.

    task      a `Task`, or 'path/task.py[:function]' or 'package.module[:function]'
    latency   '0.8ms', '350us', or '40%' of the original's, measured beside it
    size      of the ONNX file: '300KB', '2MB', '60%'; memory: the peak of a fresh process, written the same way
    max_drop  what the validation metric may lose: '1%' of the original's, or '0.01' in its own units; or `min_metric`:
              what it must be at least. Either turns the search around: the cheapest such model is delivered
    front     so many models between the cheapest plan and the original instead of one
    minimise  'latency' (default), 'size' or 'memory': what the cheapest model has least of, or the front is spread
              over; budgets hold as well
    profile   device profile by name or file; `space`: search space by name or file
    device    where to measure: this machine ('local'), or another one, 'ssh://[user@]host[:port]'
    trials    one-shot trials (default 100); `epochs`: of the final distillation (default 3, 0 trains nothing)
    distillation   what candidates learn from the original, names joined by '+', as `distillation.losses` says
    recovery  how they are trained in the end, as `recovery.names` says
    training  settings of the training loop, fields of `training.settings.Training`: 'optimizer=adamw,average=0.999'
    students  who competes with them in the end, joined by '+': 'scratch' (the best plan's structure from fresh
              weights), 'own' (the task's student(width); the default where the task has one), or 'inherited' alone
    baselines what the search has to beat is evaluated and trained a little ('quick'), as often as the search and all
              of it ('full'), or not at all ('none')
    timeout   seconds for everything; what doesn't fit is cut short, and said
    storage   an Optuna storage to share the study in; `work` joins it
    max_failed     share of one-shot trials that may fail
    reuse     an earlier run's folder, of the same model: whatever it knows isn't measured, evaluated or trained again
    output    run folder (default runs/TASK-BUDGET); the same call with the same folder resumes

    Returns a Result with status 'met', 'estimated' (a profile whose device isn't here: nothing was measured on it) or
    'infeasible'. Raises CompressError, with one line that says what to do.
    """
    settings = make_settings(task, **{name: value for name, value in locals().items() if hasattr(Options, name)})
    progress = progress or SilentProgress()
    folder = Path(output) if output else default_folder(task_name(task), settings)
    known = read_run(Path(reuse)) if reuse else None
    lend = known.lend_transferred if known is not None else lambda _: None
    with open_campaign(task, settings, folder, progress, opened=lend) as campaign:
        finished = campaign.folder.read_json("result.json")
        if finished is not None and finished["status"] in ("met", "estimated"):
            progress.note(f"{folder} holds a finished run; delete it to start anew")
            return Result.from_json(finished, folder)
        campaign.folder.write_yaml("config.yaml", effective_config(campaign, settings))
        try:
            if known is not None:
                progress.note(known.lend(campaign))
            if settings.schedule.epochs > 0:
                Recovery(campaign.bench, campaign.folder, settings.losses).rehearse()
            learn(campaign, settings.goal)
            calibrate(campaign)
            if known is not None:
                progress.note(foresee(campaign).text)
            if settings.front is not None:
                result = outcome.front(campaign, settings, front_models(campaign, settings))
            else:
                found = (best_model if settings.goal is None else cheapest_model)(campaign, settings)
                result = outcome.delivered(campaign, settings, *found)
        except InfeasibleError as error:
            result = outcome.infeasible(campaign, settings, error)
        except (KeyboardInterrupt, Interrupted):
            outcome.write(campaign, settings, outcome.interrupted(campaign, settings))
            raise _interrupted(folder) from None
        return outcome.write(campaign, settings, result)


def rebudget(
    run: str | Path,
    task: Task | str | None = None,
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **asked: Any,
) -> Result:
    """Search again for something else, starting from what a run knows: `compress` with `reuse=run` and its options.

    asked  budgets, `max_drop`, `min_metric`, `front`, `minimise`, and `trials`, `epochs`, `timeout`; other options are
           the run's

    Only what the run doesn't know is measured, evaluated or trained. Raises RunFolderError for another model's run.
    """
    task, options = rebudgeted(read_run(Path(run)), task, asked)
    folder = output or _beside(Path(run), task, options)
    return compress(task, **options, reuse=run, output=folder, progress=progress)


def foreseen(
    run: str | Path,
    task: Task | str | None = None,
    *,
    progress: Progress | None = None,
    **asked: Any,
) -> Foreseen:
    """The first answer of `rebudget` alone, in seconds: the best plan that is known, and what it is predicted to cost.

    It leaves no run folder: a search goes by predictions that were corrected by measuring. Raises InfeasibleError where
    no plan is predicted to be within the budgets.
    """
    progress, known = progress or SilentProgress(), read_run(Path(run))
    task, options = rebudgeted(known, task, asked)
    settings = make_settings(task, **options)
    with (
        TemporaryDirectory(prefix="automl-compress-") as folder,
        open_campaign(task, settings, Path(folder), progress, opened=known.lend_transferred) as campaign,
    ):
        progress.note(known.lend(campaign))
        learn(campaign, settings.goal)  # no plan is measured for an answer in seconds
        return foresee(campaign)


def compress_each(
    task: Task | str,
    profiles: Sequence[str],
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Result]:
    """`compress` for each of several device profiles, from one set of sensitivities; name of the profile -> result.

    Each has a run folder of its own below `output`, which gets `devices.json` and a `report.html` over all of them.
    Evaluated trials and trained models are shared between devices that run bit-widths in the same way.
    """
    names = profile_names(profiles)
    whole = make_settings(task, **options)
    folder = Path(output) if output else default_folder(task_name(task), whole)
    results: dict[str, Result] = {}
    progress = progress or SilentProgress()
    for name, each in names.items():
        progress.another(f"for {name}:")
        first = next((folder / other for other in results), None)
        try:
            results[name] = compress(
                task, **options, profile=each, reuse=first, output=folder / name, progress=progress
            )
        except Interrupted:
            raise _interrupted(folder) from None
    outcome.write_devices(folder, results)
    return results


def work(
    task: Task | str,
    *,
    storage: str,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, int]:
    """Join the one-shot trials of a search that runs elsewhere with the same task, options and `storage`.

    Returns how many trials ended in which state while this worker ran. Distillation and delivery are the search's.
    """
    progress = progress or SilentProgress()
    settings = make_settings(task, storage=storage, **options)
    default = default_folder(task_name(task), settings)
    folder = Path(output) if output else default.with_name(f"{default.name}-worker-{os.getpid()}")
    with open_campaign(task, settings, folder, progress) as campaign:
        learn(campaign)
        calibrate(campaign)
        before = trial_counts(campaign.study())
        campaign.explore(int(options.get("trials") or TRIALS), options.get("timeout"))
        after = trial_counts(campaign.study())
    return {state: count - before.get(state, 0) for state, count in after.items() if count > before.get(state, 0)}


def profile(
    tasks: Task | str | Sequence[Task | str] = (),
    *,
    kernels: str | None = None,
    profile: str = Options.profile,
    device: str = Options.device,
    space: str = Options.space,
    threads: int | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Profiled]:
    """Measure what networks cost on a device, so that searches find it known and any plan of theirs can be predicted.

    tasks    tasks, or 'path/task.py[:function]'; the plans of each within `space` are what is measured
    kernels  'standard' measures layers that most networks consist of, without a task
    threads  of the runtime (default: the profile's); another number is another profile
    device   'local' or 'ssh://[user@]host[:port]'

    Only what the profile lacks is measured; whatever was measured when a call ends is kept. Returns what was added, for
    the standard kernels first. Raises CompressError, with one line that says what to do.
    """
    progress = progress or SilentProgress()
    wanted = [tasks] if isinstance(tasks, str | Task) else list(tasks)
    require_sense(wanted, kernels=kernels, space=space, weights=weights)
    found = []
    with open_device(profile, device, progress, threads=threads) as place:
        place.profile.require_match()
        if kernels:
            found.append(profile_kernels(place, list(standard_models(seed)), progress))
        for task in wanted:
            with open_forecast(task, place, progress, space=space, weights=weights, seed=seed) as forecast:
                found.append(profile_network(task_name(task), forecast, progress))
    return found


@contextmanager
def forecast(
    task: Task | str,
    *,
    profile: str = Options.profile,
    device: str = Options.device,
    space: str = Options.space,
    threads: int | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[Forecast]:
    """Tell what plans of a task cost on a device, in a `with` block; arguments as for `profile`.

    What the profile lacks is measured first. Then `predict(plan)` lowers a plan's model with the runtime, and
    `quick(plan)` tells the same in about a millisecond.
    """
    progress = progress or SilentProgress()
    with (
        open_device(profile, device, progress, threads=threads) as place,
        open_forecast(task, place, progress, space=space, weights=weights, seed=seed) as found,
    ):
        found.learn(PROFILE, progress)
        yield found


def replay(
    run: str | Path,
    task: Task | str,
    *,
    trial: str | int | None = None,
    output: str | Path | None = None,
    weights: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build a delivered model again from the original, the run's `plan.json` and its weights; returns the ONNX file.

    trial  a one-shot trial instead, by its number, as it was evaluated: repaired and quantized, not trained. Where the
           run searched at several budgets, 'BUDGET:NUMBER' as in the report

    Raises PlanError for another model's plan, and for a trial that there isn't.
    """
    run = Path(run)
    if trial is not None:
        known = read_run(run)
        plan = known.trial(str(trial))
        bench = known.bench(load(task, weights))
        target = Path(output) if output else run / f"trial-{str(trial).replace(' ', '-').replace(':', '-')}.onnx"
        onnx.save(bench.export(*bench.student(plan)), target)
        return target
    plan_path, weights_path = run / "plan.json", run / "best.safetensors"
    for path in (plan_path, weights_path):
        if not path.is_file():
            within = [str(plan.parent) for each in ("*", "front/*") for plan in sorted(run.glob(f"{each}/plan.json"))]
            way = f"name one of its models: {', '.join(within)}" if within else "only a delivered model can be replayed"
            raise PlanError(f"{path}: no such file; {way}")
    loaded = read_transferred(run, load(task, weights))
    width = student_width(plan_path)
    if width is not None:
        loaded = replace(loaded, model=make_student(loaded, width, seed=0))
    bench = Workbench(loaded, trace(loaded.model.eval(), loaded.example_inputs))
    plan, ranges, bench.executions = read_plan(plan_path, bench.graph)
    target = Path(output) if output else run / "replayed.onnx"
    found = stored_quantization(weights_path, ranges)
    onnx.save(bench.export(rebuild(bench, plan, weights_path), plan, found), target)
    return target


def _interrupted(folder: Path) -> Interrupted:
    return Interrupted(f"interrupted; the same command with -o {folder} goes on where it stopped")


def _beside(run: Path, task: Task | str, options: Mapping[str, Any]) -> Path:
    """The folder of another budget's run: next to the run, called after it."""
    return run.parent / default_folder(run.name, make_settings(task, **options)).name
