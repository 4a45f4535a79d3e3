"""Channel indices as values: which indices of which tensors are the same channel.

Every index of every dimension of every parameter gets a number. Operators tie numbers together (a residual addition
makes channel 3 of both sides one channel); what remains apart can be removed apart. An operator that is not understood
freezes the numbers that flow into it.

A reshape that splits a dimension makes a grid: of 6 heads of 32 channels, index 40 belongs to head 1 and to column 8,
and goes when either of them goes. Such a number is *composite*: it stands for the set of its atoms. A head is then one
atom with 32 places, a column one with 6, and they are two ways of making the same layer narrower. Groups of
convolutions and of group norm, split q/k/v projections, and channel shuffles are grids as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

Ids = np.ndarray  # int64 [size of the dimension]
Labels = tuple[Ids | None, ...]  # one entry a dimension; None: nothing along this dimension can be removed


class Channels:
    """A union-find over channel numbers, in which a class may stand for several others, with reasons to stay whole."""

    def __init__(self) -> None:
        self._parent = np.arange(1024, dtype=np.int64)
        self._count = 0
        self._parts: dict[int, tuple[int, ...]] = {}  # a composite class -> the numbers it stands for, outermost first
        self._composites: dict[tuple[int, ...], int] = {}
        self._frozen: dict[int, str] = {}
        self._axes: dict[int, frozenset[int]] = {}  # an atom -> the splits that it is an index of
        self._pinned: int | None = None

    def fresh(self, count: int) -> Ids:
        """`count` new channels that are tied to nothing."""
        while self._count + count > len(self._parent):
            grown = np.arange(2 * len(self._parent), dtype=np.int64)
            grown[: len(self._parent)] = self._parent
            self._parent = grown
        ids: Ids = np.arange(self._count, self._count + count)
        self._count += count
        return ids

    def fresh_axis(self, count: int) -> Ids:
        """`count` new channels that are one way to index something; they are never confused with another such way."""
        ids = self.fresh(count)
        if not count:
            return ids
        self._axes.update(dict.fromkeys(ids.tolist(), frozenset([int(ids[0])])))
        return ids

    def pinned(self, count: int) -> Ids:
        """Labels for `count` indices that must stay beside others that need not."""
        if self._pinned is None:
            self._pinned = int(self.fresh(1)[0])
            self._frozen[self._pinned] = "it holds no channels"
        return np.full(count, self._pinned)

    def axes(self, atom: int) -> frozenset[int]:
        """Which splits a class is an index of; classes of one group agree in this."""
        return self._axes.get(self._find(atom), frozenset())

    def root(self, ids: Ids) -> Ids:
        """The representative of each channel's class."""
        roots: Ids = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[ids] = roots
        return roots

    def tie(self, left: Ids, right: Ids) -> None:
        """Make left[i] and right[i] the same channel, for every i."""
        one, other = self.root(left), self.root(right)
        apart = one != other
        # Pair by pair: one vectorised pass would lose unions where a root appears twice (a flattened channel).
        for pair in dict.fromkeys(zip(one[apart].tolist(), other[apart].tolist(), strict=True)):
            self._tie(*pair)

    def freeze(self, ids: Ids | None, reason: str) -> None:
        """These channels must stay, whatever else is tied to them. The first reason is kept."""
        if ids is not None:
            for root in np.unique(self.root(ids)).tolist():
                for atom in self._all_atoms(root):
                    self._frozen.setdefault(atom, reason)

    def frozen(self, channel: int) -> str | None:
        """Why a channel must stay, or None if it, or one of its atoms, may go."""
        atoms = list(self._all_atoms(self._find(channel)))
        reasons = [self._frozen.get(atom) for atom in atoms]
        return reasons[0] if all(reasons) else None

    def atoms(self, channel: int) -> tuple[int, ...]:
        """What a number stands for: the removable atoms of which any takes it along, outermost first."""
        found = dict.fromkeys(self._all_atoms(self._find(channel)))
        return tuple(atom for atom in found if atom not in self._frozen)

    def sets(self, ids: Ids) -> list[tuple[int, ...]]:
        """The atoms of each channel."""
        roots = self.root(ids)
        known = {root: self.atoms(root) for root in np.unique(roots).tolist()}
        return [known[root] for root in roots.tolist()]

    def merge(self, labels: Sequence[Ids | None], sizes: Sequence[int]) -> Ids | None:
        """Labels of several dimensions that become one, row by row."""
        tracked = [axis for axis, ids in enumerate(labels) if ids is not None and sizes[axis] > 1]
        if not tracked:
            return None
        columns = [
            np.broadcast_to(
                np.asarray(labels[axis]).reshape([-1 if a == axis else 1 for a in range(len(sizes))]), sizes
            ).ravel()
            for axis in tracked
        ]
        if len(columns) == 1:
            return columns[0]
        rows = zip(*(self.root(column).tolist() for column in columns), strict=True)
        return np.array([self._composite(row) for row in rows], dtype=np.int64)

    def split(self, ids: Ids | None, sizes: Sequence[int]) -> list[Ids | None]:
        """Labels of the dimensions that one dimension is split into; what it was becomes their grid."""
        wide = [axis for axis, size in enumerate(sizes) if size > 1]
        if ids is None or not wide:
            return [None] * len(sizes)
        if len(wide) == 1:
            return [ids if axis == wide[0] else None for axis in range(len(sizes))]
        grid = self._grid(ids, sizes)
        if grid is None:
            self._refine(ids, sizes)
            grid = self._grid(ids, sizes)
        if grid is None:
            self.freeze(ids, "its indices don't form a grid")
            return [None] * len(sizes)
        return grid

    def _grid(self, ids: Ids, sizes: Sequence[int]) -> list[Ids | None] | None:
        """Labels a[i], b[j], ... such that each number stands for what its coordinates stand for; None if there are
        none."""
        sets = self.sets(ids)
        if not any(sets):
            return [None] * len(sizes)
        if all(len(atoms) == 1 for atoms in sets) and len(set(sets)) == len(sets):
            return None
        order = np.arange(len(sets)).reshape(sizes)
        common = set(sets[0]).intersection(*sets)
        if common:  # with these the whole dimension would go
            self.freeze(np.array(sorted(common)), "all of a dimension would go with it")
            sets = self.sets(ids)
        table: list[list[tuple[int, ...]]] = []
        for axis, size in enumerate(sizes):
            column = []
            for index in range(size):
                members = np.take(order, index, axis=axis).ravel().tolist()
                shared = set(sets[members[0]]).intersection(*(sets[m] for m in members[1:]))
                column.append(tuple(atom for atom in sets[members[0]] if atom in shared))
            table.append(column)
        for number, coordinates in enumerate(np.ndindex(*sizes)):
            told = {atom for axis, index in enumerate(coordinates) for atom in table[axis][index]}
            if told != set(sets[number]):
                return None
        return [self._labels(column) if any(column) else None for column in table]

    def _labels(self, column: Sequence[tuple[int, ...]]) -> Ids:
        return np.array(
            [self._composite(atoms) if atoms else int(self.pinned(1)[0]) for atoms in column], dtype=np.int64
        )

    def _refine(self, ids: Ids, sizes: Sequence[int]) -> None:
        """Make the numbers a grid of `sizes`: by new axes, by splitting the axes of the grid that they are, or, where
        neither fits, by making them equal along the shortest dimension, which then stays whole."""
        sets = self.sets(ids)
        if all(len(atoms) == 1 for atoms in sets) and len(set(sets)) == len(sets):
            merged = self.merge([self.fresh_axis(size) if size > 1 else None for size in sizes], sizes)
            assert merged is not None
            self.tie(ids, merged)
            return
        finer = self._common_refinement(ids, sizes)
        if finer is not None:
            existing, parts = finer
            for axis, pieces in zip(self._grid(ids, existing) or [], parts, strict=False):
                if axis is not None and len(pieces) > 1:
                    self.split(axis, pieces)
            if self._grid(ids, sizes) is not None:
                return
        table = ids.reshape(sizes)
        shortest = min((axis for axis, size in enumerate(sizes) if size > 1), key=lambda axis: sizes[axis])
        first = np.take(table, 0, axis=shortest)
        for index in range(1, sizes[shortest]):
            self.tie(first.ravel(), np.take(table, index, axis=shortest).ravel())
        rest = [size for axis, size in enumerate(sizes) if axis != shortest]
        self.split(first.ravel(), rest)

    def _common_refinement(self, ids: Ids, sizes: Sequence[int]) -> tuple[list[int], list[list[int]]] | None:
        """The grid that the numbers are already, and how each of its axes divides for `sizes` to be made of them."""
        count = len(ids)
        inner = [s for s in range(2, count) if count % s == 0 and self._grid(ids, (count // s, s)) is not None]
        if not inner:
            return None
        wanted = [math.prod(sizes[axis:]) for axis in range(1, len(sizes))]
        for chosen in (inner, inner[:1], inner[-1:]):
            cuts = sorted({*chosen, *wanted, 1, count} - {0})
            if any(b % a for a, b in pairwise(cuts)):
                continue
            edges = [count, *sorted(chosen, reverse=True), 1]
            existing = [a // b for a, b in pairwise(edges)]
            parts = []
            for outer, lower in pairwise(edges):
                between = [c for c in reversed(cuts) if lower <= c <= outer]
                parts.append([a // b for a, b in pairwise(between)])
            return existing, parts
        return None

    def _composite(self, parts: tuple[int, ...]) -> int:
        if len(parts) == 1:
            return parts[0]
        known = self._composites.get(parts)
        if known is None:
            known = self._composites[parts] = int(self.fresh(1)[0])
            self._parts[known] = parts
        return known

    def _all_atoms(self, root: int) -> Iterator[int]:
        parts = self._parts.get(root)
        if parts is None:
            yield root
        else:
            for part in parts:
                yield from self._all_atoms(self._find(part))

    def _tie(self, left: int, right: int) -> None:
        a, b = self._find(left), self._find(right)
        if a == b:
            return
        if a in self._parts and b in self._parts:
            self._tie_composites(a, b)
        elif a in self._parts:
            self._substitute(b, a)
        elif b in self._parts:
            self._substitute(a, b)
        else:
            low, high = min(a, b), max(a, b)
            self._parent[high] = low
            reason = self._frozen.pop(high, None)
            if reason is not None:
                self._frozen.setdefault(low, reason)
            axes = self._axes.pop(high, frozenset()) | self._axes.get(low, frozenset())
            if axes:
                self._axes[low] = axes

    def _substitute(self, atom: int, composite: int) -> None:
        """The atom goes exactly when one of the composite's atoms goes, so it is that composite."""
        atoms = dict.fromkeys(self._all_atoms(composite))
        if atom in atoms:
            for other in atoms:
                if other != atom:
                    self._frozen.setdefault(other, "it is tied to a part of itself")
            return
        reason = self._frozen.pop(atom, None)
        self._axes.pop(atom, None)
        self._parent[atom] = composite
        if reason is not None:
            for other in atoms:
                self._frozen.setdefault(other, reason)

    def _tie_composites(self, a: int, b: int) -> None:
        """Both sides must go together: equal atoms, or atoms tied in order, or, where neither works, none may go."""
        one, other = dict.fromkeys(self._all_atoms(a)), dict.fromkeys(self._all_atoms(b))
        left, right = [x for x in one if x not in other], [x for x in other if x not in one]
        left, right = ([x for x in side if x not in self._frozen] for side in (left, right))
        if len(left) == 1 and len(right) > 1:
            self._substitute(left[0], self._composite(tuple(right)))
        elif len(right) == 1 and len(left) > 1:
            self._substitute(right[0], self._composite(tuple(left)))
        elif len(left) == len(right):
            for x, y in zip(left, right, strict=True):
                self._tie(x, y)
        else:
            for atom in (*left, *right):
                self._frozen.setdefault(atom, "it meets another arrangement of channels")

    def _find(self, channel: int) -> int:
        while self._parent[channel] != channel:
            self._parent[channel] = self._parent[self._parent[channel]]
            channel = int(self._parent[channel])
        return channel
