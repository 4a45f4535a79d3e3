"""What the parts of the search benchmark share: a ResNet-20, its space, table and cost model, and cheap evaluations.

The table counts what cuts lose, and fewer bits as nothing: 8 bits are the only other width that a latency budget offers
here. So there is no joint effect of width and bits either, which the product's table has. Evaluations count both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from search_evaluator import Evaluator, Lines

from automl_compress.core.budget import Budget, Cost
from automl_compress.core.plan import Plan
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.profile.profile import load_profile
from automl_compress.model.task import load_task
from automl_compress.model.trace import trace
from automl_compress.progress import Progress, SilentProgress
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.space.space import SearchSpace, load_space
from automl_compress.search.table.dominated import drop_dominated
from automl_compress.search.table.forecast import SEARCH, Forecast
from automl_compress.search.table.pricing import additive_table
from automl_compress.search.table.profiling import forecast_of
from automl_compress.search.table.sensitivity import single
from automl_compress.search.table.table import AdditiveTable, QualityKey

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cifar10_resnet20" / "task.py"
CACHE = Path(__file__).resolve().parent / ".cache" / "search"


@dataclass(frozen=True, kw_only=True)
class Laboratory:
    """One network on one device.

    space     what a latency budget leaves to decide
    table     the additive table, sensitivities included
    original  the original's predicted cost, which budgets are shares of
    evaluate  a plan's one-shot accuracy, cached
    margin    factor of predictions, which measured plans about a budget told
    lowered   whether plans are predicted from their lowered models, as the product predicts them
    """

    bench: Workbench
    space: SearchSpace
    table: AdditiveTable
    forecast: Forecast
    original: Cost
    evaluate: Evaluator
    margin: float = 1.0
    lowered: bool = False

    def predict(self, plan: Plan) -> Cost:
        """The plan's cost: in outline in about a millisecond, or lowered in some tens, the same for every method."""
        cost = self.forecast.predict(plan) if self.lowered else self.forecast.quick(plan)
        return replace(cost, latency_us=self.margin * cost.latency_us)

    def budget(self, share: float) -> Budget:
        """A share of the original's latency."""
        return Budget(limits={"latency": share * self.original.latency_us})


@contextmanager
def open_laboratory(
    data: Path,
    weights: Path,
    *,
    cache: Path = CACHE,
    profile: str = "local",
    progress: Progress | None = None,
) -> Iterator[Laboratory]:
    """Trace the network, learn what the profile lacks, and measure sensitivities that the cache lacks."""
    os.environ |= {"AC_DATA_DIR": str(data), "AC_WEIGHTS_DIR": str(weights)}
    show = progress or SilentProgress()
    task = load_task(str(EXAMPLE))
    graph = trace(task.model, task.example_inputs)
    with Device(load_profile(profile)) as device:
        forecast = forecast_of(task, graph, device, load_space("cnn"), measure=False)
        forecast.learn(SEARCH, show)
        bench, plans = forecast.bench, forecast.variants
        offered = {d.target: [int(o) for o in d.options] for d in forecast.space.decisions if d.kind == "bits"}
        table = additive_table(
            graph,
            plans,
            [forecast.kernels(plan) for plan in plans],
            [forecast.predict(plan).latency_us for plan in plans],
            bench.original.ByteSize(),
            {},
            bench.executions,
            offered,
        )
        space = _space(forecast, table, Lines(cache / "space.jsonl"), show)
        show.stage("measuring sensitivities", sum(len(d.options) for d in space.decisions))
        evaluate = Evaluator(bench, space.plan_key, cache / "evaluations.jsonl")
        quality: dict[QualityKey, float] = {}
        for decision in space.decisions:
            for option in decision.options:
                quality[decision.name, option] = evaluate.distance(single(decision, option))
                show.advance()
        yield Laboratory(
            bench=bench,
            space=space,
            table=replace(table, quality=quality),
            forecast=forecast,
            original=forecast.quick(Plan()),
            evaluate=evaluate,
        )


def _space(forecast: Forecast, table: AdditiveTable, known: Lines, show: Progress) -> SearchSpace:
    """The space without what the device runs no faster; found once, so that whatever is kept stays comparable."""
    key = forecast.space.fingerprint
    if key not in known.known:
        show.stage("leaving out what the device runs no faster")
        found = drop_dominated(
            forecast.space, forecast.bench.graph, table, metrics=("latency",), predict=forecast.quick
        )
        known.add(key, {"options": {d.name: list(d.options) for d in found.decisions}, "fixed": dict(found.fixed)})
    options, fixed = known.known[key]["options"], known.known[key]["fixed"]
    decisions = [replace(d, options=tuple(options[d.name])) for d in forecast.space.decisions if d.name in options]
    return replace(forecast.space, decisions=tuple(decisions), fixed=fixed)
