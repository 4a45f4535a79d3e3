"""The parts of an integer program with 0/1 variables: columns, sparse rows, and a layer's sides as axes of choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from automl_compress.core.graph import End

Vector = NDArray[np.float64]
_GRID = 32


@dataclass(frozen=True, kw_only=True)
class Side:
    """A layer's input, output, or both at once: the groups on it and the widths it may take, one number per end."""

    groups: tuple[str, ...]
    ends: tuple[End, ...]
    widths: tuple[tuple[int, ...], ...]


class Rows:
    """Collects columns and sparse rows `low <= row . x <= high`."""

    def __init__(self) -> None:
        self.count = 0
        self._rows: list[tuple[Mapping[int, float], float, float]] = []

    def column(self) -> int:
        self.count += 1
        return self.count - 1

    def add(self, row: Mapping[int, float], low: float, high: float) -> None:
        self._rows.append((row, low, high))

    def vector(self, values: Mapping[int, float]) -> Vector:
        result = np.zeros(self.count)
        result[list(values)] = list(values.values())
        return result

    def matrix(self) -> tuple[Any, Vector, Vector]:
        entries = [(i, column, value) for i, (row, _, _) in enumerate(self._rows) for column, value in row.items()]
        index, column, value = zip(*entries, strict=True)
        matrix = csr_matrix((value, (index, column)), shape=(len(self._rows), self.count))
        return matrix, np.array([low for _, low, _ in self._rows]), np.array([high for _, _, high in self._rows])


def thinned(points: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """At most `_GRID` of them, both ends included."""
    if len(points) <= _GRID:
        return points
    return [points[i] for i in np.linspace(0, len(points) - 1, _GRID).round().astype(int)]
