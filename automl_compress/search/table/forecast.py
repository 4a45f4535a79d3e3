"""What plans of one network cost on a device: learned once, then told for any plan.

Two ways. `predict` builds the plan's ONNX model and asks the runtime which kernels it makes of it: tens of
milliseconds, and as exact as the prices of kernels are. `quick` sketches the plan and tells the kernels from what the
runtime made of others: about a millisecond, with an error of its own that is known from plans that were left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray

from automl_compress.core.budget import Cost
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.deploy.sketcher import Sketcher
from automl_compress.errors import ExportError
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.kernels import Kernel, Lowered
from automl_compress.hardware.prediction.cost import LATENCY_TERMS, CostModel, Tensors, priced
from automl_compress.hardware.prediction.fit import Fit
from automl_compress.hardware.prediction.foresee import foresee
from automl_compress.hardware.prediction.interpolate import PriceList, Total
from automl_compress.hardware.prediction.kernel_key import (
    integer_nodes,
    reordered_bytes,
    traffic_bytes,
    working_bytes_of,
)
from automl_compress.hardware.prediction.liveness import live_bytes
from automl_compress.hardware.prediction.measure import (
    Filled,
    measure_again,
    measure_model,
    measure_variants,
    spread_evenly,
    weigh_models,
)
from automl_compress.hardware.prediction.sketch import Sketch, fit_size
from automl_compress.hardware.prediction.surroundings import Sample, Surroundings
from automl_compress.hardware.profile.schema import CorrectionRecord
from automl_compress.progress import Progress, SilentProgress
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.pricing import covering_plans, layer_bytes, random_plan, weight_bytes
from automl_compress.techniques.quantization.formats import format_of

# Shares of removed blocks among random plans: few, as a search proposes them, and many.
_DROP_SHARES = (0.05, 0.15, 0.3)
_WIDTH_SHARE = 0.6
_BATCH = 8
# Lowering a model takes as long as it has nodes and bytes: so many of both, together, are done in a tenth of a second.
_USUAL_NODES = 400
_USUAL_BYTES = 40_000_000


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured.

    pool      random plans that are lowered, not measured; fewer of a network that is large to lower
    traced    of these, how many at most are measured, those first whose kernels are known least, until in nine of ten
              what is interpolated adds no more than `target` (relative standard deviation of the sum)
    checks    plans measured at the end whatever is known of their kernels
    memories  models whose memory is measured, small and large ones
    """

    pool: int
    traced: int
    target: float
    checks: int
    memories: int


SEARCH = Effort(pool=24, traced=8, target=0.02, checks=0, memories=8)
PROFILE = Effort(pool=240, traced=120, target=0.004, checks=12, memories=40)


class Forecast:
    """Costs of plans of `bench`'s network within `space`, on `device`.

    With `measure`, kernels that a plan needs and the profile knows too little of are measured when it is predicted.
    """

    def __init__(
        self,
        bench: Workbench,
        space: SearchSpace,
        device: Device,
        *,
        seed: int = 0,
        measure: bool = True,
    ) -> None:
        self.bench, self.space, self.device = bench, space, device
        self.costs = CostModel(device.profile, device, original=bench.original, measure=measure)
        self.variants: list[Plan] = []
        self._seed = seed
        self._predicted: dict[str, Cost] = {}
        self._seen: dict[str, tuple[Plan, Lowered, int]] = {}
        self._surroundings: Surroundings | None = None
        self._size_terms: NDArray[np.float64] = np.zeros(1)
        self._activation_share = 1.0
        self._reordered_share = 0.0
        self._traffic_share = 1.0
        self._integer_share = 1.0

    def learn(
        self,
        effort: Effort = SEARCH,
        progress: Progress | None = None,
        *,
        between: Callable[[], None] = lambda: None,
    ) -> Filled:
        """Measure what the space needs and the profile lacks. Returns what was added to the profile.

        between  called after every measurement; what it raises ends learning, and what was measured is kept

        Raises DeviceError if measuring fails, ProfileError if the profile is another machine's or can't be written.
        """
        show = progress or SilentProgress()
        known = len(self.device.profile.kernels)
        executions = self.bench.executions
        self.variants = covering_plans(self.space, self.bench.graph, executions=executions, seed=self._seed)
        show.stage("looking at variants", len(self.variants))
        models = [self._lower(plan, show) for plan in self.variants]
        filled = measure_variants(self.device, models, progress=show, memories=0, between=between)
        pool = self._pool(effort, show)
        measured, troubles = self._trace_unknown(pool, effort, show, between)
        weighed = self._weigh(effort.memories, show, between)
        if measured:
            foresee(self.device.profile, {low.key: [k.key for k in low.kernels] for _, low, _ in self._seen.values()})
            self._store_correction()
        self.forget()
        self._surroundings = None
        return replace(
            filled,
            kernels=len(self.device.profile.kernels) - known,
            models=filled.models + measured,
            memories=weighed,
            requests=filled.requests + measured + weighed,
            troubles=(*filled.troubles, *troubles),
        )

    def predict(self, plan: Plan) -> Cost:
        """The plan's predicted cost; the same plan is lowered once."""
        if plan.key not in self._predicted:
            self._predicted[plan.key] = self.costs.predict(self.bench.structure(plan))
        return self._predicted[plan.key]

    def quick(self, plan: Plan) -> Cost:
        """The plan's cost in about a millisecond, for a network of 20 layers. Only after `learn`.

        Raises ExportError where plans of this network can't be sketched (`predict` still works).
        """
        sketch = self.sketcher(plan)
        total, nodes = self.surroundings(sketch)
        tensors = Tensors(
            file=float(np.dot(self._size_terms, sketch.size_terms)),
            weights=sketch.size_terms[0],
            reordered=self._reordered_share * self._blocked_bytes(sketch),
            activations=self._activation_share * live_bytes(sketch),
            traffic=self._traffic_share * sketch.moved_bytes(),
            integer_nodes=self._integer_share * sum(sketch.integer),
            weight_only=self._weight_only(sketch),
            working=self._working_bytes(sketch),
        )
        return self.costs.cost_of(total, nodes, tensors)

    def kernels(self, plan: Plan) -> list[Kernel]:
        """What the runtime executes for a plan, priced."""
        return priced(self._lowered(plan).kernels, self.costs.prices)

    def _lowered(self, plan: Plan) -> Lowered:
        return self._seen[plan.key][1] if plan.key in self._seen else self.device.lowered(self.bench.structure(plan))

    def seen(self, plan: Plan) -> bool:
        """Whether the plan was lowered while learning."""
        return plan.key in self._seen

    def fits(self) -> tuple[Fit, Fit]:
        """What latency and memory of this network's plans are predicted by; they know their error on unseen models."""
        return self.costs.fits(self._priced(Plan()).us)

    def forget(self) -> None:
        """The cost model was corrected: predict anew."""
        self._predicted.clear()

    @cached_property
    def sketcher(self) -> Sketcher:
        """Raises ExportError where the network's plans have to be exported one by one."""
        bench = self.bench
        if not bench.template.usable:
            raise ExportError("plans of this network can't be sketched: each has to be exported by itself")
        return Sketcher(
            bench.template,
            bench.graph,
            bench.original,
            narrowed=lambda plan: bench.structure(plan),
            size_of=lambda plan: weight_bytes(bench.graph, plan, bench.executions),
            executions=bench.executions,
        )

    @property
    def surroundings(self) -> Surroundings:
        """What was learned of how the runtime lowers this network's plans."""
        if self._surroundings is None:
            sketches = [self.sketcher(plan) for plan, _, _ in self._seen.values()]
            samples = [
                Sample(sketch=sketch, kernels=lowered.kernels)
                for sketch, (_, lowered, _) in zip(sketches, self._seen.values(), strict=True)
            ]
            self._surroundings = Surroundings(samples, self.costs.prices)
            seen = [(lowered, size) for _, lowered, size in self._seen.values()]
            self._size_terms = fit_size(sketches, [size for _, size in seen])
            blocked = sum(self._blocked_bytes(sketch) for sketch in sketches)
            found = sum(reordered_bytes(kernel.key for kernel in lowered.kernels) for lowered, _ in seen)
            self._reordered_share = found / blocked if blocked else 0.0
            asked = sum(sum(sketch.integer) for sketch in sketches)
            computed = sum(integer_nodes(kernel.key for kernel in lowered.kernels) for lowered, _ in seen)
            self._integer_share = computed / asked if asked else 0.0
            moved = [traffic_bytes(kernel.key for kernel in lowered.kernels) for lowered, _ in seen]
            self._traffic_share = float(
                np.median([found / sketch.moved_bytes() for found, sketch in zip(moved, sketches, strict=True)])
            )
            activations = [lowered.activation_bytes for lowered, _ in seen]
            self._activation_share = float(
                np.median([found / live_bytes(sketch) for found, sketch in zip(activations, sketches, strict=True)])
            )
        return self._surroundings

    def _blocked_bytes(self, sketch: Sketch) -> float:
        """Weights of convolutions that may run in the runtime's blocked layout: those in floating point."""
        layers, total = self.bench.graph.layer, 0.0
        for position, name in enumerate(sketch.skeleton.layers):
            if name is not None and not sketch.integer[position] and layers[name].kernel:
                total += layer_bytes(layers[name], (sketch.read[position], sketch.written[position], FULL_BITS))
        return total

    def _working_bytes(self, sketch: Sketch) -> float:
        """Of the convolution in integers that needs most."""
        layers = self.bench.graph.layer
        return max(
            (
                working_bytes_of(sketch.written_numbers[i], sketch.written[i], math.prod(layers[name].kernel))
                for i, name in enumerate(sketch.skeleton.layers)
                if name is not None and sketch.integer[i] and layers[name].kernel
            ),
            default=0,
        )

    def _weight_only(self, sketch: Sketch) -> bool:
        """Whether a layer is to keep weights of fewer bits that a kernel unpacks."""
        layers, executions = self.bench.graph.layer, self.bench.executions
        return any(
            bits != FULL_BITS and name is not None and format_of(layers[name].kind, bits, executions) == "blocks"
            for name, bits in zip(sketch.skeleton.layers, sketch.bits, strict=True)
        )

    def _lower(self, plan: Plan, show: Progress) -> onnx.ModelProto:
        model = self.bench.structure(plan)
        self._seen[plan.key] = (plan, self.device.lowered(model), model.ByteSize())
        show.advance(1)
        return model

    def _pool(self, effort: Effort, show: Progress) -> list[Plan]:
        """Random plans at any student width, lowered. Their number doesn't depend on how busy the machine is."""
        rng = np.random.default_rng(self._seed)
        widths = [float(option) for d in self.space.decisions if d.kind == "width" for option in d.options]
        original = self.bench.original
        labour = max(1.0, len(original.graph.node) / _USUAL_NODES + original.ByteSize() / _USUAL_BYTES)
        count = max(_BATCH, int(effort.pool / labour))
        show.stage("looking at random plans", count)
        pool: list[Plan] = []
        while len(pool) < count:
            plan = random_plan(self.space, rng, drop_share=float(rng.choice(_DROP_SHARES)))
            if widths and rng.random() < _WIDTH_SHARE:
                plan = replace(plan, width=float(rng.choice(widths)))
            self._lower(plan, show)
            pool.append(plan)
        return pool

    def _trace_unknown(
        self, pool: Sequence[Plan], effort: Effort, show: Progress, between: Callable[[], None]
    ) -> tuple[int, list[str]]:
        """Measure plans of the pool whose kernels are known least, then the checks. (how many, troubles)."""
        checks = list(pool[: effort.checks]) if self.device.measures else []
        waiting = list(pool[effort.checks :])
        troubles: list[str] = []
        measured = 0
        show.stage("measuring random plans", effort.traced + len(checks))
        while self.device.measures and waiting and measured < effort.traced:
            errors = {plan.key: self._priced(plan).guess_error for plan in waiting}
            if float(np.quantile(list(errors.values()), 0.9)) <= effort.target:
                break
            waiting.sort(key=lambda plan: -errors[plan.key])
            prices = self.costs.prices
            for plan in waiting[:_BATCH]:
                measured += self._measure(plan, prices, troubles, show)
                between()
            del waiting[:_BATCH]
            measure_again(self.device, self.bench.original)
        prices = self.costs.prices
        for plan in checks:
            measured += self._measure(plan, prices, troubles, show)
            between()
        return measured, troubles

    def _weigh(self, count: int, show: Progress, between: Callable[[], None]) -> int:
        """Weigh measured models, evenly spread over their sizes, since memory is not predicted beyond what was seen."""
        known = [(size, plan) for plan, lowered, size in self._seen.values() if self.device.profile.model(lowered.key)]
        order = [plan.key for _, plan in sorted(known, key=lambda entry: (entry[0], entry[1].key))]
        chosen = spread_evenly(order, count)
        show.stage("weighing models", len(chosen))
        models = (self.bench.structure(self._seen[key][0]) for key in chosen)
        return weigh_models(self.device, models, progress=show, between=between)

    def _priced(self, plan: Plan) -> Total:
        """The kernels of a plan that was lowered, added up."""
        return self.costs.prices.total(kernel.key for kernel in self._seen[plan.key][1].kernels)

    def _measure(self, plan: Plan, prices: PriceList, troubles: list[str], show: Progress) -> int:
        """Measure a plan unless the profile has it; `prices`: what was known before. Returns 1 if it was measured."""
        key = self._seen[plan.key][1].key
        if self.device.profile.model(key) is not None:
            return 0
        model, original = self.bench.structure(plan), self.bench.original
        troubles += measure_model(self.device, model, reference=original, prices=prices)
        show.advance(1, kernels=len(self.device.profile.kernels))
        return 1

    def _store_correction(self) -> None:
        """Put the correction and its error on unseen models into the profile, for people and other programs."""
        latency, _ = self.fits()
        record = CorrectionRecord(
            key=self.costs.family,
            coefficients=dict(zip(LATENCY_TERMS, (round(c, 6) for c in latency.coefficients), strict=True)),
            records=latency.records,
            error=latency.error,
            worst_error=latency.worst_error,
            p95_error=latency.p95_error,
            date=datetime.now(timezone.utc).date().isoformat(),
        )
        self.device.profile.add_corrections([record])
