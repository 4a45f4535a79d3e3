"""From raw durations to figures: nothing here touches a clock, so nothing here depends on one.

What a burst says (`bursts.burst_us`) is the raw value. The median over bursts is what counts, the interquartile range
over the median says how far to trust it, and a ratio of two models is the median of the ratios of bursts that were
taken side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from automl_compress.core.result import Timing
from automl_compress.errors import DeviceError


def timing(bursts_us: Sequence[float], runs: int) -> Timing:
    """Summarise bursts in microseconds; `runs` is how many runs a burst had.

    Raises DeviceError if there are none or one of them isn't a positive number.
    """
    values = np.asarray(bursts_us, dtype=float)
    if not values.size or not np.all(np.isfinite(values)) or np.any(values <= 0):
        raise DeviceError(
            f"the measuring process returned durations that can't be: {list(bursts_us)[:5]}; run the measurement again"
        )
    low, median, high = np.percentile(values, [25, 50, 75])
    return Timing(
        values_us=tuple(values.tolist()), median_us=float(median), spread=float((high - low) / median), runs=runs
    )


def ratio(timings: Mapping[str, Timing], name: str, reference: str) -> float:
    """How long `name` takes as a multiple of `reference`: the median over rounds, in which a common drift cancels."""
    ours, theirs = timings[name].values_us, timings[reference].values_us
    return float(np.median(np.divide(ours, theirs)))


def trimmed_mean(values: Sequence[float], cut: float = 0.2) -> float:
    """The mean without the lowest and the highest `cut` of the values.

    Durations in whole microseconds need a mean, since the median of a short one would be a step function, and a single
    interruption, a thousand times longer than the kernel, must not enter it.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    skipped = int(len(ordered) * cut)
    return float(ordered[skipped : len(ordered) - skipped].mean())


def burst_means(values: Sequence[float], bursts: int, discard: float) -> tuple[float, ...]:
    """Split consecutive runs into bursts and take each one's trimmed mean without its first part (`discard` of it)."""
    length = len(values) // bursts
    skipped = min(int(length * discard), length - 1)
    return tuple(trimmed_mean(values[i * length + skipped : (i + 1) * length]) for i in range(bursts))


def median_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median and (largest - smallest) / median of a few bursts; the spread of a zero median is 0."""
    median = float(np.median(values))
    return median, (float(max(values)) - float(min(values))) / median if median > 0 else 0.0
