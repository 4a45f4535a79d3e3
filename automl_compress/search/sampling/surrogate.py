"""What finished trials say about plans that weren't tried: a Gaussian process around the additive table.

The loss of a plan is modelled as the table's sum for it, each kind of option (widths, bits, removed blocks) times a
factor that is learned, plus corrections of single options (a linear kernel; an option may be the more wrong, the more
it is said to lose), plus what options do together (a squared exponential kernel over what each decision is said to
lose, so that plans are near each other when they lose alike in the same places). How much of each there is, how far
plans are near each other, and how much is noise, is chosen by marginal likelihood, one after another.

So is the scale on which losses add up: their own, or that of their logarithms beyond a usual loss. Broken models differ
in how they are broken, and none of that matters; but where losses do add up, a hundred sums of exact losses say far
more about single options than a hundred sums of logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.special import ndtr

from automl_compress.search.table.states import Bools, Floats, Ints

_GRID: dict[str, tuple[float, ...]] = {
    "single": (0.15, 0.5, 1.5),
    "noise": (1e-5, 0.003, 0.02, 0.1),
    "joint": (1e-4, 0.01, 0.1, 0.5),
    "reach": (0.5, 2.0),
}
"""What is chosen from: the relative deviation of single losses from the table; variances of noise and of what options
do together, in units of that of the losses; how far plans are near, in units of the median squared distance."""
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


@dataclass(frozen=True)
class Shares:
    """How much there is of each part: see `_GRID`. `level`: 1 where plans have an unknown level in common, else 0."""

    single: float
    noise: float
    joint: float
    reach: float
    level: float

    def near(self, far: Floats) -> Floats:
        """How alike plans are whose squared distances are these: 1 for the same plan."""
        return np.asarray(np.exp(-0.5 * far / self.reach))


_STARTS = (
    Shares(single=0.5, noise=1e-5, joint=1e-4, reach=2.0, level=1.0),
    Shares(single=0.5, noise=0.02, joint=0.1, reach=2.0, level=1.0),
)


class Scale:
    """Options and plans on one scale of losses, their own or their logarithms'.

    `prior` is what the table says of options, in units of the scale, and `spread` what they may be off by relative to
    that; `wanted` are the plans' losses.
    """

    def __init__(
        self, options: Options, rows: Floats, losses: Floats, *, unit: float, least: float, logarithmic: bool
    ) -> None:
        self.rows, self.logarithmic, self._unit, self.least = rows, logarithmic, unit, least
        self.wanted = self.transform(losses)
        self.variance = max(float(np.var(self.wanted)), 1e-9)
        known = rows @ options.losses
        aim = self.wanted if logarithmic else losses / unit
        self.prior = max(float(known @ aim) / max(float(known @ known), 1e-12), 1e-12) * options.losses
        own = self.prior[options.losses > 0]
        floor = _FLOOR * (float(own.mean()) if len(own) else 1.0)
        self.spread = np.where(options.neutral, 0.0, self.prior + floor)
        self.kinds = np.eye(int(options.kind.max(initial=0)) + 1)[options.kind]
        self._place = np.sqrt(np.maximum(self.prior, 0.0))
        self._starts = np.flatnonzero(np.diff(options.decision, prepend=-1.0))
        self.known, self._points = self.sums(rows), self._embed(rows)
        self.linear = self.linear_with(rows)
        self.factors = self.known @ self.known.T
        self.far = _squared_distances(self._points, self._points)
        several = len(rows) > 1
        self._median = max(float(np.median(self.far[np.triu_indices(len(rows), 1)])), 1e-9) if several else 1.0
        self.far /= self._median

    def transform(self, losses: Floats) -> Floats:
        """Losses on this scale: 0 for the best trial."""
        above = (losses - self.least) / self._unit
        return np.asarray(np.log1p(np.maximum(above, -0.5)) if self.logarithmic else above)

    def sums(self, features: Floats) -> Floats:
        """(row, kind): what the table says that the options of each kind lose together."""
        return np.asarray((features * self.prior) @ self.kinds)

    def linear_with(self, features: Floats) -> Floats:
        """The kernel of single corrections between these and the plans."""
        return np.asarray((features * self.spread**2) @ self.rows.T)

    def far_from(self, features: Floats) -> Floats:
        """Squared distances from the plans, in units of the median one."""
        return _squared_distances(self._embed(features), self._points) / self._median

    def kernel(self, shares: Shares, linear: Floats, near: Floats, factors: Floats) -> Floats:
        """Covariances of losses, without noise; `near`: see `Shares.near`."""
        joint, level = self.variance * shares.joint, self.variance * shares.level
        return np.asarray(shares.single**2 * linear + joint * near + _FACTOR**2 * factors + level)

    def residual(self, shares: Shares) -> tuple[Floats, float]:
        """What the table leaves unexplained, and the level that was taken off."""
        beyond = self.wanted - self.known.sum(axis=1)
        level = float(beyond.mean()) if shares.level else -self.least / self._unit
        return beyond - level, level

    def factored(self, shares: Shares) -> Floats:
        """The lower root of the plans' covariances, noise included."""
        kernel = self.kernel(shares, self.linear, shares.near(self.far), self.factors)
        return np.asarray(np.linalg.cholesky(kernel + shares.noise * self.variance * np.eye(len(self.rows))))

    def evidence(self, shares: Shares) -> float:
        """The logarithm of the likelihood of the losses themselves, whatever the scale on which they are modelled."""
        try:
            root = self.factored(shares)
        except np.linalg.LinAlgError:
            return -np.inf
        half = solve_triangular(root, self.residual(shares)[0], lower=True, check_finite=False)
        stretched = float(self.wanted.sum()) if self.logarithmic else 0.0
        return float(-0.5 * half @ half - np.log(np.diag(root)).sum()) - stretched

    def best(self, *, level: float) -> tuple[float, Shares]:
        """The shares with the most evidence that are reached by changing one after another, and how much it is."""
        found = []
        for start in _STARTS:
            shares = replace(start, level=level)
            most = self.evidence(shares)
            for _ in range(_PASSES):
                before = shares
                for name, values in _GRID.items():
                    for value in values:
                        other = replace(shares, **{name: value})
                        if other != shares and (evidence := self.evidence(other)) > most:
                            most, shares = evidence, other
                if shares == before:
                    break
            found.append((most, shares))
        return max(found, key=lambda end: end[0])

    def _embed(self, features: Floats) -> Floats:
        return np.asarray(np.add.reduceat(features * self._place, self._starts, axis=1))


class Surrogate:
    """Fitted to plans, as rows of options in force (0 or 1), and what they lost.

    from_original  whether losses are beside the original's, so that a plan in which nothing is in force loses nothing

    Predictions are in the units of `transform`, lower is better. Needs two plans whose losses differ.
    """

    def __init__(self, options: Options, features: Floats, losses: Floats, *, from_original: bool = False) -> None:
        order = np.argsort(losses, kind="stable")[:_MOST]
        rows, known = features[order], losses[order]
        # The best trials, and the others as far as they go: both ends of what is to be told apart.
        some = np.unique(np.linspace(0, len(known) - 1, min(_JUDGING, len(known))).round().astype(int))
        unit, least = _unit(losses), float(losses.min())
        ends = []
        for logarithmic in (False, True):
            judged = Scale(options, rows[some], known[some], unit=unit, least=least, logarithmic=logarithmic)
            ends.append((*judged.best(level=float(logarithmic or not from_original)), logarithmic))
        _, self._shares, logarithmic = max(ends, key=lambda end: end[0])
        self._scale = Scale(options, rows, known, unit=unit, least=least, logarithmic=logarithmic)
        self._root = (self._scale.factored(self._shares), True)
        self._residual, self._level = self._scale.residual(self._shares)
        self._weights = cho_solve(self._root, self._residual, check_finite=False)
        self.best = float(self._scale.wanted[0])

    def transform(self, losses: Floats) -> Floats:
        """Losses in the units of predictions: 0 for the best trial."""
        return self._scale.transform(losses)

    def predict(self, features: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of each row, without noise."""
        scale, shares = self._scale, self._shares
        sums = scale.sums(features)
        near = shares.near(scale.far_from(features))
        cross = scale.kernel(shares, scale.linear_with(features), near, sums @ scale.known.T)
        mean = sums.sum(axis=1) + self._level + cross @ self._weights
        half = solve_triangular(self._root[0], cross.T, lower=True, check_finite=False)
        own = ((features * scale.spread) ** 2).sum(axis=1)
        variance = scale.kernel(shares, own, np.ones(len(own)), (sums**2).sum(axis=1)) - (half**2).sum(axis=0)
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
        scale, shares, plans = self._scale, self._shares, len(self._residual)
        weights = rng.normal(size=(count, len(scale.spread))) * shares.single
        factors = rng.normal(size=(count, scale.kinds.shape[1])) * _FACTOR
        together = shares.joint * shares.near(scale.far) + 1e-6 * np.eye(plans)
        root = np.linalg.cholesky(scale.variance * together)
        other = rng.normal(size=(count, plans)) @ root.T
        other += rng.normal(size=other.shape) * np.sqrt(scale.variance * shares.noise)
        other += rng.normal(size=(count, 1)) * np.sqrt(scale.variance * shares.level)
        missing = self._residual - (weights * scale.spread) @ scale.rows.T - factors @ scale.known.T - other
        return self._corrected(weights, factors, cho_solve(self._root, missing.T, check_finite=False).T)

    @cached_property
    def learned(self) -> Floats:
        """The most likely losses of all options."""
        kinds, options = self._scale.kinds.shape[1], len(self._scale.spread)
        likely: Floats = self._corrected(np.zeros((1, options)), np.zeros((1, kinds)), self._weights[None])[0]
        return likely

    def _corrected(self, weights: Floats, factors: Floats, missing: Floats) -> Floats:
        scale = self._scale
        weights = weights + self._shares.single**2 * (missing @ scale.rows) * scale.spread
        factors = factors + _FACTOR**2 * missing @ scale.known
        # The table's order within a kind is never turned round as a whole.
        scaled = np.maximum(1.0 + factors, _LEAST_FACTOR) @ scale.kinds.T * scale.prior
        return np.asarray(np.maximum(scaled + weights * scale.spread, 0.0))


def _unit(losses: Floats) -> float:
    """What counts as a large loss: beyond it, only its logarithm counts."""
    above = losses - losses.min()
    return max(float(np.median(above[above > 0])) if (above > 0).any() else 1.0, 1e-9)


def _squared_distances(one: Floats, other: Floats) -> Floats:
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None, :] - 2.0 * one @ other.T
    return np.asarray(np.maximum(squares, 0.0))
