"""Part (c): models delivered at a latency budget by the search and by other routes, after the same recovery.

Every route is a ladder of cuts (`search_peers`), and the largest of them whose 8-bit model was measured within the
budget is taken; of a route that reaches no such model the fastest, which misses the budget. The search is that of part
(a), but by predictions from lowered models, corrected by plans about the budget that were measured, both as in the
product. As there the best plans and the plans that it started from are measured, milder variants of the best are
evaluated and measured, too, and those that are within the budget are put in order by the product's one-shot metric and
go up the product's ladder of short distillations. Then all get the same distillation, calibration and export: the
product's defaults without the last stage, training with rounding. The test images are read once a model. In the end
all models take turns in one run of bursts beside the original.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import onnx
from search_evaluations import COUNTS, best_plans, code_version, margin_text, seeds
from search_evaluations import OURS as OUR_SAMPLER
from search_evaluations import run as search_run
from search_evaluator import Lines
from search_laboratory import Laboratory
from search_peers import ROUTES, UNTOUCHED, cuts, eight_bits
from search_training import recovered

from automl_compress.core.plan import Plan
from automl_compress.hardware.device.timer import ratio
from automl_compress.model.views import view_name
from automl_compress.progress import Progress
from automl_compress.recovery.names import DEFAULT_MODE
from automl_compress.search.campaign.measuring import about_the_budget
from automl_compress.search.campaign.timing import most_entrants, rungs
from automl_compress.search.ladder.entrants import in_order, variants
from automl_compress.search.ladder.halving import best_alike
from automl_compress.search.sampling.seeds import FEWEST_BLOCKS
from automl_compress.techniques.distillation.losses import DEFAULT, parse_losses
from automl_compress.techniques.training.settings import Training

OURS = "search"
ALL_ROUTES = (OURS, *ROUTES, UNTOUCHED)
STEPS = ("cuts", "searches", "finalists", "models", "timing")
_AIM = 0.985  # of the budget: a model's latency is not the same in two runs
_TURN = 8
_MEASURED = 8
_VARIANTS = 8
_JUDGED = 10


@dataclass(frozen=True, kw_only=True)
class Item:
    """One model to deliver."""

    route: str
    share: float
    epochs: float
    plan: Plan
    name: str


class Deliveries:
    """What was cut, trained and timed so far, below `cache`."""

    def __init__(
        self,
        laboratory: Laboratory,
        cache: Path,
        progress: Progress,
        *,
        routes: Sequence[str],
        ladder: float | None,
        seeds: int,
    ) -> None:
        self.laboratory = replace(laboratory, lowered=True, original=laboratory.forecast.predict(Plan()))
        self.progress, self._seeds, self._ladder = progress, seeds, ladder
        self._folder = cache / "models"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._ratios = Lines(cache / "cuts.jsonl")
        self._one_shot = Lines(cache / "one-shot.jsonl")
        self._found = Lines(cache / "models.jsonl")
        self._timings = Lines(cache / "timings.jsonl")
        self._rungs = Lines(cache / "rungs.jsonl")
        self._cache = cache
        self._first = Lines(cache / "seeds.jsonl")
        self._routes = cuts(laboratory, cache, progress, routes)
        # Models that were trained by other defaults aren't compared with these.
        views = [view_name(view) for view in laboratory.bench.task.views]
        recipe = f"{Training()} {parse_losses(DEFAULT)!r} {DEFAULT_MODE} {views}"
        self._recipe = hashlib.sha256(recipe.encode()).hexdigest()[:6]

    def measure_cuts(self) -> None:
        """Measure every route's cuts in 8 bits beside the original."""
        self._measure({name: plan for ladder in self._routes.values() for name, plan in ladder.items()})

    def measure_about(self, shares: Sequence[float]) -> None:
        """Measure plans about each budget, which correct predictions."""
        self._measure({f"{OURS}-{plan.key}": plan for share in shares for plan in self._about(share)})

    def search(self, shares: Sequence[float]) -> None:
        """The search of part (a) by corrected predictions."""
        for share in shares:
            search_run(
                self._at(share),
                self._cache,
                methods=(OUR_SAMPLER,),
                shares=(share,),
                counts=(max(COUNTS),),
                seeds=self._seeds,
                progress=self.progress,
            )

    def measure_finalists(self, shares: Sequence[float]) -> None:
        """Measure the search's best plans, and then milder variants of the best of these."""
        self._measure({f"{OURS}-{plan.key}": plan for share in shares for plan in self._finalists(share)})
        self._measure({f"{OURS}-{plan.key}": plan for share in shares for plan in self._variants(share)})

    def _measure(self, plans: Mapping[str, Plan]) -> None:
        missing = [name for name in plans if name not in self._ratios.known]
        self.progress.stage("measuring models before they are trained", len(missing))
        for start in range(0, len(missing), _TURN):
            names = missing[start : start + _TURN]
            found = self._latencies({name: self.laboratory.bench.structure(plans[name]) for name in names})
            for name in names:
                self._ratios.add(name, found[name])
                self.progress.advance()

    def items(self, shares: Sequence[float], epochs: Sequence[float], routes: Sequence[str]) -> Iterator[Item]:
        """What is to be delivered, one after the other."""
        for length in epochs:
            for route in routes:
                for share in shares:
                    if route != OURS:
                        yield self._cut(route, share, length)
                    elif plan := self._searched(share, self._ladder or length):
                        yield Item(route=OURS, share=share, epochs=length, plan=plan, name=f"{OURS}-{plan.key}")
                    else:
                        self.progress.note(
                            f"no plan of a search at {share:.0%} is within the budget: run step searches first"
                        )

    def deliver(self, item: Item) -> None:
        """Recover, export and test one model, unless that was done."""
        if self._key(item) in self._found.known:
            return
        self.progress.stage(f"{item.name}: {item.epochs:g} epochs", None)
        bench = self.laboratory.bench
        model, plan = recovered(bench, item.plan, item.epochs, repaired=item.route == OURS)
        exported = bench.export(model, plan, bench.quantization(model, plan, thorough=True))
        onnx.save(exported, self._path(item))
        validation, test = (bench.metric(exported, split) for split in ("validation", "test"))
        self._found.add(self._key(item), {"validation": validation, "accuracy": test, "plan": plan.to_json()})

    def rows(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """`route, budget, epochs, accuracy, latency_ratio, size_ratio, met` and the cut's `name`, of trained models."""
        ready = [item for item in items if self._key(item) in self._found.known]
        timings = self._timed(ready)
        original = self.laboratory.bench.original.ByteSize()
        return [
            {
                "route": item.route,
                "budget": item.share,
                "epochs": item.epochs,
                "accuracy": self._found.known[self._key(item)]["accuracy"],
                "latency_ratio": timings[self._key(item)],
                "size_ratio": self._path(item).stat().st_size / original,
                "met": timings[self._key(item)] <= item.share,
                "name": item.name,
            }
            for item in ready
        ]

    def untouched_ratio(self) -> float | None:
        """The latency of the original in 8 bits over that in 32, as measured with the cuts."""
        return self._ratios.known.get(UNTOUCHED)

    def _timed(self, items: Sequence[Item]) -> Mapping[str, float]:
        """All models in one run of bursts; again when one is new."""
        paths = {self._key(item): self._path(item) for item in items}
        key = json.dumps(sorted(paths))
        if key not in self._timings.known:
            self.progress.stage("timing the delivered models", None)
            with self.laboratory.forecast.device.saved(self.laboratory.bench.original) as original:
                found = self.laboratory.forecast.device.compare({"original": original, **paths}, bursts=40)
            self._timings.add(key, {name: ratio(found, name, "original") for name in paths})
        return dict(self._timings.known[key])

    def _latencies(self, models: Mapping[str, onnx.ModelProto]) -> dict[str, float]:
        device = self.laboratory.forecast.device
        with ExitStack() as files:
            models = {"original": self.laboratory.bench.original, **models}
            paths = {name: files.enter_context(device.saved(model)) for name, model in models.items()}
            found = device.compare(paths)
        return {name: ratio(found, name, "original") for name in models}

    def _cut(self, route: str, share: float, epochs: float) -> Item:
        """The largest of a route's cuts that was measured within the budget; where none is, the fastest."""
        ladder, graph = self._routes[route], self.laboratory.bench.graph
        fits = [name for name in ladder if self._ratios.known[name] <= _AIM * share]

        def weights(name: str) -> int:
            return sum(inputs * outputs for inputs, outputs in ladder[name].widths(graph).values())

        best = max(fits, key=weights) if fits else min(ladder, key=lambda name: float(self._ratios.known[name]))
        return Item(route=route, share=share, epochs=epochs, plan=ladder[best], name=best)

    def _about(self, share: float) -> list[Plan]:
        laboratory = self.laboratory
        limits = {"latency": _AIM * laboratory.budget(share).limits["latency"]}
        return about_the_budget(laboratory.space, laboratory.bench.graph, laboratory.table, limits, laboratory.predict)

    def _at(self, share: float) -> Laboratory:
        """Predictions corrected by what plans about the budget took."""
        original = self.laboratory.original.latency_us
        found = [self._ratio(plan) * original / self.laboratory.predict(plan).latency_us for plan in self._about(share)]
        # What the search aims at is a little below the budget.
        return replace(self.laboratory, margin=round(median(found) / _AIM, 3))

    def _finalists(self, share: float) -> list[Plan]:
        """The search's best plans, and those that it started from, if they are predicted to be within the budget."""
        laboratory, found = self._at(share), list[Plan]()
        budget = laboratory.budget(share)
        best = best_plans(laboratory, self._cache, share, seeds=self._seeds)[:_MEASURED]
        for plan in (*best, *self._seed_plans(share).values()):
            if budget.met(laboratory.predict(plan)) and plan.key not in {other.key for other in found}:
                found.append(plan)
        return found

    def _variants(self, share: float) -> list[Plan]:
        """Milder ones of the best that are within the budget, by predictions that were corrected by measurements."""
        laboratory, finalists = self._at(share), self._finalists(share)
        budget = laboratory.budget(share).limits["latency"]
        measured = [plan for plan in finalists if self._was_measured(plan)]
        original = laboratory.original.latency_us
        dearest = max(self._ratio(plan) * original / (_AIM * laboratory.predict(plan).latency_us) for plan in measured)
        good = sorted(self._within(finalists, share), key=lambda plan: -laboratory.evaluate(plan))
        return variants(
            laboratory.space,
            good[: _VARIANTS // 2],
            laboratory.table.quality,
            eight_bits(laboratory),
            lambda plan: min(dearest, 1.0) * laboratory.predict(plan).latency_us <= budget,
        )[:_VARIANTS]

    def _seed_plans(self, share: float) -> dict[str, Plan]:
        """What the search started from; its integer program takes seconds."""
        laboratory, graph = self._at(share), self.laboratory.bench.graph
        key = f"{share} {laboratory.space.fingerprint} {code_version()}{margin_text(laboratory)}"
        if key not in self._first.known:
            self._first.add(key, {name: plan.to_json() for name, plan in seeds(laboratory, share).items()})
        return {name: Plan.from_json(data, graph) for name, data in self._first.known[key].items()}

    def _ratio(self, plan: Plan) -> float:
        return float(self._ratios.known[f"{OURS}-{plan.key}"])

    def _within(self, plans: Sequence[Plan], share: float) -> list[Plan]:
        return [plan for plan in plans if self._was_measured(plan) and self._ratio(plan) <= _AIM * share]

    def _was_measured(self, plan: Plan) -> bool:
        return f"{OURS}-{plan.key}" in self._ratios.known

    def _searched(self, share: float, epochs: float) -> Plan | None:
        """The search's choice: the best of those that it measured within the budget, by the product's ladder."""
        bench, steps = self.laboratory.bench, rungs(epochs, most_entrants(epochs))
        pool = self._within([*self._variants(share), *self._finalists(share)], share)
        by_hand = [plan for name, plan in self._seed_plans(share).items() if name == FEWEST_BLOCKS]
        pool.sort(key=lambda plan: (plan not in by_hand, -self.laboratory.evaluate(plan)))
        pool = pool[:_JUDGED]
        self.progress.stage(f"judging the search's finalists at {share:.0%}", len(pool))
        for plan in pool:
            if plan.key not in self._one_shot.known:
                self._one_shot.add(plan.key, bench.one_shot(plan))
            self.progress.advance()
        plans = in_order(
            self.laboratory.space,
            [(plan, float(self._one_shot.known[plan.key])) for plan in pool],
            self.laboratory.table.quality,
            error=bench.standard_error,
            original=bench.original_one_shot,
            always=by_hand,
            places=steps[0].models,
        )
        for rung, after in pairwise(steps):
            reached = {i: self._rung(plan, rung.epochs) for i, plan in enumerate(plans[: rung.models])}
            order = best_alike(reached, partial(bench.standard_error, whole=True))[: after.models]
            plans = [plans[i] for i in sorted(order)]
        return plans[0] if plans else None

    def _rung(self, plan: Plan, epochs: float) -> float:
        """The validation metric after a short distillation."""
        key = f"{plan.key} {epochs:g} {self._recipe}"
        if key not in self._rungs.known:
            self.progress.stage(f"{plan.key}: {epochs:.2g} epochs", None)
            bench = self.laboratory.bench
            model, full = recovered(bench, plan, epochs, repaired=True)
            self._rungs.add(key, bench.metric(bench.export(model, full), "validation"))
        return float(self._rungs.known[key])

    def _key(self, item: Item) -> str:
        return f"{item.name} {item.epochs:g} {self._recipe}"

    def _path(self, item: Item) -> Path:
        return self._folder / f"{item.name}-{item.epochs:g}-{self._recipe}.onnx"


def run(
    laboratory: Laboratory,
    cache: Path,
    *,
    shares: Sequence[float],
    epochs: Sequence[float],
    routes: Sequence[str],
    ladder: float | None,
    seeds: int,
    steps: Sequence[str] = STEPS,
    deadline: float | None = None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """What the search found with each of `seeds`, and the other routes.

    `ladder`: so many epochs decide how many plans go up the ladder and for how long; None: as many as are trained.
    The steps that are named: `searches` evaluates, `models` trains, the others measure and want an idle core.
    After `deadline` (of `time.monotonic`) no further model is begun.
    """
    deliveries = Deliveries(laboratory, cache, progress, routes=routes, ladder=ladder, seeds=seeds)
    if "cuts" in steps:
        deliveries.measure_cuts()
        progress.note(f"in 8 bits with nothing removed: {deliveries.untouched_ratio():.3f} of the original's latency")
        deliveries.measure_about(shares)
    if "searches" in steps:
        deliveries.search(shares)
    if "finalists" in steps:
        deliveries.measure_finalists(shares)
    if not {"models", "timing"} & set(steps):
        return []
    if "models" in steps:
        for item in deliveries.items(shares, epochs, routes):
            if deadline is not None and time.monotonic() > deadline:
                break
            deliveries.deliver(item)
    return deliveries.rows(list(deliveries.items(shares, epochs, routes))) if "timing" in steps else []
