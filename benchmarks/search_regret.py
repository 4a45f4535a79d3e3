"""How far from the optimum are the sampler's plans after 100 evaluations, on spaces whose optimum is known?

The spaces are those of `synthetic_spaces`, whose losses add up; the optimum is that of the integer program, proven. The
true losses are what a trial is told; the table that a sampler starts from is either the truth or is wrong: each loss
times a lognormal factor, and removed blocks believed to be twice as harmless as they are. Optuna's samplers use the
table to project their plans onto the budget and not otherwise, and are shown beside the exact one. Regret is the loss
of the best plan so far over the optimum's, minus one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from common import parser, write_rows
from synthetic_spaces import network, space_of, table_of

SIZES = (20, 60, 200)
EVALUATIONS = 100
OURS = "budget"
METHODS = (OURS, "tpe:project", "nsga2:project", "random:project")
TABLES = {"exact": 0.0, "noisy": 0.5}
BUDGETS: Mapping[str, Mapping[str, float]] = {
    "latency": {"latency": 0.4},
    "latency+size": {"latency": 0.4, "size": 0.3},
}
_BIAS = 0.5


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, help="spaces of each size (default 3; 1 with --quick)")
    options.add_argument("--sizes", nargs="*", type=int, help=f"numbers of decisions (default: {SIZES})")
    options.add_argument("--methods", nargs="*", default=list(METHODS), help=f"default: {' '.join(METHODS)}")
    given = options.parse_args()
    sizes = given.sizes or (SIZES[:2] if given.quick else SIZES)
    rows = run(sizes=sizes, methods=given.methods, seeds=given.seeds or (1 if given.quick else 3))
    write_rows(given.json, "search_regret", rows, quick=given.quick)


def run(
    *, sizes: Sequence[int] = SIZES, methods: Sequence[str] = METHODS, seeds: int = 3, evaluations: int = EVALUATIONS
) -> list[dict[str, Any]]:
    """Rows `decisions, budget, table, method, evaluations, regret` (mean over seeds), `worst`."""
    rows = []
    for size in sizes:
        for budget, shares in BUDGETS.items():
            for table, noise in TABLES.items():
                for method in methods if not noise else [m for m in methods if m == OURS]:
                    found = [regret(size, shares, noise, method, seed, evaluations) for seed in range(seeds)]
                    rows.append(
                        {
                            "decisions": size,
                            "budget": budget,
                            "table": table,
                            "method": method,
                            "evaluations": evaluations,
                            "regret": float(np.mean(found)),
                            "worst": max(found),
                        }
                    )
                    print(
                        "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
                    )
    return rows


def regret(size: int, shares: Mapping[str, float], noise: float, method: str, seed: int, evaluations: int) -> float:
    """That of the best plan of one study."""
    import optuna

    from automl_compress.core.budget import Budget, Cost
    from automl_compress.core.plan import Plan
    from automl_compress.search.sampling.sampler import make_sampler
    from automl_compress.search.sampling.study import Objective, best_feasible, run_trials
    from automl_compress.search.solvers.decode import Decoder, additive_loss

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    graph = network(size)
    space = space_of(graph)
    truth = table_of(space, graph, seed)

    def predict(plan: Any) -> Any:
        cost = truth.plan_cost(graph, plan)
        return Cost(latency_us=cost.latency_us, size_bytes=cost.size_bytes, memory_bytes=cost.size_bytes)

    whole = predict(Plan())
    limits = {metric: share * whole.of(metric) for metric, share in shares.items()}
    believed = replace(truth, quality=mistaken(truth.quality, noise, seed))
    sampler = make_sampler(
        method,
        space=space,
        decoder=Decoder(space, graph, believed),
        limits=Budget(limits=limits),
        predict=predict,
        original=0.0,
        seed=seed,
    )
    study = optuna.create_study(direction="minimize", sampler=sampler)
    objective = Objective(
        space=space,
        budget=Budget(limits=limits),
        predict=predict,
        evaluate=lambda plan: additive_loss(space, plan, truth.quality),
    )
    run_trials(study, objective, evaluations, repeats=evaluations)
    best = best_feasible(study)
    return float("inf") if best is None else float(best.values[0]) / optimum(graph, space, truth, limits) - 1.0


def optimum(graph: Any, space: Any, table: Any, limits: dict[str, float]) -> float:
    """The least loss within limits."""
    from automl_compress.search.solvers.decode import Decoder

    found = Decoder(space, graph, table).solve(table.quality, limits, gap=1e-6, exhaustive=True)
    assert found is not None
    return float(found.loss)


def mistaken(quality: Mapping[Any, float], noise: float, seed: int) -> dict[Any, float]:
    """A table that is wrong by lognormal factors of that deviation, and too optimistic of removed blocks."""
    rng = np.random.default_rng([seed, 1])
    factors = {key: float(np.exp(rng.normal(0.0, noise))) for key in quality}
    bias = _BIAS if noise else 1.0
    return {key: loss * factors[key] * (bias if key[0].startswith("drop.") else 1.0) for key, loss in quality.items()}


if __name__ == "__main__":
    main()
