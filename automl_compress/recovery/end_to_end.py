"""End-to-end recovery: one training in which the model learns, loses channels and weights, and computes in fewer bits.

From the teacher's weights or from fresh ones. In the first part masks close along the cubic schedule while the whole
model trains, channels with the smallest weights first, and weights are rounded to ever fewer bits; which channels stay
is decided there, not beforehand: of the plan only the numbers count. Then the channels are cut out, which behind a
batch-norm changes nothing that is computed, and the smaller model trains to the end. Blocks are removed at that point.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from automl_compress.core.graph import ChannelGroup
from automl_compress.core.masks import NO_MASK
from automl_compress.core.plan import Plan
from automl_compress.errors import TrainingError
from automl_compress.model.surgery import copy_model
from automl_compress.recovery.approach import channel_norms, cubic, eased
from automl_compress.recovery.curriculum import Easiest, pace
from automl_compress.recovery.job import Job, Recovered
from automl_compress.recovery.rounded import Rounded
from automl_compress.techniques.objective import Objective
from automl_compress.techniques.prune import apply_plan
from automl_compress.techniques.sparsify import apply_masks, mask_of, masks_in_force

APPROACH_SHARE = 0.5  # of the epochs, in which masks close
CHANGES = 20  # of the masks, evenly spaced


def end_to_end(job: Job) -> Recovered:
    """Train toward the plan's numbers of channels, masks and bits."""
    whole = copy_model(job.teacher)
    if job.scratch:
        reset(whole, job.seed)
    start = replace(job.plan, kept={})
    rounded = Rounded(_objective(job, start), job.graph, start)
    closing = Closing(job, whole, rounded)
    first = job.train(
        whole,
        rounded,
        "approach",
        closing,
        epochs=job.training.epochs * APPROACH_SHARE,
        schedule="constant",
        warm_up=0.1,
        deliver="last",
    )
    plan = replace(job.plan, kept=closing.kept(1.0))
    model = apply_plan(whole, job.graph, plan)
    apply_masks(model, job.graph, plan)
    objective = Rounded(job.objective(plan), job.graph, plan)
    objective.share = 1.0
    last = job.train(
        model,
        objective,
        "at the plan's size",
        job.held(model, plan),
        epochs=job.training.epochs * (1 - APPROACH_SHARE),
        schedule="cosine",
        warm_up=0.0,
        validate=job.validate,
    )
    return Recovered(model=model.eval(), plan=plan, logs=(first, last))


class Closing:
    """Masks of a whole model that close along the cubic schedule: asked for at `CHANGES` steps.

    What is masked is zero and stays so: it has the smallest weights at the next change. The last change comes before
    the end, so that the model gets used to it.
    """

    def __init__(self, job: Job, whole: nn.Module, rounded: Rounded) -> None:
        self._job, self._whole, self._rounded = job, whole, rounded
        self._parameters = {name for name, _ in whole.named_parameters(remove_duplicate=False)}

    def __call__(self, step: int, steps: int) -> dict[str, Tensor] | None:
        every = max(1, round(steps / (CHANGES + 1)))
        share = cubic(step // every * every / max(1, steps - every))
        self._rounded.share = share
        return self.masks(share) if step % every == 0 or step == steps - 1 else None

    def kept(self, share: float) -> dict[str, tuple[int, ...]]:
        """Group -> the channels that stay when this share of what the plan removes is gone."""
        kept = {}
        for group in self._job.graph.groups:
            final = len(self._job.plan.kept[group.name]) if group.name in self._job.plan.kept else group.size
            count = group.size - round(share * (group.size - final))
            if count < group.size:
                best = torch.argsort(channel_norms(self._whole, group), descending=True, stable=True)[:count]
                kept[group.name] = tuple(sorted(best.tolist()))
        return kept

    def masks(self, share: float) -> dict[str, Tensor]:
        """Parameter -> which of its weights train."""
        state = dict(self._whole.named_parameters(remove_duplicate=False))
        found: dict[str, Tensor] = {}
        for name, channels in self.kept(share).items():
            for parameter, mask in self._of_group(self._job.graph.group[name], set(channels), state).items():
                found[parameter] = found[parameter] & mask if parameter in found else mask
        for layer, text in masks_in_force(self._job.graph, self._job.plan).items():
            eased_text = eased(text, share) if share < 1 else text
            if eased_text != NO_MASK:
                parameter = self._job.graph.layer[layer].weight
                weight = state[parameter].detach().cpu()
                mask = mask_of(weight * found.get(parameter, torch.tensor(True)), eased_text)
                found[parameter] = found[parameter] & mask if parameter in found else mask
        return found

    def _of_group(self, group: ChannelGroup, stay: set[int], state: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for place in group.places:
            if place.tensor not in self._parameters:
                continue
            gone = [p for channel, where in enumerate(place.positions) if channel not in stay for p in where]
            mask = found.setdefault(place.tensor, torch.ones(state[place.tensor].shape, dtype=torch.bool))
            mask.index_fill_(place.dim, torch.tensor(gone, dtype=torch.long), False)
        return found


def reset(model: nn.Module, seed: int) -> None:
    """Fresh weights, as the modules' own `reset_parameters` makes them. Raises TrainingError where a module with
    weights has none."""
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        for name, module in model.named_modules():
            fresh = getattr(module, "reset_parameters", None)
            if callable(fresh):
                fresh()
            elif next(module.parameters(recurse=False), None) is not None:
                raise TrainingError(
                    f"{name or 'the model'} ({type(module).__name__}) has weights but no reset_parameters(); give the "
                    "task a model with fresh weights instead of asking for a start from scratch"
                )
    finally:
        torch.set_rng_state(before)


def _objective(job: Job, plan: Plan) -> Objective:
    objective = job.objective(plan)
    return Easiest(objective, job.task, job.teacher, pace(0.5)) if job.easy_first else objective
