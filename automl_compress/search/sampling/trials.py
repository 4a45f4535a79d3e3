"""What a study knows, as numbers: which plans were tried, what they lost, and what they were predicted to cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.linalg import cho_factor, cho_solve

from automl_compress.core.budget import Budget
from automl_compress.core.plan import Plan
from automl_compress.errors import PlanError
from automl_compress.search.sampling.storage import interrupted
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.states import Floats

BASE = {"latency": "latency", "size": "size", "memory": "size"}
"""Which additive metric a budget's metric follows. Memory doesn't add up; the file's size is what mostly decides it."""
_OWN, _COMMON, _NOISE = 0.03, 0.05, 0.003  # relative deviations of predictions from the table
_MOST = 200


@dataclass(frozen=True)
class Known:
    """A trial's plan, and what came of it.

    loss    how much worse than the original it was; None where it wasn't evaluated
    failed  it was begun, and came to nothing: it broke, diverged, or was given up
    excess  metric -> by what share it is over the budget, by what is known today
    refused it was over the budget when it was proposed, and so not evaluated
    """

    number: int
    plan: Plan
    key: str
    loss: float | None
    failed: bool
    excess: Mapping[str, float]
    refused: bool = False

    @property
    def feasible(self) -> bool:
        return bool(self.excess) and all(value <= 0 for value in self.excess.values())

    @property
    def settled(self) -> bool:
        """Whether there is nothing to be learned from trying it again. What was refused may have become cheaper since,
        by a corrected prediction or by measuring."""
        return not (self.refused and self.feasible)


def known_trials(
    study: Study,
    space: SearchSpace,
    plans: dict[int, tuple[Plan, str]],
    before: int,
    original: float | None = None,
    excess: Callable[[Plan], Mapping[str, float]] | None = None,
) -> list[Known]:
    """The trials of a study other than number `before`, without interrupted ones, which are run again.

    plans     remembers what finished trials stand for
    excess    by what share a plan is over each budget; None: as it was when it was tried
    original  the value of the untouched plan, from which losses are; without it, from that trial's, or from the best
    """
    trials = [t for t in study.get_trials(deepcopy=False) if t.number != before]
    cut_short = interrupted(trials)
    sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
    found = []
    for trial in trials:
        if trial.number not in plans:
            plan = trial_plan(space, trial)
            if plan is None:
                continue
            entry = (plan, space.plan_key(plan))
            if trial.state.is_finished():
                plans[trial.number] = entry
        else:
            entry = plans[trial.number]
        if trial.number in cut_short:
            continue
        done = trial.state == TrialState.COMPLETE and trial.values is not None
        too_dear = refused(trial)
        given_up = trial.state == TrialState.FAIL or (trial.state == TrialState.PRUNED and not too_dear)
        value = -sign * float(trial.values[0]) if done else None
        constraints: Mapping[str, float] = dict(trial.constraints)
        if constraints and excess is not None:
            constraints = excess(entry[0])
        found.append(Known(trial.number, *entry, value, given_up, constraints, too_dear))
    return _beside_the_original(found, space, None if original is None else -sign * original)


def refused(trial: FrozenTrial) -> bool:
    """Whether a trial ended because its plan was over the budget by what was known then."""
    return trial.state == TrialState.PRUNED and any(value > 0 for value in trial.constraints.values())


def seed_of(seed: int, trial: FrozenTrial, *more: int) -> int:
    """A seed for what is drawn for one trial: a resumed study and other workers neither repeat nor change it."""
    return int(np.random.default_rng([seed, trial.number, *more]).integers(2**31))


def drawn_alone(seed: int, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
    """A value for one parameter, drawn at random for this trial."""
    drawn = seed_of(seed, trial, len(trial.params))
    return RandomSampler(seed=drawn).sample_independent(study, trial, name, distribution)


def trial_plan(space: SearchSpace, trial: FrozenTrial) -> Plan | None:
    """The plan of a trial, also of one that waits in the queue; None if its parameters aren't complete."""
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    if any(d.name not in params for d in space.decisions):
        return None
    try:
        return space.plan({d.name: params[d.name] for d in space.decisions})
    except PlanError:
        return None


def _beside_the_original(known: Sequence[Known], space: SearchSpace, value: float | None) -> list[Known]:
    """Losses from the original's figure; where that isn't known, from the best."""
    untouched = space.plan_key(space.plan({}))
    values = {k.number: k.loss for k in known if k.loss is not None}
    original = [values[k.number] for k in known if k.key == untouched and k.number in values]
    top = min(original or values.values(), default=0.0) if value is None else value
    return [k if k.loss is None else replace(k, loss=k.loss - top) for k in known]


class Pricing:
    """By how much predictions exceed the table, learned from what was predicted: a Gaussian process with fixed scales
    over the options in force, around the usual ratio."""

    def __init__(self, budget: Budget, features: Floats, logs: Mapping[str, Floats]) -> None:
        self.budget = budget
        self._rows = features[-_MOST:]
        self._usual = {m: float(np.median(v[-_MOST:])) if len(v) else 0.0 for m, v in logs.items()}
        self._weights: dict[str, Floats] = {}
        if len(self._rows):
            kernel = self._kernel(self._rows, self._rows) + _NOISE**2 * np.eye(len(self._rows))
            self._factor = cho_factor(kernel, lower=True, check_finite=False)
            self._weights = {
                m: cho_solve(self._factor, v[-_MOST:] - self._usual[m], check_finite=False) for m, v in logs.items()
            }

    def ratios(self, features: Floats) -> tuple[dict[str, Floats], Floats]:
        """(metric -> logarithm of prediction over table, its standard deviation) for each row."""
        if not len(self._rows):
            none = np.zeros(len(features))
            return dict.fromkeys(self.budget.limits, none), none + _COMMON
        cross = self._kernel(features, self._rows)
        means = {m: self._usual[m] + cross @ self._weights[m] for m in self.budget.limits}
        half = cho_solve(self._factor, cross.T, check_finite=False)
        variance = _OWN**2 + _COMMON**2 - np.einsum("rt,tr->r", cross, half)
        return means, np.sqrt(np.maximum(variance, _NOISE**2))

    def limits(self, features: Floats) -> dict[str, float]:
        """Limits for the table that come to the budget for a plan like the one row."""
        means, _ = self.ratios(features)
        found: dict[str, float] = {}
        for metric, limit in self.budget.limits.items():
            aimed = limit / float(np.exp(means[metric][0]))
            found[BASE[metric]] = min(aimed, found.get(BASE[metric], np.inf))
        return found

    def _kernel(self, one: Floats, other: Floats) -> Floats:
        """Options in common, as a share of those that there are."""
        size = np.sqrt(np.maximum(one.sum(axis=1), 1.0))[:, None] * np.sqrt(np.maximum(other.sum(axis=1), 1.0))[None, :]
        return np.asarray(_OWN**2 + _COMMON**2 * (one @ other.T) / size)


def log_ratios(
    budget: Budget, excess: Iterable[Mapping[str, float]], table: Iterable[Mapping[str, float]]
) -> dict[str, Floats]:
    """Metric -> logarithm of what was predicted over what the table says."""
    rows = list(zip(excess, table, strict=True))
    return {
        m: np.log([(over[m] + 1.0) * limit / max(cost[BASE[m]], 1e-12) for over, cost in rows] or np.zeros(0))
        for m, limit in budget.limits.items()
    }
