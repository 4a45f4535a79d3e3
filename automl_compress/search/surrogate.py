"""What finished trials say about plans that weren't tried: a Gaussian process around the additive table.

The loss of a plan is modelled as a multiple of the table's sum for it, plus corrections of single options (a linear
kernel; an option may be the more wrong, the more it is said to lose), plus what options do together (a squared
exponential kernel over what each decision is said to lose, so that plans are near each other when they lose alike in
the same places). How much of each there is, how far plans are near each other, and how much is noise, is chosen by
marginal likelihood on a small grid.

Large losses are modelled by their logarithms: broken models differ in how they are broken, and none of that matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.special import ndtr

from automl_compress.search.states import Bools, Floats

_SINGLE, _JOINT, _NOISE, _REACH = (0.3, 1.0, 3.0), (0.01, 0.1, 0.5), (0.003, 0.02, 0.1), (0.5, 2.0)
_GRID = tuple(product(_SINGLE, _JOINT, _NOISE, _REACH))
"""Variances of single corrections, of joint ones and of noise, in units of that of the losses; and how far plans are
near, in units of the median squared distance."""
_BOLDNESS = (
    0.3  # of the deviation, what counts as a chance: among thousands of plans, unlikely ones look good by chance
)
_COMMON = 1.0  # the variance of the multiple of the table, and of what all plans have in common
_FLOOR = 0.1  # of the mean loss of an option: what an option may lose though the table says that it loses nothing
_MOST = 240  # trials that are learned from: the best ones
_JUDGING = 64  # trials by which the grid is judged


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
        self._rows = features[order]
        self._least, self._unit = float(losses.min()), _unit(losses)
        wanted = self.transform(losses[order])
        self.best = float(wanted[0])
        known = self._rows @ options.losses
        self._multiple = max(float(known @ wanted) / max(float(known @ known), 1e-12), 1e-12)
        self._prior = self._multiple * options.losses
        own = self._prior[options.losses > 0]
        self._spread = np.where(options.neutral, 0.0, self._prior + _FLOOR * (float(own.mean()) if len(own) else 1.0))
        self._starts = np.flatnonzero(np.diff(options.decision, prepend=-1.0))
        self._place = np.sqrt(np.maximum(self._prior, 0.0))
        self._points = self._embed(self._rows)
        self._fit(wanted, self._multiple * known)

    def transform(self, losses: Floats) -> Floats:
        """Losses in the units of predictions: 0 for the best trial."""
        return np.asarray(np.log1p(np.maximum(losses - self._least, -0.5 * self._unit) / self._unit))

    def predict(self, features: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of each row, without noise."""
        known = features @ self._prior
        far = _squared_distances(self._embed(features), self._points) / self._length
        cross = self._kernel(self._linear(features, self._rows), np.exp(-0.5 * far), np.outer(known, self._known))
        mean = known + self._centre + cross @ self._weights
        half = solve_triangular(self._factor[0], cross.T, lower=True, check_finite=False)
        own = ((features * self._spread) ** 2).sum(axis=1)
        variance = self._kernel(own, np.ones(len(own)), known**2) - (half**2).sum(axis=0)
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def log_improvement(self, features: Floats) -> Floats:
        """The logarithm of the expected improvement over the best plan so far (Jones et al., 1998), also where that is
        tiny, for deviations that are smaller by `_BOLDNESS`."""
        mean, deviation = self.predict(features)
        deviation = deviation * _BOLDNESS
        gain = (self.best - mean) / deviation
        density = np.exp(-0.5 * gain**2) / np.sqrt(2 * np.pi)
        direct = np.log(np.maximum(gain * ndtr(gain) + density, 1e-300))
        # Far below, gain and density cancel; their difference is then about density / gain².
        tail = -0.5 * gain**2 - 0.5 * np.log(2 * np.pi) - 2.0 * np.log(np.maximum(-gain, 1.0))
        return np.asarray(np.log(deviation) + np.where(gain > -6.0, direct, tail))

    def drawn(self, rng: np.random.Generator, count: int) -> Floats:
        """Losses of all options, drawn from what is still possible after the trials: rows of Thompson samples.

        Drawn from the prior and corrected by the difference at the trials (Matheron's rule; Wilson et al., 2020).
        """
        single, joint, noise = self._shares
        weights = rng.normal(size=(count, len(self._spread))) * np.sqrt(single / self._mean_single)
        multiple = rng.normal(size=(count, 1)) * np.sqrt(self._common / self._mean_known)
        other = rng.normal(size=(count, len(self._rows))) @ self._joint_root.T * np.sqrt(joint)
        other += rng.normal(size=other.shape) * np.sqrt(noise) + rng.normal(size=(count, 1)) * np.sqrt(self._common)
        missing = self._residual - (weights * self._spread) @ self._rows.T - multiple * self._known - other
        missing = cho_solve(self._factor, missing.T, check_finite=False).T
        return self._corrected(weights, multiple, missing)

    @cached_property
    def learned(self) -> Floats:
        """The most likely losses of all options."""
        likely: Floats = self._corrected(np.zeros((1, len(self._spread))), np.zeros((1, 1)), self._weights[None])[0]
        return likely

    def _corrected(self, weights: Floats, multiple: Floats, missing: Floats) -> Floats:
        single, _, _ = self._shares
        weights = weights + single / self._mean_single * (missing @ self._rows) * self._spread
        multiple = multiple + self._common / self._mean_known * (missing @ self._known)[:, None]
        # The table's order is never turned round as a whole.
        scaled = np.maximum(1.0 + multiple, 0.1) * self._prior
        return np.asarray(np.maximum(scaled + weights * self._spread, 0.0))

    def _fit(self, wanted: Floats, known: Floats) -> None:
        self._known, self._centre = known, float((wanted - known).mean())
        self._residual = wanted - known - self._centre
        variance = max(float(np.var(wanted)), 1e-9)
        self._common = _COMMON * variance
        self._mean_known = max(float(known @ known) / len(known), 1e-12)
        self._mean_single = max(float(((self._rows * self._spread) ** 2).sum(axis=1).mean()), 1e-12)
        linear, both = self._linear(self._rows, self._rows), np.outer(known, known)
        far = _squared_distances(self._points, self._points)
        median = max(float(np.median(far[np.triu_indices(len(far), 1)])), 1e-9) if len(far) > 1 else 1.0
        # The best trials, and the others as far as they go: both ends of what is to be told apart.
        some = np.unique(np.linspace(0, len(wanted) - 1, min(_JUDGING, len(wanted))).round().astype(int))
        square = np.ix_(some, some)
        near = {reach: np.exp(-0.5 * far / (reach * median)) for reach in _REACH}

        def factor(choice: tuple[float, float, float, float], part: tuple[Floats, ...], others: Floats) -> Floats:
            self._shares = (variance * choice[0], variance * choice[1], variance * choice[2])
            kernel = self._kernel(part[0], others, part[1]) + self._shares[2] * np.eye(len(others))
            return np.asarray(np.linalg.cholesky(kernel))

        def evidence(choice: tuple[float, float, float, float]) -> float:
            root = factor(choice, (linear[square], both[square]), near[choice[3]][square])
            half = solve_triangular(root, self._residual[some], lower=True, check_finite=False)
            return float(-0.5 * half @ half - np.log(np.diag(root)).sum())

        best = max(_GRID, key=evidence)
        self._length = best[3] * median
        self._factor = (factor(best, (linear, both), near[best[3]]), True)
        self._weights = cho_solve(self._factor, self._residual, check_finite=False)
        self._joint_root = np.linalg.cholesky(near[best[3]] + 1e-6 * np.eye(len(wanted)))

    def _kernel(self, linear: Floats, near: Floats, both: Floats) -> Floats:
        single, joint, _ = self._shares
        common = self._common * (1.0 + both / self._mean_known)
        return np.asarray(single / self._mean_single * linear + joint * near + common)

    def _linear(self, one: Floats, other: Floats) -> Floats:
        return np.asarray((one * self._spread**2) @ other.T)

    def _embed(self, features: Floats) -> Floats:
        return np.asarray(np.add.reduceat(features * self._place, self._starts, axis=1))


def _unit(losses: Floats) -> float:
    """What counts as a large loss: beyond it, only its logarithm counts."""
    above = losses - losses.min()
    return max(float(np.median(above[above > 0])) if (above > 0).any() else 1.0, 1e-9)


def _squared_distances(one: Floats, other: Floats) -> Floats:
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None, :] - 2.0 * one @ other.T
    return np.asarray(np.maximum(squares, 0.0))
