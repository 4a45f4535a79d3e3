"""Transfer: the new head learns the new data first, then everything does; the result is the teacher of what follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from automl_compress.deploy.run_folder import RunFolder
from automl_compress.errors import PlanError
from automl_compress.model.outputs import joined
from automl_compress.model.surgery import copy_model
from automl_compress.model.task import Task, load_weights
from automl_compress.model.transfer import head_name
from automl_compress.techniques.distillation.losses import TASK, Losses
from automl_compress.techniques.distillation.objective import Distillation
from automl_compress.techniques.training.log import OnStep, TrainingLog
from automl_compress.techniques.training.loop import train
from automl_compress.techniques.training.settings import Resources, Training

HEAD_RATE = 5.0
STORED = "transferred"


def transferred(
    task: Task, *, seed: int = 0, on_step: OnStep | None = None, checkpoint: Path | None = None
) -> tuple[Task, tuple[TrainingLog, ...]]:
    """The task of a model that was trained on its data, and how it was trained; a task without a transfer as it is.

    Both stages keep what is best on validation data. The task's own model is not modified. The same seed gives the same
    model; with a checkpoint, an interrupted training goes on where it was.
    """
    transfer = task.transfer
    if transfer is None:
        return task, ()
    model = copy_model(task.model)
    objective = Distillation(task, task.model, Losses(weights={TASK: None}))
    head = model.get_submodule(head_name(model, transfer))
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    logs = []
    stages = (
        ("the new head alone", transfer.head_epochs, transfer.learning_rate * HEAD_RATE, True),
        ("everything", transfer.epochs, transfer.learning_rate, False),
    )
    for stage, epochs, learning_rate, alone in stages:
        if epochs == 0:
            continue
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name] and not alone)
        if alone:
            head.requires_grad_(True)
        file = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}-{stage.split()[-1]}")
        log = train(
            model,
            task,
            objective,
            # A fresh head has further to go than a share of its norm at each step, and a pass or so to get there.
            Training(epochs=epochs, optimizer="sgd", learning_rate=learning_rate),
            seed=seed,
            validate=validation_metric(task),
            on_step=on_step,
            resources=Resources(checkpoint=file),
            label=f"transfer, {stage}",
        )
        logs.append(log)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])
    return replace(task, model=model.eval(), transfer=None), tuple(logs)


def transfer_in(
    folder: RunFolder, task: Task, *, seed: int = 0, on_step: OnStep | None = None
) -> tuple[Task, dict[str, Any] | None]:
    """`transferred` once for a run folder, and what is known about it; read from there if it is there.

    Returns the task as it is, and None, where it has no transfer.
    """
    if task.transfer is None:
        return task, None
    known = folder.read_json(f"{STORED}.json")
    if known is None:
        checkpoint = folder.file(f"{STORED}.training")
        done, logs = transferred(task, seed=seed, on_step=on_step, checkpoint=checkpoint)
        state = {name: value.clone().contiguous() for name, value in done.model.state_dict().items()}
        folder.write_bytes(f"{STORED}.safetensors", save(state))
        known = {"metric": logs[-1].metric, "training": [log.to_json() for log in logs]}
        folder.write_json(f"{STORED}.json", known)  # last: its presence says that the weights are complete
        for left in checkpoint.parent.glob(f"{checkpoint.name}*"):
            left.unlink()
    return read_transferred(folder.path, task), known


def read_transferred(folder: Path, task: Task) -> Task:
    """The task of the model that `transfer_in` left in a run folder, or in one above it. Raises PlanError."""
    if task.transfer is None:
        return task
    file = stored_transfer(folder)
    if file is None:
        missing = folder / f"{STORED}.safetensors"
        raise PlanError(f"{missing}: no such file; the task has a transfer, whose result a run keeps there")
    model = copy_model(task.model)
    load_weights(model, file)
    return replace(task, model=model.eval(), transfer=None)


def stored_transfer(folder: Path) -> Path | None:
    """The weights that `transfer_in` left in a run folder, or in one above it, if it did."""
    places = [place / f"{STORED}.safetensors" for place in (folder, *folder.resolve().parents[:2])]
    return next((place for place in places if place.is_file()), None)


def in_words(known: Mapping[str, Any]) -> str:
    """What was trained before anything was compressed, and how good that was."""
    stages = "; ".join(str(log["label"]).partition(", ")[2] for log in known["training"])
    return f"transferred to this data first ({stages}): {known['metric']:.4f} on validation"


def validation_metric(task: Task) -> Callable[[nn.Module], float]:
    """The task's metric of a PyTorch model on all validation data."""

    def metric(model: nn.Module) -> float:
        device = next(model.parameters()).device
        outputs, targets = [], []
        with torch.no_grad():
            for inputs, wanted in task.batches("validation"):
                outputs.append(model(*(part.to(device) for part in inputs)))
                targets.append(wanted)
        return task.metric_of(joined(outputs), torch.cat(targets))

    return metric
