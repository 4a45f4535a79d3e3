"""Whether the search beat each baseline, in plain words.

Before training, the search's best is that after as many evaluations as the baseline had; after training, it is the
delivered model beside baselines that were trained like it, on all validation data. The two are never mixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from automl_compress.core.budget import format_metric
from automl_compress.core.goal import Goal
from automl_compress.core.result import Figures
from automl_compress.search.campaign.baselines import Baselines, Rival
from automl_compress.search.delivery.deliver import Verified
from automl_compress.search.sampling.seeds import ORIGINAL

Rung = Literal["one-shot", "full"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The search beside one baseline at one rung.

    metric, search_metric    what was compared: at "one-shot" the metric on the samples of trials, each the best of so
                             many `evaluations`; at "full" the metric on all validation data, of the search's own model
                             where a baseline's is delivered
    within_budget            whether the baseline is a rival: within every budget, and good enough where that was asked
    beaten                   None where the baseline is no rival, or was not to be had
    """

    baseline: str
    rung: Rung
    metric: float | None
    search_metric: float | None
    evaluations: int = 1
    search_evaluations: int = 1
    within_budget: bool
    beaten: bool | None
    text: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def one_shot_standings(found: Baselines) -> Iterator[Standing]:
    """For a baseline that is a single plan, the search's best of all its evaluations counts."""
    for rival in found.rivals:
        among = found.search[: rival.evaluations] if rival.is_searched else found.search
        best = max(among, default=None)
        beaten = None
        if rival.fits and rival.metric is not None and best is not None:
            beaten = best > rival.metric
        yield Standing(
            baseline=rival.name,
            rung="one-shot",
            metric=rival.metric,
            search_metric=best,
            evaluations=rival.evaluations,
            search_evaluations=len(among),
            within_budget=rival.fits,
            beaten=beaten,
            text=f"{rival.name}: {_one_shot_text(rival, best, len(among), beaten)}",
        )


def _one_shot_text(rival: Rival, best: float | None, count: int, beaten: bool | None) -> str:
    if rival.plan is None and not rival.evaluations:
        return "no plan was found within the budget, in as many evaluations as the search had"
    if rival.plan is None:
        return f"none of the {rival.evaluations} plans that were evaluated is within the budget"
    if not rival.fits:
        return "over the budget, no rival"
    if beaten is None:
        return "not evaluated"
    of = f" (best of {rival.evaluations})" if rival.is_searched else ""
    return f"{_number(rival.metric)}{of}, the search {_number(best)} (best of {count}): {_verdict(beaten)}"


def full_standings(found: Baselines, verified: Verified, goal: Goal | None = None) -> Iterator[Standing]:
    """The delivered model beside the original and the baselines that were trained; with a `goal`, its cost beside that
    of baselines that are good enough. Where it is a baseline's own, the search's best is held against the others."""
    delivered = verified.delivered
    ours, whose = (delivered, "the delivered model") if found.own is None else (found.own, "the search's own model")
    models = {ORIGINAL: verified.original, **_trained(found, verified)}
    for name, figures in models.items():
        same = figures.plan is not None and figures.plan == delivered.plan
        rival = same or _is_rival(figures, verified, goal)  # one file that is measured twice may be on both sides
        beaten = None if not rival else False if same else _better(ours, figures, goal)
        what = "it is the delivered model" if same else f"{whose} {_shown(ours, goal)}"
        yield Standing(
            baseline=name,
            rung="full",
            metric=figures.metric,
            search_metric=ours.metric,
            within_budget=rival,
            beaten=beaten,
            text=f"{name}: {_shown(figures, goal)} {_how(name)}, {what}: {_verdict(beaten)}",
        )
    for name, reason in found.failed.items():
        yield Standing(
            baseline=name,
            rung="full",
            metric=None,
            search_metric=ours.metric,
            within_budget=False,
            beaten=None,
            text=f"{name}: could not be recovered ({reason})",
        )


def front_standings(points: Mapping[str, tuple[Baselines, Verified]], minimise: str) -> Iterator[Standing]:
    """A front's models, by name, each with the baselines of its budget: each before training, and after it the best of
    the models that cost no more than a baseline."""
    for name, (found, _) in points.items():
        for standing in one_shot_standings(found):
            yield replace(standing, baseline=f"{standing.baseline} ({name})", text=f"{name}, {standing.text}")
    original = next(verified.original for _, verified in points.values())
    baselines = {ORIGINAL: original}
    baselines |= {k: v for found, verified in points.values() for k, v in _trained(found, verified).items()}
    models = {name: verified.delivered for name, (_, verified) in points.items()}
    for name, figures in baselines.items():
        cost = figures.cost.of(minimise)
        cheaper = {model: f for model, f in models.items() if f.cost.of(minimise) <= cost}
        best = max(cheaper, key=lambda model: cheaper[model].metric, default=None)
        beaten, what = None, "no model of the front is as cheap"
        if best is not None:
            same = figures.plan is not None and figures.plan == cheaper[best].plan
            beaten = not same and cheaper[best].metric > figures.metric
            verdict = "it is this model" if same else _verdict(beaten)
            what = f"{best} {_with_cost(cheaper[best], minimise)}: {verdict}"
        yield Standing(
            baseline=name,
            rung="full",
            metric=figures.metric,
            search_metric=None if best is None else cheaper[best].metric,
            within_budget=best is not None,
            beaten=beaten,
            text=f"{name}: {_with_cost(figures, minimise)} {_how(name)}, {what}",
        )


def _how(baseline: str) -> str:
    return "as it was" if baseline == ORIGINAL else "trained"


def _trained(found: Baselines, verified: Verified) -> dict[str, Figures]:
    return {name: figures for name, figures in verified.baselines.items() if name in found.distilled}


def _is_rival(figures: Figures, verified: Verified, goal: Goal | None) -> bool:
    enough = goal is None or goal.reached(figures.metric, verified.original.metric)
    return enough and verified.budget.met(figures.cost)


def _better(delivered: Figures, other: Figures, goal: Goal | None) -> bool:
    if goal is None:
        return delivered.metric > other.metric
    return delivered.cost.of(goal.minimise) < other.cost.of(goal.minimise)


def _shown(figures: Figures, goal: Goal | None) -> str:
    return _number(figures.metric) if goal is None else _with_cost(figures, goal.minimise)


def _with_cost(figures: Figures, metric: str) -> str:
    return f"{_number(figures.metric)} with {format_metric(metric, figures.cost.of(metric))}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _verdict(beaten: bool | None) -> str:
    return {True: "beaten", False: "not beaten", None: "no rival (over a budget, or not good enough)"}[beaten]
