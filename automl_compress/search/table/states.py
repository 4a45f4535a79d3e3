"""Plans as rows of integers, and what their choices lose as rows of numbers: what `arrays` computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
NEVER = 1e30  # the loss of what isn't offered


@dataclass(frozen=True)
class States:
    """Plans as rows: the position of each knob, the index of each layer's bits, and which blocks are removed.

    What is said of parts that are gone doesn't count, but is kept: it is what they would be if they came back.
    """

    position: Ints
    bits: Ints
    drop: Bools

    def __len__(self) -> int:
        return len(self.position)

    def take(self, rows: Ints | Sequence[int]) -> States:
        return States(self.position[rows], self.bits[rows], self.drop[rows])

    @staticmethod
    def stack(parts: Sequence[States]) -> States:
        return States(
            np.concatenate([part.position for part in parts]),
            np.concatenate([part.bits for part in parts]),
            np.concatenate([part.drop for part in parts]),
        )

    @staticmethod
    def where(condition: Bools, one: States, other: States) -> States:
        """Row by row `one` where the condition holds, else `other`."""
        rows = condition[:, None]
        return States(
            np.where(rows, one.position, other.position),
            np.where(rows, one.bits, other.bits),
            np.where(rows, one.drop, other.drop),
        )


@dataclass(frozen=True)
class Losses:
    """What the choices lose, for each row: of `knobs` (all positions one after another), of `bits` (layer, index) and
    of removed blocks."""

    knobs: Floats
    bits: Floats
    drop: Floats

    def take(self, rows: Ints | Sequence[int]) -> Losses:
        return Losses(self.knobs[rows], self.bits[rows], self.drop[rows])


def upward(widths: Sequence[int], full: int) -> Ints:
    """Width -> index of the smallest of `widths` that isn't below it."""
    return np.minimum(np.searchsorted(widths, np.arange(full + 1)), len(widths) - 1).astype(np.int64)


def joined(maps: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Arrays one after another, and where each begins."""
    sizes = np.array([len(part) for part in maps], dtype=np.int64)
    return np.concatenate(maps), (np.cumsum(sizes) - sizes).astype(np.int64)


def padded(rows: Sequence[Sequence[int]], fill: int, width: int) -> Ints:
    """Rows of different lengths as one array."""
    result = np.full((len(rows), width), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return result
