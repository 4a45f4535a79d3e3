"""How much slower a kernel is in a model that moves more bytes: its values and weights then come from farther caches.

time ∝ traffic ^ exponent, where a model's traffic is what all its kernels read and write in one run. The exponents come
from kernels that were seen in several models: within one key nothing but the surroundings differ, so that a regression
on the logarithms of both, with a constant for each kernel, shows their effect alone. There is one exponent for each
operator, drawn toward that of all together, and that toward nothing. On a Xeon with 2 MB of second-level cache it is
0.08 to 0.11 for networks of 0.5 to 15 MB, and 0.02 for one that fits into the cache whole: a network of a tenth of the
traffic runs the same kernel in 0.8 of the time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from automl_compress.hardware.prediction.kernel_key import read_key
from automl_compress.hardware.profile.schema import KernelRecord

SMALLEST_US = 0.05
# The strength of "no effect", in microseconds times squared logarithms; and how much one kernel can weigh.
_DOUBT = 200.0
_HEAVIEST_US = 60.0
# Below this a time says more about the resolution of the clock than about caches.
_SHORTEST_US = 1.5


@dataclass(frozen=True, kw_only=True)
class Growth:
    """`exponents` by operator, `other` for those not named; `typical_bytes`: the traffic to which prices refer."""

    exponents: Mapping[str, float] = field(default_factory=dict)
    other: float = 0.0
    typical_bytes: float = 1.0

    def factor(self, op: str, traffic_bytes: float) -> float:
        """What a kernel takes in a model of that traffic, as a multiple of its price."""
        return math.exp(self.exponents.get(op, self.other) * math.log(max(traffic_bytes, 1.0) / self.typical_bytes))

    def typical(self, record: KernelRecord) -> KernelRecord:
        """The record as if the kernel had been seen in models of typical traffic; as it is where theirs isn't known."""
        seen = record.sightings
        if not seen:
            return record
        op = read_key(record.key).op
        factors = [self.factor(op, traffic) for _, traffic in seen]
        values = [float(np.median(rounds)) / factor for (rounds, _), factor in zip(seen, factors, strict=True)]
        mean = sum(values) / len(values)
        within = max(_spread(rounds) for rounds, _ in seen)
        return replace(record, mean_us=mean, spread=max(within, (max(values) - min(values)) / max(mean, SMALLEST_US)))


def learn_growth(records: Iterable[KernelRecord]) -> Growth:
    """From all that a profile knows of kernels; without what they were seen in, nothing grows."""
    products: dict[str, float] = defaultdict(float)
    squares: dict[str, float] = defaultdict(float)
    everywhere: list[int] = []
    for record in records:
        seen = record.sightings
        everywhere += [traffic for _, traffic in seen]
        if len(seen) < 2 or record.mean_us < _SHORTEST_US:
            continue
        times, traffic = _centered([float(np.median(rounds)) for rounds, _ in seen]), _centered([t for _, t in seen])
        op, weight = read_key(record.key).op, min(record.mean_us, _HEAVIEST_US)
        products[op] += weight * float(traffic @ times)
        squares[op] += weight * float(traffic @ traffic)
    if not everywhere:
        return Growth()
    other = sum(products.values()) / (sum(squares.values()) + _DOUBT)
    return Growth(
        exponents={op: (products[op] + _DOUBT * other) / (squares[op] + _DOUBT) for op in squares},
        other=other,
        typical_bytes=float(np.exp(np.mean(np.log(np.maximum(everywhere, 1))))),
    )


def _centered(values: Sequence[float]) -> NDArray[np.float64]:
    logs = np.log(np.maximum(np.asarray(values, dtype=float), SMALLEST_US))
    centered: NDArray[np.float64] = logs - logs.mean()
    return centered


def _spread(rounds: tuple[float, ...]) -> float:
    return (max(rounds) - min(rounds)) / max(float(np.median(rounds)), SMALLEST_US)
