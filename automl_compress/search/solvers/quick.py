"""Decoding in milliseconds: the same question as `decode.Decoder` answers exactly, without a proof.

A few problems are solved together: the table as it is, and the table with its losses changed at random, whose answers
are then improved by the table as it is. The changes lead out of the corners in which coordinate descent ends; the
fewer decisions there are, the more of them are made. They come from a fixed seed: the answer depends on the question
alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from automl_compress.core.graph import Graph
from automl_compress.search.solvers.lagrange import Descent
from automl_compress.search.solvers.moves import Neighbours
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.arrays import TableArrays
from automl_compress.search.table.losses import estimated_loss
from automl_compress.search.table.states import Floats, States
from automl_compress.search.table.table import ADDITIVE, AdditiveTable, QualityKey, Solution

_STARTS = ((150, 16), (400, 6))
_FEWEST = 3
_SPREADS = (0.5, 1.0)  # of the logarithms of the losses, in turn
_ROUNDS = 4  # where widths are priced roughly, limits are tightened by what was exceeded, so often


class QuickDecoder:
    """Decodes one space, table and student width (by default the widest). Made once, for many losses and limits."""

    def __init__(self, space: SearchSpace, graph: Graph, table: AdditiveTable, *, width: float | None = None) -> None:
        widest = float((space.options("width") or (1.0,))[0])
        self.arrays = TableArrays(space, graph, table, widest if width is None else width)
        self.descent = Descent(self.arrays)
        self.neighbours = Neighbours(self.arrays)
        self.starts = next((starts for most, starts in _STARTS if self.neighbours.count <= most), _FEWEST)
        spread = np.resize(_SPREADS, self.starts)
        spread[0] = 0.0
        noise = np.random.default_rng(0).normal(size=(self.starts, len(self.arrays.keys) + 1))
        self._factors: Floats = np.exp(spread[:, None] * noise)

    def solve(self, quality: Mapping[QualityKey, float], limits: Mapping[str, float]) -> Solution | None:
        """The best plan that was found within `limits` ('latency' in microseconds, 'size' in bytes; others don't add up
        and are left out), with a gap of infinity; None where none was found, which proves nothing."""
        values = self.values(quality)
        wanted = self.limits(limits)
        aims = wanted.copy()
        for _ in range(1 if self.arrays.exact else _ROUNDS):
            found = self.best(values, aims)
            if found is None:
                return None
            plan = self.arrays.plan(found)
            cost = self.arrays.table.plan_cost(self.arrays.graph, plan)
            ratios = np.array([cost.of(m) for m in ADDITIVE]) / wanted
            if (ratios <= 1 + 1e-9).all():
                # With the loss by the student's width, which the arrays of one width don't have.
                loss = estimated_loss(self.arrays.space, self.arrays.table, plan, quality)
                return Solution(plan=plan, loss=loss, cost=cost, gap=float("inf"))
            aims = np.where(ratios > 1, aims / ratios * (1 - 1e-6), aims)
        return None

    def best(self, values: Floats, limits: Floats) -> States | None:
        """One row: the best that was found for losses in the order of `arrays.keys` within limits over `ADDITIVE`."""
        arrays = self.arrays
        rows = np.tile(limits, (self.starts, 1))
        found = self.descent.solve(arrays.losses_of(values * self._factors), rows)
        if not found.ok.any():
            return None
        some = np.flatnonzero(found.ok)
        losses = arrays.losses_of(np.tile(values, (len(some), 1)))
        states = self.neighbours.improve(found.states.take(some), losses, rows[some], found.prices[some])
        loss, cost = arrays.total(states, losses)
        # Equal losses are decided for what is cheaper.
        share = cost / np.where(np.isfinite(limits), limits, self.descent.scale)
        order = np.lexsort((share.sum(axis=1), np.round(loss, 9)))
        return states.take(order[:1])

    def values(self, quality: Mapping[QualityKey, float]) -> Floats:
        """The losses in the order of `arrays.keys`, and a zero."""
        return np.array([*(quality.get(key, 0.0) for key in self.arrays.keys), 0.0])

    def limits(self, limits: Mapping[str, float]) -> Floats:
        """Limits in the order of `ADDITIVE`; infinity where there is none."""
        return np.array([limits.get(metric, np.inf) for metric in ADDITIVE])
