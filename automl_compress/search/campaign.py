"""One search from an untouched model to finalists that fit the budget on the device.

The order is that of cost: learn the device, refuse what can't be met, learn what each option costs in quality, try many
plans without training, measure the best on the device, distil those, and keep the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
import optuna.trial

from automl_compress.core.budget import Budget, Cost, Limit, format_metric
from automl_compress.core.plan import Plan
from automl_compress.core.result import Figures
from automl_compress.deploy.run_folder import RunFolder
from automl_compress.errors import InfeasibleError
from automl_compress.hardware.cost import CostModel
from automl_compress.hardware.device import Device
from automl_compress.hardware.measure import measure_variants
from automl_compress.hardware.timer import ratio
from automl_compress.progress import Progress
from automl_compress.search.decode import Decoder, cheapest, solve
from automl_compress.search.evaluate import Workbench
from automl_compress.search.ladder import SURVIVORS, Candidate, Recovery, short
from automl_compress.search.pricing import additive_table, covering_plans, uniform_bits
from automl_compress.search.sampler import make_sampler
from automl_compress.search.sensitivity import Sensitivity, measure_sensitivity
from automl_compress.search.space import SearchSpace, drop_dominated
from automl_compress.search.study import (
    Objective,
    best_feasible,
    open_study,
    ranked,
    run_trials,
    seed_plans,
    trial_counts,
)
from automl_compress.search.table import AdditiveTable
from automl_compress.techniques.distill import Schedule

# The search aims a little below a budget: a prediction errs by a percent or two, and a miss costs a distillation.
AIM = {"latency": 0.985, "memory": 0.97}
_REACH = 1.03  # an estimate this far above a limit is not yet proof that the limit can't be met
_CONFIRM = 8
_MEMORIES = 8
_MILP_SCALES = (0.6, 1.4)
_MILP_STEPS = 7
_ROUNDS = 4
STUDY = "one-shot"
MILP = "milp"


def _row(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    predicted = trial.user_attrs.get("predicted", {})
    infeasible = any(value > 0 for value in trial.constraints.values())
    state = {"COMPLETE": "complete", "PRUNED": "infeasible" if infeasible else "pruned"}.get(trial.state.name, "failed")
    return {
        "number": trial.number,
        "state": state,
        "metric": trial.value if trial.state.name == "COMPLETE" else None,
        "predicted_latency_us": predicted.get("latency"),
        "predicted_size_bytes": predicted.get("size"),
        "rung": "one-shot",
    }


@dataclass
class Campaign:
    """The state of one search. `limits` are the budgets as written, `budget` what they come to beside the original."""

    bench: Workbench
    space: SearchSpace
    device: Device
    limits: Mapping[str, Limit]
    folder: RunFolder
    progress: Progress
    identity: Mapping[str, str]
    seed: int = 0
    sampler: str = "budget"
    storage: str | None = None
    costs: CostModel = field(init=False)
    original: Cost = field(init=False)
    budget: Budget = field(init=False)
    table: AdditiveTable = field(init=False)
    _predicted: dict[str, Cost] = field(default_factory=dict)
    _study: optuna.Study | None = None
    _milp: Plan | None = None

    def learn(self) -> None:
        """Everything that comes before the first trial. Raises InfeasibleError if no trial could help."""
        self.measure_original()
        self.learn_device()
        self.require_feasible()
        self.learn_quality()

    def measure_original(self) -> None:
        """Export and measure the original once; a resumed run holds its budgets against the same figures."""
        self.progress.stage("measuring the original")
        path = self.folder.path / "original.onnx"
        if not path.exists():
            self.folder.write_bytes("original.onnx", self.bench.original.SerializeToString())
        known = self.folder.read_json("original.json")
        if known is None:
            timing = self.device.compare({"original": path})["original"]
            known = {
                "latency_us": timing.median_us,
                "size_bytes": path.stat().st_size,
                "memory_bytes": self.device.memory_bytes(path),
            }
            self.folder.write_json("original.json", known)
        self.original = Cost(**known, provenance="measured")
        self.budget = Budget.resolve(self.limits, self.original)
        self.costs = CostModel(self.device.profile, self.device, original=self.bench.original)

    def learn_device(self) -> None:
        """Show the device every shape that the space can reach, and make the additive table."""
        plans = covering_plans(self.space, self.bench.graph, seed=self.seed)
        models = [self.bench.structure(plan) for plan in plans]
        measure_variants(self.device, models, progress=self.progress, memories=_MEMORIES)
        self.costs.anchor(models[0], self.original.latency_us)
        self._predicted = {plan.key: self.costs.predict(model) for plan, model in zip(plans, models, strict=True)}
        totals = [self._predicted[plan.key].latency_us for plan in plans]
        lowered = [self.costs.lower(model) for model in models]
        self.table = additive_table(self.bench.graph, plans, lowered, totals, self.original.size_bytes, {})
        self._fix_space()

    def require_feasible(self) -> None:
        """Raise InfeasibleError at once where even the cheapest plan is over a budget."""
        floors = self.floors()
        over = {m: f for m, f in floors.items() if f > self.budget.limits[m] * _REACH}
        if not over and self._solve({m: limit * _REACH for m, limit in self._table_limits().items()}) is not None:
            return
        nearest = {m: max(f, self.budget.limits[m]) if m not in over else f for m, f in floors.items()}
        what = ", ".join(
            f"{m} {format_metric(m, f)} (asked {format_metric(m, self.budget.limits[m])})"
            for m, f in (over or floors).items()
        )
        how = "the cheapest reachable model needs" if over else "the budgets can't be met together; each alone reaches"
        raise InfeasibleError(f"{how} {what}", nearest=nearest, binding=self.binding())

    def learn_quality(self) -> None:
        """Measure, or read from the run folder, what each option costs in quality."""
        self.progress.stage("measuring sensitivities", sum(len(d.options) for d in self.space.decisions))
        file = self.folder.file("sensitivity.jsonl")
        quality: Sensitivity = measure_sensitivity(self.bench, self.space, file, self.progress.advance)
        self.table = replace(self.table, quality=quality)

    def explore(self, trials: int, timeout: float | None = None) -> None:
        """One-shot trials until the study holds `trials` finished ones, or `timeout` seconds are over."""
        study = self.study()
        seed_plans(study, self.space, self.seeds())
        self.progress.stage("one-shot trials", trials, seconds=timeout)
        self.progress.advance(min(trials, sum(trial_counts(study).values())))

        def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            self.progress.advance(
                1, **{k: v for k, v in trial_counts(study).items() if v and k in ("failed", "infeasible")}
            )
            best = best_feasible(study)
            if best is not None and best.number == trial.number:
                self.progress.best(best.value or 0.0, self.describe(self.space.plan(best.params)))

        run_trials(study, self._objective(), trials, timeout=timeout, callbacks=[after])

    def study(self) -> optuna.Study:
        """The one-shot study, in the run folder or in the storage that was named."""
        if self._study is None:
            sampler = make_sampler(
                self.sampler,
                space=self.space,
                decoder=Decoder(self.space, self.bench.graph, self.table),
                limits=self.aim,
                predict=self.predict,
                seed=self.seed,
            )
            self._study = open_study(self.storage or self.folder.path, STUDY, sampler, fingerprint=self.identity)
        return self._study

    def _objective(self) -> Objective:
        return Objective(space=self.space, budget=self.aim, predict=self.predict, evaluate=self.bench.one_shot)

    def seeds(self) -> dict[str, Plan]:
        """The plans that every search starts from, by label."""
        result = {"original": Plan()}
        lowest = min((int(o) for d in self.space.decisions if d.kind == "bits" for o in d.options), default=32)
        if lowest < 32:
            result[f"uniform-int{lowest}"] = uniform_bits(self.space, lowest)
        for decision in self.space.decisions:
            if decision.kind == "width":
                for width in decision.options:
                    if width != 1.0:
                        result[f"width-{width:g}"] = replace(uniform_bits(self.space, lowest), width=float(width))
        if self._milp is None:
            self._milp = self._first_milp()
        if self._milp.drop or self._milp.bits or self._milp.sparsity or self._milp.width < 1:
            result[MILP] = self._milp
        return result

    def _first_milp(self) -> Plan:
        """The table's optimum as it was before any trial; the original where there is none within the budget."""
        known = self.folder.read_json("milp.json")
        if known is None:
            known = (self.milp() or Plan()).to_json(self.bench.graph)
            self.folder.write_json("milp.json", known)
        return Plan.from_json(known, self.bench.graph)

    def milp(self) -> Plan | None:
        """The exact optimum of the additive table whose predicted cost is within the budget, None if there is none.

        The table's sums are estimates, so the limit that it is solved for is moved, by bisection, to the loosest whose
        optimum is still predicted to be within the budget.
        """
        limits, low, high = self._table_limits(), *_MILP_SCALES
        best: Plan | None = None
        for _ in range(_MILP_STEPS):
            scale = (low + high) / 2
            plan = self._solve({metric: limit * scale for metric, limit in limits.items()})
            if plan is not None and self.aim.met(self.predict(plan)):
                best, low = plan, scale
            elif plan is None:
                low = scale
            else:
                high = scale
        return best

    def finalists(self, trials: int, timeout: float | None = None) -> list[Plan]:
        """The best one-shot plans that were measured on the device and are within the budget, best first.

        A plan that misses corrects the cost model, and the next ones are held against that.
        """
        tried: set[str] = set()
        passed: list[Plan] = []
        for number in range(_ROUNDS):
            self.explore(trials + number * max(8, trials // 4), timeout)
            pool = [plan for plan in self._ranked() if plan.key not in tried][:_CONFIRM]
            tried |= {plan.key for plan in pool}
            passed += self.confirm(pool)
            if passed:
                return passed
        raise InfeasibleError(
            f"none of {len(tried)} plans that were predicted to meet the budget met it when measured",
            nearest=self.floors(),
            binding=self.binding(),
        )

    def confirm(self, plans: Sequence[Plan]) -> list[Plan]:
        """Those plans that meet the latency budget when measured beside the original, in the same order."""
        if not plans or "latency" not in self.budget.limits:
            return list(plans)
        self.progress.stage("measuring the best plans on the device", len(plans))
        paths = {"original": self.folder.path / "original.onnx"}
        with ExitStack() as files:
            paths |= {plan.key: files.enter_context(self.device.saved(self.bench.structure(plan))) for plan in plans}
            timings = self.device.compare(paths)
        result = []
        for plan in plans:
            measured = ratio(timings, plan.key, "original") * self.original.latency_us
            predicted = self.predict(plan)
            if measured <= self.budget.limits["latency"]:
                result.append(plan)
            else:
                self.tighten(predicted, replace(predicted, latency_us=measured, provenance="measured"))
        return result

    def tighten(self, predicted: Cost, measured: Cost) -> None:
        """A model came out dearer than predicted: correct the cost model, and forget what it said before."""
        self.costs.tighten(predicted, measured)
        self._predicted.clear()
        self._study = None  # its sampler proposed by the old predictions

    def climb(self, plans: Sequence[Plan], schedule: Schedule, recovery: Recovery) -> list[Candidate]:
        """Distil briefly, keep the best, distil fully: the finished candidates, best first."""
        survivors = list(plans[:SURVIVORS])
        if schedule.epochs > 0 and len(survivors) > 1:
            tried = [self.recover(plan, "short", short(schedule), recovery) for plan in survivors]
            order = sorted(range(len(tried)), key=lambda i: -tried[i].metric)
            survivors = [survivors[i] for i in order]
        return [self.recover(survivors[0], "full", schedule, recovery)]

    def recover(self, plan: Plan, rung: str, schedule: Schedule, recovery: Recovery) -> Candidate:
        """One recovery with progress."""
        self.progress.stage(f"{rung} distillation", None)

        def on_step(step: int, steps: int, loss: float, images_per_second: float) -> None:
            if step == 1:
                self.progress.stage(f"{rung} distillation", steps)
            self.progress.advance(1, loss=round(loss, 4), images_per_second=round(images_per_second))

        candidate = recovery.recover(plan, rung, schedule, on_step)
        cost = self.describe(replace(candidate.plan, kept={}))
        self.progress.note(f"{rung} distillation: {candidate.metric:.4f} on validation at {cost}")
        return candidate

    def baselines(self, schedule: Schedule, recovery: Recovery) -> dict[str, Candidate]:
        """What the search has to beat, recovered like its own finalists: uniform quantization and the table's optimum."""
        plans = {name: plan for name, plan in self.seeds().items() if name.startswith("uniform-") or name == MILP}
        return {name: self.recover(plan, "full", schedule, recovery) for name, plan in plans.items()}

    def within_budget(self, baselines: Mapping[str, Candidate]) -> list[Candidate]:
        """Those that are predicted to meet the budget: should one be best, it is what the user gets."""
        return [c for c in baselines.values() if self.aim.met(self.predict(replace(c.plan, kept={})))]

    def describe(self, plan: Plan) -> str:
        cost = self.predict(plan)
        share = cost.latency_us / self.original.latency_us
        return f"{share:.3f} of the latency, {cost.size_bytes / 1e3:.0f} KB (predicted)"

    def predict(self, plan: Plan) -> Cost:
        """The plan's predicted cost; the same plan is lowered once."""
        if plan.key not in self._predicted:
            self._predicted[plan.key] = self.costs.predict(self.bench.structure(plan))
        return self._predicted[plan.key]

    @property
    def aim(self) -> Budget:
        """The budget that the search holds its predictions against."""
        return self.budget.scaled(AIM)

    def binding(self) -> tuple[str, ...]:
        """The layers that take most of the cheapest plan's latency (or size), dearest first."""
        metric = "latency" if "latency" in self.budget.limits else "size"
        plan = cheapest(self.space, self.bench.graph, self.table, metric)
        costs = {
            name: self.table.cost(name, (*widths, plan.layer_bits(name))).of(metric)
            for name, widths in plan.widths(self.bench.graph).items()
        }
        return tuple(sorted(costs, key=lambda name: -costs[name])[:3])

    @property
    def has_study(self) -> bool:
        """Whether the search got as far as its first trial."""
        return self._study is not None

    def trial_counts(self) -> dict[str, int]:
        return trial_counts(self.study()) if self.has_study else {}

    def trial_rows(self) -> list[dict[str, Any]]:
        """One row a trial for the report: number, state, metric, predicted cost."""
        return [_row(trial) for trial in self.study().get_trials(deepcopy=False)] if self.has_study else []

    def floors(self) -> dict[str, float]:
        """Metric -> the lowest predicted figure that the space reaches, for each budget."""
        return {m: self._floor(m) for m in self.budget.limits}

    def original_figures(self) -> Figures:
        """The original as measured at the start."""
        return Figures(
            metric=self.original_metric(),
            latency_us=self.original.latency_us,
            size_bytes=int(self.original.size_bytes),
            memory_bytes=int(self.original.memory_bytes),
        )

    def original_metric(self) -> float:
        """The original's validation metric, measured once for a run folder."""
        known = self.folder.read_json("original-metric.json")
        if known is None:
            known = {"metric": self.bench.metric(self.bench.original, "validation")}
            self.folder.write_json("original-metric.json", known)
        return float(known["metric"])

    def all_notes(self) -> tuple[str, ...]:
        """What the report has to say about what was left alone, and how far predictions can be trusted."""
        graph = self.bench.graph
        reasons: dict[str, list[str]] = {}
        for entry in graph.frozen:
            reasons.setdefault(entry.reason, []).append(entry.layer)
        frozen = [f"channels left whole: {', '.join(layers)}: {reason}" for reason, layers in reasons.items()]
        skipped = [f"not counted in MACs: {name} ({count} times)" for name, count in graph.skipped.items()]
        return (*self.space.notes, *frozen, *skipped, *self.costs.notes(self.bench.original))

    def _ranked(self) -> list[Plan]:
        """Plans of finished trials, best first, that today's cost model still finds within the budget."""
        plans = [self.space.plan(trial.params) for trial in ranked(self.study(), 10 * _CONFIRM)]
        return [plan for plan in plans if self.aim.met(self.predict(plan))]

    def _floor(self, metric: str) -> float:
        """The lowest predicted figure of any plan that the table suggests as cheapest."""
        plan = cheapest(self.space, self.bench.graph, self.table, "size" if metric == "memory" else metric)
        return min(self.predict(other).of(metric) for other in (plan, *self._narrowest(plan)))

    def _narrowest(self, plan: Plan) -> list[Plan]:
        widths = [float(o) for d in self.space.decisions if d.kind == "width" for o in d.options]
        return [replace(plan, width=min(widths))] if widths else []

    def _table_limits(self) -> dict[str, float]:
        """The limits that the additive table can be held against; memory follows the file's size."""
        limits = {m: limit for m, limit in self.aim.limits.items() if m != "memory"}
        if "memory" in self.aim.limits:
            share = self.aim.limits["memory"] / max(self.original.memory_bytes, 1.0)
            limits["size"] = min(limits.get("size", float("inf")), share * self.original.size_bytes)
        return limits

    def _solve(self, limits: Mapping[str, float]) -> Plan | None:
        return solve(self.space, self.bench.graph, self.table, limits)

    def _fix_space(self) -> None:
        """Drop dominated options once: a resumed run offers what it offered before, whatever was measured since."""
        known = self.folder.read_json("space.json")
        if known is None:
            space = drop_dominated(self.space, self.bench.graph, self.table, metrics=tuple(self.budget.limits))
            known = {
                "options": {d.name: list(d.options) for d in space.decisions},
                "fixed": dict(space.fixed),
                "notes": list(space.notes),
            }
            self.folder.write_json("space.json", known)
        options = known["options"]
        self.space = replace(
            self.space,
            decisions=tuple(
                replace(d, options=tuple(options[d.name])) for d in self.space.decisions if d.name in options
            ),
            fixed=known["fixed"],
            notes=tuple(known["notes"]),
        )
