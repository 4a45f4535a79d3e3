"""Small robust fits: few measurements, a sensible prior, and no trust beyond what was seen.

Errors count relative to the measured value, the coefficients are drawn toward the prior as if it had been observed
weakly, and outliers lose weight (Huber). Predictions keep to the range of ratios that the measurements showed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

Array = NDArray[np.float64]

ENOUGH = 6
# The median of a normal error's size is so much of its standard deviation.
MEDIAN_DEVIATION = 0.6745
_PRIOR_WEIGHT = 0.01
_MARGIN = 0.15


@dataclass(frozen=True, kw_only=True)
class Fit:
    """value = coefficients · features, kept within `ratio_range` times what the prior alone gives.

    records      how many measurements it was fitted on
    error        median relative error on measurements left out one by one; None with too few for a fit
    worst_error  the largest of those, `p95_error` their 95th percentile; `checked` is how many there were, and `errors`
                 all of them in their order
    deviation    their root mean square, which heavy tails raise above what the median says; None where `error` is
    """

    coefficients: tuple[float, ...]
    prior: tuple[float, ...]
    ratio_range: tuple[float, float]
    records: int
    error: float | None = None
    worst_error: float | None = None
    p95_error: float | None = None
    deviation: float | None = None
    checked: int = 0
    errors: tuple[float, ...] = ()

    def __call__(self, features: Sequence[float]) -> float:
        row = np.asarray(features, dtype=float)
        plain = float(row @ np.asarray(self.prior))
        low, high = self.ratio_range
        return float(np.clip(row @ np.asarray(self.coefficients), low * plain, high * plain))

    @property
    def trusted(self) -> bool:
        """Whether its error on other measurements is known."""
        return self.error is not None


def fit(
    features: Sequence[Sequence[float]],
    values: Sequence[float],
    prior: Sequence[float],
    *,
    nonnegative: bool = False,
    enough: int = ENOUGH,
) -> Fit:
    """Fit one coefficient per feature. With fewer than `enough` measurements only the prior's scale is fitted.

    `features` is (measurements, coefficients), `values` are positive, and the prior must give a positive value for each
    row. Without measurements the prior itself is returned.
    """
    rows, targets = np.asarray(features, dtype=float), np.asarray(values, dtype=float)
    base = np.asarray(prior, dtype=float)
    if not len(targets):
        return Fit(coefficients=tuple(prior), prior=tuple(prior), ratio_range=(1.0, 1.0), records=0)
    ratios = targets / (rows @ base)
    seen = (float(ratios.min()) * (1 - _MARGIN), float(ratios.max()) * (1 + _MARGIN))
    if len(targets) < enough:
        scaled = tuple((base * np.median(ratios)).tolist())
        return Fit(coefficients=scaled, prior=tuple(prior), ratio_range=seen, records=len(targets))
    errors = [_left_out_error(rows, targets, base, i, nonnegative) for i in range(len(targets))]
    return Fit(
        coefficients=tuple(_solve(rows, targets, base, nonnegative).tolist()),
        prior=tuple(prior),
        ratio_range=seen,
        records=len(targets),
        error=float(np.median(errors)),
        worst_error=float(max(errors)),
        p95_error=float(np.percentile(errors, 95)),
        deviation=float(np.sqrt(np.mean(np.square(errors)))),
        checked=len(errors),
        errors=tuple(errors),
    )


def _left_out_error(rows: Array, targets: Array, prior: Array, i: int, nonnegative: bool) -> float:
    others = np.arange(len(targets)) != i
    guess = rows[i] @ _solve(rows[others], targets[others], prior, nonnegative)
    return abs(float(guess) - float(targets[i])) / float(targets[i])


def _solve(rows: Array, targets: Array, prior: Array, nonnegative: bool) -> Array:
    """Relative least squares with a ridge toward the prior, reweighted so that outliers count linearly."""
    relative = rows / targets[:, None]
    scale = np.abs(relative).mean(axis=0)
    scale[scale == 0] = 1.0
    # Each coefficient is measured by what it contributes to the value, so that the ridge treats them alike.
    design, center = relative / scale, prior * scale
    low = np.zeros(len(prior)) if nonnegative else np.full(len(prior), -np.inf)
    weights, solution = np.ones(len(targets)), center
    for _ in range(8):
        root = np.sqrt(weights)
        ridge = np.sqrt(_PRIOR_WEIGHT) * np.eye(len(prior))
        left = np.vstack([design * root[:, None], ridge])
        right = np.concatenate([root, np.sqrt(_PRIOR_WEIGHT) * center])
        solution = lsq_linear(left, right, bounds=(low, np.inf)).x
        misses = np.abs(design @ solution - 1.0)
        limit = max(1.5 * float(np.median(misses)) / MEDIAN_DEVIATION, 1e-6)
        weights = np.minimum(1.0, limit / np.maximum(misses, 1e-12))
    return np.asarray(solution / scale, dtype=float)
