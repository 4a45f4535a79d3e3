"""What the runtime makes of a sketch: learned from models that it lowered, without running it again.

A layer's own kernel is looked up by layer, bit-width and channels (and interpolated where those were not seen). What
runs besides, reorders, conversions, additions, is charged to the node that it serves and depends on what surrounds the
node: which neighbours run in integers, in which layout values are, whether channels fill the layout's blocks. Such
surroundings repeat, within a network and from plan to plan. For each, at four levels of detail, a linear function of
the values' sizes is fitted, drawn toward that of the next coarser level; the finest level that was seen predicts.

The layouts are guessed by following them through the graph (blocked behind an aligned convolution in floating point,
channels last behind one in integers, passed on by operators that work element by element). The guess only sorts nodes
into surroundings: what these cost is learned, and how well it predicts is tested on models that were left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from automl_compress.hardware.device.kernels import Kernel
from automl_compress.hardware.prediction.fit import MEDIAN_DEVIATION
from automl_compress.hardware.prediction.interpolate import PriceList, SizeCurve, SizePlace, Total
from automl_compress.hardware.prediction.sketch import Skeleton, Sketch

Array = NDArray[np.float64]
Levels = tuple[tuple[Hashable, Hashable, Hashable], Hashable, Hashable, Hashable]

_BLOCK = 16
_RIDGE = 0.3
_HELD_OUT = 5
_ENOUGH_SEEN = 8
# fmt: off
_ELEMENTWISE = frozenset({
    "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Add", "Mul", "Concat", "MaxPool",
    "AveragePool", "GlobalAveragePool",
})
# fmt: on
_MOVING = frozenset({"Slice", "Pad", "Squeeze", "Reshape", "Transpose"})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sketch and the kernels that the runtime executed for it."""

    sketch: Sketch
    kernels: tuple[Kernel, ...]


class Surroundings:
    """Predicts the sum of a sketch's kernels. `error` is the median relative error on samples that were left out, None
    with too few to tell; `worst_error` the largest."""

    def __init__(self, samples: Sequence[Sample], prices: PriceList) -> None:
        self._prices = prices
        self.error: float | None = None
        self.worst_error: float | None = None
        rows = [_row(sample, prices) for sample in samples]
        if len(rows) >= 2 * _HELD_OUT:
            misses = []
            for start in range(_HELD_OUT):
                self._fit([row for i, row in enumerate(rows) if i % _HELD_OUT != start])
                misses += [self._miss(row) for i, row in enumerate(rows) if i % _HELD_OUT == start]
            self.error, self.worst_error = float(np.median(misses)), max(misses)
        self._fit(rows)

    def __call__(self, sketch: Sketch) -> tuple[Total, float]:
        """(sum of the kernels, number of kernels)."""
        skeleton, details = sketch.skeleton, surroundings(sketch)
        us, variance, nodes, certain = self._elsewhere[0], 0.0, self._elsewhere[1], True
        for position, layer in enumerate(skeleton.layers):
            extra = self._helpers(details[position], sketch, position)
            us, nodes = us + max(0.0, extra[0]), nodes + extra[1]
            if layer is not None:
                own, error, known = self._own(details[position], sketch, position)
                us, nodes, variance, certain = us + own, nodes + 1, variance + (own * error) ** 2, certain and known
        spread = (self.error if self.error is not None else 0.1) / MEDIAN_DEVIATION
        error = float(np.hypot(np.sqrt(variance) / max(us, 1e-9), spread))
        return Total(us, error, error, 0.0, "interpolated" if certain else "estimated"), nodes

    def _miss(self, row: _Row) -> float:
        return abs(self(row.sketch)[0].us / row.total_us - 1.0)

    def _own(self, levels: Levels, sketch: Sketch, position: int) -> tuple[float, float, bool]:
        """(microseconds, relative standard deviation, whether anything like it was seen) of a layer's own kernel."""
        at = (sketch.read[position], sketch.written[position])
        name, coarse = _names(levels, sketch, position)
        entries = self._entries.get(name)
        if entries is None or (at not in entries and len(entries) < _ENOUGH_SEEN):  # too few to interpolate
            name, entries = coarse, self._entries.get(coarse)
        if entries is None:
            return self._typical, 1.0, False
        if at in entries:
            return (*entries[at], True)
        if (name, at) not in self._between:
            if name not in self._curves:
                places = [_place(*widths) for widths in entries]
                times, errors = (np.array(column) for column in zip(*entries.values(), strict=True))
                self._curves[name] = SizeCurve(places, times, errors)
            self._between[name, at] = self._curves[name](_place(*at))
        return (*self._between[name, at], True)

    def _helpers(self, levels: Levels, sketch: Sketch, position: int) -> tuple[float, float]:
        for level, name in zip(reversed(self._levels), reversed(levels), strict=True):
            fitted = level.get(name)
            if fitted is not None:
                one, wrote, read, weighs = _sizes(sketch, position)
                us = fitted[0] * one + fitted[1] * wrote + fitted[2] * read + fitted[3] * weighs
                return us, fitted[4]
        return 0.0, 0.0

    def _fit(self, rows: Sequence[_Row]) -> None:
        own: dict[Hashable, dict[tuple[int, int], list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        groups: list[dict[Hashable, list[tuple[float, ...]]]] = [defaultdict(list) for _ in range(4)]
        parents: list[dict[Hashable, Hashable]] = [{} for _ in range(4)]
        for row in rows:
            sketch = row.sketch
            for position, levels in enumerate(row.levels):
                sizes = _sizes(sketch, position)
                for number, name in enumerate(levels):
                    groups[number][name].append((*sizes, row.helper_us[position], row.helper_count[position]))
                    parents[number][name] = levels[max(number - 1, 0)]
                price = row.own[position]
                if price is not None:
                    for name in _names(levels, sketch, position):
                        own[name][sketch.read[position], sketch.written[position]].append(price)
        self._entries = {
            name: {
                at: (float(np.mean([us for us, _ in seen])), max(e for _, e in seen)) for at, seen in entries.items()
            }
            for name, entries in own.items()
        }
        self._curves: dict[Hashable, SizeCurve] = {}
        self._between: dict[tuple[Hashable, tuple[int, int]], tuple[float, float]] = {}
        everything = [us for entries in self._entries.values() for us, _ in entries.values()]
        self._typical = float(np.median(everything)) if everything else 0.0
        self._elsewhere = tuple(float(np.median([row.elsewhere[i] for row in rows])) if rows else 0.0 for i in (0, 1))
        self._levels: list[dict[Hashable, tuple[float, ...]]] = [{}, {}, {}, {}]
        for number, group in enumerate(groups):
            for name, entries in group.items():
                table = np.array(entries)
                above = self._levels[number - 1][parents[number][name]] if number else None
                self._levels[number][name] = _ridge(table, above)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A sample, charged to its nodes. `elsewhere` is (us, count) of kernels that belong to no node."""

    sketch: Sketch
    levels: tuple[Levels, ...]
    own: tuple[tuple[float, float] | None, ...]
    helper_us: tuple[float, ...]
    helper_count: tuple[float, ...]
    elsewhere: tuple[float, float]
    total_us: float


def _row(sample: Sample, prices: PriceList) -> _Row:
    sketch = sample.sketch
    count = len(sketch.skeleton.ops)
    own: list[tuple[float, float] | None] = [None] * count
    helper_us, helper_count = [0.0] * (count + 1), [0.0] * (count + 1)
    total = 0.0
    found = prices.of_model(kernel.key for kernel in sample.kernels)
    for kernel, position in zip(sample.kernels, charge(sketch.skeleton, sample.kernels), strict=True):
        price = found[kernel.key]
        total += price.us
        if kernel.role == "layer" and position < count and own[position] is None:
            own[position] = (price.us, price.error)
        else:
            helper_us[position] += price.us
            helper_count[position] += 1
    return _Row(
        sketch=sketch,
        levels=surroundings(sketch),
        own=tuple(own),
        helper_us=tuple(helper_us[:count]),
        helper_count=tuple(helper_count[:count]),
        elsewhere=(helper_us[count], helper_count[count]),
        total_us=total,
    )


def charge(skeleton: Skeleton, kernels: Sequence[Kernel]) -> list[int]:
    """The node that each kernel serves: the one that it computes, else whose value its name keeps a trace of, else the
    one that made what it reads; the number of nodes where none of these is found."""
    layers = {layer: i for i, layer in enumerate(skeleton.layers) if layer is not None}
    makers: dict[str, int] = {}
    charged = []
    for kernel in kernels:
        position = layers.get(kernel.layer or "") if kernel.role == "layer" else None
        for name in (*kernel.writes, *kernel.reads):
            if position is None:
                position = makers.get(name, _traced(skeleton.position, name))
        if position is None:  # it reads constants alone, such as a weight that is unpacked in every run
            position = next((p for name in kernel.writes if (p := _traced(layers, name)) is not None), None)
        if position is None:
            position = len(skeleton.ops)
        makers.update(dict.fromkeys(kernel.writes, position))
        charged.append(position)
    return charged


def _traced(positions: Mapping[str, int], name: str) -> int | None:
    """'relu_3_nchwc' -> the position of 'relu_3': what the runtime makes of a value keeps its name in front."""
    while name:
        if name in positions:
            return positions[name]
        name = name[: max(name.rfind(mark) for mark in "_/.") if any(mark in name for mark in "_/.") else 0]
    return None


def surroundings(sketch: Sketch) -> tuple[Levels, ...]:
    """For each node what surrounds it, at four levels of detail, coarsest first."""
    skeleton = sketch.skeleton
    layouts = _layouts(sketch)
    near = []
    for i, (op, inputs) in enumerate(zip(skeleton.ops, skeleton.inputs, strict=True)):
        reads_integers = any(sketch.quantized[j] for j in inputs if j >= 0)
        flags = (
            op,
            sketch.integer[i],
            sketch.quantized[i],
            reads_integers,
            sketch.bits[i] if skeleton.layers[i] else 0,
        )
        read_layouts = tuple(sorted(layouts[j] if j >= 0 else "input" for j in inputs))
        detail = (layouts[i], read_layouts)
        fill = (
            sketch.omitted[i],
            sketch.written[i] % _BLOCK == 0,
            sketch.written[i] % 4 == 0,
            sketch.read[i] % _BLOCK == 0,
        )
        near.append((flags, detail, fill))
    codes = [hash(entry) for entry in near]
    first = [_around(skeleton, codes, i) for i in range(len(codes))]
    second = [_around(skeleton, first, i) for i in range(len(codes))]
    return tuple(
        ((kind, flags, detail), (kind, code), (kind, code, one), (kind, code, one, two))
        for kind, (flags, detail, _), code, one, two in zip(skeleton.kinds, near, codes, first, second, strict=True)
    )


def _around(skeleton: Skeleton, codes: Sequence[int], i: int) -> int:
    before = tuple(codes[j] if j >= 0 else 0 for j in skeleton.inputs[i])
    return hash((before, tuple(sorted(codes[j] for j in skeleton.users[i]))))


def _layouts(sketch: Sketch) -> list[str]:
    """A guess at the layout of each node's value: 'blocked', 'last' (channels last), 'mixed' or 'plain'."""
    skeleton = sketch.skeleton
    layouts: list[str] = []
    for i, op in enumerate(skeleton.ops):
        sources = {layouts[j] if j >= 0 else "plain" for j in skeleton.inputs[i]}
        one = next(iter(sources)) if len(sources) == 1 else ""
        if op == "Conv":
            layout = "last" if sketch.integer[i] else "blocked" if sketch.written[i] % _BLOCK == 0 else "plain"
        elif op in _ELEMENTWISE and one in ("blocked", "last") and not (one == "blocked" and sketch.integer[i]):
            layout = one
        elif op in _ELEMENTWISE and "blocked" in sources and not sketch.integer[i] and not sketch.quantized[i]:
            layout = "mixed"
        elif op in _MOVING and sketch.quantized[i] and one == "last":
            layout = "last"
        else:
            layout = "plain"
        layouts.append("left" if layout == "blocked" and sketch.quantized[i] else layout)
    return layouts


def _names(levels: Levels, sketch: Sketch, position: int) -> tuple[Hashable, Hashable]:
    """What a layer's own kernel is looked up by: with what it reads and writes, by which the runtime may choose another
    kernel, and without."""
    kind, flags, _ = levels[0]
    return (kind, flags), (kind, sketch.bits[position], sketch.integer[position])


def _sizes(sketch: Sketch, position: int) -> tuple[float, float, float, float]:
    """What the time of a node's helpers follows: 1, the numbers that it writes and reads, and those of its weight, as
    it is unpacked in every run where no kernel reads its bits."""
    weights = sketch.read[position] * sketch.written[position] if sketch.skeleton.layers[position] is not None else 0
    return (1.0, sketch.written_numbers[position] / 1e4, sketch.read_numbers[position] / 1e4, weights / 1e4)


def _ridge(table: Array, above: tuple[float, ...] | None) -> tuple[float, ...]:
    """Coefficients of `_sizes` for the time, and the mean count, drawn toward `above`. The table's last two columns are
    times and counts."""
    design, times, counts = table[:, :-2], table[:, -2], table[:, -1]
    prior = np.array(above[:-1]) if above is not None else np.array([times.mean(), *[0.0] * (design.shape[1] - 1)])
    left = design.T @ design + _RIDGE * np.eye(design.shape[1])
    found = prior + np.linalg.solve(left, design.T @ (times - design @ prior))
    weight = len(counts) / (len(counts) + _RIDGE)
    count = weight * float(counts.mean()) + (1 - weight) * (above[-1] if above is not None else float(counts.mean()))
    return (*found.tolist(), count)


def _place(read: int, written: int) -> SizePlace:
    """A layer's kernel at so many channels, as something to interpolate over; those left over after full blocks are
    often computed one by one."""
    left = [written % block / 1e2 for block in (4, _BLOCK // 2, _BLOCK)]
    missing = [-written % block / 1e2 for block in (_BLOCK // 2, _BLOCK, 2 * _BLOCK)]
    return SizePlace((read, written), (1.0, read * written / 1e3, read / 1e2, written / 1e2, *left, *missing))
