"""`recover`: train the model of a plan in a mode of one's choice."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from automl_compress.cli.action import Action
from automl_compress.cli.options import Debug, Json, Output, Quiet, Task, Training, Weights
from automl_compress.cli.output import display, print_result, stdout_to_stderr
from automl_compress.recovery.names import DEFAULT_MODE, NAMES, check_mode
from automl_compress.search.campaign.options import EPOCHS
from automl_compress.techniques.distillation.losses import DEFAULT, parse_losses
from automl_compress.techniques.training.settings import parse_training

commands = typer.Typer()
_MODES = "; ".join(f"{name}: {words}" for name, words in NAMES.items())


@commands.command("recover", help="Train the model that a plan describes, without a search.")
def _recover(
    task: Task,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A run's plan.json.")],
    mode: Annotated[str, typer.Option(metavar="MODE", help=_MODES)] = DEFAULT_MODE,
    epochs: Annotated[float, typer.Option(metavar="N", min=0, help="Epochs of all stages together.")] = EPOCHS,
    distillation: Annotated[str, typer.Option(metavar="LOSSES", help="What is learned, as for search.")] = DEFAULT,
    training: Training = "",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of everything that is random.")] = 0,
    weights: Weights = None,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Action:
    def run(api: Any) -> int:
        check_mode(mode)
        parse_losses(distillation)
        parse_training(training, epochs=epochs)
        with stdout_to_stderr(), display(quiet) as progress:
            api = api or import_module("automl_compress.search.ladder.recovering")
            found = api.recover(
                task,
                plan,
                mode=mode,
                epochs=epochs,
                training=training,
                distillation=distillation,
                seed=seed,
                weights=weights,
                output=output,
                progress=progress,
            )
        facts = {
            "metric": found.metric,
            "onnx": str(found.onnx),
            "weights": str(found.weights),
            "seconds": found.seconds,
            "training": list(found.training),
            "notes": list(found.notes),
        }
        lines = [f"{found.onnx}: {found.metric:.4f} on validation data", *found.notes]
        print_result(json.dumps(facts, indent=2) if as_json else "\n".join(lines))
        return 0

    return Action(run=run, folder=output, debug=debug, resumes=True)
