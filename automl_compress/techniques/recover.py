"""Cheap repairs after a cut that need no gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> bool:
    """Set the running statistics of every batch-norm layer to the exact average over `batches`, in place.

    A cut changes the distribution that every later layer sees; its normalisation must follow. Returns whether the model
    has such layers. Source: Li et al. 2020, "EagleEye" (adaptive batch normalisation).
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return False
    training, momenta = model.training, [layer.momentum for layer in layers]
    model.eval()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average
            layer.train()
        with torch.no_grad():
            for inputs in batches:
                model(*inputs)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.train(training)
    return True
