"""The samplers by name: our own, and Optuna's, whose plans are projected onto the budget or penalised.

*Projected*: what Optuna's sampler proposes is replaced by the nearest plan within the budget, and that is what the
trial is about, so that every trial is evaluated. *Penalised*: the proposal stands, and the constraints that every trial
sets tell the sampler by how much it missed; such a trial isn't evaluated.

All of them draw by the seed and a trial's number (CMA-ES by that of the trial that it starts at), so a resumed search
or another worker doesn't repeat what was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from automl_compress.core.budget import Budget
from automl_compress.errors import InputError, did_you_mean
from automl_compress.search.sampling.budget_sampler import BudgetSampler
from automl_compress.search.sampling.fitting import Fitting, Predict
from automl_compress.search.sampling.trials import drawn_alone, seed_of, trial_plan
from automl_compress.search.solvers.decode import Decoder
from automl_compress.search.space.offers import Option
from automl_compress.search.space.space import SearchSpace

__all__ = ["SAMPLERS", "BudgetSampler", "make_sampler", "trial_plan"]

_PROJECTED = ":project"
_OPTUNA: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: AnewSampler(lambda drawn: optuna.samplers.TPESampler(seed=drawn), seed),
    "gp": lambda seed: AnewSampler(lambda drawn: optuna.samplers.GPSampler(seed=drawn), seed),
    "nsga2": lambda seed: AnewSampler(lambda drawn: optuna.samplers.NSGAIISampler(seed=drawn), seed),
    "cmaes": lambda seed: OrdinalSampler(lambda drawn: optuna.samplers.CmaEsSampler(seed=drawn), seed),
    "random": lambda seed: AnewSampler(lambda drawn: optuna.samplers.RandomSampler(seed=drawn), seed),
}
SAMPLERS = ("budget", *_OPTUNA, *(f"{name}{_PROJECTED}" for name in _OPTUNA))


def make_sampler(
    name: str,
    *,
    space: SearchSpace,
    decoder: Decoder,
    limits: Budget | Mapping[str, float],
    predict: Predict,
    original: float | None = None,
    seed: int,
) -> BaseSampler:
    """A sampler by its name: 'budget' (ours), 'tpe', 'gp', 'nsga2', 'cmaes' or 'random' (Optuna's, penalised), or one
    of these with ':project' behind it. InputError for any other."""
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}: use one of {', '.join(SAMPLERS)}{did_you_mean(name, SAMPLERS)}")
    if name == "budget":
        return BudgetSampler(space=space, decoder=decoder, limits=limits, predict=predict, original=original, seed=seed)
    plain = name.removesuffix(_PROJECTED)
    sampler = _OPTUNA[plain](seed)
    if plain == name:
        return sampler
    budget = limits if isinstance(limits, Budget) else Budget(limits=dict(limits))
    return ProjectedSampler(sampler, space, Fitting(space, decoder, budget, predict))


def proposes_what_fits(name: str) -> bool:
    """Whether a sampler proposes a plan that is predicted to be over the budget only where it finds none within."""
    return name == "budget" or name.endswith(_PROJECTED)


class AnewSampler(BaseSampler):
    """Another sampler, made anew for every trial with a seed of that trial's. All that Optuna's samplers know of
    earlier trials is in the study."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._sampler = make(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler = self._make(seed_of(self._seed, trial))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._sampler.after_trial(study, trial, state, values)


class ProjectedSampler(BaseSampler):
    """Another sampler, whose plans are replaced by the nearest ones within the budget (`Fitting.nearest`)."""

    def __init__(self, sampler: BaseSampler, space: SearchSpace, fitting: Fitting) -> None:
        self._sampler, self._space, self._fitting = sampler, space, fitting

    def reseed_rng(self) -> None:
        self._sampler.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All decisions of the space: a plan can only be projected as a whole."""
        return dict(self._space.distributions())

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The other sampler's proposal, projected."""
        inner = self._sampler.infer_relative_search_space(study, trial)
        params = dict(self._sampler.sample_relative(study, trial, inner))
        for name, distribution in search_space.items():
            if name not in params:
                params[name] = self._sampler.sample_independent(study, trial, name, distribution)
        others = {name: value for name, value in params.items() if name not in self._space.decision}
        if len(params) - len(others) < len(self._space.decisions):
            return params
        plan = self._space.plan({name: value for name, value in params.items() if name in self._space.decision})
        return {**others, **self._space.params(self._fitting.nearest(plan))}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._sampler.after_trial(study, trial, state, values)


class OrdinalSampler(BaseSampler):
    """A sampler of numbers for options: each decision is a number from 0 to 1, its options are equal parts of that.

    The other sampler sees a study of its own, with these numbers, which lives as long as the process: a resumed search
    starts it anew from what was found. Plans over the budget count there as worse than all that were evaluated.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int = 0) -> None:
        self._make, self._seed = make, seed
        self._shadow: Study | None = None
        self._asked: dict[int, optuna.trial.Trial] = {}
        self._seen: set[int] = set()
        self._worst: float | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What all finished trials had to decide."""
        return optuna.search_space.IntersectionSearchSpace().calculate(study)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """An option for every decision among options; others are left to independent sampling."""
        self._raise_error_if_multi_objective(study)
        choices = {
            n: d.choices for n, d in search_space.items() if isinstance(d, optuna.distributions.CategoricalDistribution)
        }
        if not choices:
            return {}
        shadow = self._shadow_of(study, trial)
        for other in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if other.number not in self._seen and all(other.params.get(n) in c for n, c in choices.items()):
                self._add(other.number, {n: _middle(c, other.params[n]) for n, c in choices.items()}, other.values[0])
        asked = shadow.ask({name: FloatDistribution(0.0, 1.0) for name in choices})
        self._asked[trial.number] = asked
        return {n: c[min(int(asked.params[n] * len(c)), len(c) - 1)] for n, c in choices.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        self._raise_error_if_multi_objective(study)
        return drawn_alone(self._seed, study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        if self._shadow is not None:
            self._shadow.sampler.reseed_rng()

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Tell the other sampler."""
        asked = self._asked.pop(trial.number, None)
        if asked is None or self._shadow is None:
            return
        self._seen.add(trial.number)
        if state == TrialState.COMPLETE and values:
            self._shadow.tell(asked, values[0])
            worse = max if study.direction == optuna.study.StudyDirection.MINIMIZE else min
            self._worst = values[0] if self._worst is None else worse(self._worst, values[0])
        elif self._worst is not None:
            self._shadow.tell(asked, self._worst)
        else:
            self._shadow.tell(asked, state=TrialState.FAIL)

    def _shadow_of(self, study: Study, trial: FrozenTrial) -> Study:
        if self._shadow is None:
            sampler = self._make(seed_of(self._seed, trial))
            self._shadow = optuna.create_study(direction=study.direction, sampler=sampler)
        return self._shadow

    def _add(self, number: int, params: Mapping[str, float], value: float) -> None:
        assert self._shadow is not None
        self._seen.add(number)
        space: dict[str, BaseDistribution] = dict.fromkeys(params, FloatDistribution(0.0, 1.0))
        self._shadow.add_trial(optuna.trial.create_trial(params=dict(params), distributions=space, value=value))


def _middle(choices: tuple[Option | None, ...], value: Any) -> float:
    return (choices.index(value) + 0.5) / len(choices)
