"""Learning rate and momentum by step: functions of the step alone, so that there is no state to lose."""

from __future__ import annotations

import math

from automl_compress.techniques.training.settings import Training

# One-cycle's start and end, as parts of the peak and of the start, and its momentum (Smith 2018; torch's OneCycleLR).
_START, _END = 1 / 25, 1e-4
_MOMENTUM_SPAN = 0.05


def rate(training: Training, step: int, steps: int) -> float:
    """The learning rate of step 0 to steps - 1."""
    peak = training.learning_rate
    if training.schedule == "one-cycle":
        start = peak * _START
        return _cycle(training, step, steps, (start, peak, start * _END))
    warm = training.warm_up_share * steps
    if step + 1 < warm:
        return peak * (step + 1) / warm
    return peak if training.schedule == "constant" else _between(peak, 0.0, (step - warm) / (steps - warm))


def momentum(training: Training, step: int, steps: int) -> float:
    """The momentum of a step: that of one-cycle is low where the rate is high."""
    if training.schedule != "one-cycle" or not training.momentum:
        return training.momentum
    high, low = min(training.momentum + _MOMENTUM_SPAN, 0.999), max(training.momentum - _MOMENTUM_SPAN, 0.0)
    return _cycle(training, step, steps, (high, low, high))


def _cycle(training: Training, step: int, steps: int, levels: tuple[float, float, float]) -> float:
    """From the first level to the second while the rate rises, then to the third."""
    top, last = training.warm_up_share * max(steps, 2) - 1, max(steps, 2) - 1
    if step <= top:
        return _between(levels[0], levels[1], step / top if top else 1.0)
    return _between(levels[1], levels[2], (step - top) / (last - top))


def _between(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0)))
