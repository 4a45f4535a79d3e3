"""Searching for a model, joining a search, showing what was found, and building it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any

import typer

from automl_compress.cli.action import Action
from automl_compress.cli.options import Debug, Device, Json, Output, Quiet, Run, Task, Training, Weights, parse_seconds
from automl_compress.cli.output import display, fail, print_result, stdout_to_stderr
from automl_compress.core.budget import parse_budget
from automl_compress.core.goal import parse_aim
from automl_compress.deploy.overview import read_overview, summarize_devices, to_json
from automl_compress.deploy.summary import nearest_text, read_result, summarize
from automl_compress.errors import InputError
from automl_compress.recovery.names import NAMES as MODES
from automl_compress.recovery.names import check_mode
from automl_compress.recovery.students import parse_students
from automl_compress.search.campaign.options import EPOCHS, Options
from automl_compress.techniques.distillation.losses import MIXED, NAMES, parse_losses
from automl_compress.techniques.training.settings import parse_training

EXIT_CODES = {"met": 0, "infeasible": 3, "estimated": 4, "interrupted": 130}

commands = typer.Typer()


@commands.command("worker", help="Join the search in --storage, with the same options.")
@commands.command("search", help="Find and deliver the best model within a budget, or the cheapest good enough one.")
def _search(
    ctx: typer.Context,
    task: Task,
    latency: Annotated[str | None, typer.Option(metavar="BUDGET", help="0.8ms, 350us or 40% of the original.")] = None,
    size: Annotated[str | None, typer.Option(metavar="BUDGET", help="Of the ONNX file: 300KB, 2MB or 60%.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="BUDGET", help="Peak of a fresh process: 2MB or 60%.")] = None,
    max_drop: Annotated[
        str | None, typer.Option(metavar="LOSS", help="Cheapest model that loses at most 1% of the metric, or 0.01.")
    ] = None,
    min_metric: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Cheapest model whose metric is at least 0.91.")
    ] = None,
    front: Annotated[
        int | None, typer.Option(metavar="N", help="N models between the cheapest and the original, in one run.")
    ] = None,
    minimise: Annotated[
        str | None, typer.Option(metavar="WHAT", help="What is cheap: latency (default), size or memory.")
    ] = None,
    output: Output = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Device profile, a name or file; several: a model for each."),
    ] = None,
    device: Device = Options.device,
    space: Annotated[str, typer.Option(metavar="NAME", help="Search space: a name or a file.")] = Options.space,
    trials: Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after so many trials.")] = None,
    epochs: Annotated[float | None, typer.Option(metavar="N", min=0, help="Epochs of the final distillation.")] = None,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Stop searching after 90s, 30m or 2h.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of everything that is random.")] = Options.seed,
    sampler: Annotated[
        str, typer.Option(metavar="NAME", help="'budget', or the name of an Optuna sampler.")
    ] = Options.sampler,
    baselines: Annotated[
        str, typer.Option(metavar="EFFORT", help="For what the search has to beat: quick, full or none.")
    ] = Options.baselines,
    recovery: Annotated[
        str, typer.Option(metavar="MODE", help=f"How finalists are trained: {', '.join(MODES)}.")
    ] = Options.recovery,
    training: Training = Options.training,
    max_failed: Annotated[
        float, typer.Option(metavar="SHARE", min=0, max=1, help="Stop when a larger share of the trials failed.")
    ] = Options.max_failed,
    distillation: Annotated[
        str, typer.Option(metavar="LOSSES", help=f"What is learned, joined by +: {', '.join((*NAMES, MIXED))}.")
    ] = Options.distillation,
    students: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Who competes with the cut model: scratch, own, scratch+own.")
    ] = None,
    weights: Weights = None,
    storage: Annotated[str | None, typer.Option(metavar="URL", help="Optuna storage to share the study in.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Action:
    worker = ctx.info_name == "worker"
    profiles = profile or [Options.profile]

    def run(api: Any) -> int:
        parse_losses(distillation)
        check_mode(recovery)
        parse_training(training, epochs=EPOCHS)
        parse_students(students)
        aim = parse_aim(max_drop, min_metric, front, minimise)
        parse_budget(latency, size, memory, required=aim is None)
        if worker and aim is not None:
            raise InputError("worker: joins a search within budgets; other searches run in one process")
        if worker and len(profiles) > 1:
            raise InputError("worker: a worker searches for one device: give one --profile")
        if worker and storage is None:
            raise InputError("worker: --storage is missing: name the storage of the search to join")
        options = {
            "latency": latency,
            "size": size,
            "memory": memory,
            "profile": profiles[0],
            "device": device,
            "space": space,
            "trials": trials,
            "epochs": epochs,
            "timeout": None if timeout is None else parse_seconds(timeout),
            "seed": seed,
            "sampler": sampler,
            "max_failed": max_failed,
            "distillation": distillation,
            "recovery": recovery,
            "training": training,
            "students": students,
            "baselines": baselines,
            "weights": weights,
            "storage": storage,
            "output": output,
        }
        if aim is not None:
            options |= {"max_drop": max_drop, "min_metric": min_metric, "front": front, "minimise": minimise}
        with stdout_to_stderr(), display(quiet) as progress:
            api = api or import_module("automl_compress.api")
            if len(profiles) > 1:
                del options["profile"]
                outcome = api.compress_each(task, profiles, progress=progress, **options)
            else:
                outcome = (api.work if worker else api.compress)(task, progress=progress, **options)
        if len(profiles) > 1:
            return _report_each({name: result.to_json() for name, result in outcome.items()}, as_json)
        return _report_worker(outcome, as_json) if worker else report(outcome.to_json(), as_json)

    return Action(run=run, folder=output, debug=debug)


@commands.command("show", help="Show what a finished run found.")
def _show(run: Run, as_json: Json = False, debug: Debug = False) -> Action:
    def show(_api: Any) -> int:
        each = read_overview(run)
        if each is not None:
            print_result(json.dumps(to_json(each), indent=2) if as_json else summarize_devices(each))
            return 0
        result = read_result(run)
        print_result(json.dumps(result, indent=2) if as_json else summarize(result))
        return 0

    return Action(run=show, debug=debug)


@commands.command("replay", help="Build a delivered model again from its plan.json.")
def _replay(
    run: Run,
    task: Task,
    trial: Annotated[
        str | None, typer.Option(metavar="N", help="A one-shot trial instead, as the report numbers them: 12.")
    ] = None,
    output: Output = None,
    weights: Weights = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Action:
    def replay(api: Any) -> int:
        with stdout_to_stderr(), display(quiet) as progress:
            api = api or import_module("automl_compress.api")
            model = api.replay(run, task, trial=trial, output=output, weights=weights, progress=progress)
        print_result(str(model))
        return 0

    return Action(run=replay, folder=output, debug=debug)


def report(result: Mapping[str, Any], as_json: bool) -> int:
    """Print a result; its status decides the exit code."""
    status = result["status"]
    print_result(json.dumps(result, indent=2) if as_json else summarize(result))
    if status == "infeasible":
        found = nearest_text(result["nearest"], result["binding"])
        reason = next(iter(result["notes"]), "no reachable model meets the budget")
        fail("; ".join(filter(None, [reason, found])), EXIT_CODES[status])
    return EXIT_CODES[status]


def _report_each(results: Mapping[str, Mapping[str, Any]], as_json: bool) -> int:
    """Print the results of several devices; the exit code is that of the worst."""
    print_result(json.dumps(to_json(results), indent=2) if as_json else summarize_devices(results))
    lacking = [name for name, result in results.items() if result["status"] == "infeasible"]
    if lacking:
        return fail(f"no reachable model meets the budget on {', '.join(lacking)}", EXIT_CODES["infeasible"])
    return max(EXIT_CODES[result["status"]] for result in results.values())


def _report_worker(trials: Mapping[str, int], as_json: bool) -> int:
    """Print how many trials a worker ran, by state."""
    text = ", ".join(f"{count} {state}" for state, count in trials.items()) or "none; nothing was left to do"
    print_result(json.dumps(dict(trials)) if as_json else f"trials run by this worker: {text}")
    return 0
