"""`rebudget`: another question to a run that was made, answered from what it knows."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Annotated, Any

import typer

from automl_compress.cli.action import Action
from automl_compress.cli.options import Debug, Json, Output, Quiet, Run, parse_seconds
from automl_compress.cli.output import display, print_result, stdout_to_stderr
from automl_compress.cli.search import report
from automl_compress.core.budget import parse_budget
from automl_compress.core.goal import parse_aim
from automl_compress.errors import InputError

commands = typer.Typer()


@commands.command("rebudget", help="Search again for another budget, starting from what a run knows.")
def _rebudget(
    run: Run,
    task: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="path/task.py[:function]; by default the run's own.")
    ] = None,
    latency: Annotated[str | None, typer.Option(metavar="BUDGET", help="0.8ms, 350us or 40% of the original.")] = None,
    size: Annotated[str | None, typer.Option(metavar="BUDGET", help="Of the ONNX file: 300KB, 2MB or 60%.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="BUDGET", help="Peak of a fresh process: 2MB or 60%.")] = None,
    max_drop: Annotated[str | None, typer.Option(metavar="LOSS", help="As for search: 1%, or 0.01.")] = None,
    min_metric: Annotated[str | None, typer.Option(metavar="METRIC", help="As for search: 0.91.")] = None,
    front: Annotated[int | None, typer.Option(metavar="N", help="As for search.")] = None,
    minimise: Annotated[str | None, typer.Option(metavar="WHAT", help="As for search.")] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Only the best known plan and its predicted cost, in seconds.")
    ] = False,
    trials: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="More trials (default: a quarter of the run's).")
    ] = None,
    epochs: Annotated[float | None, typer.Option(metavar="N", min=0, help="Default: the run's.")] = None,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="90s, 30m or 2h for everything.")] = None,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Action:
    def again(api: Any) -> int:
        aim = parse_aim(max_drop, min_metric, front, minimise)
        parse_budget(latency, size, memory, required=aim is None)
        asked = {
            "latency": latency,
            "size": size,
            "memory": memory,
            "max_drop": max_drop,
            "min_metric": min_metric,
            "front": front,
            "minimise": minimise,
            "trials": trials,
            "epochs": epochs,
            "timeout": None if timeout is None else parse_seconds(timeout),
        }
        if plan_only and output is not None:
            raise InputError("--plan-only leaves no run folder behind: leave out -o, or --plan-only")
        with stdout_to_stderr(), display(quiet) as progress:
            api = api or import_module("automl_compress.api")
            if plan_only:
                found = api.foreseen(run, task, progress=progress, **asked)
            else:
                found = api.rebudget(run, task, output=output, progress=progress, **asked)
        if not plan_only:
            return report(found.to_json(), as_json)
        print_result(json.dumps(found.to_json(), indent=2) if as_json else found.text)
        return 0

    return Action(run=again, folder=output, debug=debug)
