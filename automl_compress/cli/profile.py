"""`profile`: measuring what networks cost on a device, apart from any search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any

import typer

from automl_compress.cli.action import Action
from automl_compress.cli.options import Debug, Device, Json, Quiet, Weights
from automl_compress.cli.output import display, print_result, stdout_to_stderr
from automl_compress.search.campaign.options import Options

commands = typer.Typer()


@commands.command("profile", help="Measure what networks, or the standard kernels, cost on a device.")
def _profile(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TASK]...", help="path/task.py[:function] or package.module[:function]"),
    ] = None,
    kernels: Annotated[
        str | None, typer.Option(metavar="SET", help="'standard': layers that most networks consist of.")
    ] = None,
    profile: Annotated[str, typer.Option(metavar="NAME", help="Device profile: a name or a file.")] = Options.profile,
    device: Device = Options.device,
    space: Annotated[
        str, typer.Option(metavar="NAME", help="Whose plans are measured: a name or a file.")
    ] = Options.space,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of the runtime; another number is another profile.")
    ] = None,
    weights: Weights = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the plans that are measured.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Action:
    def run(api: Any) -> int:
        wanted = {"kernels": kernels, "space": space, "weights": weights}
        place = {"profile": profile, "device": device, "threads": threads}
        # What is wrong with the arguments is said before the api is there, which takes seconds.
        asked = import_module("automl_compress.search.campaign.asked")
        asked.require_sense(tasks or [], **wanted)
        asked.require_profile(**place)
        with stdout_to_stderr(), display(quiet) as progress:
            api = api or import_module("automl_compress.api")
            found = api.profile(tasks or [], seed=seed, progress=progress, **wanted, **place)
        rows = [profiled.to_json() for profiled in found]
        print_result(json.dumps(rows, indent=2) if as_json else "\n".join(_text(row) for row in rows))
        return 0

    return Action(run=run, debug=debug, resumes=True)


def _text(row: Mapping[str, Any]) -> str:
    """What was measured, and how well plans are predicted now."""
    lines = [
        f"{row['network']}: {row['kernels']} kernels and {row['models']} models added in {row['seconds']:.0f} s"
        if row["requests"]
        else f"{row['network']}: everything was known",
        f"  profile: {row['file']} ({row['known']} kernels)",
    ]
    if row["error"] is not None:
        worst = f"worst {row['worst_error']:.1%} of {row['checked']}"
        lines.append(f"  latency of plans that were not measured before: off by {row['error']:.1%} (median; {worst})")
    if row["quick_error"] is not None:
        lines.append(f"  without lowering them, another {row['quick_error']:.1%} (median)")
    if row["memory_error"] is not None:
        lines.append(f"  memory of plans that were not weighed: off by {row['memory_error']:.1%} (median)")
    return "\n".join([*lines, *(f"  warning: {warning}" for warning in row["warnings"])])
