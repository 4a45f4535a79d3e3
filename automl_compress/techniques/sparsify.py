"""Masks: weights become zero while shapes stay. Nothing gets faster by it in dense kernels; the file compresses better.

A pattern N:M goes along the input channels, at each output and kernel position (Mishra et al. 2021 for 2:4). A layer
whose inputs were cut to a number that M doesn't divide ends in a shorter group, which keeps at most N as well, as if
zeros followed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.core.graph import Graph
from automl_compress.core.masks import NO_MASK, Mask, parse_mask
from automl_compress.core.plan import Plan

_CONJUGATE_STEPS = 40
_CONVERGED = 1e-10
_PRECISE_COLUMNS = 1024


def mask_of(weight: Tensor, text: str) -> Tensor:
    """Which weights stay [the weight's shape, bool]; `weight` is [outputs, inputs of a group, *kernel].

    Weights that are zero already go first, so masking twice changes nothing.
    """
    if text == NO_MASK:
        return torch.ones_like(weight, dtype=torch.bool)
    mask = parse_mask(text)
    scores = weight.detach().abs().double()
    if mask.kind == "pattern":
        return _pattern(scores, mask)
    if mask.by_row:
        norms = scores.flatten(1).norm(dim=1).clamp_min(1e-30)
        scores = scores / norms.view(-1, *[1] * (weight.ndim - 1))
    if mask.kind == "threshold":
        return scores >= mask.value
    gone = round(mask.value * scores.numel())
    result = torch.ones(scores.numel(), dtype=torch.bool, device=weight.device)
    # A stable sort, so that equal weights give the same mask on every machine.
    result[torch.argsort(scores.flatten(), stable=True)[:gone]] = False
    return result.view(weight.shape)


def apply_masks(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Set the weights that the plan's masks take to zero, in place; layers of removed blocks don't count."""
    stored = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, text in masks_in_force(graph, plan).items():
            weight = stored[graph.layer[name].weight]
            weight.mul_(mask_of(weight, text))


def held_masks(model: nn.Module, graph: Graph, plan: Plan) -> dict[str, Tensor]:
    """Parameter name -> which of its weights stay, for a model whose masks were applied: what training must keep."""
    stored = dict(model.named_parameters(remove_duplicate=False))
    return {
        graph.layer[name].weight: stored[graph.layer[name].weight].detach() != 0 for name in masks_in_force(graph, plan)
    }


def masks_in_force(graph: Graph, plan: Plan) -> dict[str, str]:
    """Layer name -> mask, for layers that the plan leaves in the network."""
    return {
        layer.name: plan.masks[layer.name]
        for layer in graph.layers
        if plan.masks.get(layer.name, NO_MASK) != NO_MASK and not plan.drop.intersection(layer.blocks)
    }


def zero_shares(model: nn.Module, graph: Graph) -> Mapping[str, float]:
    """Layer name -> fraction of its weights that are exactly zero, for layers that the model still has."""
    stored = dict(model.named_parameters(remove_duplicate=False))
    return {
        layer.name: float((stored[layer.weight] == 0).double().mean())
        for layer in graph.layers
        if layer.weight in stored
    }


def compressed_bytes(data: bytes) -> int:
    """The size after compression (deflate, as in a zip file)."""
    return len(zlib.compress(data, 9))


def compensated(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """Masked weights [groups, outputs, columns] nearest to `weight` on the data, by what stays making up for what goes.

    Least squares for each output over its own columns, (w - w0) gram (w - w0)^T with `gram` [groups, columns, columns]
    damped, by conjugate gradients on all outputs at once: a factorisation for each would take columns^3 of them. The
    error falls with every step, so stopping early does no harm.
    """
    precise = torch.float64 if weight.shape[2] <= _PRECISE_COLUMNS else torch.float32
    weight, gram = weight.to(precise), gram.to(precise)
    scale = 1 / gram.diagonal(dim1=1, dim2=2).unsqueeze(1)  # Jacobi preconditioning
    found = weight * mask
    residual = ((weight - found) @ gram) * mask
    direction = residual * scale
    energy = (residual * direction).sum(dim=2, keepdim=True)
    start = energy.clone()
    for _ in range(_CONJUGATE_STEPS):
        image = (direction @ gram) * mask
        curvature = (direction * image).sum(dim=2, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature, torch.zeros_like(energy))
        found = found + length * direction
        residual = residual - length * image
        scaled = residual * scale
        after = (residual * scaled).sum(dim=2, keepdim=True)
        if bool((after <= _CONVERGED * start).all()):
            break
        direction = scaled + torch.where(energy > 0, after / energy, torch.zeros_like(energy)) * direction
        energy = after
    return found * mask


def _pattern(scores: Tensor, mask: Mask) -> Tensor:
    """The `kept` largest of each `of` consecutive inputs, at each output and kernel position."""
    inputs = scores.shape[1]
    last = scores.movedim(1, -1)
    padded = functional.pad(last, (0, -inputs % mask.of), value=-1.0)  # what isn't there never stays
    groups = padded.reshape(*padded.shape[:-1], -1, mask.of)
    best = torch.argsort(groups, dim=-1, descending=True, stable=True)[..., : mask.kept]
    chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return chosen.flatten(-2)[..., :inputs].movedim(-1, 1)
