"""How much a kernel differs from model to model, beyond what the model's traffic does to it (`growth.py`).

What ran before it, where its values lie and which of them are still in a near cache change its time from model to
model, a short kernel's more than a long one's: by 10 % at 6 µs and 4 % at 60 µs on a Xeon. One measurement of a kernel
therefore says less of it than its rounds agree to, and kernels of neighbouring sizes have something to say as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from automl_compress.hardware.prediction.growth import SMALLEST_US, Growth
from automl_compress.hardware.prediction.kernel_key import read_key
from automl_compress.hardware.profile.schema import KernelRecord

_BINS = 8
_ENOUGH = 20 * _BINS
_LIMITS = (0.005, 0.5)
# Half of the squares of normal deviations are smaller than this.
_MEDIAN_SQUARE = 0.455


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Standard deviation of the logarithm of a kernel's time: `at_1us` for one of a microsecond, changing with a power
    of the time. The defaults are what three networks on a Xeon came to, for profiles with too few kernels to tell."""

    at_1us: float = 0.3
    exponent: float = -0.65

    def __call__(self, us: float) -> float:
        return float(np.clip(self.at_1us * max(us, SMALLEST_US) ** self.exponent, *_LIMITS))


def learn_scatter(records: Iterable[KernelRecord], growth: Growth) -> Scatter:
    """From kernels that were seen in several models, robustly: the line through bins of the logarithm of the time."""
    times: list[float] = []
    squares: list[float] = []
    for record in records:
        seen = record.sightings
        if len(seen) < 2:
            continue
        op = read_key(record.key).op
        ratios = [float(np.median(rounds)) / growth.factor(op, traffic) for rounds, traffic in seen]
        logs = np.log(np.maximum(ratios, SMALLEST_US))
        squares += ((logs - logs.mean()) ** 2 * len(seen) / (len(seen) - 1)).tolist()
        times += [math.log(max(record.mean_us, SMALLEST_US))] * len(seen)
    if len(times) < _ENOUGH:
        return Scatter()
    order = np.argsort(times, kind="stable")
    bins = [part for part in np.array_split(order, _BINS) if len(part)]
    centers = [float(np.mean(np.asarray(times)[part])) for part in bins]
    spreads = [math.sqrt(float(np.median(np.asarray(squares)[part])) / _MEDIAN_SQUARE) for part in bins]
    if centers[-1] - centers[0] < 1.0:
        return Scatter()
    exponent, at_1us = np.polyfit(centers, np.log(np.maximum(spreads, _LIMITS[0])), 1)
    return Scatter(at_1us=float(np.exp(at_1us)), exponent=float(exponent))
