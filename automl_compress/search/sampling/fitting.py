"""Plans that the cost model finds within the budget, from the table alone: its optimum, and what is left in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from automl_compress.core.budget import Budget, Cost
from automl_compress.core.plan import Plan
from automl_compress.search.sampling.trials import BASE
from automl_compress.search.solvers.program import Decoder, Unsolved
from automl_compress.search.solvers.quick import QuickDecoder
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.losses import sparsity_everywhere
from automl_compress.search.table.table import QualityKey, Solution

Predict = Callable[[Plan], Cost]
_ROUNDS = 8
_ROOM = 0.01
_LAST = 20
_LOOSE = 1.3


class Fitting:
    """Decodes and predicts in turns until the budget is met, by one space and table."""

    def __init__(self, space: SearchSpace, decoder: Decoder, budget: Budget, predict: Predict) -> None:
        self._space, self._graph, self._table = space, decoder.graph, decoder.table
        self._budget, self._predict = budget, predict
        self._exact = {decoder.width: decoder}
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

        For when candidates are used up: it asks the exact solver. `tried` are plans by their key.
        """
        excluded = list(tried.values())
        nearest: tuple[float, Plan] | None = None
        for width in self._widths:
            decoder = self._exact.setdefault(width, Decoder(self._space, self._graph, self._table, width=width))
            for plan in self._in_order(decoder, excluded):
                worst = max(self._budget.constraints(self._predict(plan)).values())
                if worst <= 0 and self._space.plan_key(plan) not in tried:
                    return plan
                if nearest is None or worst < nearest[0]:
                    nearest = (worst, plan)
        return nearest[1] if nearest else None

    def _in_order(self, decoder: Decoder, excluded: list[Plan]) -> Iterator[Plan]:
        """Plans by the table's loss, exactly: first for limits that are moved by what was predicted, then, as long as
        there are some, for limits that leave out nothing that could fit."""
        limits = {BASE[m]: limit for m, limit in self._budget.limits.items()}
        loose = {metric: limit * _LOOSE for metric, limit in limits.items()}
        for attempt in range(_LAST):
            try:
                found = decoder.solve(self._table.quality, limits, exclude=excluded, gap=1e-3)
            except Unsolved:
                return
            if found is None and limits is loose:
                return
            if found is None:
                limits = loose
                continue
            excluded.append(found.plan)
            yield found.plan
            moved = _moved(limits, found, self._budget.constraints(self._predict(found.plan)))
            limits = loose if limits is loose or attempt >= _ROUNDS else moved


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
