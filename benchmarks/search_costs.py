"""What does the search itself cost: milliseconds for a proposal, and its share of a real run's time?

Proposals are timed in studies of 60 trials on the spaces of `synthetic_spaces` with a table that is wrong; the first
one, which sets everything up, is in the maximum. The share is of a `search` run of ResNet-20 from start to delivery:
what is neither training, nor evaluating (repair, calibration and validation of plans, sensitivities included), nor
measuring on the device.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from common import parser, write_rows
from search_regret import mistaken
from synthetic_spaces import network, space_of, table_of

SIZES = (20, 60, 200)
TRIALS = 60
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cifar10_resnet20" / "task.py"


def main() -> None:
    options = parser(__doc__.splitlines()[0], data=True, weights=True)
    options.add_argument("--parts", nargs="*", default=["proposals", "share"], help="default: proposals share")
    options.add_argument("--epochs", type=float, default=1.0, help="of the run's final distillation (default 1)")
    options.add_argument("--trials", type=int, help="of the run (default 100; 10 with --quick)")
    given = options.parse_args()
    rows: list[dict[str, Any]] = []
    if "proposals" in given.parts:
        rows += proposals(trials=20 if given.quick else TRIALS)
    if "share" in given.parts:
        os.environ |= {"AC_DATA_DIR": str(given.data), "AC_WEIGHTS_DIR": str(given.weights)}
        rows.append(share(trials=given.trials or (10 if given.quick else 100), epochs=given.epochs))
    write_rows(given.json, "search_costs", rows, quick=given.quick)


def proposals(*, sizes: Sequence[int] = SIZES, trials: int = TRIALS) -> list[dict[str, Any]]:
    """Rows `decisions, budget, proposal_ms` (median), `proposal_max_ms`."""
    rows = []
    for size in sizes:
        for shares in ({"latency": 0.4}, {"latency": 0.4, "size": 0.3}):
            taken = 1e3 * np.array(_timed(size, shares, trials))
            row = {"decisions": size, "budget": "+".join(shares), "proposal_ms": float(np.median(taken))}
            rows.append(row | {"proposal_max_ms": float(taken.max())})
    return rows


def _timed(size: int, shares: dict[str, float], trials: int) -> list[float]:
    """Seconds for each proposal of one study, without what predicting costs."""
    import optuna

    from automl_compress.core.budget import Budget, Cost
    from automl_compress.core.plan import Plan
    from automl_compress.search.sampling.sampler import make_sampler
    from automl_compress.search.sampling.study import Objective, run_trials
    from automl_compress.search.solvers.decode import Decoder, additive_loss

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    graph = network(size)
    space = space_of(graph)
    truth = table_of(space, graph, 0)
    spent: dict[str, float] = defaultdict(float)

    def predict(plan: Any) -> Any:
        with _clocked(spent, "predict"):
            cost = truth.plan_cost(graph, plan)
        return Cost(latency_us=cost.latency_us, size_bytes=cost.size_bytes, memory_bytes=cost.size_bytes)

    whole = predict(Plan())
    budget = Budget(limits={metric: part * whole.of(metric) for metric, part in shares.items()})
    believed = replace(truth, quality=mistaken(truth.quality, 0.5, 0))
    sampler = make_sampler(
        "budget",
        space=space,
        decoder=Decoder(space, graph, believed),
        limits=budget,
        predict=predict,
        original=0.0,
        seed=0,
    )
    taken: list[float] = []
    propose = sampler.sample_relative

    def timed(*given: Any) -> Any:
        before, begun = spent["predict"], time.perf_counter()
        params = propose(*given)
        taken.append(time.perf_counter() - begun - (spent["predict"] - before))
        return params

    study = optuna.create_study(direction="minimize", sampler=sampler)
    objective = Objective(
        space=space,
        budget=budget,
        predict=predict,
        evaluate=lambda plan: additive_loss(space, plan, truth.quality),
    )
    with patch.object(sampler, "sample_relative", timed):
        run_trials(study, objective, trials)
    return taken


def share(*, trials: int, epochs: float) -> dict[str, Any]:
    """A row with seconds by part of one run, `outside` (share that is none of training, evaluating and measuring) and
    `outside_trials` (the same of the one-shot trials alone: proposing, predicting, keeping the study)."""
    from automl_compress import compress
    from automl_compress.hardware.device.device import Device
    from automl_compress.hardware.prediction.measure import measure_model, measure_variants
    from automl_compress.search.campaign import learning, opening
    from automl_compress.search.evaluation.evaluate import Workbench
    from automl_compress.search.ladder.ladder import Recovery
    from automl_compress.search.sampling import study
    from automl_compress.search.sampling.budget_sampler import BudgetSampler
    from automl_compress.search.table import forecast
    from automl_compress.search.table.sensitivity import measure_joint, measure_sensitivity
    from automl_compress.techniques.distillation.teacher import worth_of_teaching

    spent: dict[str, float] = defaultdict(float)
    clock = _Exclusive(spent)
    with (
        TemporaryDirectory() as folder,
        _patched(
            [
                (Workbench, "one_shot", clock.wrap("evaluate", Workbench.one_shot)),
                (Workbench, "metric", clock.wrap("evaluate", Workbench.metric)),
                (opening, "worth_of_teaching", clock.wrap("evaluate", worth_of_teaching)),
                (learning, "measure_sensitivity", clock.wrap("evaluate", measure_sensitivity)),
                (learning, "measure_joint", clock.wrap("evaluate", measure_joint)),
                (Recovery, "recover", clock.wrap("train", Recovery.recover)),
                (Device, "compare", clock.wrap("measure", Device.compare)),
                (Device, "memory_bytes", clock.wrap("measure", Device.memory_bytes)),
                (Device, "savings", clock.wrap("measure", Device.savings)),
                (forecast, "measure_variants", clock.wrap("measure", measure_variants)),
                (forecast, "measure_model", clock.wrap("measure", measure_model)),
                (forecast.Forecast, "predict", clock.wrap("predict", forecast.Forecast.predict)),
                (BudgetSampler, "sample_relative", clock.wrap("propose", BudgetSampler.sample_relative)),
                (study, "_one_trial", clock.wrap("trials", study._one_trial)),
            ]
        ),
    ):
        begun = time.perf_counter()
        compress(str(EXAMPLE), latency="40%", trials=trials, epochs=epochs, output=Path(folder) / "run")
        total = time.perf_counter() - begun
    inside = spent["evaluate"] + spent["train"] + spent["measure"]
    in_trials = clock.within["trials"]
    own = in_trials["propose"] + in_trials["predict"] + in_trials["trials"]
    return {
        "trials": trials,
        "total_s": total,
        **{f"{name}_s": value for name, value in sorted(spent.items())},
        "outside": 1.0 - inside / total,
        "outside_trials": own / max(sum(in_trials.values()), 1e-9),
    }


class _Exclusive:
    """Charges time to the innermost of nested calls; `within` says what it was charged to during calls of a name."""

    def __init__(self, spent: dict[str, float]) -> None:
        self._spent, self._since = spent, time.perf_counter()
        self._stack: list[str] = []
        self.within: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self._charge()
            self._stack.append(name)
            try:
                return function(*given, **named)
            finally:
                self._charge()
                self._stack.pop()

        return call

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self._spent[self._stack[-1]] += now - self._since
            for outer in set(self._stack):
                self.within[outer][self._stack[-1]] += now - self._since
        self._since = now


@contextmanager
def _patched(changes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    patches = [patch.object(*change) for change in changes]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


@contextmanager
def _clocked(spent: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    spent[name] += time.perf_counter() - begun


if __name__ == "__main__":
    main()
