"""Plans that may be worth trying: decoded ones, and neighbours of the best, all within limits by the table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from automl_compress.search.solvers.quick import QuickDecoder
from automl_compress.search.table.states import Floats, States

_LARGE = 400  # single changes above which less is tried
_PAIRED = 48
_AROUND, _AROUND_LARGE = 60, 20
_ROUNDS, _ROUNDS_LARGE = 8, 3


@dataclass(frozen=True)
class Aim:
    """What is decoded: losses of all keys as rows, and limits over `ADDITIVE` as rows."""

    values: Floats
    limits: Floats


class Proposals:
    """Makes plans of one student width."""

    def __init__(self, decoder: QuickDecoder) -> None:
        self.decoder = decoder
        self.large = decoder.neighbours.count > _LARGE

    def decoded(self, aim: Aim, around: Floats | None) -> tuple[States, Floats]:
        """The best plan for each row for which there is one, and the prices by which they were found; `around` are
        prices of a similar problem, one for each metric."""
        decoder = self.decoder
        losses = decoder.arrays.losses_of(aim.values)
        near = None if around is None else np.tile(around, (len(aim.values), 1))
        found = decoder.descent.solve(losses, aim.limits, near)
        some = np.flatnonzero(found.ok)
        if not len(some):
            return found.states.take(some), found.prices[some]
        rounds = _ROUNDS_LARGE if self.large else _ROUNDS
        states = decoder.neighbours.improve(
            found.states.take(some),
            losses.take(some),
            aim.limits[some],
            found.prices[some],
            rounds=rounds,
            paired=_PAIRED,
        )
        return states, found.prices[some]

    def nearby(self, states: States, values: Floats, limits: Floats, prices: Floats) -> States:
        """Plans one or two changes away from each row, the best by one row of losses, within limits."""
        count = _AROUND_LARGE if self.large else _AROUND
        losses = self.decoder.arrays.losses_of(np.tile(values, (len(states), 1)))
        rows = (np.tile(limits, (len(states), 1)), np.tile(prices, (len(states), 1)))
        return self.decoder.neighbours.around(states, losses, *rows, paired=_PAIRED, count=count)
