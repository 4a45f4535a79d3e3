"""The whole flow on one screen: a task and a budget in, a verified ONNX model out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx

from automl_compress.core.budget import Limit, parse_budget
from automl_compress.core.goal import Front, Goal, parse_aim
from automl_compress.core.result import Result
from automl_compress.errors import InfeasibleError, InputError, Interrupted, PlanError
from automl_compress.model.task import Task, require_task_file
from automl_compress.model.trace import trace
from automl_compress.progress import Progress, SilentProgress
from automl_compress.recovery.names import DEFAULT_MODE, check_mode
from automl_compress.recovery.transfer import read_transferred
from automl_compress.search import outcome
from automl_compress.search.cheapest import cheapest_model
from automl_compress.search.directions import best_model
from automl_compress.search.evaluate import Workbench
from automl_compress.search.forecast import PROFILE, Forecast
from automl_compress.search.front import front_models
from automl_compress.search.ladder import read_plan, rebuild, stored_quantization
from automl_compress.search.opening import load, open_campaign, open_device, open_forecast, task_name
from automl_compress.search.profiling import Profiled, profile_kernels, profile_network
from automl_compress.search.settings import Settings, effective_config
from automl_compress.search.standard import standard_models
from automl_compress.search.study import trial_counts
from automl_compress.search.timing import Clock
from automl_compress.techniques.distillation.losses import DEFAULT, parse_losses

DEFAULT_TRIALS = 100
DEFAULT_EPOCHS = 3.0


def compress(
    task: Task | str,
    *,
    latency: str | None = None,
    size: str | None = None,
    memory: str | None = None,
    max_drop: str | None = None,
    min_metric: str | float | None = None,
    front: int | None = None,
    minimise: str | None = None,
    profile: str = "local",
    device: str = "local",
    space: str = "cnn",
    trials: int | None = None,
    epochs: float | None = None,
    timeout: float | None = None,
    seed: int = 0,
    sampler: str = "budget",
    distillation: str = DEFAULT,
    recovery: str = DEFAULT_MODE,
    weights: str | Path | None = None,
    storage: str | None = None,
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
    timeout   seconds after which no further trial is begun; part of it is kept for distillation
    storage   an Optuna storage to share the study in; `work` joins it
    output    run folder (default runs/TASK-BUDGET); the same call with the same folder resumes

    Returns a Result with status 'met', 'estimated' (a profile whose device isn't here: nothing was measured on it) or
    'infeasible'. Raises CompressError, with one line that says what to do.
    """
    aim = parse_aim(max_drop, min_metric, front, minimise)
    limits = parse_budget(latency, size, memory, required=aim is None)
    parse_losses(distillation)
    check_mode(recovery)
    progress = progress or SilentProgress()
    folder = Path(output) if output else _default_folder(task, limits, aim)
    options = {
        "task": task if isinstance(task, str) else type(task.model).__name__,
        **{name: limit.text for name, limit in limits.items()},
        "max_drop": max_drop,
        "min_metric": min_metric,
        "front": front,
        "minimise": minimise,
        "profile": profile,
        "device": device,
        "space": space,
        "trials": trials or DEFAULT_TRIALS,
        "epochs": DEFAULT_EPOCHS if epochs is None else epochs,
        "timeout": timeout,
        "seed": seed,
        "sampler": sampler,
        "distillation": distillation,
        "recovery": recovery,
        "weights": str(weights) if weights else None,
        "storage": storage,
    }
    settings = Settings(
        from_spec=isinstance(task, str),
        limits=limits,
        aim=aim,
        options=options,
        clock=Clock(deadline=time.monotonic() + timeout if timeout else None),
    )
    with open_campaign(task, settings, folder, progress) as campaign:
        known = campaign.folder.read_json("result.json")
        if known is not None and known["status"] in ("met", "estimated"):
            progress.note(f"{folder} holds a finished run; delete it to start anew")
            return Result.from_json(known, folder)
        campaign.folder.write_yaml("config.yaml", effective_config(campaign, settings))
        try:
            campaign.learn()
            if settings.front is not None:
                result = outcome.front(campaign, settings, front_models(campaign, settings))
            else:
                found = (best_model if settings.goal is None else cheapest_model)(campaign, settings)
                result = outcome.delivered(campaign, settings, *found)
        except InfeasibleError as error:
            result = outcome.infeasible(campaign, settings, error)
        except (KeyboardInterrupt, Interrupted):
            outcome.write(campaign, settings, outcome.interrupted(campaign, settings))
            raise Interrupted(f"interrupted; the same command with -o {folder} goes on where it stopped") from None
        return outcome.write(campaign, settings, result)


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
    limits = parse_budget(options.pop("latency", None), options.pop("size", None), options.pop("memory", None))
    progress = progress or SilentProgress()
    default = _default_folder(task, limits)
    folder = Path(output) if output else default.with_name(f"{default.name}-worker-{os.getpid()}")
    settings = Settings(limits=limits, options={"storage": storage, **options})
    with open_campaign(task, settings, folder, progress) as campaign:
        campaign.learn()
        before = trial_counts(campaign.study())
        campaign.explore(int(options.get("trials") or DEFAULT_TRIALS), options.get("timeout"))
        after = trial_counts(campaign.study())
    return {state: count - before.get(state, 0) for state, count in after.items() if count > before.get(state, 0)}


def profile(
    tasks: Task | str | Sequence[Task | str] = (),
    *,
    kernels: str | None = None,
    profile: str = "local",
    device: str = "local",
    space: str = "cnn",
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
    if kernels not in (None, "standard"):
        raise InputError(f"unknown kernels {kernels!r}: the only set is 'standard'")
    if not wanted and kernels is None:
        raise InputError("nothing to profile: name a task, or kernels='standard' (--kernels standard)")
    for task in wanted:
        if isinstance(task, str):
            require_task_file(task)
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
    profile: str = "local",
    device: str = "local",
    space: str = "cnn",
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
    output: str | Path | None = None,
    weights: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build a delivered model again from the original, the run's `plan.json` and its weights; returns the ONNX file.

    Raises PlanError for another model's plan.
    """
    run = Path(run)
    loaded = load(task, weights)
    plan_path, weights_path = run / "plan.json", run / "best.safetensors"
    for path in (plan_path, weights_path):
        if not path.is_file():
            raise PlanError(f"{path}: no such file; only a run that delivered a model can be replayed")
    loaded = read_transferred(run, loaded)
    graph = trace(loaded.model, loaded.example_inputs)
    bench = Workbench(loaded, graph)
    plan, ranges, bench.executions = read_plan(plan_path, bench)
    target = Path(output) if output else run / "replayed.onnx"
    found = stored_quantization(weights_path, ranges)
    onnx.save(bench.export(rebuild(bench, plan, weights_path), plan, found), target)
    return target


def _default_folder(task: Task | str, limits: Mapping[str, Limit], aim: Goal | Front | None = None) -> Path:
    asked = [f"{metric}{limit.text}" for metric, limit in limits.items()]
    if isinstance(aim, Front):
        asked.append(f"front{aim.points}{aim.minimise}")
    elif aim is not None:
        asked += [aim.text.strip("-"), *([aim.minimise] if aim.minimise != "latency" else [])]
    return Path("runs") / "-".join([task_name(task), *(a.replace("%", "pct").replace(" ", "") for a in asked)])
