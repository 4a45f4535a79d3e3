"""The samplers: our own, which proposes only plans that meet the budget, and Optuna's by name.

`BudgetSampler` perturbs the table of estimated losses, or aims at a mixture of the best plans so far, decodes the best
plan within the budget and asks the cost model; a plan that is too dear tightens the additive limit by as much, one
that leaves room loosens it. Finished trials correct the table. It follows SPDY (Frantar and Alistarh, 2022), which
searches the coefficients of a layer-wise knapsack, and keeps to Optuna's convention for relative samplers.

Everything that it knows comes from the study's trials, the seed and the trial's number: a resumed study and further
workers on the same storage need nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from automl_compress.core.budget import Budget, Cost
from automl_compress.core.plan import Plan
from automl_compress.errors import InputError, PlanError
from automl_compress.search.decode import Decoder, Solution, options_in_force
from automl_compress.search.learn import Observation, corrected
from automl_compress.search.space import SearchSpace
from automl_compress.search.storage import interrupted
from automl_compress.search.table import Option, QualityKey

SAMPLERS = ("budget", "tpe", "gp", "nsga2", "random")
_ATTEMPTS = 5
_ROUNDS = 4
_ELITES = 8
_ROOM = 0.03
_GAP = 1e-3  # the losses carry far more noise than that
Predict = Callable[[Plan], Cost]
Quality = dict[QualityKey, float]


def make_sampler(
    name: str,
    *,
    space: SearchSpace,
    decoder: Decoder,
    limits: Budget | Mapping[str, float],
    predict: Predict,
    seed: int,
) -> BaseSampler:
    """A sampler by its name: 'budget' (ours), 'tpe', 'gp', 'nsga2' or 'random' (Optuna's). InputError for any other.

    All of them see the constraints that `run_trials` sets on every trial.
    """
    if name == "budget":
        return BudgetSampler(space=space, decoder=decoder, limits=limits, predict=predict, seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "cmaes":
        raise InputError("sampler 'cmaes' can't choose among options, only tune numbers: use budget, tpe, gp or nsga2")
    raise InputError(f"unknown sampler {name!r}: use one of {', '.join(SAMPLERS)}")


@dataclass(frozen=True, kw_only=True)
class _Past:
    """What the study knows before a trial: all plans that were tried, evaluated feasible ones best first."""

    tried: Mapping[str, Plan]
    elites: tuple[Plan, ...]
    quality: Quality
    ratios: Mapping[str, float]


class BudgetSampler(BaseSampler):
    """Proposes plans whose predicted cost meets `limits`, never one that the study already tried while others are left.

    decoder  of the same space; its table's `quality` is what the search starts from
    limits   a budget, or metric -> microseconds or bytes
    predict  the cost model; called a few times for each proposal
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
        seed: int = 0,
    ) -> None:
        self._space, self._graph, self._table = space, decoder.graph, decoder.table
        self._budget = limits if isinstance(limits, Budget) else Budget(limits=dict(limits))
        self._predict = predict
        self._seed = seed
        self._decoders: dict[float, Decoder] = {decoder.width: decoder}
        self._keys: dict[int, str] = {}
        self._widths = [float(w) for w in space.options("width")] or [1.0]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All decisions of the space."""
        return dict(self._space.distributions())

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A plan within the budget, as parameters."""
        self._raise_error_if_multi_objective(study)
        rng = np.random.default_rng([self._seed, trial.number])
        past = self._past(study, trial)
        nearest: tuple[float, Plan] | None = None
        collided: list[Plan] = []
        for attempt in range(_ATTEMPTS):
            quality = self._aim(past, rng, attempt)
            plan, excess = self._fit(quality, past.ratios, self._pick_width(rng, attempt), collided)
            if plan is None:
                continue
            if excess <= 0 and self._space.plan_key(plan) not in past.tried:
                return self._space.params(plan)
            collided.append(plan)
            rank = (excess if excess > 0 else 0.0) + (1e3 if self._space.plan_key(plan) in past.tried else 0.0)
            if nearest is None or rank < nearest[0]:
                nearest = (rank, plan)
        plan = self._next_best(past) or (nearest[1] if nearest else self._space.plan({}))
        return self._space.params(plan)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The option that changes least; for a parameter that isn't of the space, any with equal probability."""
        if param_name in self._space.decision:
            return self._space.decision[param_name].neutral
        seed = int(np.random.default_rng([self._seed, trial.number]).integers(2**31))
        return optuna.samplers.RandomSampler(seed=seed).sample_independent(study, trial, param_name, param_distribution)

    def _past(self, study: Study, trial: FrozenTrial) -> _Past:
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        plans = {t.number: plan for t in trials if (plan := trial_plan(self._space, t)) is not None}
        done = [t for t in trials if t.state == TrialState.COMPLETE and t.number in plans and t.value is not None]
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        best_first = sorted(done, key=lambda t: (-sign * _value(t), t.number))
        feasible = [t for t in best_first if all(v <= 0 for v in t.constraints.values())]
        untouched = self._space.plan_key(self._space.plan({}))
        original = [t for t in done if self._key(t, plans[t.number]) == untouched]
        top = max((sign * _value(t) for t in original or done), default=0.0)
        options = {t.number: options_in_force(self._space, plans[t.number]) for t in done}
        observed = [Observation(options=options[t.number], loss=top - sign * _value(t)) for t in done]
        known = [t for t in trials if t.number in plans]
        cut_short = interrupted(trials)
        return _Past(
            tried={self._key(t, plans[t.number]): plans[t.number] for t in known if t.number not in cut_short},
            elites=tuple(plans[t.number] for t in feasible[:_ELITES]),
            quality=corrected(self._table.quality, observed, free={(d.name, d.neutral) for d in self._space.decisions}),
            ratios=self._ratios([(t, plans[t.number]) for t in known if t.constraints]),
        )

    def _key(self, trial: FrozenTrial, plan: Plan) -> str:
        if trial.number not in self._keys:
            key = self._space.plan_key(plan)
            if not trial.state.is_finished():
                return key
            self._keys[trial.number] = key
        return self._keys[trial.number]

    def _ratios(self, priced: Iterable[tuple[FrozenTrial, Plan]]) -> dict[str, float]:
        """By how much predictions exceed the table, in the latest trials: where the first additive limit is put."""
        found: dict[str, list[float]] = {}
        for trial, plan in list(priced)[-10:]:
            cost = self._table.plan_cost(self._graph, plan)
            for metric in ("latency", "size"):
                if metric in trial.constraints and metric in self._budget.limits and cost.of(metric) > 0:
                    predicted = (trial.constraints[metric] + 1.0) * self._budget.limits[metric]
                    found.setdefault(metric, []).append(predicted / cost.of(metric))
        return {metric: float(np.median(values)) for metric, values in found.items()}

    def _aim(self, past: _Past, rng: np.random.Generator, attempt: int) -> Quality:
        """The losses to decode: the learned table itself, the table perturbed, or distances from a child of elites."""
        strength = float(np.exp(rng.uniform(np.log(0.05), np.log(1.0)))) * 1.5**attempt
        way = rng.random()
        if attempt == 0 and way < 0.2:
            return past.quality
        noisy = self._perturbed(past.quality, rng, strength)
        return noisy if way < 0.6 or len(past.elites) < 2 else self._near_child(past, noisy, rng)

    def _perturbed(self, quality: Quality, rng: np.random.Generator, strength: float) -> Quality:
        factors = {name: rng.normal(0.0, strength) for name in sorted({name for name, _ in quality})}
        own = rng.normal(0.0, 0.3 * strength, len(quality))
        keys = sorted(quality, key=str)
        return {key: quality[key] * float(np.exp(factors[key[0]] + e)) for key, e in zip(keys, own, strict=True)}

    def _near_child(self, past: _Past, quality: Quality, rng: np.random.Generator) -> Quality:
        """Losses that draw the decoder to a mutated mixture of two of the best plans, as far as the budget allows."""
        first, second = rng.choice(len(past.elites), size=2, replace=False)
        one, two = (dict(options_in_force(self._space, past.elites[int(i)])) for i in (first, second))
        child: dict[str, Option] = {}
        mutation = 2.0 / max(1, len(self._space.decisions))
        for decision in self._space.decisions:
            inherited = (one if rng.random() < 0.5 else two).get(decision.name, decision.neutral)
            mutated = decision.options[int(rng.integers(len(decision.options)))]
            child[decision.name] = mutated if rng.random() < mutation else inherited
        far = 3.0 * float(np.mean(list(quality.values()))) if quality else 1.0
        # What the child removes must be dear to keep: not removing is no option with a loss of its own.
        dropped = {b.name for b in self._graph.blocks if child.get(f"drop.{b.name}")}
        removed = {layer.name for layer in self._graph.layers if dropped.intersection(layer.blocks)}
        result = dict(quality)
        for decision in self._space.decisions:
            gone = decision.kind in ("bits", "mask") and decision.target in removed
            for option in decision.options:
                key = (decision.name, option)
                distance = 0.0 if option == child[decision.name] and not gone else far
                result[key] = 0.2 * quality.get(key, 0.0) + distance
        return result

    def _pick_width(self, rng: np.random.Generator, attempt: int) -> float:
        """The full student where sparsity covers the range, unless that keeps failing; else any width."""
        covered = all(self._space.options(f"sparsity.{g.name}") for g in self._graph.groups)
        return self._widths[0] if covered and attempt < _ATTEMPTS - 1 else float(rng.choice(self._widths))

    def _decoder(self, width: float) -> Decoder:
        if width not in self._decoders:
            self._decoders[width] = Decoder(self._space, self._graph, self._table, width=width)
        return self._decoders[width]

    def _fit(
        self, quality: Quality, ratios: Mapping[str, float], width: float, exclude: Iterable[Plan]
    ) -> tuple[Plan | None, float]:
        """Decode and predict in turns until the budget is met. Also by how much it is exceeded (<= 0: met)."""
        limits = {m: v / ratios.get(m, 1.0) for m, v in self._budget.limits.items() if m != "memory"}
        best: tuple[float, Plan] | None = None
        nearest: tuple[float, Plan] | None = None
        for _ in range(_ROUNDS):
            found = self._decoder(width).solve(quality, limits, exclude=exclude, gap=_GAP)
            if found is None:
                break
            excess = self._budget.constraints(self._predict(found.plan))
            worst = max(excess.values())
            if worst <= 0 and (best is None or found.loss < best[0]):
                best = (found.loss, found.plan)
            if nearest is None or worst < nearest[0]:
                nearest = (worst, found.plan)
            if -_ROOM <= worst <= 0 or (worst <= 0 and found.loss == 0):
                break
            limits = _moved(limits, found, excess)
        if best is not None:
            return best[1], 0.0
        return (nearest[1], nearest[0]) if nearest else (None, float("inf"))

    def _next_best(self, past: _Past) -> Plan | None:
        """The best plan by the learned table that wasn't tried, when noise alone keeps finding tried ones."""
        excluded = list(past.tried.values())
        for width in self._widths:
            for _ in range(_ATTEMPTS):
                plan, excess = self._fit(past.quality, past.ratios, width, excluded)
                if plan is None:
                    break
                if excess <= 0:
                    return plan
                excluded.append(plan)
        return None


def trial_plan(space: SearchSpace, trial: FrozenTrial) -> Plan | None:
    """The plan of a trial, also of one that waits in the queue; None if its parameters aren't complete."""
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    if any(d.name not in params for d in space.decisions):
        return None
    try:
        return space.plan({d.name: params[d.name] for d in space.decisions})
    except PlanError:
        return None


def _moved(limits: Mapping[str, float], found: Solution, excess: Mapping[str, float]) -> dict[str, float]:
    """The next additive limits: where a metric is exceeded, or has room, the table's figure over the prediction's."""
    moved = dict(limits)
    for metric, over in excess.items():
        # Memory isn't additive; the file's size is what mostly decides it.
        target = "size" if metric == "memory" else metric
        if metric == "memory" and over <= 0:
            continue
        aimed = found.cost.of(target) / (1.0 + over)
        if over > 0:
            moved[target] = min(moved.get(target, aimed), aimed * (1 - 1e-3))
        elif max(excess.values()) <= 0 and over < -_ROOM and metric in limits:
            moved[target] = max(limits[target], aimed)
    return moved


def _value(trial: FrozenTrial) -> float:
    return float(trial.values[0])
