"""Plans that a search has to beat though nobody searched for them: random ones, and those of the classic route.

Both meet the budget as predicted, and are made from the same options, table and cost model as the search's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna

from automl_compress.core.budget import Budget, Cost
from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.errors import TrainingError
from automl_compress.search.sampling.sampler import make_sampler
from automl_compress.search.sampling.study import Objective, best_feasible, run_trials
from automl_compress.search.solvers.decode import Decoder
from automl_compress.search.space.offers import Option
from automl_compress.search.space.space import Decision, SearchSpace
from automl_compress.search.table.pricing import plain_bits
from automl_compress.search.table.table import AdditiveTable

_DRAWS = 40
_TIGHTER = 0.95
_ROUNDS = 8
# Proposals that turn out too dear cost no evaluation; so many in all end the classic route.
_TRIALS_PER_EVALUATION = 4


@dataclass(frozen=True, kw_only=True)
class Market:
    """What plans are made of and held against.

    limits   metric -> limit of the additive table; `budget` is what `predict` is held against
    """

    space: SearchSpace
    graph: Graph
    table: AdditiveTable
    limits: Mapping[str, float]
    budget: Budget
    predict: Callable[[Plan], Cost]
    seed: int = 0

    def fits(self, plan: Plan) -> bool:
        return self.budget.met(self.predict(plan))


def random_feasible(market: Market) -> Iterator[Plan]:
    """Different plans that are predicted to meet the budget, without end as long as there are any.

    Each begins with an option drawn evenly for every decision. As long as it is too dear by the table, a decision drawn
    at random takes one of its cheaper options; where the cost model still finds it too dear, the table's limits shrink.
    """
    rng = np.random.default_rng([market.seed, 1])
    seen: set[str] = set()
    failed = 0
    while failed < _DRAWS:
        plan = _random(market, rng)
        key = market.space.plan_key(plan) if plan is not None else ""
        if plan is None or key in seen:
            failed += 1
            continue
        failed = 0
        seen.add(key)
        yield plan


def _random(market: Market, rng: np.random.Generator) -> Plan | None:
    params: dict[str, Option] = {d.name: d.options[int(rng.integers(len(d.options)))] for d in market.space.decisions}
    scale = 1.0
    for _ in range(_ROUNDS):
        if not _reduce(market, params, scale, rng):
            return None
        plan = market.space.plan(params)
        if market.fits(plan):
            return plan
        scale *= _TIGHTER
    return None


def _reduce(market: Market, params: dict[str, Option], scale: float, rng: np.random.Generator) -> bool:
    """Make `params` cheaper until the table finds them within its limits; False where nothing is left to reduce."""
    over = _excess(market, params, scale)
    while over > 0:
        for index in rng.permutation(len(market.space.decisions)):
            decision = market.space.decisions[int(index)]
            further = _further(decision, params[decision.name])
            if not further:
                continue
            changed = {**params, decision.name: further[int(rng.integers(len(further)))]}
            less = _excess(market, changed, scale)
            if less < over:
                params.update(changed)
                over = less
                break
        else:
            return False
    return True


def _further(decision: Decision, option: Option) -> tuple[Option, ...]:
    return decision.options[decision.options.index(option) + 1 :]


def _excess(market: Market, params: Mapping[str, Option], scale: float) -> float:
    cost = market.table.plan_cost(market.graph, market.space.plan(params))
    return max(cost.of(metric) / (limit * scale) - 1.0 for metric, limit in market.limits.items())


def classic_space(space: SearchSpace) -> SearchSpace | None:
    """What is left to decide for who prunes first and then quantizes everything alike; None if nothing is pruned."""
    low = plain_bits(space)
    chosen = [d for d in space.decisions if d.kind in ("width", "sparsity", "drop")]
    alike: dict[str, Any] = {
        d.name: low if d.kind == "bits" and low in d.options else d.neutral
        for d in space.decisions
        if d.kind in ("bits", "mask")
    }
    return replace(space, decisions=tuple(chosen), fixed={**space.fixed, **alike}) if chosen else None


def prune_then_quantize(
    market: Market, evaluations: int, evaluate: Callable[[Plan], float | None], stop: Callable[[], bool] = lambda: False
) -> tuple[Plan | None, float | None, int]:
    """The classic route: the best pruned model in 32 bits, then uniform quantization.

    How much is pruned is decided so that the model fits once it is quantized; which channels and blocks go, by the
    metric before that. It is proposed by the budget sampler, too, from the same sensitivities. Returns the plan, its
    metric after quantization, and how many plans were evaluated, at most `evaluations`; (None, None, n) if no plan
    fits.
    """
    space = classic_space(market.space)
    if space is None:
        return None, None, 0
    options = {d.name for d in space.decisions}
    quality = {key: value for key, value in market.table.quality.items() if key[0] in options}
    table = replace(market.table, quality=quality)
    decided = {d.target for d in market.space.decisions if d.kind == "bits"}
    sampler = make_sampler(
        "budget",
        space=space,
        decoder=Decoder(space, market.graph, table),
        limits=market.budget,
        predict=market.predict,
        seed=market.seed,
    )
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=optuna.pruners.NopPruner())

    def in_32_bits(plan: Plan) -> float:
        metric = evaluate(replace(plan, bits={k: b for k, b in plan.bits.items() if k not in decided}))
        if metric is None:
            raise TrainingError("the plan can't be evaluated")
        return metric

    objective = Objective(space=space, budget=market.budget, predict=market.predict, evaluate=in_32_bits)
    done = 0
    # One evaluation is kept for the quantized model.
    for trials in range(1, _TRIALS_PER_EVALUATION * evaluations):
        if done >= evaluations - 1 or stop() or run_trials(study, objective, trials, failure_share=1) == "exhausted":
            break
        done = sum("repeat_of" not in t.user_attrs for t in study.trials if t.state.name == "COMPLETE")
    best = best_feasible(study)
    if best is None:
        return None, None, done
    plan = space.plan(best.params)
    return plan, evaluate(plan), done + 1
