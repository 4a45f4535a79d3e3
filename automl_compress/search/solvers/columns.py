"""The options of a space as the columns of a matrix, the same for every student width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from automl_compress.search.solvers.quick import QuickDecoder
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.states import Bools, Floats, Ints, States
from automl_compress.search.table.table import QualityKey


class Columns:
    """Column -> option, sorted by decision; masks are left out, because nothing that is decoded depends on them.

    decision   number of the decision that each column belongs to, ascending
    kind       number of the kind of that decision
    neutral    whether the option changes nothing
    """

    def __init__(self, space: SearchSpace, decoders: Sequence[QuickDecoder]) -> None:
        kinds = ("sparsity", "drop", "bits", "width") if len(decoders) > 1 else ("sparsity", "drop", "bits")
        decisions = [d for d in space.decisions if d.kind in kinds]
        self.keys: list[QualityKey] = [(d.name, option) for d in decisions for option in d.options]
        self.decision: Floats = np.repeat(np.arange(len(decisions), dtype=float), [len(d.options) for d in decisions])
        self.kind: Ints = np.array([kinds.index(d.kind) for d in decisions for _ in d.options], dtype=np.int64)
        self.neutral: Bools = np.array([option == d.neutral for d in decisions for option in d.options], dtype=bool)
        index = {key: column for column, key in enumerate(self.keys)}
        self._units = _units(space, [d.name for d in decisions])
        self._column: list[Ints] = []
        self._own: list[Ints] = []
        self._width: list[int | None] = []
        for decoder in decoders:
            keys = decoder.arrays.keys
            self._own.append(np.array([i for i, key in enumerate(keys) if key in index], dtype=np.int64))
            self._column.append(np.array([index[key] for key in keys if key in index], dtype=np.int64))
            self._width.append(index.get(("width", decoder.arrays.width)))
        self._sizes = [len(decoder.arrays.keys) for decoder in decoders]

    def losses(self, quality: Mapping[QualityKey, float]) -> Floats:
        """A table's losses, column by column."""
        return np.array([quality.get(key, 0.0) for key in self.keys])

    def features(self, decoder: QuickDecoder, number: int, states: States) -> Floats:
        """(row, column) -> 1 where the option is in force; `decoder` is the one with this number."""
        result = np.zeros((len(states), len(self.keys)))
        result[:, self._column[number]] = decoder.arrays.features(states)[:, self._own[number]]
        if self._width[number] is not None:
            result[:, self._width[number]] = 1.0
        return result

    def values(self, number: int, losses: Floats) -> Floats:
        """Rows of losses in the order that the decoder of that number expects."""
        result = np.zeros((len(losses), self._sizes[number] + 1))
        result[:, self._own[number]] = losses[:, self._column[number]]
        return result

    def child(self, one: Floats, other: Floats, rng: np.random.Generator, mutations: float) -> Floats:
        """What is in force in a mixture of two plans: each removable block, with all that is decided inside of it,
        comes from one of them, and so does each other decision. About `mutations` decisions are drawn anew."""
        pick = rng.random(int(self._units.max(initial=0)) + 1) < 0.5
        result = np.where(pick[self._units[self.decision.astype(np.int64)]], one, other)
        count = int(self.decision.max(initial=-1)) + 1
        for decision in np.flatnonzero(rng.random(count) < mutations / max(1, count)):
            columns = np.flatnonzero(self.decision == decision)
            result[columns] = 0.0
            result[columns[int(rng.integers(len(columns)))]] = 1.0
        return result


def _units(space: SearchSpace, names: Sequence[str]) -> Ints:
    """Decision -> number of what it belongs to: the outermost removable block around it, or itself."""
    graph = space.graph
    outermost: dict[str, str] = {}
    for block in sorted(graph.blocks, key=lambda b: -len(b.layers)):
        for layer in block.layers:
            outermost.setdefault(layer, block.name)
    numbers: dict[str, int] = {}
    result = []
    for name in names:
        kind, _, target = name.partition(".")
        if kind == "sparsity":
            group = graph.group[target]
            around = {outermost.get(layer) for layer in (*group.producers, *group.consumers)}
        elif kind == "drop":
            around = {outermost.get(layer) for layer in graph.block[target].layers}
        else:
            around = {outermost.get(target)}
        inside = around.pop() if len(around) == 1 else None
        result.append(numbers.setdefault(name if inside is None else f"block {inside}", len(numbers)))
    return np.array(result, dtype=np.int64)
