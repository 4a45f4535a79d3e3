"""What finished trials say about the table of estimated losses: a correction of each option, learned by regression.

A trial's observed loss is modelled as `scale * (sum of the estimates in force) + sum of corrections in force`, where
each option's correction is a priori near zero and may be the larger, the larger its estimate is. That is a ridge
regression around the additive estimate (Gaussian prior); its strength is chosen by leave-one-out error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from automl_compress.search.table import QualityKey

MINIMUM = 4
_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The options in force in one evaluated plan, and how much worse than the original it was."""

    options: tuple[QualityKey, ...]
    loss: float


def corrected(
    quality: Mapping[QualityKey, float], observed: Sequence[Observation], *, free: Collection[QualityKey] = ()
) -> dict[QualityKey, float]:
    """The table in units of the observed loss, corrected by what was observed; never below zero.

    `free` are options that change nothing, and therefore are never corrected. With fewer than four observations, or
    none with any loss, the table comes back unchanged.
    """
    keys = sorted(quality, key=str)
    prior = np.array([quality[key] for key in keys])
    features = _indicators(keys, observed)
    losses = np.array([o.loss for o in observed])
    estimates = features @ prior if len(observed) else losses
    if len(observed) < MINIMUM or float(estimates @ estimates) == 0 or float(estimates @ losses) <= 0:
        return dict(quality)
    scale = float(estimates @ losses / (estimates @ estimates))
    scaled = scale * prior
    # A floor lets an option whose estimate is zero turn out to be harmful.
    spread = np.where(prior > 0, scaled, 0.0) + 0.1 * float(scaled[prior > 0].mean())
    spread[[key in free for key in keys]] = 0.0
    weighted = features * spread
    kernel = weighted @ weighted.T
    residual = losses - scale * estimates
    noise = _strength(kernel, residual) * float(np.trace(kernel)) / len(observed)
    if noise <= 0:
        return {key: float(value) for key, value in zip(keys, scaled, strict=True)}
    moved = scaled + spread * (weighted.T @ np.linalg.solve(kernel + noise * np.eye(len(observed)), residual))
    return {key: float(max(0.0, value)) for key, value in zip(keys, moved, strict=True)}


def _indicators(keys: Sequence[QualityKey], observed: Sequence[Observation]) -> Matrix:
    index = {key: i for i, key in enumerate(keys)}
    result = np.zeros((len(observed), len(keys)))
    for row, observation in enumerate(observed):
        for key in observation.options:
            if key in index:
                result[row, index[key]] = 1.0
    return result


def _strength(kernel: Matrix, residual: Matrix) -> float:
    """The ridge strength, relative to the kernel's mean diagonal, with the least leave-one-out error."""
    unit = float(np.trace(kernel)) / len(residual)
    if unit <= 0:
        return 0.0

    def error(strength: float) -> float:
        inverse = np.linalg.inv(kernel + strength * unit * np.eye(len(residual)))
        return float((((inverse @ residual) / np.diag(inverse)) ** 2).sum())

    return min(_STRENGTHS, key=error)
