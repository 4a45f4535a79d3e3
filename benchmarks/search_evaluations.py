"""Part (a): how good is the best plan of each search after so many evaluations?

Every method gets the same space, budget, cost model and cached evaluations. A trial counts as one evaluation, also
where its plan is over the budget and therefore never evaluated, as in the product. `tpe`, `nsga2` and `gp` are Optuna's
samplers out of the box with the budget as a constraint; where `:project` is added, each of their plans is replaced by
the nearest one within the budget, as the product offers it, so that all their evaluations count.
`random` is random plans, each cut further at random until it meets the budget. `milp` is the exact optimum of the
additive table, a single plan. `budget` is the product's sampler with the product's seeds, which include that plan.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from scipy.stats import spearmanr
from search_evaluator import Lines
from search_laboratory import Laboratory

from automl_compress.core.plan import Plan
from automl_compress.progress import Progress
from automl_compress.search.sampling import budget_sampler, proposals, surrogate, trials
from automl_compress.search.sampling import seeds as first
from automl_compress.search.sampling.sampler import make_sampler
from automl_compress.search.sampling.seeds import MILP, first_plans, loosest_optimum
from automl_compress.search.sampling.study import Objective, ranked, run_trials, seed_plans
from automl_compress.search.solvers import lagrange, moves, quick
from automl_compress.search.solvers.decode import Decoder
from automl_compress.search.solvers.feasibility import Reach
from automl_compress.search.table import arrays
from automl_compress.search.table.pricing import random_plan

OURS = "budget"
OUR_CODE = (arrays, budget_sampler, first, lagrange, moves, proposals, quick, surrogate, trials)
METHODS = (OURS, MILP, "random", "nsga2", "tpe", "nsga2:project", "tpe:project", "gp")
SHARES = (0.40, 0.35, 0.30, 0.25)
COUNTS = (25, 50, 100, 200)
CHANCE = 0.1
KEPT = 16
History = list[float | None]


def run(
    laboratory: Laboratory,
    cache: Path,
    *,
    methods: Sequence[str] = METHODS,
    shares: Sequence[float] = SHARES,
    counts: Sequence[int] = COUNTS,
    seeds: int = 5,
    deadline: float | None = None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Rows `method, budget, evaluations, accuracy` (mean over seeds of the best so far, chance where no plan met the
    budget), `worst`, `best` of the seeds, `seeds`, `feasible` (share of trials that met the budget).

    After `deadline` (of `time.monotonic`) no search is begun; the rows are of those that are there.
    """
    done = Lines(cache / "searches.jsonl")
    # Seed by seed, so that what is there when time is over compares all methods.
    wanted = [(m, share, s) for s in range(seeds) for share in shares for m in methods if s == 0 or m != MILP]
    progress.stage("searching by cached evaluations", len(wanted))
    for method, share, seed in wanted:
        key = _key(laboratory, method, share, seed)
        if not _reaches(done.known.get(key), method, max(counts)):
            if deadline is not None and time.monotonic() > deadline:
                continue
            values, best = search(laboratory, method, share, seed, max(counts))
            done.add(key, {"values": values, "best": [plan.to_json() for plan in best]})
        progress.advance()
    rows = []
    for method in methods:
        for share in shares:
            records = [done.known.get(_key(laboratory, method, share, seed)) for seed in range(seeds)]
            for count in counts:
                histories = [record["values"] for record in records if record and _reaches(record, method, count)]
                rows += [_row(method, share, count, histories)] if histories else []
    return rows


def _reaches(record: Any, method: str, count: int) -> bool:
    """Whether a search that was kept is long enough; the optimum of the table is a single plan."""
    return record is not None and (method == MILP or len(record["values"]) >= count)


def best_plans(laboratory: Laboratory, cache: Path, share: float, *, seeds: int) -> list[Plan]:
    """The best plans that the product's sampler found at a budget over all seeds that were run, best first."""
    done = Lines(cache / "searches.jsonl")
    keys = [_key(laboratory, OURS, share, seed) for seed in range(seeds)]
    found = {}
    for key in keys:
        for data in done.known.get(key, {}).get("best", []):
            plan = Plan.from_json(data, laboratory.bench.graph)
            found[plan.key] = plan
    return sorted(found.values(), key=lambda plan: -laboratory.evaluate(plan))


def fidelity(laboratory: Laboratory, cache: Path, *, progress: Progress) -> list[dict[str, Any]]:
    """One row: the rank correlation (Spearman) of the cached evaluations with the product's one-shot metric on 20
    plans, three random ones and two good ones of each budget; over the good ones alone; and the means of both."""
    done = Lines(cache / "fidelity.jsonl")
    plans: list[Plan] = []
    good: list[bool] = []
    for share in SHARES:
        rng = np.random.default_rng(round(1000 * share))
        drawn = [random_plan(laboratory.space, rng, drop_share=rng.uniform(0, 0.6)) for _ in range(3)]
        plans += [fitted(laboratory, share, plan, rng) for plan in drawn]
        plans += best_plans(laboratory, cache, share, seeds=5)[:8:4]
        good += [False] * 3 + [True] * 2
    progress.stage("the product's one-shot metric", len(plans))
    for plan in plans:
        key = laboratory.space.plan_key(plan)
        if key not in done.known:
            begun = time.process_time()
            value = laboratory.bench.one_shot(plan)
            done.add(key, [value, time.process_time() - begun])
        progress.advance()
    product = np.array([done.known[laboratory.space.plan_key(plan)][0] for plan in plans])
    cached = np.array([laboratory.evaluate(plan) for plan in plans])
    return [
        {
            "plans": len(plans),
            "rank_correlation": float(spearmanr(product, cached).statistic),
            "rank_correlation_of_good": float(spearmanr(product[good], cached[good]).statistic),
            "mean_cached": float(cached.mean()),
            "mean_product": float(product.mean()),
            "product_seconds": float(np.mean([done.known[laboratory.space.plan_key(plan)][1] for plan in plans])),
        }
    ]


def _row(method: str, share: float, count: int, histories: Sequence[History]) -> dict[str, Any]:
    best = [max((v for v in h[:count] if v is not None), default=CHANCE) for h in histories]
    tried = [v is not None for h in histories for v in h[:count]]
    return {
        "method": method,
        "budget": share,
        "evaluations": count,
        "accuracy": float(np.mean(best)),
        "worst": min(best),
        "best": max(best),
        "seeds": len(histories),
        "feasible": float(np.mean(tried)),
    }


def search(laboratory: Laboratory, method: str, share: float, seed: int, count: int) -> tuple[History, list[Plan]]:
    """The accuracy of each trial's plan, None where it was over the budget; and the best plans, best first."""
    budget = laboratory.budget(share)
    if method == MILP:
        return [laboratory.evaluate(milp(laboratory, share))], [milp(laboratory, share)]
    rng = np.random.default_rng([seed, round(1000 * share)])
    if method == "random":
        plans = (random_plan(laboratory.space, rng, drop_share=rng.uniform(0, 0.6)) for _ in range(count))
        return [laboratory.evaluate(fitted(laboratory, share, plan, rng)) for plan in plans], []
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=make_sampler(
            method,
            space=laboratory.space,
            decoder=Decoder(laboratory.space, laboratory.bench.graph, laboratory.table),
            limits=budget,
            predict=laboratory.predict,
            original=laboratory.evaluate(Plan()),
            seed=seed,
        ),
    )
    objective = Objective(
        space=laboratory.space,
        budget=budget,
        predict=laboratory.predict,
        evaluate=laboratory.evaluate,
    )
    if method == OURS:
        seed_plans(study, laboratory.space, seeds(laboratory, share))
    run_trials(study, objective, count, repeats=count)
    best = [laboratory.space.plan(trial.params) for trial in ranked(study, KEPT)]
    return [trial.value for trial in study.trials[:count]], best


def seeds(laboratory: Laboratory, share: float) -> dict[str, Plan]:
    """The plans that the product starts from, by label."""
    budget = laboratory.budget(share)
    return first_plans(
        laboratory.space,
        laboratory.table.quality,
        lambda plan: max(budget.constraints(laboratory.predict(plan)).values()),
        milp(laboratory, share),
    )


def milp(laboratory: Laboratory, share: float) -> Plan:
    """The optimum of the additive table for the loosest limit whose plan is predicted to meet the budget."""
    budget, graph = laboratory.budget(share), laboratory.bench.graph
    reach = Reach(space=laboratory.space, graph=graph, table=laboratory.table, predict=laboratory.predict)
    found = loosest_optimum(
        partial(reach.estimate, budget.limits),
        partial(reach.solve, budget.limits),
        lambda plan: budget.met(laboratory.predict(plan)),
    )
    if found is None:
        raise SystemExit(f"no plan of the additive table's meets {share:.0%} of the latency on this device")
    return found


def fitted(laboratory: Laboratory, share: float, plan: Plan, rng: np.random.Generator) -> Plan:
    """The plan, cut further by one option of one decision at a time, in an order drawn at random, until it meets the
    budget."""
    budget, space = laboratory.budget(share), laboratory.space
    params = dict(space.params(plan))
    at = {d.name: d.options.index(params[d.name]) for d in space.decisions if d.kind != "width"}
    steps = [name for name, index in at.items() for _ in range(len(space.decision[name].options) - 1 - index)]
    order = [steps[i] for i in rng.permutation(len(steps))]

    def after(count: int) -> Plan:
        taken = Counter(order[:count])
        return space.plan({**params, **{n: space.decision[n].options[i + taken[n]] for n, i in at.items()}})

    few, many = -1, len(order)
    if not budget.met(laboratory.predict(after(many))):
        raise SystemExit(f"even the narrowest plan is over {share:.0%} of the latency")
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if budget.met(laboratory.predict(after(middle))) else (middle, many)
    return after(many)


def code_version() -> str:
    """Changes with the code of the product's sampler."""
    return hashlib.sha256(_code().encode()).hexdigest()[:8]


def margin_text(laboratory: Laboratory) -> str:
    """What tells searches by other predictions apart, in keys."""
    lowered = " lowered" if laboratory.lowered else ""
    return lowered if laboratory.margin == 1 else f"{lowered} x{laboratory.margin:g}"


def _code() -> str:
    return "".join(inspect.getsource(module) for module in OUR_CODE)


def _key(laboratory: Laboratory, method: str, share: float, seed: int) -> str:
    """Runs of the product's sampler are made again when its code has changed, all when the space has."""
    text = _code() if method == OURS else ""
    version = hashlib.sha256((laboratory.space.fingerprint + text).encode()).hexdigest()[:8]
    return f"{method} {share:.2f} seed {seed} {version}{margin_text(laboratory)}"
