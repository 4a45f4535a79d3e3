"""The range of a stream of values, without keeping the values: one histogram, from which several rules choose.

A rule trades the error of rounding (a wide range has wide steps) against that of clipping:

* `minmax`: nothing is clipped.
* `percentile`: that share of all values lies within.
* `mse`: the least mean squared error of what 8-bit steps make of the histogram.
* `entropy`: the least Kullback-Leibler divergence of the histogram from its image in 8-bit steps (as TensorRT does:
  Migacz 2017), over symmetric cuts of the larger side.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Rule = Literal["minmax", "percentile", "mse", "entropy"]
RULES: tuple[Rule, ...] = ("percentile", "minmax", "mse", "entropy")
PERCENTILE = 99.999
_BINS = 4096
_SAMPLES = 1 << 16
_STEPS = 255
_CUTS = np.linspace(0.2, 1.0, 41)
Floats = NDArray[np.float64]


class RangeObserver:
    """Counts values in `_BINS` bins over [-r, r]; r doubles when a larger value arrives, by merging neighbouring bins.

    Lowest and highest are exact; at most `_SAMPLES` evenly spaced values of each array are counted.
    """

    def __init__(self) -> None:
        self.low, self.high = float("inf"), -float("inf")
        self._reach = 0.0
        self._counts = np.zeros(_BINS, np.int64)

    def update(self, values: NDArray[np.float32]) -> None:
        """Take in an array of finite values."""
        if not values.size:
            return
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        reach = max(abs(self.low), abs(self.high))
        if self._reach == 0:
            self._reach = reach
        while self._reach < reach:
            self._widen()
        flat = values.reshape(-1)[:: -(-values.size // _SAMPLES)]
        width = 2 * self._reach / _BINS or 1.0
        bins = np.clip(((flat + self._reach) / width).astype(np.int64), 0, _BINS - 1)
        self._counts += np.bincount(bins, minlength=_BINS)

    def _widen(self) -> None:
        half = self._counts.reshape(-1, 2).sum(1)
        self._counts = np.concatenate([np.zeros(_BINS // 4, np.int64), half, np.zeros(_BINS // 4, np.int64)])
        self._reach *= 2

    def range(self, rule: Rule = "percentile", percentile: float = PERCENTILE) -> tuple[float, float]:
        """(low, high) by that rule, each within what was seen. `percentile` is of all values, in (50, 100]."""
        if rule == "minmax" or percentile == 100 or not self._counts.any() or self.high <= self.low:
            return self.low, self.high
        if rule == "percentile":
            low, high = self._percentile(percentile)
        else:
            low, high = self._least(rule)
        return max(low, self.low), min(high, self.high)

    def _percentile(self, percentile: float) -> tuple[float, float]:
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be in (50, 100], found {percentile}")
        tail = (1 - percentile / 100) / 2 * self._counts.sum()
        below = np.cumsum(self._counts)
        width = 2 * self._reach / _BINS
        first = int(np.searchsorted(below, tail, side="right"))
        last = int(np.searchsorted(below, below[-1] - tail, side="left"))
        return first * width - self._reach, (last + 1) * width - self._reach

    def _least(self, rule: Rule) -> tuple[float, float]:
        """The cut of the range that was seen with the least error."""
        used = np.flatnonzero(self._counts)
        width = 2 * self._reach / _BINS
        counts = self._counts[used[0] : used[-1] + 1].astype(np.float64)
        centres = ((np.arange(used[0], used[-1] + 1) + 0.5) * width - self._reach).clip(self.low, self.high)
        error = _squared if rule == "mse" else _divergence
        cuts = [(min(self.low, 0.0) * cut, max(self.high, 0.0) * cut) for cut in _CUTS]
        return min(cuts, key=lambda limits: error(counts, centres, *limits))


def _squared(counts: Floats, centres: Floats, low: float, high: float) -> float:
    step = (high - low) / _STEPS
    rounded = np.clip(np.rint(centres / step) * step, low, high)
    # Within its bin a value is spread evenly; where bins are wider than steps, rounding errs by a step's share alone.
    inside = (centres >= low) & (centres <= high)
    errors = np.where(inside, np.maximum((centres - rounded) ** 2, step**2 / 12), (centres - rounded) ** 2)
    return float((counts * errors).sum())


def _divergence(counts: Floats, centres: Floats, low: float, high: float) -> float:
    step = (high - low) / _STEPS
    bins = np.clip(np.rint((centres - low) / step), 0, _STEPS).astype(np.int64)
    inside = (centres >= low) & (centres <= high)
    if not inside.any():
        return float("inf")  # all values lie together, beyond this cut
    kept = np.where(inside, counts, 0.0)
    filled = (kept > 0).astype(np.float64)
    sums = np.bincount(bins, weights=kept, minlength=_STEPS + 1)
    cells = np.bincount(bins, weights=filled, minlength=_STEPS + 1)
    image = filled * (sums / np.maximum(cells, 1.0))[bins]
    wanted = kept.copy()
    # What is cut off counts in the outermost bins of the original, but not of its image.
    edge = np.flatnonzero(inside)
    wanted[edge[0]] += counts[: edge[0]].sum()
    wanted[edge[-1]] += counts[edge[-1] + 1 :].sum()
    p, q = wanted / wanted.sum(), image / max(image.sum(), 1e-12)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-9))).sum())
