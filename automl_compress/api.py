"""The whole flow on one screen: a task and a budget in, a verified ONNX model out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from automl_compress.core.budget import Limit, parse_budget
from automl_compress.core.result import Result
from automl_compress.deploy.report import write_report
from automl_compress.errors import CompressError, InfeasibleError, InputError, Interrupted, PlanError
from automl_compress.model.task import Task, require_task_file
from automl_compress.model.trace import trace
from automl_compress.progress import Progress, SilentProgress
from automl_compress.recovery.names import DEFAULT_MODE, check_mode
from automl_compress.search.account import notes as notes_of
from automl_compress.search.account import trial_rows
from automl_compress.search.campaign import Campaign
from automl_compress.search.deliver import Verified, final_metric, verify
from automl_compress.search.evaluate import Workbench
from automl_compress.search.finalists import baselines, climb, finalists, within_budget
from automl_compress.search.forecast import PROFILE, Forecast
from automl_compress.search.ladder import Candidate, Recovery, plan_file, read_plan, rebuild, stored_quantization
from automl_compress.search.opening import load, open_campaign, open_device, open_forecast, task_name
from automl_compress.search.profiling import Profiled, profile_kernels, profile_network
from automl_compress.search.settings import Settings, effective_config, reproduce
from automl_compress.search.standard import standard_models
from automl_compress.search.study import trial_counts
from automl_compress.techniques.distillation.losses import DEFAULT, parse_losses

DEFAULT_TRIALS = 100
DEFAULT_EPOCHS = 3.0
_DELIVERIES = 4
_EXPLORE_SHARE = 0.4


def compress(
    task: Task | str,
    *,
    latency: str | None = None,
    size: str | None = None,
    memory: str | None = None,
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
    """Find, train, measure and deliver the best model of `task` within the budgets.

    task      a `Task`, or 'path/task.py[:function]' or 'package.module[:function]'
    latency   '0.8ms', '350us', or '40%' of the original's, measured beside it
    size      of the ONNX file: '300KB', '2MB', '60%'; memory: the peak of a fresh process, written the same way
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
    limits = parse_budget(latency, size, memory)
    parse_losses(distillation)
    check_mode(recovery)
    progress = progress or SilentProgress()
    folder = Path(output) if output else _default_folder(task, limits)
    options = {
        "task": task if isinstance(task, str) else type(task.model).__name__,
        **{name: limit.text for name, limit in limits.items()},
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
        options=options,
        deadline=time.monotonic() + timeout if timeout else None,
    )
    with open_campaign(task, settings, folder, progress) as campaign:
        known = campaign.folder.read_json("result.json")
        if known is not None and known["status"] in ("met", "estimated"):
            progress.note(f"{folder} holds a finished run; delete it to start anew")
            return Result.from_json(known, folder)
        campaign.folder.write_yaml("config.yaml", effective_config(campaign, settings))
        try:
            result = _run(campaign, settings)
        except InfeasibleError as error:
            result = _infeasible(campaign, error)
        except (KeyboardInterrupt, Interrupted):
            _write(campaign, settings, _interrupted(campaign))
            raise Interrupted(f"interrupted; the same command with -o {folder} goes on where it stopped") from None
        return _write(campaign, settings, result)


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
    graph = trace(loaded.model, loaded.example_inputs)
    plan_path, weights_path = run / "plan.json", run / "best.safetensors"
    for path in (plan_path, weights_path):
        if not path.is_file():
            raise PlanError(f"{path}: no such file; only a run that delivered a model can be replayed")
    bench = Workbench(loaded, graph)
    plan, ranges, bench.executions = read_plan(plan_path, bench)
    target = Path(output) if output else run / "replayed.onnx"
    found = stored_quantization(weights_path, ranges)
    onnx.save(bench.export(rebuild(bench, plan, weights_path), plan, found), target)
    return target


def _run(campaign: Campaign, settings: Settings) -> Result:
    """Search, recover, verify; a miss corrects the cost model and the search goes on."""
    campaign.learn()
    trials, schedule = int(settings.options["trials"]), settings.schedule
    recovery = Recovery(campaign.bench, campaign.folder, settings.losses, settings.recovery)
    for attempt in range(_DELIVERIES):
        plans = finalists(campaign, trials + attempt, settings.left(_EXPLORE_SHARE))
        candidates = climb(campaign, plans, schedule, recovery)
        beaten = baselines(campaign, schedule, recovery)
        best = max([*candidates, *within_budget(campaign, beaten)], key=lambda candidate: candidate.metric)
        verified = verify(campaign, best, beaten)
        if verified.met:
            return _delivered(campaign, settings, best, verified)
        campaign.progress.note("the finished model missed the budget; the search goes on")
        campaign.measured[best.plan.key] = verified.beside(campaign.original)
    raise InfeasibleError(
        f"{_DELIVERIES} finished models missed the budget when measured",
        nearest=campaign.floors(),
        binding=campaign.binding(),
    )


def _delivered(campaign: Campaign, settings: Settings, best: Candidate, verified: Verified) -> Result:
    folder = campaign.folder
    folder.write_bytes("best.onnx", best.onnx.read_bytes())
    folder.write_bytes("best.safetensors", best.weights.read_bytes())
    folder.write_json("plan.json", plan_file(best, campaign.bench))
    delivered = replace(verified.delivered, test_metric=final_metric(campaign, best))
    notes = list(verified.notes)
    for name, figures in verified.baselines.items():
        fits = verified.budget.met(
            replace(
                verified.cost,
                latency_us=figures.latency_us,
                size_bytes=figures.size_bytes,
                memory_bytes=figures.memory_bytes,
            )
        )
        if fits and figures.metric >= delivered.metric and figures.plan != delivered.plan:
            notes.append(
                f"baseline {name} is within the budget and not worse on validation: the search did not beat it"
            )
        if figures.plan == delivered.plan:
            notes.append(f"the delivered model is the baseline {name}: the search found nothing better")
    return _result(
        campaign,
        status="met" if verified.cost.provenance == "measured" else "estimated",
        original=verified.original,
        delivered=delivered,
        baselines=verified.baselines,
        budget=verified.budget.limits,
        layers=verified.layers,
        notes=(*notes, *notes_of(campaign)),
        seconds={"total": time.monotonic() - settings.begun, "distillation": best.seconds},
    )


def _infeasible(campaign: Campaign, error: InfeasibleError) -> Result:
    return _result(
        campaign,
        status="infeasible",
        original=campaign.original_figures(),
        budget=campaign.budget.limits,
        nearest=error.nearest,
        binding=error.binding,
        notes=(str(error), *notes_of(campaign)),
    )


def _interrupted(campaign: Campaign) -> Result:
    known = hasattr(campaign, "budget")
    return _result(
        campaign,
        status="interrupted",
        original=campaign.original_figures() if known else None,
        budget=campaign.budget.limits if known else {},
    )


def _result(campaign: Campaign, **fields: Any) -> Result:
    header = campaign.device.profile.header
    shown = {"provenance", "match", "runtime", "device", "memory"}
    shown |= {"protocol"} if campaign.device.measures else {"sources", "roofline"}
    device = {
        "address": campaign.device.link.name,
        "profile": campaign.device.profile.name,
        "file": str(campaign.device.profile.path),
        "threads": campaign.device.profile.threads,
        **header.model_dump(include=shown, mode="json"),
    }
    return Result(device=device, folder=campaign.folder.path, trials=campaign.trial_counts(), **fields)


def _write(campaign: Campaign, settings: Settings, result: Result) -> Result:
    """result.json and report.html; the JSON last, since its presence says that a run is finished."""
    try:
        write_report(result, trial_rows(campaign), campaign.folder.path, commands=[reproduce(campaign, settings)])
    except OSError as error:
        raise CompressError(
            f"{error.filename}: can't be written ({error.strerror}); free some space and run again"
        ) from error
    campaign.folder.write_json("result.json", result.to_json())
    return result


def _default_folder(task: Task | str, limits: Mapping[str, Limit]) -> Path:
    return Path("runs") / "-".join(
        [task_name(task), *(f"{m}{limit.text.replace('%', 'pct').replace(' ', '')}" for m, limit in limits.items())]
    )
