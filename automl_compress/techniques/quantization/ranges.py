"""The range of a stream of values, without keeping the values."""

from __future__ import annotations

import numpy as np

_BINS = 4096
_SAMPLES = 1 << 16


class RangeObserver:
    """Lowest and highest value of everything seen, or the range that holds `percentile` percent of it.

    Percentiles come from a histogram of `_BINS` bins over [-r, r]; r doubles when a larger value arrives, by merging
    neighbouring bins. At most `_SAMPLES` evenly spaced values of each array are counted.
    """

    def __init__(self, percentile: float = 100.0) -> None:
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be in (50, 100], found {percentile}")
        self.percentile = percentile
        self.low, self.high = float("inf"), -float("inf")
        self._reach = 0.0
        self._counts = np.zeros(_BINS, np.int64)

    def update(self, values: np.ndarray) -> None:
        """Take in an array of finite values."""
        if not values.size:
            return
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        if self.percentile == 100:
            return
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

    def range(self) -> tuple[float, float]:
        """(low, high), each within what was seen."""
        if self.percentile == 100 or not self._counts.any():
            return self.low, self.high
        tail = (1 - self.percentile / 100) / 2 * self._counts.sum()
        below = np.cumsum(self._counts)
        width = 2 * self._reach / _BINS
        first = int(np.searchsorted(below, tail, side="right"))
        last = int(np.searchsorted(below, below[-1] - tail, side="left"))
        low, high = first * width - self._reach, (last + 1) * width - self._reach
        return max(low, self.low), min(high, self.high)
