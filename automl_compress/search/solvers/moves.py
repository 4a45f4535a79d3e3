"""Single changes of plans, what each would do to loss and cost, and a local search with them within limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from automl_compress.search.solvers.lagrange import Cases, cases_of
from automl_compress.search.table.arrays import TableArrays
from automl_compress.search.table.states import NEVER, Bools, Floats, Ints, Losses, States

_PAIRED = 96  # of the most promising changes, every two are tried together
_CHECKED = 6
_LEAST = 1e-9


@dataclass(frozen=True)
class Changes:
    """What each single change does: (row, change) -> difference in loss, (row, metric, change) -> in cost.

    Changes are numbered: all positions of all knobs, then all bits of all layers, then all blocks. What isn't possible,
    or changes nothing, has a loss of infinity.
    """

    loss: Floats
    cost: Floats


class Neighbours:
    """The changes of one space's plans."""

    def __init__(self, arrays: TableArrays) -> None:
        self.arrays = arrays
        self._cases: Cases | None = cases_of(arrays, np.unique(arrays.edge_knob)) if len(arrays.edge_knob) else None
        self._knob_of = np.repeat(np.arange(len(arrays.knobs)), arrays.counts)
        self._position_of = np.arange(int(arrays.counts.sum())) - np.repeat(arrays.first, arrays.counts)
        self._width = arrays.offered.shape[1]
        self._bits_from = len(self._knob_of)
        self._blocks_from = self._bits_from + len(arrays.layers) * self._width
        self.count = self._blocks_from + len(arrays.blocks)

    def changes(self, states: States, losses: Losses) -> Changes:
        """All single changes of each row. Exact for each by itself."""
        layers_gone, knobs_gone = self.arrays.gone(states.drop)
        place = self.arrays.places(*self.arrays.widths(states.position))
        parts = (
            self._narrowings(states, losses, place, layers_gone == 0, knobs_gone == 0),
            self._bit_widths(states, losses, place, layers_gone == 0),
            self._removals(states, losses, place, layers_gone, knobs_gone),
        )
        return Changes(
            loss=np.concatenate([loss for loss, _ in parts], axis=1),
            cost=np.concatenate([cost for _, cost in parts], axis=2),
        )

    def apply(self, states: States, changes: Ints) -> States:
        """Row by row, one change after another: `changes` is (row, any number), -1 for none."""
        position, bits, drop = states.position.copy(), states.bits.copy(), states.drop.copy()
        for column in range(changes.shape[1]):
            change = changes[:, column]
            rows = np.flatnonzero((change >= 0) & (change < self._bits_from))
            position[rows, self._knob_of[change[rows]]] = self._position_of[change[rows]]
            rows = np.flatnonzero((change >= self._bits_from) & (change < self._blocks_from))
            layer, index = np.divmod(change[rows] - self._bits_from, self._width)
            bits[rows, layer] = index
            rows = np.flatnonzero(change >= self._blocks_from)
            drop[rows, change[rows] - self._blocks_from] ^= True
        return States(position, bits, drop)

    def around(
        self, states: States, losses: Losses, limits: Floats, prices: Floats, *, paired: int, count: int
    ) -> States:
        """For each row about `count` plans that differ from it in one or two changes and are, as far as changes add up,
        within `limits`: those with the lowest losses."""
        _, cost = self.arrays.total(states, losses)
        chosen = self._promising(states, losses, limits - cost, prices, paired, count)
        return self.apply(states.take(np.repeat(np.arange(len(states)), chosen.shape[1])), chosen.reshape(-1, 2))

    def improve(
        self, states: States, losses: Losses, limits: Floats, prices: Floats, *, rounds: int = 24, paired: int = _PAIRED
    ) -> States:
        """Lower the loss of feasible rows by single changes and pairs, within `limits`; equal losses: the cost.

        Of all pairs of the `paired` changes that are most promising at `prices`, the best few are checked, for changes
        around one layer or block don't add up.
        """
        active = np.arange(len(states))
        loss, cost = self.arrays.total(states, losses)
        for _ in range(rounds):
            part, terms = states.take(active), losses.take(active)
            chosen = self._promising(part, terms, limits[active] - cost[active], prices[active], paired, _CHECKED)
            trials = self.apply(part.take(np.repeat(np.arange(len(active)), chosen.shape[1])), chosen.reshape(-1, 2))
            rows = np.repeat(active, chosen.shape[1])
            tried_loss, tried_cost = self.arrays.total(trials, losses.take(rows))
            fits = (tried_cost <= limits[rows] * (1 + _LEAST)).all(axis=1)
            gained = np.where(fits, loss[rows] - tried_loss, -np.inf).reshape(chosen.shape[:2])
            best = gained.argmax(axis=1)
            better = gained[np.arange(len(active)), best] > _LEAST * np.maximum(1.0, loss[active])
            if not better.any():
                break
            taken = (np.arange(len(active)) * chosen.shape[1] + best)[better]
            active = active[better]
            states = _put(states, active, trials.take(taken))
            loss[active], cost[active] = tried_loss[taken], tried_cost[taken]
        return states

    def _promising(
        self, states: States, losses: Losses, room: Floats, prices: Floats, paired: int, checked: int
    ) -> Ints:
        """(row, candidate, 2): the pairs and single changes that should lower the loss most within the room, or -1."""
        changes = self.changes(states, losses)
        rank = changes.loss + np.einsum("rmc,rm->rc", changes.cost, prices)
        count = min(paired, rank.shape[1])
        few = np.sort(np.argpartition(rank, count - 1, axis=1)[:, :count], axis=1)
        loss = np.take_along_axis(changes.loss, few, axis=1)
        cost = np.take_along_axis(changes.cost, few[:, None, :], axis=2)
        room = room + _LEAST * np.abs(room)
        together = loss[:, :, None] + loss[:, None, :]
        fits = np.ones(together.shape, dtype=bool)
        for metric in range(cost.shape[1]):
            if np.isfinite(room[:, metric]).any():
                fits &= cost[:, metric, :, None] + cost[:, metric, None, :] <= room[:, metric, None, None]
        together = np.where(fits, together, np.inf)
        diagonal = np.arange(count)
        alone = np.where((cost <= room[:, :, None]).all(axis=1), loss, np.inf)
        together[:, diagonal, diagonal] = alone
        below = np.tril_indices(count, -1)
        together[:, below[0], below[1]] = np.inf
        flat = together.reshape(len(together), -1)
        checked = min(checked, flat.shape[1] - 1)
        best = np.argpartition(flat, checked, axis=1)[:, :checked]
        few = np.where(np.isfinite(loss), few, -1)  # where there are few changes, what isn't possible is among them
        first, second = np.take_along_axis(few, best // count, axis=1), np.take_along_axis(few, best % count, axis=1)
        single = alone.argmin(axis=1)
        first = np.concatenate([first, np.take_along_axis(few, single[:, None], axis=1)], axis=1)
        second = np.concatenate([second, np.full((len(second), 1), -1)], axis=1)
        return np.stack([first, np.where(second == first, -1, second)], axis=2)

    def _narrowings(
        self, states: States, losses: Losses, place: Ints, layers_here: Bools, knobs_here: Bools
    ) -> tuple[Floats, Floats]:
        arrays, rows = self.arrays, np.arange(len(states))[:, None]
        now = losses.knobs[rows, arrays.first + states.position]
        loss = losses.knobs - now[:, self._knob_of]
        barred = ~knobs_here[:, self._knob_of] | (states.position[:, self._knob_of] == self._position_of)
        loss = np.where(barred, np.inf, loss)
        cost = np.zeros((len(states), len(arrays.cost), loss.shape[1]))
        if self._cases is not None:
            layers = arrays.edge_layer[self._cases.edges]
            at = self._cases.places(arrays, states.position)
            bits, here = states.bits[:, layers], layers_here[:, layers]
            before = arrays.cost[:, place[:, layers], bits] * here
            case = self._cases.edge
            after = arrays.cost[:, at, bits[:, case]] * here[:, case]
            sums = np.add.reduceat(after - before[:, :, case], self._cases.starts, axis=2)
            cost[:, :, self._cases.positions] = sums.transpose(1, 0, 2)
            if arrays.table.joint:
                alone = losses.bits[rows, layers, bits] * here
                change = alone[:, case] * (arrays.share[at] - arrays.share[place[:, layers]][:, case])
                loss[:, self._cases.positions] += np.add.reduceat(change, self._cases.starts, axis=1)
        return loss, cost

    def _bit_widths(self, states: States, losses: Losses, place: Ints, here: Bools) -> tuple[Floats, Floats]:
        rows, layers = np.arange(len(states))[:, None], np.arange(len(self.arrays.layers))
        loss = (losses.bits - losses.bits[rows, layers, states.bits][:, :, None]) * self.arrays.share[place][:, :, None]
        barred = ~here[:, :, None] | (losses.bits >= NEVER) | (states.bits[:, :, None] == np.arange(self._width))
        cost = self.arrays.cost[:, place] - self.arrays.cost[:, place, states.bits][:, :, :, None]
        flat = (len(states), len(layers) * self._width)
        return (
            np.where(barred, np.inf, loss).reshape(flat),
            cost.transpose(1, 0, 2, 3).reshape(flat[0], len(cost), flat[1]),
        )

    def _removals(
        self, states: States, losses: Losses, place: Ints, layers_gone: Floats, knobs_gone: Floats
    ) -> tuple[Floats, Floats]:
        arrays, rows = self.arrays, np.arange(len(states))[:, None]
        drop = states.drop
        held = layers_gone[:, None, :] - drop[:, :, None] * arrays.block_layers
        layers = (arrays.block_layers * (held == 0)).astype(float)
        held = knobs_gone[:, None, :] - drop[:, :, None] * arrays.block_knobs
        knobs = (arrays.block_knobs * (held == 0)).astype(float)
        of_layers = losses.bits[rows, np.arange(len(arrays.layers)), states.bits] * arrays.share[place]
        of_knobs = losses.knobs[rows, arrays.first + states.position]
        within = drop.astype(np.int64) @ arrays.inside > 0
        # A removed block inside of this one counts only while no other removed block holds it.
        outer = (drop.astype(np.int64) @ arrays.inside)[:, None, :] - drop[:, :, None] * arrays.inside
        inner = arrays.inside * (drop[:, None, :] & (outer == 0))
        lost = np.where(drop, losses.drop, 0.0)
        saved = np.einsum("rbl,rl->rb", layers, of_layers) + np.einsum("rbk,rk->rb", knobs, of_knobs)
        saved += np.einsum("rbi,ri->rb", inner, lost)
        cost = np.einsum("rbl,mrl->rmb", layers, arrays.cost[:, place, states.bits])
        sign = np.where(drop, -1.0, 1.0)
        loss = sign * (losses.drop - saved)
        barred = within | arrays.always | (losses.drop >= NEVER)
        return np.where(barred, np.inf, loss), -sign[:, None, :] * cost


def _put(states: States, rows: Ints, values: States) -> States:
    position, bits, drop = states.position.copy(), states.bits.copy(), states.drop.copy()
    position[rows], bits[rows], drop[rows] = values.position, values.bits, values.drop
    return States(position, bits, drop)
