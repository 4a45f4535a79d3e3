"""What finished trials say about plans that weren't tried: a Gaussian process around the additive table.

The loss of a plan is modelled as a scale times the table's sum for it, plus corrections of single options (a linear
kernel; an option may be the more wrong, the more it is said to lose), plus what options do together (a squared
exponential kernel over what each decision is said to lose, so that plans are near each other when they lose the same in
the same places). How much of each there is, and how much noise, is chosen by marginal likelihood on a small grid.

Losses are modelled on a logarithmic scale where that fits better: models that are broken differ by how they are broken,
and none of that matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.special import ndtr

from automl_compress.search.states import Bools, Floats

_SHARES = tuple(product((0.1, 0.4, 1.0), (0.03, 0.2, 0.6), (0.01, 0.06, 0.25)))
"""Grid of variances of single corrections, of joint ones and of noise, in units of what the table doesn't explain."""
_FLOOR = 0.1  # of the mean loss of an option: what an option may lose though the table says that it loses nothing
_MOST = 240  # trials that are learned from: the best ones
_JUDGING = 100  # trials by which the grid is judged


@dataclass(frozen=True)
class Options:
    """The options of a space as columns: what the table says each loses, which decision each belongs to (ascending),
    and which change nothing."""

    losses: Floats
    decision: Floats
    neutral: Bools


class Surrogate:
    """Fitted to plans, as rows of options in force (0 or 1), and what they lost.

    Predictions are in the units of `transform`, lower is better. Needs two plans whose losses differ.
    """

    def __init__(self, options: Options, features: Floats, losses: Floats) -> None:
        order = np.argsort(losses, kind="stable")[:_MOST]
        self._options = options
        self._rows = features[order]
        self._unit = _unit(losses)
        wanted = self.transform(losses[order])
        # Losses by the table, in the model's units: near the best plans, where it counts.
        known = self._rows @ options.losses
        self._slope, self._offset = _line(known, wanted)
        self.prior: Floats = self._slope * options.losses
        own = self.prior[options.losses > 0]
        floor = _FLOOR * float(own.mean()) if len(own) else _FLOOR
        self._spread = np.where(options.neutral, 0.0, self.prior + floor)
        self._starts = np.flatnonzero(np.diff(options.decision, prepend=-1.0))
        self._place = np.sqrt(np.maximum(self.prior, 0.0))
        self._points = self._embed(self._rows)
        self._fit(wanted - self._offset - self._slope * known)
        self.best = float(wanted.min())

    def transform(self, losses: Floats) -> Floats:
        """Losses in the units of predictions."""
        return np.asarray(np.log1p(np.maximum(losses, -0.5 * self._unit) / self._unit))

    def predict(self, features: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of each row, without noise."""
        cross = self._kernel(features, self._rows, self._embed(features), self._points)
        mean = self._offset + features @ self.prior + cross @ self._weights
        half = solve_triangular(self._factor[0], cross.T, lower=True, check_finite=False)
        variance = self._diagonal(features) - (half**2).sum(axis=0)
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def improvement(self, features: Floats) -> Floats:
        """Expected improvement over the best plan so far (Jones et al., 1998)."""
        mean, deviation = self.predict(features)
        gain = (self.best - mean) / deviation
        density = np.exp(-0.5 * gain**2) / np.sqrt(2 * np.pi)
        return np.asarray(deviation * (gain * ndtr(gain) + density))

    def drawn(self, rng: np.random.Generator, count: int) -> Floats:
        """Losses of all options, drawn from what is still possible after the trials: rows of Thompson samples.

        Drawn from the prior and corrected by the difference at the trials (Matheron's rule; Wilson et al., 2020).
        """
        single, joint, noise = self._shares
        scale = np.sqrt(single / self._mean_single)
        weights = rng.normal(size=(count, len(self._spread))) * scale
        other = rng.normal(size=(count, len(self._rows))) @ self._joint_root.T * np.sqrt(joint)
        other += rng.normal(size=other.shape) * np.sqrt(noise)
        missing = self._residual - (weights * self._spread) @ self._rows.T - other
        missing = cho_solve(self._factor, missing.T, check_finite=False).T
        weights = weights + single / self._mean_single * (missing @ self._rows) * self._spread
        return np.asarray(np.maximum(self.prior + weights * self._spread, 0.0))

    @cached_property
    def learned(self) -> Floats:
        """The most likely losses of all options."""
        single, _, _ = self._shares
        weights = single / self._mean_single * (self._weights @ self._rows) * self._spread
        return np.asarray(np.maximum(self.prior + weights * self._spread, 0.0))

    def _fit(self, residual: Floats) -> None:
        variance = max(float(residual @ residual) / len(residual), 1e-9)
        self._residual = residual
        self._mean_single = max(float(((self._rows * self._spread) ** 2).sum(axis=1).mean()), 1e-12)
        far = _squared_distances(self._points, self._points)
        self._length = max(float(np.median(far[np.triu_indices(len(far), 1)])), 1e-9) if len(far) > 1 else 1.0
        linear = self._linear(self._rows, self._rows) / self._mean_single
        near = np.exp(-0.5 * far / self._length)
        some = slice(0, _JUDGING)
        identity = np.eye(len(residual))

        def evidence(shares: tuple[float, float, float]) -> float:
            single, joint, noise = (variance * share for share in shares)
            kernel = (single * linear + joint * near + noise * identity)[some, some]
            factor = cho_factor(kernel, lower=True, check_finite=False)
            part = residual[some]
            fit = part @ cho_solve(factor, part, check_finite=False)
            return float(-0.5 * fit - np.log(np.diag(factor[0])).sum())

        best = max(_SHARES, key=evidence)
        self._shares = tuple(variance * share for share in best)
        single, joint, noise = self._shares
        self._factor = cho_factor(single * linear + joint * near + noise * identity, lower=True, check_finite=False)
        self._weights = cho_solve(self._factor, residual, check_finite=False)
        self._joint_root = np.linalg.cholesky(near + 1e-6 * identity)

    def _kernel(self, one: Floats, other: Floats, at: Floats, where: Floats) -> Floats:
        single, joint, _ = self._shares
        near = np.exp(-0.5 * _squared_distances(at, where) / self._length)
        return np.asarray(single / self._mean_single * self._linear(one, other) + joint * near)

    def _diagonal(self, features: Floats) -> Floats:
        single, joint, _ = self._shares
        return np.asarray(single / self._mean_single * ((features * self._spread) ** 2).sum(axis=1) + joint)

    def _linear(self, one: Floats, other: Floats) -> Floats:
        return np.asarray((one * self._spread**2) @ other.T)

    def _embed(self, features: Floats) -> Floats:
        return np.asarray(np.add.reduceat(features * self._place, self._starts, axis=1))


def _unit(losses: Floats) -> float:
    """What counts as a large loss: beyond it, only its logarithm counts."""
    positive = losses[losses > 0]
    return max(float(np.quantile(positive, 0.25)) if len(positive) else 1.0, 1e-9)


def _line(known: Floats, wanted: Floats) -> tuple[float, float]:
    """(slope, offset) of the best half of the trials, which come first; the slope is never negative."""
    half = max(2, (len(known) + 1) // 2)
    x, y = known[:half], wanted[:half]
    centred = x - x.mean()
    spread = float(centred @ centred)
    through_origin = float(x @ y) / max(float(x @ x), 1e-12)
    # Few trials, or all alike, say little about the slope: the line through the origin counts like one of spread.
    weight = float(x.mean() ** 2) + 1e-12
    slope = (float(centred @ (y - y.mean())) + weight * through_origin) / (spread + weight)
    slope = max(slope, 0.1 * abs(through_origin), 1e-12)
    return slope, float(y.mean() - slope * x.mean())


def _squared_distances(one: Floats, other: Floats) -> Floats:
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None, :] - 2.0 * one @ other.T
    return np.asarray(np.maximum(squares, 0.0))
