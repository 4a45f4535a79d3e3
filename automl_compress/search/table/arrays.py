"""The additive table of a space as arrays: what every choice costs and loses, for many plans at once.

A knob's positions (`knobs`) are the numbers of channels that its groups may keep. Every layer has a small table, (input
width, output width, bits) to cost, looked up at the widths that the knobs around it leave. A block that is removed
takes its layers and the knobs inside of it out of the sum.

Plans are rows of three integer arrays (`States`), so that sums and changes are gathers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from automl_compress.core.graph import End, Graph, Layer
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.search.space.knobs import knobs_of
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.states import NEVER, Bools, Floats, Ints, Losses, States, joined, padded, upward
from automl_compress.search.table.table import ADDITIVE, AdditiveTable, QualityKey, kept_options, nearest_option

_GRID = 64  # widths of one side of a layer that are told apart; above, a width is priced as the next larger one


class TableArrays:
    """One space and table at one student width.

    knobs, layers, blocks   what the columns of `States` stand for; layers and blocks by name
    bits       layer -> bit-widths on offer
    keys       what `losses` expects a number for, in this order
    first      knob -> its first position among all knobs' positions
    offered    (layer, index) whether there are bits of that index
    exact      whether every width is priced as it is
    cost       (metric, place, bits) -> cost, a place being a layer at an input and an output width
    share      place -> what of the layer's loss by fewer bits counts there
    """

    def __init__(self, space: SearchSpace, graph: Graph, table: AdditiveTable, width: float = 1.0) -> None:
        self.space, self.graph, self.table, self.width = space, graph, table, width
        self.layers, self.blocks = list(graph.layers), [block.name for block in graph.blocks]
        self.options = {g.name: kept_options(space.options(f"sparsity.{g.name}"), g.size, width) for g in graph.groups}
        self.knobs = knobs_of(graph, self.options)
        self.counts: Ints = np.array([len(knob.kept) for knob in self.knobs], dtype=np.int64)
        self.first: Ints = np.concatenate([[0], np.cumsum(self.counts)[:-1]]).astype(np.int64)[: len(self.knobs)]
        self.bits = [tuple(int(b) for b in space.options(f"bits.{x.name}") or (FULL_BITS,)) for x in self.layers]
        self.fixed: Floats = np.array([table.fixed.of(m) for m in ADDITIVE])
        self._index_blocks()
        self._index_edges()
        self._index_places()
        self._index_losses()

    def losses(self, quality: Sequence[Mapping[QualityKey, float]]) -> Losses:
        """What the options lose by some tables of quality, a row for each."""
        values = np.array([[row.get(key, 0.0) for key in self.keys] + [0.0] for row in quality])
        return self.losses_of(values)

    def losses_of(self, values: Floats) -> Losses:
        """The same from rows of numbers in the order of `keys`, a zero after them."""
        bits = values[:, self._bit_keys]
        bits[:, ~self.offered] = NEVER
        drop = values[:, self._drop_keys]
        drop[:, ~self._droppable] = NEVER
        return Losses(values[:, self._knob_keys].sum(axis=2), bits, drop)

    def gone(self, drop: Bools) -> tuple[Floats, Floats]:
        """How many removed blocks hold each layer, and how many hold each knob whole."""
        removed = drop.astype(np.float64)
        return removed @ self._block_layers, removed @ self._block_knobs

    def widths(self, position: Ints) -> tuple[Ints, Ints]:
        """(input, output) channels of all layers."""
        chosen = self.edge_first + position[:, self.edge_knob]
        return self._left(self.removed_in[chosen], "in"), self._left(self.removed_out[chosen], "out")

    def places(self, inputs: Ints, outputs: Ints, layers: Ints | slice = slice(None)) -> Ints:
        """Where the costs of `layers` are at these widths."""
        row = self._in_index[self._in_first[layers] + inputs]
        place: Ints = self._place_first[layers] + row * self._columns[layers]
        place += self._out_index[self._out_first[layers] + outputs]
        return place

    def costs(self, states: States) -> Floats:
        """(row, metric) -> cost, what is fixed included."""
        here = self.gone(states.drop)[0] == 0
        return self._costs(self.places(*self.widths(states.position)), states.bits, here)

    def _costs(self, place: Ints, bits: Ints, here: Bools) -> Floats:
        total: Floats = (self.cost[:, place, bits] * here).sum(axis=2).T + self.fixed
        return total

    def total(self, states: States, losses: Losses) -> tuple[Floats, Floats]:
        """(loss, cost by metric) of every state, what is fixed included."""
        rows = np.arange(len(states))[:, None]
        layers_gone, knobs_gone = self.gone(states.drop)
        place, here = self.places(*self.widths(states.position)), layers_gone == 0
        loss = (losses.bits[rows, np.arange(len(self.layers)), states.bits] * self.share[place] * here).sum(axis=1)
        loss += (losses.knobs[rows, self.first + states.position] * (knobs_gone == 0)).sum(axis=1)
        counted = states.drop & ~((states.drop.astype(float) @ self._inside) > 0)
        return loss + np.where(counted, losses.drop, 0.0).sum(axis=1), self._costs(place, states.bits, here)

    def plain(self, states: States) -> States:
        """The same plans, with what is gone at its first choice: equal plans have equal rows."""
        layers_gone, knobs_gone = self.gone(states.drop)
        drop = states.drop & ~((states.drop.astype(float) @ self._inside) > 0)
        return States(np.where(knobs_gone > 0, 0, states.position), np.where(layers_gone > 0, 0, states.bits), drop)

    def digests(self, states: States) -> list[bytes]:
        """Equal for rows that mean equal plans."""
        plain = self.plain(states)
        joined = np.concatenate([plain.position, plain.bits, plain.drop], axis=1).astype(np.uint8)
        return [row.tobytes() for row in joined]

    def features(self, states: States) -> Floats:
        """(row, key) -> 1 where that option is in force: of parts that are there, and of blocks that are not."""
        plain = self.plain(states)
        layers_gone, knobs_gone = self.gone(plain.drop)
        result = np.zeros((len(plain), len(self.keys) + 1))
        rows = np.arange(len(plain))[:, None]
        chosen = self._knob_keys[self.first + plain.position]
        for column in range(chosen.shape[2]):
            result[rows, np.where(knobs_gone == 0, chosen[:, :, column], -1)] = 1.0
        bits = self._bit_keys[np.arange(len(self.layers)), plain.bits]
        result[rows, np.where(layers_gone == 0, bits, -1)] = 1.0
        result[rows, np.where(plain.drop, self._drop_keys, -1)] = 1.0
        return result[:, :-1]

    def plan(self, states: States, row: int = 0) -> Plan:
        """A row as a plan of the space."""
        params = self.space.neutral()
        if "width" in params:
            params["width"] = self.width
        plain = self.plain(states.take([row]))
        for knob, at in zip(self.knobs, plain.position[0], strict=True):
            for name, count in zip(knob.groups, knob.kept[at], strict=True):
                if f"sparsity.{name}" in params:
                    params[f"sparsity.{name}"] = self.options[name][count]
        for layer, offered, at in zip(self.layers, self.bits, plain.bits[0], strict=True):
            if f"bits.{layer.name}" in params:
                params[f"bits.{layer.name}"] = offered[at]
        for block, removed in zip(self.blocks, plain.drop[0], strict=True):
            if f"drop.{block}" in params:
                params[f"drop.{block}"] = bool(removed)
        return self.space.plan(params)

    def states(self, plans: Sequence[Plan]) -> States:
        """Plans as rows; a number of channels that isn't offered here becomes the nearest that is."""
        position = np.zeros((len(plans), len(self.knobs)), dtype=np.int64)
        bits = np.zeros((len(plans), len(self.layers)), dtype=np.int64)
        drop = np.zeros((len(plans), len(self.blocks)), dtype=bool)
        for row, plan in enumerate(plans):
            for column, knob in enumerate(self.knobs):
                wanted = [plan.kept_count(name, self.graph.group[name].size) for name in knob.groups]
                far = [sum(abs(a - b) for a, b in zip(kept, wanted, strict=True)) for kept in knob.kept]
                position[row, column] = far.index(min(far))
            for column, (layer, offered) in enumerate(zip(self.layers, self.bits, strict=True)):
                chosen = plan.layer_bits(layer.name)
                bits[row, column] = offered.index(chosen) if chosen in offered else 0
            drop[row] = [name in plan.drop for name in self.blocks]
        return States(position, bits, drop)

    def untouched(self, rows: int = 1) -> States:
        """Everything as wide as it may be, with the blocks that always go removed."""
        drop = np.tile(self.always, (rows, 1))
        zeros = np.zeros((rows, len(self.knobs)), dtype=np.int64)
        return States(zeros, np.zeros((rows, len(self.layers)), dtype=np.int64), drop)

    def _index_blocks(self) -> None:
        blocks = [set(block.layers) for block in self.graph.blocks]
        groups = self.graph.group
        held = [
            {layer for name in knob.groups for layer in (*groups[name].producers, *groups[name].consumers)}
            for knob in self.knobs
        ]
        shape = (len(blocks), len(self.layers))
        self.block_layers: Ints = np.array(
            [[x.name in block for x in self.layers] for block in blocks], dtype=np.int64
        ).reshape(shape)
        self.block_knobs: Ints = np.array(
            [[bool(layers) and layers <= block for layers in held] for block in blocks], dtype=np.int64
        ).reshape(len(blocks), len(self.knobs))
        # The same as floating-point numbers: numpy multiplies matrices of integers without BLAS.
        self._block_layers, self._block_knobs = self.block_layers.astype(float), self.block_knobs.astype(float)
        # inside[outer, inner]
        self.inside: Ints = np.array([[inner < outer for inner in blocks] for outer in blocks], dtype=np.int64).reshape(
            len(blocks), len(blocks)
        )
        self._inside = self.inside.astype(float)
        offered = [self.space.options(f"drop.{name}") for name in self.blocks]
        self._droppable: Bools = np.array([True in each for each in offered], dtype=bool)
        self.always: Bools = np.array([each == (True,) for each in offered], dtype=bool)

    def _index_edges(self) -> None:
        """An edge is a knob beside a layer. Edges are sorted by layer; each has a figure for each of its knob's
        positions: the channels that it takes from the layer's input and output."""
        self.edge_knob: Ints
        self.edge_layer: Ints
        edges = [
            (column, k)
            for column, layer in enumerate(self.layers)
            for k, knob in enumerate(self.knobs)
            if set(knob.groups) & {*layer.in_groups, *layer.out_groups}
        ]
        self.edge_layer = np.array([layer for layer, _ in edges], dtype=np.int64)
        self.edge_knob = np.array([k for _, k in edges], dtype=np.int64)
        sizes = self.counts[self.edge_knob] if edges else np.zeros(0, dtype=np.int64)
        self.edge_first: Ints = (np.cumsum(sizes) - sizes).astype(np.int64)
        taken = {end: np.zeros(int(sizes.sum()), dtype=np.int64) for end in ("in", "out")}
        ends: tuple[End, End] = ("in", "out")
        for (column, k), start in zip(edges, self.edge_first, strict=True):
            layer, knob = self.layers[column], self.knobs[k]
            for at, kept in enumerate(knob.kept):
                counts = dict(zip(knob.groups, kept, strict=True))
                for end in ends:
                    left = self.graph.width(layer, end, counts)
                    taken[end][start + at] = _channels(layer, end) - left
        self.removed_in, self.removed_out = taken["in"], taken["out"]
        self._edge_starts: Ints = np.flatnonzero(np.diff(self.edge_layer, prepend=-1)).astype(np.int64)
        self._edged = self.edge_layer[self._edge_starts]
        self._full: dict[End, Ints] = {
            end: np.array([_channels(layer, end) for layer in self.layers], dtype=np.int64) for end in ends
        }

    def _left(self, taken: Ints, end: End) -> Ints:
        left = np.repeat(self._full[end][None, :], len(taken), axis=0)
        if len(self.edge_layer):
            left[:, self._edged] -= np.add.reduceat(taken, self._edge_starts, axis=1)
        return np.maximum(left, 1)

    def _index_places(self) -> None:
        self.exact = True
        most = max(len(offered) for offered in self.bits)
        self.offered: Bools = np.zeros((len(self.layers), most), dtype=bool)
        places: list[Floats] = []
        shares: list[Floats] = []
        layer_of: list[Ints] = []
        first, columns = [], []
        maps: dict[str, list[Ints]] = {"in": [], "out": []}
        for column, layer in enumerate(self.layers):
            self.offered[column, : len(self.bits[column])] = True
            inputs, outputs = self._reached(column)
            first.append(sum(len(part) for part in places))
            columns.append(len(outputs))
            grid = np.array([(i, o) for i in inputs for o in outputs], dtype=np.int64)
            if _tied_sides(layer) and len(outputs) == 1:
                grid = np.array(
                    [(i, max(1, round(layer.out_channels * i / layer.in_channels))) for i in inputs], dtype=np.int64
                )
            prices = np.zeros((len(grid), len(ADDITIVE), most))
            for at, bits in enumerate(self.bits[column]):
                prices[:, :, at] = self.table.costs(layer.name, grid, bits)
            places.append(prices)
            shares.append(self.table.share_of_bits(layer, grid[:, 1]))
            layer_of.append(np.full(len(grid), column))
            maps["in"].append(upward(inputs, layer.in_channels))
            maps["out"].append(upward(outputs, layer.out_channels))
        self.cost: Floats = np.concatenate(places).transpose(1, 0, 2).copy()
        self.share: Floats = np.concatenate(shares)
        self.place_layer: Ints = np.concatenate(layer_of)
        self._place_first, self._columns = np.array(first, dtype=np.int64), np.array(columns, dtype=np.int64)
        self._in_index, self._in_first = joined(maps["in"])
        self._out_index, self._out_first = joined(maps["out"])

    def _reached(self, column: int) -> tuple[list[int], list[int]]:
        """The input and output widths that a layer may have; of tied sides only the input's, the output's follow."""
        layer = self.layers[column]
        edges = np.flatnonzero(self.edge_layer == column)
        found: list[list[int]] = []
        for end, removed in (("in", self.removed_in), ("out", self.removed_out)):
            totals = {_channels(layer, "in" if end == "in" else "out")}
            for edge in edges:
                start = self.edge_first[edge]
                taken = set(removed[start : start + self.counts[self.edge_knob[edge]]].tolist())
                totals = {total - n for total in totals for n in taken if total - n > 0}
            widths = sorted(totals)
            if len(widths) > _GRID:
                self.exact = False
                widths = [widths[i] for i in np.linspace(0, len(widths) - 1, _GRID).round().astype(int)]
            found.append(widths)
        return (found[0], [layer.out_channels]) if _tied_sides(layer) else (found[0], found[1])

    def _index_losses(self) -> None:
        self.keys: list[QualityKey] = []
        index: dict[QualityKey, int] = {}

        def key(name: str, option: object) -> int:
            pair: QualityKey = (name, option)  # type: ignore[assignment]
            if pair not in index:
                index[pair] = len(self.keys)
                self.keys.append(pair)
            return index[pair]

        knob_keys: list[list[int]] = []
        for knob in self.knobs:
            for kept in knob.kept:
                row = []
                for name, count in zip(knob.groups, kept, strict=True):
                    offered = self.space.options(f"sparsity.{name}")
                    if offered:
                        option = nearest_option(offered, self.graph.group[name].size, count)
                        row.append(key(f"sparsity.{name}", option))
                knob_keys.append(row)
        bit_keys = [
            [key(f"bits.{x.name}", b) for b in offered] for x, offered in zip(self.layers, self.bits, strict=True)
        ]
        drop_keys = [key(f"drop.{name}", True) for name in self.blocks]
        none = len(self.keys)
        self._knob_keys = padded(knob_keys, none, max((len(row) for row in knob_keys), default=1) or 1)
        self._bit_keys = padded(bit_keys, none, self.offered.shape[1])
        self._drop_keys: Ints = np.array(drop_keys, dtype=np.int64)


def _tied_sides(layer: Layer) -> bool:
    """Whether input and output narrow together, as those of a depthwise convolution."""
    return bool(layer.in_groups) and set(layer.in_groups) == set(layer.out_groups)


def _channels(layer: Layer, end: End) -> int:
    return layer.in_channels if end == "in" else layer.out_channels
