"""What a search space gives each part of a network, which rule says so, and what is left out and why.

Nothing is trained, and nothing is measured: costs are predicted from what the device's profile holds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from automl_compress.core.budget import METRICS, Cost
from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.errors import ExportError, InputError
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.kernels import Kernel
from automl_compress.model.task import Task
from automl_compress.model.task_file import require_task_file
from automl_compress.model.trace import trace
from automl_compress.progress import Progress, SilentProgress
from automl_compress.search.campaign.opening import load, open_device, task_name
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.solvers.decode import cheapest
from automl_compress.search.space.offers import offered_bits
from automl_compress.search.space.rules import SpaceFile
from automl_compress.search.space.space import SearchSpace, load_space, resolve
from automl_compress.search.table.dominated import drop_dominated
from automl_compress.search.table.forecast import Forecast
from automl_compress.search.table.pricing import additive_table, covering_plans
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS

_ONLY_BY_HAND = "a repeated layer: it can be cut from Python, not in a search"


@dataclass(frozen=True, kw_only=True)
class Priced:
    """Costs as a profile predicts them. `floor`, `ceiling`: metric -> the lowest figure of any plan that the table
    suggests, and that of the plan that changes least. `kernels`: provenance -> how many of the kernels that plans
    consist of are known so."""

    profile: str
    file: str
    floor: Mapping[str, float]
    ceiling: Mapping[str, float]
    provenance: str
    kernels: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A space applied to one network.

    rules     as written
    priced    what the profile says; None if there is none or it holds nothing: then `unpriced` says why, and no option
              was dropped for what it costs
    budgets   the costs that a search would limit, by which options were dropped
    """

    network: str
    rules: SpaceFile
    space: SearchSpace
    budgets: tuple[str, ...]
    priced: Priced | None = None
    unpriced: str = ""
    warnings: tuple[str, ...] = field(default=())

    @property
    def graph(self) -> Graph:
        return self.space.graph

    @property
    def plans_log10(self) -> float:
        """The decimal logarithm of how many combinations of options there are."""
        return sum(math.log10(len(decision.options)) for decision in self.space.decisions)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        space, graph = self.space, self.graph
        decided = Counter(space.decided_by.values())
        frozen: dict[str, list[str]] = {}
        for entry in graph.frozen:
            frozen.setdefault(entry.layer, []).append(entry.reason)
        return {
            "network": self.network,
            "space": space.name,
            "description": self.rules.description,
            "importance": space.importance,
            "budgets": list(self.budgets),
            "rules": [
                {"number": number, "text": rule.text, "gives": list(rule.gives), "decides": decided[number]}
                for number, rule in enumerate(self.rules.rules, 1)
            ],
            "width": self._choice("width"),
            "groups": [
                {
                    "name": group.name,
                    "channels": group.size,
                    "producers": list(group.producers),
                    "alternatives": sorted(graph.alternatives[group.name]),
                    "sparsity": self._choice(f"sparsity.{group.name}"),
                }
                for group in graph.groups
            ],
            "blocks": [
                {
                    "name": block.name,
                    "layers": list(block.layers),
                    "drop": self._choice(f"drop.{block.name}"),
                    "why_not": "" if block.ending == "zeros" else _ONLY_BY_HAND,
                }
                for block in graph.blocks
            ],
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "in_channels": layer.in_channels,
                    "out_channels": layer.out_channels,
                    "parameters": layer.params,
                    "bits": self._choice(f"bits.{layer.name}"),
                    "mask": self._choice(f"mask.{layer.name}"),
                    "left_whole": frozen.get(layer.name, []),
                }
                for layer in graph.layers
            ],
            "decisions": dict(Counter(decision.kind for decision in space.decisions)),
            "plans_log10": round(self.plans_log10, 2),
            "priced": asdict(self.priced) if self.priced else None,
            "unpriced": self.unpriced,
            "notes": list(space.notes),
            "warnings": list(self.warnings),
        }

    def _choice(self, name: str) -> dict[str, Any]:
        """One decision: its options (none if no rule decides), the rule's number, what is left out."""
        return {
            "options": list(self.space.options(name)),
            "rule": self.space.decided_by.get(name),
            "left_out": [
                {"option": entry.option, "reason": entry.reason}
                for entry in self.space.left_out
                if entry.decision == name
            ],
        }


def describe_space(
    task: Task | str,
    *,
    space: str = "cnn",
    profile: str | None = "local",
    budgets: Sequence[str] = ("latency",),
    weights: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Overview:
    """Apply a search space to a task's network, and drop what a profile shows to be pointless.

    task     a `Task`, or 'path/task.py[:function]' or 'package.module[:function]'
    profile  device profile by name or file; None: bit-widths are offered as this program's runtime has them
    budgets  the costs that a search would limit ('latency', 'size', 'memory'): with a limit on size, options that only
             make the file smaller are offered, and none is dropped for its latency alone

    Nothing is measured. Raises CompressError, with one line that says what to do.
    """
    unknown = [name for name in budgets if name not in METRICS]
    if unknown or not budgets:
        found = repr(unknown[0]) if unknown else "nothing"
        raise InputError(f"budgets: found {found}; name what a search would limit: {', '.join(METRICS)}")
    show = progress or SilentProgress()
    if isinstance(task, str):
        require_task_file(task)
    rules = load_space(space)
    if profile is None:
        show.stage("loading the task")
        loaded = load(task, weights)
        show.stage("tracing the model")
        graph = trace(loaded.model, loaded.example_inputs)
        offered, held_back = offered_bits(DEFAULT_EXECUTIONS, size_limited="size" in budgets)
        return Overview(
            network=task_name(task),
            rules=rules,
            space=resolve(rules, graph, offered, held_back),
            budgets=tuple(budgets),
            unpriced="no profile was named",
        )
    with open_device(profile, "local", show) as device:
        show.stage("loading the task")
        loaded = load(task, weights)
        show.stage("tracing the model")
        graph = trace(loaded.model, loaded.example_inputs)
        executions = device.profile.executions
        offered, held_back = offered_bits(executions, size_limited="size" in budgets)
        plain = Overview(
            network=task_name(task),
            rules=rules,
            space=resolve(rules, graph, offered, held_back),
            budgets=tuple(budgets),
            warnings=tuple(device.profile.warnings),
        )
        if not device.profile.kernels and device.profile.header.roofline is None:
            how = "automl-compress profile TASK measures what the network needs"
            return replace(plain, unpriced=f"profile {device.profile.name} holds no measurements yet; {how}")
        bench = Workbench(loaded, graph, seed=seed, executions=executions)
        try:
            return priced(plain, Forecast(bench, plain.space, device, seed=seed, measure=False), device, show)
        except ExportError as error:
            return replace(plain, unpriced=str(error))


def priced(plain: Overview, forecast: Forecast, device: Device, progress: Progress) -> Overview:
    """The overview with dominated options dropped and costs predicted, by what the device's profile holds."""
    graph, bench, space = plain.graph, forecast.bench, plain.space
    plans = covering_plans(space, graph, executions=bench.executions, seed=0)
    progress.stage("looking at variants", len(plans))
    kernels: list[list[Kernel]] = []
    totals: list[float] = []
    for plan in plans:
        kernels.append(forecast.kernels(plan))
        totals.append(forecast.predict(plan).latency_us)
        progress.advance()
    offered = {d.target: [int(o) for o in d.options] for d in space.decisions if d.kind == "bits"}
    size = forecast.predict(Plan()).size_bytes
    table = additive_table(graph, plans, kernels, totals, size, {}, bench.executions, offered)
    reduced = drop_dominated(space, graph, table, metrics=plain.budgets, predict=forecast.predict)
    narrow = [min(float(o) for o in reduced.options("width"))] if reduced.options("width") else []
    found = [cheapest(reduced, graph, table, metric) for metric in ("latency", "size")]
    floors = [forecast.predict(p) for plan in found for p in (plan, *(replace(plan, width=w) for w in narrow))]
    ceiling = forecast.predict(reduced.plan({}))
    known = {kernel.key: kernel.provenance for executed in kernels for kernel in executed}
    return replace(
        plain,
        space=reduced,
        priced=Priced(
            profile=device.profile.name,
            file=str(device.profile.path),
            floor={m: min(cost.of(m) for cost in floors) for m in METRICS},
            ceiling={m: ceiling.of(m) for m in METRICS},
            provenance=_least([*floors, ceiling]),
            kernels=dict(Counter(known.values())),
        ),
    )


def _least(costs: Sequence[Cost]) -> str:
    return "estimated" if any(cost.provenance == "estimated" for cost in costs) else "interpolated"
