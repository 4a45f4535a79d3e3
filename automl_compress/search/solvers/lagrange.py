"""Plans of least loss within limits, in milliseconds: Lagrange multipliers, then local search.

With a price on each metric the problem has no limits any more: every layer takes the bits that are best at its widths,
knobs are set one after another to the best position given the others (those that share no layer at once), and a block
goes where what is inside is worth less than it costs. The prices are found by bisection, for several limits by raising
the price of what is exceeded. What remains to the limits is then used, and what the descent missed is mended, by single
changes and pairs of changes that lower the loss within the limits.

Many problems that differ in their losses and limits are solved at once, as rows. Everything is deterministic. Unlike
the integer program in `decode`, it proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from automl_compress.search.table.arrays import TableArrays
from automl_compress.search.table.states import NEVER, Bools, Floats, Ints, Losses, States

_LOWEST, _HIGHEST = -9.0, 5.0  # powers of ten between which prices are looked for
_STEPS = 14
_STEPS_NEAR, _NEAR = 6, 0.7
_STEPS_OF_SEVERAL = 24
_SWEEPS = 2
_CROWDED = 3  # knobs around a layer above which their order is disregarded
_EPS = 1e-9


@dataclass(frozen=True)
class Found:
    """The best feasible row for each problem; `ok` says where there is one. `prices` are the last multipliers."""

    states: States
    ok: Bools
    loss: Floats
    cost: Floats
    prices: Floats


@dataclass(frozen=True)
class Cases:
    """Some knobs, and the index arrays with which all of their positions are looked at together.

    `edges` are the edges of these knobs sorted by knob. A *case* is an edge (`edge`, an index of `edges`) at one of its
    knob's positions (`figure`, an index of `removed_in`); cases are sorted by (knob, position), `starts` is where those
    of each of `positions` begin, and `padded` is (knob, position) -> index of `positions`, -1 where there is none.
    """

    knobs: Ints
    edges: Ints
    edge: Ints
    figure: Ints
    starts: Ints
    positions: Ints
    padded: Ints

    def places(self, arrays: TableArrays, position: Ints) -> Ints:
        """(row, case) -> where the layer's costs would be if only that knob were at that position."""
        layers = arrays.edge_layer[self.edges]
        chosen = arrays.edge_first[self.edges] + position[:, arrays.edge_knob[self.edges]]
        inputs, outputs = arrays.widths(position)
        inputs = inputs[:, layers] + arrays.removed_in[chosen]
        outputs = outputs[:, layers] + arrays.removed_out[chosen]
        return arrays.places(
            np.maximum(inputs[:, self.edge] - arrays.removed_in[self.figure], 1),
            np.maximum(outputs[:, self.edge] - arrays.removed_out[self.figure], 1),
            layers[self.edge],
        )


class Descent:
    """Solves problems of one space, table and width. `limits` are rows over `table.ADDITIVE`; infinity: no limit."""

    def __init__(self, arrays: TableArrays) -> None:
        self.arrays = arrays
        self._colours = [cases_of(arrays, knobs) for knobs in _colouring(arrays)]
        self._loose = np.setdiff1d(np.arange(len(arrays.knobs)), arrays.edge_knob)
        self._levels = _levels(arrays)
        full = arrays.cost.max(axis=2)
        most = np.zeros((len(arrays.cost), len(arrays.layers)))
        for metric in range(len(full)):
            np.maximum.at(most[metric], arrays.place_layer, full[metric])
        # What everything costs at most, so that prices of different metrics compare.
        self.scale: Floats = np.maximum(most.sum(axis=1), 1e-12)

    def solve(self, losses: Losses, limits: Floats, around: Floats | None = None) -> Found:
        """The least loss within `limits` that the multipliers find, for each row.

        `around` are prices of a similar problem (rows over metrics): fewer are then tried, near to these.
        """
        limited = np.isfinite(limits)
        room = np.where(limited, np.maximum(limits - self.arrays.fixed, 1e-12), 1.0)
        unit = np.where(limited, 1.0 / room, 0.0)
        start = self.arrays.untouched(len(limits))
        size = self._size_of(losses)
        if limited.sum(axis=1).max(initial=0) <= 1:
            return self._bisect(losses, limits, unit, size, start, around)
        return self._raise(losses, limits, unit, size, start, around)

    def at(self, losses: Losses, prices: Floats, start: States, sweeps: int = _SWEEPS) -> States:
        """The descent at given prices (rows over metrics, loss for a microsecond or byte), from `start`."""
        arrays = self.arrays
        value, bits = self._reduced(losses, prices)
        position, drop = start.position, start.drop
        for _ in range(sweeps):
            for colour in self._colours:
                position = self._settle(colour, position, drop, value, losses)
            if len(self._loose):
                position = self._settle_loose(position, losses)
            place = arrays.places(*arrays.widths(position))
            drop = self._choose_blocks(np.take_along_axis(value, place, axis=1), position, losses)
        place = arrays.places(*arrays.widths(position))
        return States(position, np.take_along_axis(bits, place, axis=1), drop)

    def cheapest(self, metric: int, rows: int = 1) -> States:
        """What descent finds to be lowest in one metric."""
        zero = self.arrays.losses([{}] * rows)
        prices = np.zeros((rows, len(self.scale)))
        prices[:, metric] = 1.0
        return self.at(zero, prices, self.arrays.untouched(rows), sweeps=4)

    def _size_of(self, losses: Losses) -> Floats:
        """About as much loss as there is to lose, for each row."""
        most: Floats = np.full(len(losses.knobs), 1e-12)
        for part in (losses.knobs, losses.bits, losses.drop):
            each = np.where(part < NEVER, part, 0.0).reshape(len(part), -1)
            most = np.maximum(most, each.max(axis=1, initial=0.0))
        return most

    def _bisect(
        self, losses: Losses, limits: Floats, unit: Floats, size: Floats, start: States, around: Floats | None
    ) -> Found:
        """One limit: the lowest price at which it is met. Above it everything is feasible, as loss isn't considered."""
        best = _Best(self, losses, limits)
        per_price = unit * size[:, None]
        low, high, steps = np.full(len(limits), _LOWEST), np.full(len(limits), _HIGHEST), _STEPS
        if around is not None:
            middle = np.log10(np.maximum((around / np.maximum(per_price, 1e-300)).max(axis=1), 1e-300))
            low, high = (np.clip(middle + by, _LOWEST, _HIGHEST) for by in (-_NEAR, _NEAR))
            steps = _STEPS_NEAR
        state = self.at(losses, per_price * 10.0 ** low[:, None], start)
        low = np.where(best.see(state), _LOWEST, low)
        state = self.at(losses, per_price * 10.0 ** high[:, None], start, sweeps=_SWEEPS + 1)
        high = np.where(best.see(state), high, _HIGHEST)
        for _ in range(steps):
            middle = (low + high) / 2
            state = self.at(losses, per_price * 10.0 ** middle[:, None], state)
            met = best.see(state)
            low, high = np.where(met, low, middle), np.where(met, middle, high)
        if not best.complete:
            best.see(self.at(losses, per_price * 10.0**_HIGHEST, start, sweeps=_SWEEPS + 1))
        return best.found(per_price * 10.0 ** high[:, None])

    def _raise(
        self, losses: Losses, limits: Floats, unit: Floats, size: Floats, start: States, around: Floats | None
    ) -> Found:
        """Several limits: prices of what is exceeded rise, others fall, by less and less."""
        best = _Best(self, losses, limits)
        per_price = unit * size[:, None]
        best.see(self.at(losses, np.zeros_like(unit), start))
        state = self.at(losses, per_price * 10.0**_HIGHEST, start, sweeps=_SWEEPS + 1)
        best.see(state)
        exponent, step, steps = np.full(limits.shape, -0.5), np.ones(limits.shape), _STEPS_OF_SEVERAL
        if around is not None:
            exponent = np.log10(np.maximum(around / np.maximum(per_price, 1e-300), 10.0**_LOWEST))
            step, steps = np.full(limits.shape, 0.3), _STEPS_NEAR + _STEPS_NEAR
        before = np.zeros(limits.shape)
        for _ in range(steps):
            state = self.at(losses, per_price * 10.0**exponent, state)
            best.see(state)
            over = np.sign(best.cost * unit - np.where(unit > 0, limits * unit, 0.0))
            turned = over * before < 0
            step = np.where(turned, step * 0.5, np.minimum(step * 1.2, 2.0))
            before = over
            exponent = np.clip(exponent + step * over, _LOWEST, _HIGHEST)
        return best.found(per_price * 10.0**exponent)

    def _reduced(self, losses: Losses, prices: Floats) -> tuple[Floats, Ints]:
        """(row, place) -> loss and price of the best bits there, and their index."""
        value = np.tensordot(prices, self.arrays.cost, axes=1)
        value += losses.bits[:, self.arrays.place_layer] * self.arrays.share[:, None]
        bits = value.argmin(axis=2)
        return np.take_along_axis(value, bits[:, :, None], axis=2)[:, :, 0], bits

    def _settle(self, colour: Cases, position: Ints, drop: Bools, value: Floats, losses: Losses) -> Ints:
        """Set these knobs to their best positions. Those in removed blocks as if the blocks were there."""
        layers, knobs = (index[colour.edges] for index in (self.arrays.edge_layer, self.arrays.edge_knob))
        layers_gone, knobs_gone = self.arrays.gone(drop)
        counts = layers_gone[:, layers] == knobs_gone[:, knobs]
        place = colour.places(self.arrays, position)
        each = np.take_along_axis(value, place, axis=1) * counts[:, colour.edge]
        sums = np.add.reduceat(each, colour.starts, axis=1) + losses.knobs[:, colour.positions]
        padded = np.concatenate([sums, np.full((len(sums), 1), np.inf)], axis=1)[:, colour.padded]
        position = position.copy()
        position[:, colour.knobs] = padded.argmin(axis=2)
        return position

    def _settle_loose(self, position: Ints, losses: Losses) -> Ints:
        position = position.copy()
        for knob in self._loose:
            first = self.arrays.first[knob]
            position[:, knob] = losses.knobs[:, first : first + self.arrays.counts[knob]].argmin(axis=1)
        return position

    def _choose_blocks(self, value: Floats, position: Ints, losses: Losses) -> Bools:
        """Remove what is worth less than it costs; of blocks within blocks the inner ones are decided first."""
        arrays = self.arrays
        rows = len(position)
        drop = np.zeros((rows, len(arrays.blocks)), dtype=bool)
        if not arrays.blocks:
            return drop
        knobs = losses.knobs[np.arange(rows)[:, None], arrays.first + position]
        worth = np.zeros((rows, len(arrays.blocks)))
        for level in self._levels:
            inner = worth @ level.children
            present = value @ level.layers + knobs @ level.knobs + inner[:, level.blocks]
            gone: Bools = arrays.always[level.blocks] | (losses.drop[:, level.blocks] < present)
            drop[:, level.blocks] = gone
            worth[:, level.blocks] = np.where(gone, losses.drop[:, level.blocks], present)
        return drop


class _Best:
    """Remembers the feasible state with the least loss of each row."""

    def __init__(self, descent: Descent, losses: Losses, limits: Floats) -> None:
        self._arrays, self._losses, self._limits = descent.arrays, losses, limits
        self.cost: Floats = np.zeros_like(limits)
        self._states: States | None = None
        self._loss: Floats = np.full(len(limits), np.inf)
        self._costs: Floats = np.zeros_like(limits)

    def see(self, states: States) -> Bools:
        """Compare the next states; where they meet the limits."""
        loss, self.cost = self._arrays.total(states, self._losses)
        met = np.asarray((self.cost <= self._limits * (1 + _EPS)).all(axis=1))
        better = np.asarray(met & (loss < self._loss))
        self._states = states if self._states is None else States.where(better, states, self._states)
        self._loss = np.where(better, loss, self._loss)
        self._costs = np.where(better[:, None], self.cost, self._costs)
        return met

    @property
    def complete(self) -> bool:
        """Whether every row has a feasible state."""
        return bool(np.isfinite(self._loss).all())

    def found(self, prices: Floats) -> Found:
        assert self._states is not None
        return Found(self._states, np.isfinite(self._loss), self._loss, self._costs, prices)


@dataclass(frozen=True)
class _Level:
    """Blocks that hold no undecided block. Columns: what lies directly in each of them, not in a block inside."""

    blocks: Ints
    layers: Floats
    knobs: Floats
    children: Floats


def _levels(arrays: TableArrays) -> list[_Level]:
    count = len(arrays.blocks)
    inside = arrays.inside > 0
    depth = np.zeros(count, dtype=np.int64)
    for block in sorted(range(count), key=lambda b: int(arrays.block_layers[b].sum())):
        depth[block] = max((depth[i] + 1 for i in np.flatnonzero(inside[block])), default=0)
    levels = []
    direct = inside.copy()
    for outer in range(count):
        for inner in np.flatnonzero(inside[outer]):
            direct[outer, np.flatnonzero(inside[inner])] = False
    for level in range(int(depth.max(initial=-1)) + 1):
        blocks = np.flatnonzero(depth == level)
        held = [(b, np.flatnonzero(inside[b])) for b in blocks]
        layers = [arrays.block_layers[b] * (arrays.block_layers[i].sum(axis=0) == 0) for b, i in held]
        knobs = [arrays.block_knobs[b] * (arrays.block_knobs[i].sum(axis=0) == 0) for b, i in held]
        levels.append(
            _Level(
                blocks=blocks,
                layers=np.array(layers, dtype=float).T,
                knobs=np.array(knobs, dtype=float).T,
                children=direct.astype(float).T,
            )
        )
    return levels


def _colouring(arrays: TableArrays) -> list[Ints]:
    """Knobs in classes that share no layer, greedily. Where many meet, as behind concatenations, they are taken to be
    independent: else each would be a class of its own."""
    around: dict[int, set[int]] = {}
    for edge, layer in enumerate(arrays.edge_layer):
        around.setdefault(int(layer), set()).add(int(arrays.edge_knob[edge]))
    near: dict[int, set[int]] = {int(k): set() for k in arrays.edge_knob}
    for knobs in around.values():
        if len(knobs) <= _CROWDED:
            for knob in knobs:
                near[knob] |= knobs - {knob}
    classes: list[list[int]] = []
    colour: dict[int, int] = {}
    for knob in sorted(near, key=lambda k: (-len(near[k]), k)):
        taken = {colour[other] for other in near[knob] if other in colour}
        mine = next(i for i in range(len(near) + 1) if i not in taken)
        colour[knob] = mine
        if mine == len(classes):
            classes.append([])
        classes[mine].append(knob)
    return [np.array(sorted(each), dtype=np.int64) for each in classes]


def cases_of(arrays: TableArrays, knobs: Ints) -> Cases:
    edges = np.flatnonzero(np.isin(arrays.edge_knob, knobs))
    edges = edges[np.argsort(arrays.edge_knob[edges], kind="stable")]
    case_edge: list[int] = []
    case_figure: list[int] = []
    starts: list[int] = []
    positions: list[int] = []
    padded = np.full((len(knobs), int(arrays.counts[knobs].max())), -1, dtype=np.int64)
    for row, knob in enumerate(knobs):
        mine = np.flatnonzero(arrays.edge_knob[edges] == knob)
        for at in range(arrays.counts[knob]):
            padded[row, at] = len(starts)
            starts.append(len(case_edge))
            positions.append(arrays.first[knob] + at)
            case_edge += mine.tolist()
            case_figure += (arrays.edge_first[edges[mine]] + at).tolist()
    return Cases(
        knobs=knobs,
        edges=edges,
        edge=np.array(case_edge, dtype=np.int64),
        figure=np.array(case_figure, dtype=np.int64),
        starts=np.array(starts, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        padded=padded,
    )
