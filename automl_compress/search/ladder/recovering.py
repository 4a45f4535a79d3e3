"""Recover one plan: train the model that a plan describes, in a mode of one's choice, without a search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from automl_compress.core.plan import Plan
from automl_compress.deploy.run_folder import RunFolder
from automl_compress.errors import InputError
from automl_compress.model.task import Task, scarcity
from automl_compress.model.task_file import require_task_file
from automl_compress.model.trace import trace
from automl_compress.progress import Progress, SilentProgress
from automl_compress.recovery.names import DEFAULT_MODE, check_mode
from automl_compress.recovery.transfer import in_words, read_transferred, stored_transfer, transfer_in
from automl_compress.search.campaign.opening import load, task_name, told_of_teaching
from automl_compress.search.campaign.options import EPOCHS
from automl_compress.search.evaluation.candidate import Candidate, plan_file, read_plan
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.evaluation.identity import digest_of
from automl_compress.search.ladder.ladder import FULL, Recovery
from automl_compress.techniques.distillation.losses import DEFAULT, parse_losses
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS
from automl_compress.techniques.training.log import shown_by
from automl_compress.techniques.training.settings import Resources, Training, parse_training


def recover(
    task: Task | str,
    plan: Plan | str | Path,
    *,
    mode: str = DEFAULT_MODE,
    epochs: float = EPOCHS,
    training: Training | str = "",
    resources: Resources | None = None,
    distillation: str = DEFAULT,
    seed: int = 0,
    weights: str | Path | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> Candidate:
    """Train the model that a plan describes; nothing is searched or measured on a device.

    plan          or the file of one: a run's `plan.json`. Channels that it doesn't name yet are selected
    mode          how, as `recovery.names.NAMES` says
    epochs        of all stages together
    training      settings of the training loop, written as for `compress`; or a `Training`, whose epochs then count
    resources     what the training may use; a checkpoint is kept in the run folder in any case
    distillation  what is learned from the original, as `distillation.losses` says
    output        run folder (default runs/TASK-recovered-MODE); the same call with the same folder resumes

    A task with a transfer is trained on its data first, unless the plan's folder has the result. The folder then holds
    `recovered.onnx`, the file whose `metric` on validation data is returned with it, its `recovered.safetensors` and
    `plan.json`. Raises InputError for another model's plan or an unknown mode, and what training raises.
    """
    check_mode(mode)
    settings = parse_training(training, epochs=epochs) if isinstance(training, str) else training
    losses, progress = parse_losses(distillation), progress or SilentProgress()
    if isinstance(task, str):
        require_task_file(task)
    if not isinstance(plan, Plan) and not Path(plan).is_file():
        raise InputError(f"plan {plan}: no such file; a finished run has a plan.json")
    progress.stage("loading the task")
    loaded = load(task, weights)
    folder = Path(output) if output else Path("runs") / f"{task_name(task)}-recovered-{mode}"
    scarce = scarcity(loaded)
    if scarce:
        progress.note(f"warning: {scarce}")
    progress.stage("tracing the model")
    graph = trace(loaded.model, loaded.example_inputs)
    home, executions = folder, DEFAULT_EXECUTIONS
    if isinstance(plan, Plan):
        plan.check(graph)
    else:
        home = Path(plan).parent
        plan, _, executions = read_plan(Path(plan), graph)
    identity = {
        "task": digest_of(loaded),
        "graph": graph.fingerprint,
        "plan": plan.key,
        "seed": str(seed),
        "training": str(settings),
    }
    with RunFolder(folder, identity) as run:
        if stored_transfer(home):
            loaded = read_transferred(home, loaded)
        loaded, known = transfer_in(run, loaded, seed=seed, on_step=shown_by(progress))
        if known is not None:
            progress.note(in_words(known))
        teaching = told_of_teaching(run, loaded)
        if teaching:
            progress.note(teaching)
        bench = Workbench(loaded, graph, seed=seed, executions=executions)
        progress.stage("repairing without training")
        recovery = Recovery(bench, run, losses, mode, resources=resources)
        if settings.epochs > 0:
            recovery.rehearse()
        candidate = recovery.recover(plan, FULL, settings, shown_by(progress))
        onnx = run.write_bytes("recovered.onnx", candidate.onnx.read_bytes())
        stored = run.write_bytes("recovered.safetensors", candidate.weights.read_bytes())
        run.write_json("plan.json", plan_file(candidate, bench))
    original = f"the original reaches {bench.metric(bench.original, 'validation'):.4f} on validation data"
    notes = (original, *candidate.notes, *filter(None, [teaching, scarce]))
    return replace(candidate, onnx=onnx, weights=stored, notes=notes)
