"""Plans that the cost model finds within the budget, from the table alone: its optimum, and what is left in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np

from automl_compress.core.budget import Budget, Cost
from automl_compress.core.plan import Plan
from automl_compress.search.sampling.trials import BASE
from automl_compress.search.solvers.listing import cheapest_first
from automl_compress.search.solvers.program import Decoder
from automl_compress.search.solvers.quick import QuickDecoder
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.arrays import TableArrays
from automl_compress.search.table.losses import sparsity_everywhere
from automl_compress.search.table.states import Floats, States
from automl_compress.search.table.table import ADDITIVE, QualityKey, Solution

Predict = Callable[[Plan], Cost]
_ROUNDS = 8
_ROOM = 0.01
_LAST = 20


class Fitting:
    """Decodes and predicts in turns until the budget is met, by one space and table."""

    def __init__(self, space: SearchSpace, decoder: Decoder, budget: Budget, predict: Predict) -> None:
        self._space, self._graph, self._table = space, decoder.graph, decoder.table
        self._budget, self._predict = budget, predict
        self._widths = [float(w) for w in space.options("width")] or [1.0]
        needed = self._widths[:1] if sparsity_everywhere(space) else self._widths
        # One for each student width that is needed: the full one where sparsity covers the range.
        self.decoders = [QuickDecoder(space, self._graph, self._table, width=width) for width in needed]

    def table_optimum(self) -> Plan | None:
        """The best plan by the table for the loosest limits whose plan is predicted to meet the budget; where there is
        none, the one that comes nearest."""
        limits = {BASE[m]: limit for m, limit in self._budget.limits.items()}
        found = [f for d in self.decoders if (f := self._fitted(d, self._table.quality, limits)) is not None]
        return min(found, key=lambda f: (f[0], f[1]))[2] if found else None

    def _fitted(
        self, decoder: QuickDecoder, quality: Mapping[QualityKey, float], limits: Mapping[str, float]
    ) -> tuple[float, float, Plan] | None:
        """(by how much it exceeds the budget, its loss, the plan): the best plan for the loosest limits whose plan is
        predicted to meet the budget; where there is none, the one that comes nearest."""
        best: tuple[float, float, Plan] | None = None
        for _ in range(_ROUNDS):
            found = decoder.solve(quality, limits)
            if found is None:
                break
            excess = self._budget.constraints(self._predict(found.plan))
            worst = max(excess.values())
            this = (max(worst, 0.0), found.loss, found.plan)
            if best is None or this[:2] < best[:2]:
                best = this
            if -_ROOM <= worst <= 0 or (worst <= 0 and found.loss == 0):
                break
            limits = _moved(limits, found, excess)
        return best

    def nearest(self, plan: Plan) -> Plan:
        """The plan itself if it is predicted to meet the budget; else one that does and differs in as little as is
        found, in terms of what the table says the differences lose; else the one that comes nearest to the budget."""
        excess = self._budget.constraints(self._predict(plan))
        if max(excess.values()) <= 0:
            return plan
        quality = self._towards(plan)
        decoder = next((d for d in self.decoders if d.arrays.width == plan.width), self.decoders[0])
        over = {BASE[m]: 1.0 + value for m, value in excess.items()}
        cost = self._table.plan_cost(self._graph, plan)
        limits = {metric: cost.of(metric) / ratio for metric, ratio in over.items()}
        found = self._fitted(decoder, quality, limits)
        if found is None or found[0] > 0:
            return self.table_optimum() or plan
        return found[2]

    def _towards(self, plan: Plan) -> dict[QualityKey, float]:
        """Losses that are lowest for a plan: what differs from it costs what the table says it changes, and at least
        something."""
        params = self._space.params(plan)
        known = [loss for loss in self._table.quality.values() if loss > 0]
        least = 0.1 * sum(known) / len(known) if known else 1.0
        quality = {}
        for decision in self._space.decisions:
            own = self._table.quality.get((decision.name, params[decision.name]), 0.0)
            for option in decision.options:
                change = abs(self._table.quality.get((decision.name, option), 0.0) - own)
                quality[decision.name, option] = 0.0 if option == params[decision.name] else change + least
        return quality

    def best_of_the_rest(self, tried: Mapping[str, Plan]) -> Plan | None:
        """A plan within the budget that wasn't tried, the best first by the table; where none is found, the nearest.

        For when candidates are used up or too dear: of all plans of a small space, else of the cheapest, it asks for
        those that should fit, as the table is off as far as for the dearest that was asked for. `tried` are plans by
        their key.
        """
        left, losses, costs = self._listed
        waiting = np.ones(len(left), dtype=bool)
        ratios = np.ones(costs.shape[1])
        nearest: tuple[float, Plan] | None = None
        asked = 0
        while asked < _LAST and waiting.any():
            shares = (costs * ratios).max(axis=1)
            fits = waiting & (shares <= 1.0)
            order = np.where(fits, losses, np.inf) if fits.any() else np.where(waiting, shares, np.inf)
            best = int(order.argmin())
            waiting[best] = False
            arrays, states, row = left[best]
            plan = arrays.plan(states, row)
            if self._space.plan_key(plan) in tried:
                continue
            asked += 1
            excess = self._budget.constraints(self._predict(plan))
            worst = max(excess.values())
            if worst <= 0:
                return plan
            if nearest is None or worst < nearest[0]:
                nearest = (worst, plan)
            found = [(1.0 + over) / costs[best, m] for m, over in enumerate(excess.values())]
            ratios = np.maximum(ratios, found)
        return nearest[1] if nearest else None

    @cached_property
    def _listed(self) -> tuple[list[tuple[TableArrays, States, int]], Floats, Floats]:
        """(arrays, rows and number of each plan; its loss; its costs by the table over each limit), from cheap to
        dear at each student width."""
        limits = list(self._budget.limits.items())
        places, losses, costs = list[tuple[TableArrays, States, int]](), list[Floats](), list[Floats]()
        for width in self._widths:
            known = next((d for d in self.decoders if d.arrays.width == width), None)
            decoder = known or QuickDecoder(self._space, self._graph, self._table, width=width)
            arrays = decoder.arrays
            states, _ = cheapest_first(decoder, decoder.limits({BASE[metric]: limit for metric, limit in limits}))
            values = np.tile(decoder.values(self._table.quality), (len(states), 1))
            loss, cost = arrays.total(states, arrays.losses_of(values))
            places += [(arrays, states, row) for row in range(len(states))]
            losses.append(loss)
            costs.append(np.stack([cost[:, ADDITIVE.index(BASE[metric])] / limit for metric, limit in limits], axis=1))
        return places, np.concatenate(losses), np.maximum(np.concatenate(costs), 1e-12)


def _moved(limits: Mapping[str, float], found: Solution, excess: Mapping[str, float]) -> dict[str, float]:
    """The next additive limits: where a metric is exceeded, or has room, the table's figure over the prediction's."""
    moved = dict(limits)
    for metric, over in excess.items():
        target = BASE[metric]
        aimed = found.cost.of(target) / (1.0 + over)
        if over > 0:
            moved[target] = min(moved[target], aimed * (1 - 1e-3))
        elif max(excess.values()) <= 0 and over < -_ROOM:
            moved[target] = max(limits[target], aimed)
    return moved
