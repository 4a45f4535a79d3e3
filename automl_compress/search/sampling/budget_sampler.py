"""Our sampler: it proposes only plans that are predicted to meet the budget, and learns from finished trials.

A trial goes through four steps.

1. *Learn.* `surrogate.Surrogate` is fitted to what finished trials lost, `trials.Pricing` to what plans were predicted
   to cost beside the table. Trials that broke count as if they had lost as much as the worst.
2. *Make candidates.* The decoder answers for losses that were drawn from what is still possible (Thompson sampling),
   for the most likely ones, and for losses that draw it to a mixture of two of the best plans; neighbours of these and
   of the best plans are added, all within the budget by the table.
3. *Choose* the one with the largest expected improvement of those that were not tried and are expected to fit.
4. *Ask* the cost model. If the plan is too dear, that is learned, and the next one is chosen with more caution.

The first trial is the table's optimum. It follows SPDY (Frantar and Alistarh, 2022), which searches the coefficients of
a layer-wise knapsack, and Bayesian optimisation over discrete structures, where candidates come from a local search.
Everything that it knows comes from the study's trials, the seed and the trial's number: a resumed study and further
workers on the same storage need nothing else. What plans cost is asked anew each time, so that a plan that was refused
as too dear is proposed again once predictions were corrected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from automl_compress.core.budget import Budget
from automl_compress.core.plan import Plan
from automl_compress.search.sampling.fitting import Fitting, Predict
from automl_compress.search.sampling.proposals import Aim, Proposals
from automl_compress.search.sampling.surrogate import Options, Surrogate
from automl_compress.search.sampling.trials import BASE, Known, Pricing, drawn_alone, known_trials, log_ratios
from automl_compress.search.solvers.columns import Columns
from automl_compress.search.solvers.program import Decoder
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.states import Floats, States
from automl_compress.search.table.table import ADDITIVE

_ELITES = 6
_ENOUGH = 4  # evaluated plans from which the surrogate counts
_ASKED = 10
_CAUTION = 0.3  # standard deviations of more room that are asked for after each plan that was too dear
_DRAWN, _DRAWN_LARGE = 4, 2
_CHILDREN, _CHILDREN_LARGE = 3, 1
_MUTATIONS = 2.0


@dataclass
class _Pool:
    """Candidates of all student widths: the decoder's number and row of each, what is in force, and what they cost."""

    parts: list[tuple[int, States]]
    features: Floats
    costs: Floats

    def plan(self, proposals: Sequence[Proposals], index: int) -> Plan:
        for number, states in self.parts:
            if index < len(states):
                return proposals[number].decoder.arrays.plan(states, index)
            index -= len(states)
        raise IndexError(index)


class BudgetSampler(BaseSampler):
    """Proposes plans whose predicted cost meets `limits`, never one that the study already tried while others are left.

    decoder  of the same space; its table's `quality` is what the search starts from
    limits   a budget, or metric -> microseconds or bytes
    predict  the cost model; called a few times for each proposal
    original the value that the untouched plan would have, where it is known: losses of options then add up to losses
             of plans, and not only to differences
    seed     with the trial's number it decides all randomness

    Where no plan that meets the budget is found, the one that comes nearest is proposed.
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        decoder: Decoder,
        limits: Budget | Mapping[str, float],
        predict: Predict,
        original: float | None = None,
        seed: int = 0,
    ) -> None:
        self._space, self._graph, self._table = space, decoder.graph, decoder.table
        self._budget = limits if isinstance(limits, Budget) else Budget(limits=dict(limits))
        self._predict, self._original, self._seed = predict, original, seed
        self._fitting = Fitting(space, decoder, self._budget, predict)
        self._plans: dict[int, tuple[Plan, str]] = {}
        self._rows: dict[tuple[int, int], tuple[Floats, dict[str, float], bytes | None]] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All decisions of the space."""
        return dict(self._space.distributions())

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A plan within the budget, as parameters."""
        self._raise_error_if_multi_objective(study)
        others = {
            n: self.sample_independent(study, trial, n, d)
            for n, d in search_space.items()
            if n not in self._space.decision
        }
        if not search_space or len(others) == len(search_space):
            return others
        rng = np.random.default_rng([self._seed, trial.number])
        known = known_trials(study, self._space, self._plans, trial.number, self._original, self._over)
        settled = {k.key: k.plan for k in known if k.settled}
        tried = set(settled)
        plan = self._fitting.table_optimum() if not known else self._promising(known, tried, rng)
        if plan is None or self._space.plan_key(plan) in tried:
            plan = self._fitting.best_of_the_rest(settled) or plan or self._space.plan({})
        return {**others, **self._space.params(plan)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The option that changes least; for a parameter that isn't of the space, any with equal probability."""
        self._raise_error_if_multi_objective(study)
        if param_name in self._space.decision:
            return self._space.decision[param_name].neutral
        return drawn_alone(self._seed, study, trial, param_name, param_distribution)

    @cached_property
    def _proposals(self) -> list[Proposals]:
        return [Proposals(decoder) for decoder in self._fitting.decoders]

    @cached_property
    def _columns(self) -> Columns:
        return Columns(self._space, [p.decoder for p in self._proposals])

    @cached_property
    def _prior(self) -> Floats:
        return self._columns.losses(self._table.quality)

    @cached_property
    def _options(self) -> Options:
        return Options(self._prior, self._columns.decision, self._columns.kind, self._columns.neutral)

    @cached_property
    def _usual_prices(self) -> list[Floats | None]:
        """For each width, the prices at which the table as it is meets the budget, for a loss of one in all."""
        result: list[Floats | None] = []
        for number, proposals in enumerate(self._proposals):
            limits = {BASE[m]: limit for m, limit in self._budget.limits.items()}
            aim = Aim(self._columns.values(number, self._prior[None]), proposals.decoder.limits(limits)[None])
            states, prices = proposals.decoded(aim, None)
            result.append(prices[0] / max(float(self._prior.sum()), 1e-12) if len(states) else None)
        return result

    def _promising(self, known: Sequence[Known], tried: set[str], rng: np.random.Generator) -> Plan | None:
        """The candidate with the largest expected improvement that the cost model finds within the budget."""
        rows = [self._row(k) for k in known]
        surrogate = self._surrogate(known, [row[0] for row in rows])
        priced = [(k, row) for k, row in zip(known, rows, strict=True) if k.excess]
        excess: list[Mapping[str, float]] = [k.excess for k, _ in priced]
        features, costs = [row[0] for _, row in priced], [row[1] for _, row in priced]
        pricing = self._pricing(features, excess, costs)
        pool = self._candidates(known, surrogate, pricing, rng)
        if pool is None:
            return None
        worth = self._worth(surrogate, pool)
        asked: set[int] = set()
        for attempt in range(_ASKED):
            room = self._room(pricing, pool)
            score = np.where(room >= attempt * _CAUTION, worth, -np.inf)
            score[list(asked)] = -np.inf
            if not np.isfinite(score).any():
                score = room.copy()
                score[list(asked)] = -np.inf
            best = int(score.argmax())
            if not np.isfinite(score[best]):
                break
            asked.add(best)
            plan = pool.plan(self._proposals, best)
            if self._space.plan_key(plan) in tried:
                continue
            over = self._over(plan)
            if max(over.values()) <= 0:
                return plan
            features.append(pool.features[best])
            costs.append(dict(zip(ADDITIVE, pool.costs[best], strict=True)))
            excess.append(over)
            pricing = self._pricing(features, excess, costs)
        return None

    def _over(self, plan: Plan) -> dict[str, float]:
        """Metric -> by what share a plan is over the budget, by what is known today."""
        return self._budget.constraints(self._predict(plan))

    def _row(self, known: Known) -> tuple[Floats, dict[str, float], bytes | None]:
        """What is in force in a trial's plan, its cost by the table, and its digest where arrays hold it exactly."""
        number = next((i for i, p in enumerate(self._proposals) if p.decoder.arrays.width == known.plan.width), 0)
        if (known.number, number) not in self._rows:
            arrays = self._proposals[number].decoder.arrays
            states = arrays.states([known.plan])
            features = self._columns.features(self._proposals[number].decoder, number, states)[0]
            cost = self._table.plan_cost(self._graph, known.plan)
            exact = self._space.plan_key(arrays.plan(states)) == known.key
            entry = features, {m: cost.of(m) for m in ADDITIVE}, arrays.digests(states)[0] if exact else None
            if known.loss is None and not known.failed and not known.excess:
                return entry
            self._rows[known.number, number] = entry
        return self._rows[known.number, number]

    def _surrogate(self, known: Sequence[Known], features: Sequence[Floats]) -> Surrogate | None:
        """None while too little was evaluated. What broke counts as the worst that was seen."""
        losses = {k.number: k.loss for k in known if k.loss is not None}
        if len(losses) < _ENOUGH or max(losses.values()) <= min(losses.values()):
            return None
        worst = max(losses.values())
        kept = [
            (f, losses.get(k.number, worst))
            for k, f in zip(known, features, strict=True)
            if k.number in losses or k.failed
        ]
        rows, found = np.array([f for f, _ in kept]), np.array([loss for _, loss in kept])
        return Surrogate(self._options, rows, found, from_original=self._original is not None)

    def _pricing(
        self, features: Sequence[Floats], excess: Sequence[Mapping[str, float]], costs: Sequence[Mapping[str, float]]
    ) -> Pricing:
        rows = np.array(features).reshape(len(features), len(self._prior))
        return Pricing(self._budget, rows, log_ratios(self._budget, excess, costs))

    def _candidates(
        self, known: Sequence[Known], surrogate: Surrogate | None, pricing: Pricing, rng: np.random.Generator
    ) -> _Pool | None:
        """Plans that were not tried, each once."""
        good = sorted((k for k in known if k.loss is not None and k.feasible), key=lambda k: (k.loss, k.number))
        elites = good[:_ELITES]
        inside = [self._row(k)[0] for k in elites]
        losses = self._aims(surrogate, inside, rng)
        learned = surrogate.learned if surrogate else self._prior
        taken = {digest for k in known if k.settled and (digest := self._row(k)[2]) is not None}
        parts: list[tuple[int, States]] = []
        for number, proposals in enumerate(self._proposals):
            arrays, columns = proposals.decoder.arrays, self._columns
            like = inside[0] if inside else np.zeros(len(self._prior))
            limits = proposals.decoder.limits(pricing.limits(like[None]))
            values = columns.values(number, losses)
            usual = self._usual_prices[number]
            price = None if usual is None else usual * float(learned.sum())
            found, prices = proposals.decoded(Aim(values, np.tile(limits, (len(values), 1))), price)
            own = [k.plan for k in elites if k.plan.width == arrays.width or len(self._proposals) == 1]
            parents = States.stack([found, arrays.states(own)]) if own else found
            if not len(parents):
                continue
            price = prices.mean(axis=0) if len(prices) else (np.zeros(len(ADDITIVE)) if price is None else price)
            mean = columns.values(number, learned[None])[0]
            parents = States.stack([parents, proposals.nearby(parents, mean, limits, price)])
            if surrogate is not None:
                # What is best by all that is known has neighbours of its own.
                features = columns.features(proposals.decoder, number, parents)
                top = np.argsort(-surrogate.log_improvement(features), kind="stable")[:_ELITES]
                parents = States.stack([parents, proposals.nearby(parents.take(top), mean, limits, price)])
            digests = arrays.digests(parents)
            first = {digest: row for row, digest in reversed(list(enumerate(digests))) if digest not in taken}
            if first:
                parts.append((number, parents.take(sorted(first.values()))))
        return self._pool(parts) if parts else None

    def _aims(self, surrogate: Surrogate | None, elites: Sequence[Floats], rng: np.random.Generator) -> Floats:
        """Rows of losses to decode."""
        large = any(p.large for p in self._proposals)
        count = _DRAWN_LARGE if large else _DRAWN
        if surrogate is None:
            strengths = np.exp(rng.uniform(np.log(0.05), np.log(1.0), (2 * count, 1)))
            by_decision = rng.normal(size=(2 * count, int(self._columns.decision.max(initial=0)) + 1))
            noise = by_decision[:, self._columns.decision.astype(int)] + 0.3 * rng.normal(
                size=(2 * count, len(self._prior))
            )
            return self._prior * np.exp(strengths * noise)
        rows = [surrogate.drawn(rng, count), surrogate.learned[None]]
        learned = surrogate.learned
        positive = learned[learned > 0]
        far = 3.0 * float(positive.mean()) if len(positive) else 1.0
        for _ in range((_CHILDREN_LARGE if large else _CHILDREN) if len(elites) > 1 else 0):
            one, other = rng.choice(len(elites), size=2, replace=False)
            child = self._columns.child(elites[int(one)], elites[int(other)], rng, _MUTATIONS)
            rows.append((0.2 * learned + far * (1.0 - child))[None])
        return np.concatenate(rows)

    def _pool(self, parts: list[tuple[int, States]]) -> _Pool:
        features, costs = [], []
        for number, states in parts:
            decoder = self._proposals[number].decoder
            features.append(self._columns.features(decoder, number, states))
            costs.append(decoder.arrays.costs(states))
        return _Pool(parts, np.concatenate(features), np.concatenate(costs))

    def _worth(self, surrogate: Surrogate | None, pool: _Pool) -> Floats:
        """The logarithm of the expected improvement; without a surrogate, plans keep the order they were made in."""
        if surrogate is None:
            return -10.0 * np.arange(len(pool.features), dtype=np.float64)
        return surrogate.log_improvement(pool.features)

    def _room(self, pricing: Pricing, pool: _Pool) -> Floats:
        """By how many standard deviations a candidate is expected to be below the budget."""
        means, deviation = pricing.ratios(pool.features)
        room = np.full(len(pool.features), np.inf)
        for metric, limit in self._budget.limits.items():
            cost = np.log(np.maximum(pool.costs[:, ADDITIVE.index(BASE[metric])], 1e-12)) + means[metric]
            room = np.minimum(room, (np.log(limit) - cost) / deviation)
        return np.asarray(room)
