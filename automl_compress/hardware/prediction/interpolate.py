"""What a kernel takes at sizes that were not measured, from kernels that differ from it in nothing but sizes.

A family's times follow a roofline with costs that can't be negative (a call, multiply-adds, bytes read, written, and of
weights); what it misses (the staircase of blocked layouts above all) is learned by a Gaussian process on the logarithm
of measured over roofline. Its inputs are the sizes' logarithms, and for each size what is left over after blocks of 2,
4, 8, 16, 32: 48 channels are like 32, not like 47. Far from anything measured the roofline is what remains, and the
uncertainty says so. (Rasmussen and Williams 2006, chapter 2.)

A kernel's time depends on the model around it, too (`growth.py`): measured times are brought to the profile's typical
traffic before anything is learned from them, and prices to that of the model which is asked about. What else it depends
on is scatter (`scatter.py`), so that a kernel that was measured once or twice is drawn toward what its family says.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from automl_compress.core.budget import Provenance
from automl_compress.hardware.prediction.growth import SMALLEST_US, learn_growth
from automl_compress.hardware.prediction.kernel_key import KernelParts, read_key, traffic_bytes
from automl_compress.hardware.prediction.roofline import work_of
from automl_compress.hardware.prediction.scatter import learn_scatter
from automl_compress.hardware.profile.schema import KernelRecord

Array = NDArray[np.float64]

# Neighbours that a prediction looks at: more don't change it, and the cost grows with the cube.
_NEIGHBOURS = 48
_SIGNAL = 0.3
_NOISE = 0.02
# Reaches that are tried, the default first: octaves of a size, and weights of blocks that aren't filled.
_REACHES = tuple((along, across) for along in (2.0, 0.7, 4.0) for across in (1.5, 0.7, 4.0))
_ENOUGH_TO_CHOOSE = 12
_LARGEST_CHOICE = 200
# What profiling adds to a kernel is known to about so many microseconds.
_RESOLUTION_US = 0.2
_FEW = 3
# Larger families are looked at neighbourhood by neighbourhood, since the cost grows with the cube.
_LARGEST_FAMILY = 1500
# One standard deviation, relative, where only kernels of another family, or none, are known.
_RELATED_ERROR = 0.4
# What fusing an addition or an activation into a kernel changes, about.
_FUSED_ERROR = 0.1
_UNKNOWN_ERROR = 1.0
_FROM_WEAKEST: tuple[Provenance, ...] = ("estimated", "interpolated", "measured")
# Channels that a grouped convolution computes at a time: what is left over is computed one by one, or with padding.
_AT_A_TIME = (4, 8, 16)
_PADDED_TO = (8, 16, 32)
# How much further off than said predictions of few kernels are.
_DOUBT = 1.5
_BLOCKS = ((2, 0.35), (4, 0.5), (8, 0.6), (16, 0.8), (32, 0.4))


@dataclass(frozen=True, slots=True)
class Price:
    """Microseconds of one kernel, the relative standard deviation of that figure, and where it comes from."""

    us: float
    error: float
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Total:
    """Kernels added up: microseconds, relative standard deviation, share of measured ones, the weakest provenance.

    `guess_error` is the part of the standard deviation that measuring the rest would take away.
    """

    us: float
    error: float
    guess_error: float
    measured_share: float
    provenance: Provenance


class PriceList:
    """Prices of kernels, measured or not, from a profile's measured ones.

    Kernels that were measured have that price, drawn toward their family's the less often they were seen. Others are
    interpolated within their family; where fewer than three of it were measured, among kernels that differ in what was
    fused into them as well; else they are estimated from all kernels of the same operator, or of any.
    """

    def __init__(self, kernels: Mapping[str, KernelRecord]) -> None:
        self.growth = learn_growth(kernels.values())
        self._scatter = learn_scatter(kernels.values(), self.growth)
        self._known = {key: self.growth.typical(record) for key, record in kernels.items()}
        self._prices: dict[str, Price] = {}
        families: dict[str, list[str]] = defaultdict(list)
        operators: dict[str, list[str]] = defaultdict(list)
        for key in self._known:
            parts = read_key(key)
            families[parts.family].append(key)
            families[parts.core].append(key)
            operators[parts.op].append(key)
        self._families = families
        self._operators = operators
        self._curves: dict[str, SizeCurve] = {}
        self._smooth: dict[str, tuple[float, float]] = {}

    def __getitem__(self, key: str) -> Price:
        """In a model of the profile's typical traffic."""
        price = self._prices.get(key)
        if price is None:
            price = self._prices[key] = self._measured(key) or self._interpolated(key)
        return price

    def of_model(self, keys: Iterable[str]) -> dict[str, Price]:
        """The prices of a model's kernels, all of which are given, in that model."""
        counts = Counter(keys)
        traffic = sum(traffic_bytes([key]) * count for key, count in counts.items())
        factors = {key: self.growth.factor(read_key(key).op, traffic) for key in counts}
        return {key: replace(self[key], us=self[key].us * factor) for key, factor in factors.items()}

    def total(self, keys: Iterable[str]) -> Total:
        """What a model's kernels take one after the other. Errors of equal kernels are one error and add up."""
        counts = Counter(keys)
        prices = self.of_model(counts.elements())
        us = sum(prices[key].us * count for key, count in counts.items())
        variances = {key: (prices[key].us * prices[key].error * count) ** 2 for key, count in counts.items()}
        guessed = sum(variance for key, variance in variances.items() if prices[key].provenance != "measured")
        measured = sum(prices[key].us * n for key, n in counts.items() if prices[key].provenance == "measured")
        found = {price.provenance for price in prices.values()}
        weakest: Provenance = next((p for p in _FROM_WEAKEST if p in found), "measured")
        if not us:
            return Total(0.0, 0.0, 0.0, 1.0, "measured")
        error, guess_error = (math.sqrt(variance) / us for variance in (sum(variances.values()), guessed))
        return Total(us, error, guess_error, measured / us, weakest)

    def _measured(self, key: str) -> Price | None:
        record = self._known.get(key)
        if record is None:
            return None
        once, family = self._error(record), read_key(key).family
        if record.provenance != "measured" or len(self._families[family]) <= _FEW:
            return Price(record.mean_us, once, record.provenance)
        if key not in self._smooth:
            keys = self._families[family]
            self._smooth.update(zip(keys, self._curve(family, keys).at_known(), strict=True))
        smooth, error = self._smooth[key]
        # What is the kernel's own of its distance from the curve, and not the measurement's.
        share = _NOISE**2 / (_NOISE**2 + once**2)
        us = smooth * math.exp(share * math.log(max(record.mean_us, SMALLEST_US) / smooth))
        return Price(us, math.hypot(error, math.sqrt(share) * once), record.provenance)

    def _error(self, record: KernelRecord) -> float:
        """Relative standard deviation of a measured kernel: by how much kernels differ from model to model, by its
        spread, a range of few rounds, and by the resolution."""
        if record.provenance == "estimated":
            return _RELATED_ERROR
        us = max(record.mean_us, SMALLEST_US)
        once = max(record.spread / 3, _RESOLUTION_US / us, self._scatter(us))
        return min(max(once / math.sqrt(record.count), 0.005), 1.0)

    def _interpolated(self, key: str) -> Price:
        parts, place = read_key(key), place_of(key)
        if len(self._families.get(parts.family, ())) >= _FEW:
            us, error = self._curve(parts.family, self._families[parts.family])(place)
            return Price(us, error, self._provenance(parts.family))
        if len(self._families.get(parts.core, ())) >= _FEW and parts.core_sizes:
            us, error = self._curve(parts.core, self._families[parts.core])(SizePlace(parts.core_sizes, place.work))
            return Price(us, math.hypot(error, _FUSED_ERROR), self._provenance(parts.core))
        for name, keys in ((f"op {parts.op}", self._operators.get(parts.op, [])), ("any", list(self._known))):
            if keys:
                us = self._curve(name, keys).roofline(place)
                return Price(us, _RELATED_ERROR if name != "any" else _UNKNOWN_ERROR, "estimated")
        return Price(1.0, _UNKNOWN_ERROR, "estimated")

    def _provenance(self, family: str) -> Provenance:
        """Between estimates lies an estimate."""
        known = {self._known[key].provenance for key in self._families[family]}
        return "estimated" if "estimated" in known else "interpolated"

    def _curve(self, name: str, keys: Sequence[str]) -> SizeCurve:
        if name not in self._curves:
            records = [self._known[key] for key in keys]
            times = np.array([max(record.mean_us, SMALLEST_US) for record in records])
            errors = np.array([self._error(record) for record in records])
            whole = name == read_key(keys[0]).core
            self._curves[name] = SizeCurve([place_of(key, core=whole) for key in keys], times, errors)
        return self._curves[name]


@dataclass(frozen=True, slots=True)
class SizePlace:
    """Where a kernel lies among its family: its sizes, and the work that they imply (a call included)."""

    sizes: tuple[int, ...]
    work: tuple[float, ...]


def place_of(key: str, *, core: bool = False) -> SizePlace:
    """A kernel's sizes (those that don't depend on what was fused, if `core`) and work, by its key."""
    parts, work = read_key(key), work_of(key)
    reads, writes, weights = (
        sum(tensor.bytes for tensor in tensors) / 1e4 for tensors in (parts.inputs, parts.outputs, parts.weights)
    )
    megaoperations = work.operations / 1e6
    effort = (1.0, megaoperations, reads, writes, weights, *(share * megaoperations for share in _unfilled(parts)))
    return SizePlace(parts.core_sizes if core else parts.sizes, effort)


def _unfilled(parts: KernelParts) -> tuple[float, ...]:
    """Shares of a grouped convolution's channels that are left over after full blocks, and that are missing to fill the
    last one."""
    if not parts.grouped or not parts.weights:
        return (0.0,) * (len(_AT_A_TIME) + len(_PADDED_TO))
    channels = max(parts.weights[0].shape[0], 1)
    left = [channels % block / channels for block in _AT_A_TIME]
    return (*left, *(-channels % block / channels for block in _PADDED_TO))


class SizeCurve:
    """Time as a function of sizes, fitted to kernels of one family (or of one operator, then only as a roofline).

    `errors` are the relative standard deviations of the times. How far similarity reaches, in sizes and in blocks, is
    what makes kernels that are left out most likely.
    """

    def __init__(self, places: Sequence[SizePlace], times_us: Array, errors: Array) -> None:
        self._times = times_us
        work = np.array([place.work for place in places])
        # Relative residuals: a kernel of 2 us counts as much as one of 2 ms.
        self._rates, _ = nnls(work / times_us[:, None], np.ones(len(times_us)))
        self._work = work
        self._residuals = np.log(times_us / self._rooflines(work))
        self._noise = np.hypot(errors, _NOISE)
        self._columns: list[int] | None = None
        if len({len(place.sizes) for place in places}) == 1:
            sizes = np.array([place.sizes for place in places], dtype=int).reshape(len(places), -1)
            self._columns = _distinct_columns(sizes)
            self._logs, self._blocks = _features(sizes[:, self._columns])
            self._reach, self._doubt = _most_likely(self._logs, self._blocks, self._residuals, self._noise)

    def roofline(self, place: SizePlace) -> float:
        """Microseconds by the family's fitted rates alone."""
        return float(self._rooflines(np.array([place.work]))[0])

    def __call__(self, place: SizePlace) -> tuple[float, float]:
        """(microseconds, relative standard deviation) at these sizes."""
        assert self._columns is not None
        logs, blocks = _features(np.array([place.sizes], dtype=int)[:, self._columns])
        along, across = self._reach
        distances = _distances(self._logs, logs, along)[:, 0] + _distances(self._blocks, blocks, across)[:, 0]
        if len(distances) <= _NEIGHBOURS:
            toward = _SIGNAL**2 * np.exp(-0.5 * distances)
            weights = self._inverse @ toward
            ratio = float(weights @ self._residuals)
        else:
            near = np.argsort(distances, kind="stable")[:_NEIGHBOURS]
            toward = _SIGNAL**2 * np.exp(-0.5 * distances[near])
            weights = np.asarray(np.linalg.solve(self._covariance(near), toward), dtype=float)
            ratio = float(weights @ self._residuals[near])
        variance = max(_SIGNAL**2 - float(weights @ toward), 0.0) + _NOISE**2
        return self.roofline(place) * float(np.exp(ratio)), self._doubt * float(np.sqrt(variance))

    @cached_property
    def _inverse(self) -> Array:
        """Of the covariance of all kernels, where these are few: the same for every place that is asked about."""
        return np.asarray(np.linalg.inv(self._covariance(np.arange(len(self._times)))), dtype=float)

    def _covariance(self, some: NDArray[np.intp]) -> Array:
        along, across = self._reach
        between = _distances(self._logs[some], self._logs[some], along)
        between += _distances(self._blocks[some], self._blocks[some], across)
        covariance: Array = _SIGNAL**2 * np.exp(-0.5 * between) + np.diag(self._noise[some] ** 2)
        return covariance

    def at_known(self) -> list[tuple[float, float]]:
        """(microseconds, relative standard deviation) that the family says of each kernel that it was fitted to."""
        assert self._columns is not None
        (along, across), count = self._reach, len(self._times)
        between = _distances(self._logs, self._logs, along) + _distances(self._blocks, self._blocks, across)
        found = np.zeros((2, count))
        # Kernels of neighbouring sizes together, where there are too many for one solution.
        for part in np.array_split(np.argsort(self._logs.sum(axis=1), kind="stable"), 1 + count // _LARGEST_FAMILY):
            signal = _SIGNAL**2 * np.exp(-0.5 * between[np.ix_(part, part)])
            weights = np.linalg.solve(signal + np.diag(self._noise[part] ** 2), signal)
            found[0, part] = self._residuals[part] @ weights
            found[1, part] = np.sqrt(np.maximum(_SIGNAL**2 - (signal * weights).sum(axis=0), 0.0))
        us = self._rooflines(self._work) * np.exp(found[0])
        return list(zip(us.tolist(), found[1].tolist(), strict=True))

    def _rooflines(self, work: Array) -> Array:
        floor = max(SMALLEST_US, 0.2 * float(self._times.min()))
        predicted: Array = np.maximum(work @ self._rates, floor)
        return predicted


def _distinct_columns(sizes: NDArray[np.int_]) -> list[int]:
    """Columns that vary, each once: channels appear in what is read, written, and in the weights."""
    found: dict[bytes, int] = {}
    for number, column in enumerate(sizes.T):
        if len(np.unique(column)) > 1:
            found.setdefault(column.tobytes(), number)
    return sorted(found.values())


def _features(sizes: NDArray[np.int_]) -> tuple[Array, Array]:
    """Where kernels lie among their family: logarithms of their sizes, and which blocks these don't fill."""
    logs = np.log2(np.maximum(sizes, 1)).astype(float)
    blocks = [(sizes % block != 0).astype(float) * weight for block, weight in _BLOCKS]
    return logs, np.concatenate(blocks, axis=1)


def _distances(one: Array, other: Array, reach: float) -> Array:
    """Squared distances of all pairs, in units of `reach`."""
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None] - 2 * one @ other.T
    distances: Array = np.maximum(squares, 0.0) / reach**2
    return distances


def _most_likely(logs: Array, blocks: Array, values: Array, noise: Array) -> tuple[tuple[float, float], float]:
    """The pair of reaches under which values are most likely, each left out once (Rasmussen and Williams, 5.12), and by
    how much the misses of those that were left out exceed their standard deviations."""
    if len(values) < _ENOUGH_TO_CHOOSE:
        return _REACHES[0], _DOUBT
    some = np.linspace(0, len(values) - 1, min(len(values), _LARGEST_CHOICE)).round().astype(int)
    best, chosen, doubt = -np.inf, _REACHES[0], 1.0
    for along, across in _REACHES:
        between = _distances(logs[some], logs[some], along) + _distances(blocks[some], blocks[some], across)
        inverse = np.linalg.inv(_SIGNAL**2 * np.exp(-0.5 * between) + np.diag(noise[some] ** 2))
        variance = 1 / np.diag(inverse)
        misses = (inverse @ values[some]) * variance
        likelihood = float(-0.5 * (np.log(variance) + misses**2 / variance).sum())
        if likelihood > best:
            best, chosen = likelihood, (along, across)
            doubt = max(1.0, float(np.sqrt((misses**2 / variance).mean())))
    return chosen, doubt
