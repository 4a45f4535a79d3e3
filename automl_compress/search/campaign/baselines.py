"""What every search has to beat, evaluated as often as the search is for the comparison, and recovered.

| baseline              | what it is                                                     |
|-----------------------|----------------------------------------------------------------|
| `original`            | the untouched network                                          |
| `uniform-int8`        | every layer that may be in 8 bits is, nothing else             |
| `milp`                | the exact optimum of the additive table                        |
| `random`              | the best of several random plans within the budget             |
| `prune-then-quantize` | the best of several plans that only prune, then uniform 8 bits |

How much they may cost is the user's choice:

quick  random plans and the classic route get a tenth of the search's evaluations (at least 4). Trained like the
       search's own are uniform 8 bits and the table's optimum where they are within the budget, and whatever was better
       than the search before training; the others are measured as they are, without training.
full   as many evaluations as the search; everything is trained.
none   nothing is evaluated or trained for their sake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from optuna.trial import TrialState

from automl_compress.core.plan import Plan
from automl_compress.core.result import Figures
from automl_compress.errors import FAILURES, InputError, did_you_mean, passed_over
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.evaluation.lines import append_line, read_lines
from automl_compress.search.sampling.rivals import Market, classic_space, prune_then_quantize, random_feasible
from automl_compress.search.sampling.seeds import MILP, UNIFORM
from automl_compress.search.sampling.study import ADOPTED
from automl_compress.search.solvers.feasibility import additive_limits

RANDOM = "random"
CLASSIC = "prune-then-quantize"
QUICK = "quick"
EFFORTS = (QUICK, "full", "none")
_FILE = "baselines.jsonl"
_QUICK_SHARE = 0.1
_QUICK_LEAST = 4


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A baseline before any training.

    plan          None if none was found within the budget
    metric        on the samples of one-shot trials; None if it was not evaluated
    evaluations   of how many plans it is the best
    fits          whether the plan is within the budget, as predicted or measured
    """

    name: str
    plan: Plan | None
    metric: float | None = None
    evaluations: int = 1
    fits: bool = True

    @property
    def is_searched(self) -> bool:
        """Whether it is the best of several plans, so that it is compared after equally many evaluations."""
        return self.name in (RANDOM, CLASSIC)


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """All baselines but the original.

    search      the search's one-shot metrics within the budget, in the order of their evaluation
    candidates  name -> the model as recovered; of `distilled` after training like the search's own
    failed      name -> why it could not be recovered
    own         the search's own finished model, where a baseline's is delivered
    """

    rivals: tuple[Rival, ...] = ()
    search: tuple[float, ...] = ()
    candidates: Mapping[str, Candidate] = field(default_factory=dict)
    distilled: frozenset[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)
    own: Figures | None = None

    @property
    def trained(self) -> dict[str, Candidate]:
        return {name: found for name, found in self.candidates.items() if name in self.distilled}


def beside_own(found: Baselines, campaign: Campaign, best: Candidate, own: Candidate) -> Baselines:
    """The same, with the search's `own` finished model where `best`, which is delivered, is a baseline's."""
    if best.plan == own.plan or all(best is not other for other in found.candidates.values()):
        return found
    cost = campaign.cost(replace(own.plan, kept={}))
    figures = Figures(
        metric=own.metric,
        latency_us=cost.latency_us,
        size_bytes=int(cost.size_bytes),
        memory_bytes=int(cost.memory_bytes),
        provenance=cost.provenance,
        plan=own.plan,
    )
    return replace(found, own=figures)


def check_effort(effort: str) -> None:
    """Raises InputError for anything but 'quick', 'full' or 'none'."""
    if effort not in EFFORTS:
        raise InputError(
            f"unknown baselines {effort!r}: use one of {', '.join(EFFORTS)}{did_you_mean(effort, EFFORTS)}"
        )


def compare(
    campaign: Campaign,
    effort: str,
    recover: Callable[[Plan, bool], Candidate],
    *,
    may_train: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> Baselines:
    """Evaluate and recover the baselines of a search whose one-shot trials are done.

    What was evaluated or recovered before, by the search or by an earlier run in the same folder, isn't again.

    recover    recovers a plan, and says with True that it is to be trained like the search's own
    may_train  False where a time limit leaves nothing for that
    stop       asked before every evaluation and every recovery: no time is left for another
    """
    found = find_rivals(campaign, effort, stop)
    candidates: dict[str, Candidate] = {}
    distilled = set()
    failed: dict[str, str] = {}
    best = max(found.search, default=float("-inf"))
    # Two baselines may come to one plan, which is then one model.
    trained = {campaign.space.plan_key(r.plan) for r in found.rivals if r.plan is not None and _worth_training(r, best)}
    for rival in found.rivals if effort != "none" else ():
        if rival.plan is None or stop():
            continue
        worth = effort == "full" or campaign.space.plan_key(rival.plan) in trained
        try:
            candidates[rival.name] = recover(rival.plan, may_train and worth)
        except FAILURES as failure:
            failed[rival.name] = passed_over(failure)
            continue
        if may_train and worth:
            distilled.add(rival.name)
    return replace(found, candidates=candidates, distilled=frozenset(distilled), failed=failed)


def _worth_training(rival: Rival, best: float) -> bool:
    if not rival.fits:
        return False
    return not rival.is_searched or (rival.metric is not None and rival.metric > best)


def find_rivals(campaign: Campaign, effort: str, stop: Callable[[], bool] = lambda: False) -> Baselines:
    """All baselines but the original, evaluated one-shot beside the search; none is recovered."""
    search = tuple(metric for _, metric in searched(campaign))
    store = _Evaluations(campaign, campaign.folder.file(_FILE))
    count = _evaluations(effort, len(search))
    seeds = {n: plan for n, plan in campaign.seeds().items() if n.startswith(UNIFORM) or n == MILP}
    if effort != "none":
        campaign.progress.stage("evaluating the baselines", len(seeds) + 2 * count)
    found = []
    for name, plan in seeds.items():
        fits = campaign.fits(plan)
        metric = store.known(plan) if effort == "none" or not fits else store(plan)
        found.append(Rival(name=name, plan=plan, metric=metric, fits=fits))
    if count == 0:
        return Baselines(rivals=tuple(found), search=search)
    market = Market(
        space=campaign.space,
        graph=campaign.bench.graph,
        table=campaign.table,
        limits=additive_limits(campaign.aim, campaign.original),
        budget=campaign.aim,
        predict=campaign.predict,
        seed=campaign.seed,
    )
    found.append(_best_random(market, count, store, stop))
    if classic_space(campaign.space) is not None:
        route, metric, tried = prune_then_quantize(market, count, store, stop)
        found.append(Rival(name=CLASSIC, plan=route, metric=metric, evaluations=tried, fits=route is not None))
    return Baselines(rivals=tuple(found), search=search)


def _evaluations(effort: str, searched: int) -> int:
    """How many plans each searched baseline may evaluate, never more than the search did."""
    if effort == "none":
        return 0
    return searched if effort == "full" else min(searched, max(_QUICK_LEAST, round(_QUICK_SHARE * searched)))


def _best_random(market: Market, count: int, store: _Evaluations, stop: Callable[[], bool]) -> Rival:
    best: tuple[float, Plan] | None = None
    tried = 0
    for plan in islice(random_feasible(market), count):
        if stop():
            break
        metric = store(plan)
        tried += 1
        if metric is not None and (best is None or metric > best[0]):
            best = (metric, plan)
    if best is None:
        return Rival(name=RANDOM, plan=None, evaluations=tried, fits=False)
    return Rival(name=RANDOM, plan=best[1], metric=best[0], evaluations=tried)


class _Evaluations:
    """One-shot metrics by what a plan comes down to: the study's, those in a file, and new ones, which go there."""

    def __init__(self, campaign: Campaign, file: Path) -> None:
        self._campaign, self._file = campaign, file
        self._known = dict(searched(campaign))
        for entry in read_lines(file):
            with suppress(ValueError, KeyError, TypeError):
                self._known.setdefault(str(entry["plan"]), float(entry["metric"]))

    def known(self, plan: Plan) -> float | None:
        return self._known.get(self._campaign.space.plan_key(plan))

    def __call__(self, plan: Plan) -> float | None:
        """None for a plan that can't be evaluated, which is no rival."""
        key = self._campaign.space.plan_key(plan)
        self._campaign.progress.advance()
        if key not in self._known:
            try:
                self._known[key] = self._campaign.evaluate(plan)
            except FAILURES as failure:
                passed_over(failure)
                return None
            append_line(self._file, {"plan": key, "metric": self._known[key]})
        return self._known[key]


def searched(campaign: Campaign) -> list[tuple[str, float]]:
    """(plan's key, one-shot metric) of the search's own evaluations within the budget, in the order of their beginning.

    Where no trial was made under the budget, which is what a model happens to cost, those under the run's other budgets
    are the search's.
    """
    if not campaign.has_study:
        elsewhere = campaign.evaluated_elsewhere()
        return [(campaign.space.plan_key(plan), metric) for plan, metric in elsewhere if campaign.fits(plan)]
    trials = campaign.study().get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        (trial.user_attrs["plan"], float(trial.values[0]))
        for trial in sorted(trials, key=lambda t: t.number)
        if not {ADOPTED, "repeat_of"}.intersection(trial.user_attrs)
        and all(excess <= 0 for excess in trial.constraints.values())
    ]
