"""What finished trials say about plans that weren't tried: a Gaussian process around the additive table.

The loss of a plan is modelled as the table's sum for it, each kind of option (widths, bits, removed blocks) times a
factor that is learned, plus corrections of single options (a linear kernel; an option may be the more wrong, the more
it is said to lose), plus what options do together (a squared exponential kernel over what each decision is said to
lose, so that plans are near each other when they lose alike in the same places). How much of each there is, how far
plans are near each other, and how much is noise, is chosen by marginal likelihood, one after the other.

So is the scale on which losses add up: their own, or that of their logarithms beyond a usual loss. Broken models differ
in how they are broken, and none of that matters; but where losses do add up, a hundred sums of exact losses say far
more about single options than a hundred sums of logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.special import ndtr

from automl_compress.search.states import Bools, Floats, Ints

_GRID: dict[str, tuple[float, ...]] = {
    "single": (0.15, 0.5, 1.5),
    "noise": (1e-5, 0.003, 0.02, 0.1),
    "joint": (1e-4, 0.01, 0.1, 0.5),
    "reach": (0.5, 2.0),
}
"""What is chosen from: the relative deviation of single losses from the table; variances of noise and of what options
do together, in units of that of the losses; how far plans are near, in units of the median squared distance. Besides,
whether losses add up as logarithms, and whether all plans have a level in common that isn't known."""
_STARTS = ((0.5, 1e-5, 1e-4, 2.0), (0.5, 0.02, 0.1, 2.0))
_PASSES = 2
_FACTOR = 1.0  # the relative deviation of the factor of a kind of options
_BOLDNESS = (
    0.3  # of the deviation, what counts as a chance: among thousands of plans, unlikely ones look good by chance
)
_FLOOR = 0.02  # of the mean loss of an option: what an option may lose though the table says that it loses nothing
_LEAST_FACTOR = 0.1
_MOST = 240  # trials that are learned from: the best ones
_JUDGING = 64  # trials by which the grid is judged


@dataclass(frozen=True)
class Options:
    """The options of a space as columns: what the table says each loses, which decision each belongs to (ascending),
    which kind of decision that is, and which change nothing."""

    losses: Floats
    decision: Floats
    kind: Ints
    neutral: Bools


class Surrogate:
    """Fitted to plans, as rows of options in force (0 or 1), and what they lost.

    from_original  whether losses are beside the original's, so that a plan in which nothing is in force loses nothing

    Predictions are in the units of `transform`, lower is better. Needs two plans whose losses differ.
    """

    def __init__(self, options: Options, features: Floats, losses: Floats, *, from_original: bool = False) -> None:
        self._from_original = from_original
        order = np.argsort(losses, kind="stable")[:_MOST]
        self._options, self._rows, self._losses = options, features[order], losses[order]
        self._least, self._unit = float(losses.min()), _unit(losses)
        self._starts = np.flatnonzero(np.diff(options.decision, prepend=-1.0))
        self._kinds = np.eye(int(options.kind.max(initial=0)) + 1)[options.kind]
        # The best trials, and the others as far as they go: both ends of what is to be told apart.
        count = len(self._losses)
        self._judging = np.unique(np.linspace(0, count - 1, min(_JUDGING, count)).round().astype(int))
        self._choose()

    def transform(self, losses: Floats) -> Floats:
        """Losses in the units of predictions: 0 for the best trial."""
        above = (losses - self._least) / self._unit
        return np.asarray(np.log1p(np.maximum(above, -0.5)) if self._choice["logarithmic"] else above)

    def predict(self, features: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of each row, without noise."""
        known = features @ self._prior
        sums = self._sums(features)
        far = _squared_distances(self._embed(features), self._points) / self._length
        cross = self._kernel(self._linear(features, self._rows), np.exp(-0.5 * far), sums @ self._known.T)
        mean = known + self._centre + cross @ self._weights
        half = solve_triangular(self._factor[0], cross.T, lower=True, check_finite=False)
        own = ((features * self._spread) ** 2).sum(axis=1)
        variance = self._kernel(own, np.ones(len(own)), (sums**2).sum(axis=1)) - (half**2).sum(axis=0)
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
        weights = rng.normal(size=(count, len(self._spread))) * self._choice["single"]
        factors = rng.normal(size=(count, self._kinds.shape[1])) * _FACTOR
        root = np.linalg.cholesky(self._near + 1e-6 * np.eye(len(self._rows)))
        other = rng.normal(size=(count, len(self._rows))) @ root.T * np.sqrt(self._joint)
        other += rng.normal(size=other.shape) * np.sqrt(self._noise)
        other += rng.normal(size=(count, 1)) * np.sqrt(self._variance * self._choice["level"])
        missing = self._residual - (weights * self._spread) @ self._rows.T - factors @ self._known.T - other
        missing = cho_solve(self._factor, missing.T, check_finite=False).T
        return self._corrected(weights, factors, missing)

    @cached_property
    def learned(self) -> Floats:
        """The most likely losses of all options."""
        none = np.zeros((1, self._kinds.shape[1]))
        likely: Floats = self._corrected(np.zeros((1, len(self._spread))), none, self._weights[None])[0]
        return likely

    def _corrected(self, weights: Floats, factors: Floats, missing: Floats) -> Floats:
        weights = weights + self._choice["single"] ** 2 * (missing @ self._rows) * self._spread
        factors = factors + _FACTOR**2 * missing @ self._known
        # The table's order within a kind is never turned round as a whole.
        scaled = np.maximum(1.0 + factors, _LEAST_FACTOR) @ self._kinds.T * self._prior
        return np.asarray(np.maximum(scaled + weights * self._spread, 0.0))

    def _choose(self) -> None:
        """Settle the scale of losses and the shares by marginal likelihood, one choice after another."""
        found = [
            self._climbed({**dict(zip(_GRID, start, strict=True)), "logarithmic": logarithmic, "level": level})
            for start in _STARTS
            for logarithmic, level in ((0.0, float(not self._from_original)), (1.0, 1.0))
        ]
        _, choice = max(found, key=lambda end: end[0])
        self._prepare(choice, np.arange(len(self._losses)))
        self._weights = cho_solve(self._factor, self._residual, check_finite=False)
        self.best = float(self.transform(self._losses[:1])[0])

    def _climbed(self, choice: dict[str, float]) -> tuple[float, dict[str, float]]:
        """The best choice that is reached by changing one part after another, and its evidence."""
        best = self._evidence(choice)
        for _ in range(_PASSES):
            before = choice
            for name, values in _GRID.items():
                for value in values:
                    other = {**choice, name: value}
                    if other != choice and (found := self._evidence(other)) > best:
                        best, choice = found, other
            if choice == before:
                break
        return best, choice

    def _evidence(self, choice: dict[str, float]) -> float:
        """The logarithm of the likelihood of the losses themselves, whatever the scale on which they are modelled."""
        try:
            self._prepare(choice, self._judging)
        except np.linalg.LinAlgError:
            return -np.inf
        half = solve_triangular(self._factor[0], self._residual, lower=True, check_finite=False)
        density = -0.5 * half @ half - np.log(np.diag(self._factor[0])).sum()
        stretched = self._wanted.sum() if choice["logarithmic"] else 0.0
        return float(density - stretched)

    def _prepare(self, choice: dict[str, float], some: Ints) -> None:
        """Everything that follows from a choice and from these trials."""
        self._choice, rows = choice, self._rows[some]
        self._scale(choice["logarithmic"])
        self._wanted = self.transform(self._losses[some])
        self._variance = max(float(np.var(self._wanted)), 1e-9)
        self._joint, self._noise = self._variance * choice["joint"], self._variance * choice["noise"]
        self._known, self._points = self._sums(rows), self._embed(rows)
        known = self._known.sum(axis=1)
        self._centre = float((self._wanted - known).mean()) if choice["level"] else -self._least / self._unit
        self._residual = self._wanted - known - self._centre
        far = _squared_distances(self._points, self._points)
        median = max(float(np.median(far[np.triu_indices(len(far), 1)])), 1e-9) if len(far) > 1 else 1.0
        self._length = choice["reach"] * median
        self._near = np.exp(-0.5 * far / self._length)
        kernel = self._kernel(self._linear(rows, rows), self._near, self._known @ self._known.T)
        self._factor = (np.linalg.cholesky(kernel + self._noise * np.eye(len(rows))), True)

    def _scale(self, logarithmic: float) -> None:
        """The table's losses in the units of predictions, by least squares."""
        wanted = self.transform(self._losses) if logarithmic else self._losses / self._unit
        known = self._rows @ self._options.losses
        multiple = max(float(known @ wanted) / max(float(known @ known), 1e-12), 1e-12)
        self._prior = multiple * self._options.losses
        own = self._prior[self._options.losses > 0]
        floor = _FLOOR * (float(own.mean()) if len(own) else 1.0)
        self._spread = np.where(self._options.neutral, 0.0, self._prior + floor)
        self._place = np.sqrt(np.maximum(self._prior, 0.0))

    def _kernel(self, linear: Floats, near: Floats, factors: Floats) -> Floats:
        level = self._choice["level"] * self._variance
        return np.asarray(self._choice["single"] ** 2 * linear + self._joint * near + _FACTOR**2 * factors + level)

    def _linear(self, one: Floats, other: Floats) -> Floats:
        return np.asarray((one * self._spread**2) @ other.T)

    def _sums(self, features: Floats) -> Floats:
        """(row, kind): what the table says that the options of each kind lose together."""
        return np.asarray((features * self._prior) @ self._kinds)

    def _embed(self, features: Floats) -> Floats:
        return np.asarray(np.add.reduceat(features * self._place, self._starts, axis=1))


def _unit(losses: Floats) -> float:
    """What counts as a large loss: beyond it, only its logarithm counts."""
    above = losses - losses.min()
    return max(float(np.median(above[above > 0])) if (above > 0).any() else 1.0, 1e-9)


def _squared_distances(one: Floats, other: Floats) -> Floats:
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None, :] - 2.0 * one @ other.T
    return np.asarray(np.maximum(squares, 0.0))
