"""What a model will cost on the device, before anything is trained.

latency   which kernels the runtime will execute (found by asking it), each priced from the profile, and a correction
          for what the sum leaves out, fitted on models that were measured whole
size      the bytes of the file, exactly
memory    learned from file size, blocked weights, live activations and kernels of weighed models
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from automl_compress.core.budget import METRICS, Cost
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.kernels import Kernel, structure_digest, weight_bytes
from automl_compress.hardware.prediction.fit import MEDIAN_DEVIATION, Fit, fit
from automl_compress.hardware.prediction.interpolate import PriceList, Total
from automl_compress.hardware.prediction.kernel_key import (
    integer_nodes,
    reordered_bytes,
    runs_weight_only,
    traffic_bytes,
    working_bytes,
)
from automl_compress.hardware.prediction.measure import measure_model
from automl_compress.hardware.profile.profile import DeviceProfile
from automl_compress.hardware.profile.schema import ModelRecord

# What the runtime's allocator takes at first, the file and its copies, weights that are kept in another layout as well,
# the activations, what is kept for each node and, beside it, for one in integers, what unpacks weights, and what the
# convolution in integers that needs most works with.
_MEMORY_PRIOR = (1.8e6, 1.7, 1.2, 1.8, 3e3, 2e4, 1.1e6, 1.0)
# Weighing repeats to a few percent and the prior is close, so that fewer models do than for the latency.
_ENOUGH_WEIGHED = 4
# What the correction's terms are called in the profile.
LATENCY_TERMS = (
    "kernel_sum_us",
    "nodes",
    "constant",
    "kernel_sum_us_x_ln_size",
    "kernel_sum_us_x_ln_activations",
    "kernel_sum_us_x_ln_size_squared",
    "kernel_sum_us_x_ln_activations_squared",
    "kernel_sum_us_x_ln_traffic",
    "kernel_sum_us_x_ln_traffic_squared",
)
_LATENCY_PRIOR = (1.0, *[0.0] * (len(LATENCY_TERMS) - 1))
# Another network's overheads say something about this one only if both take a similar time.
_SIMILAR = 4.0
# A prediction whose kernels are known this badly (relative standard deviation of their sum) is worth a measurement.
_UNSURE = 0.03
# A model of whose predicted time so much came from measured kernels tells how good predictions are.
_FORESEEN = 0.5
_ENOUGH_CHECKED = 3
# So many standard deviations from the mean are 95 % of normal errors.
_TWO_SIDED_95 = 1.96


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Bytes of a model: its file, its constants, those of them that the runtime puts into its blocked layout, the peak
    of activations that are alive at the same time, and what all kernels read and write in one run; how many kernels
    compute in integers, whether one unpacks weights, and what one needs besides at most to compute in integers."""

    file: float
    weights: float
    reordered: float
    activations: float
    traffic: float
    integer_nodes: float
    weight_only: bool
    working: float


class CostModel:
    """Predicts costs on `device` from `profile`.

    original  the model whose variants are priced: the correction then rests on its variants. Without it, and until one
              of them was measured whole, it rests on models of similar size
    measure   whether a model is measured, and its kernels stored, where the profile knows too little of them; else they
              are interpolated, however far
    margins   metric -> factor that predictions are raised by, or lowered, since measured models came out otherwise
    scale     what today's latencies are of those in the profile (`anchor`): clocks and load differ from day to day
    """

    def __init__(
        self,
        profile: DeviceProfile,
        device: Device,
        *,
        original: onnx.ModelProto | None = None,
        measure: bool = True,
    ) -> None:
        self.profile = profile
        self.device = device
        self.margins: dict[str, float] = dict.fromkeys(METRICS, 1.0)
        self.scale = 1.0
        self._original = original
        self._family = structure_digest(original) if original is not None else None
        self._measure = measure
        self._measurements = 0
        self._prices = PriceList({})
        self._priced = -1
        self._fits: dict[int, tuple[Fit, Fit]] = {}
        self._fitted = -1
        self._variants: list[ModelRecord] = []

    @property
    def family(self) -> str:
        """The digest of the model whose variants are priced; "any" without one."""
        return self._family or "any"

    @property
    def measurements(self) -> int:
        """How many measurements this object has caused; 0 where the profile knew everything."""
        return self._measurements

    @property
    def prices(self) -> PriceList:
        """What kernels take, by all that the profile knows now."""
        if self.profile.revision != self._priced:
            self._prices, self._priced = PriceList(self.profile.kernels), self.profile.revision
        return self._prices

    def lower(self, model: onnx.ModelProto) -> list[Kernel]:
        """The kernels that the runtime executes, priced."""
        return priced(self.device.lowered(model).kernels, self.prices)

    def predict(self, model: onnx.ModelProto) -> Cost:
        """The cost of one sample.

        Provenance is "interpolated" where no kernel had to be estimated and the correction rests on enough whole
        models, else "estimated". Raises DeviceError if the runtime refuses the model, ProfileError if a measurement is
        called for and the profile is another machine's.
        """
        lowered = self.device.lowered(model)
        keys = [kernel.key for kernel in lowered.kernels]
        if self._measure and self.device.measures and self.prices.total(keys).guess_error > _UNSURE:
            measure_model(self.device, model, reference=self._original or model)
            self._measurements += 1
        total = self.prices.total(keys)
        tensors = Tensors(
            file=model.ByteSize(),
            weights=weight_bytes(model),
            reordered=reordered_bytes(keys),
            activations=lowered.activation_bytes,
            traffic=traffic_bytes(keys),
            integer_nodes=integer_nodes(keys),
            weight_only=runs_weight_only(keys),
            working=working_bytes(keys),
        )
        return self.cost_of(total, len(keys), tensors)

    def cost_of(self, total: Total, nodes: float, tensors: Tensors) -> Cost:
        """The cost of a model whose kernels, `nodes` of them, add up to `total`."""
        latency, memory = self.fits(total.us)
        errors = (total.error, latency.deviation or 0.0)
        return Cost(
            latency_us=latency(_terms(total.us, nodes, tensors.file, tensors.activations, tensors.traffic))
            * self.scale
            * self.margins["latency"],
            size_bytes=tensors.file * self.margins["size"],
            memory_bytes=self._memory_bytes(tensors, nodes, memory) * self.margins["memory"],
            provenance="interpolated" if total.provenance != "estimated" and latency.trusted else "estimated",
            latency_error=math.hypot(*errors),
        )

    def _memory_bytes(self, tensors: Tensors, nodes: float, process: Fit) -> float:
        if self.profile.header.memory.model == "tensors":
            return tensors.weights + tensors.activations
        return process(
            _memory_terms(
                tensors.file,
                tensors.reordered,
                tensors.activations,
                nodes,
                tensors.integer_nodes,
                tensors.weight_only,
                tensors.working,
            )
        )

    def fits(self, total_us: float) -> tuple[Fit, Fit]:
        """What a model whose kernels add up to `total_us` is predicted by.

        Latency in microseconds from the terms of `LATENCY_TERMS`, memory in bytes from `_memory_terms`.
        """
        if self.profile.revision != self._fitted:
            self._fits.clear()
            self._fitted = self.profile.revision
            self._variants = [record for record in self.profile.models if record.family == self._family]
        # Variants of one network are fitted together, whatever they take; else models of a similar time are.
        octave = 0 if self._variants else round(math.log2(max(total_us, 1e-3)))
        if octave not in self._fits:
            records = self._variants or self._similar(total_us)
            self._fits[octave] = (_fit_latency(records), _fit_memory(records))
        return self._fits[octave]

    def by_layer(self, model: onnx.ModelProto) -> dict[str, float]:
        """Layer -> its share of the predicted latency in microseconds, its helpers included; shares add up to it."""
        predicted = self.predict(model).latency_us
        shares: dict[str, float] = defaultdict(float)
        for kernel in self.lower(model):
            shares[kernel.layer or ""] += kernel.mean_us or 0.0
        total = sum(shares.values())
        return {layer: predicted * share / total for layer, share in shares.items()} if total > 0 else {}

    def anchor(self, model: onnx.ModelProto, latency_us: float) -> None:
        """Scale later predictions so that `model` (the original) gets the latency that it has today, margins aside.

        Budgets in percent refer to the original as measured beside the candidates, so predictions must, too.
        """
        predicted = self.predict(model).latency_us
        self.scale *= latency_us / predicted * self.margins["latency"]

    def tighten(self, predicted: Cost, measured: Cost) -> None:
        """Raise later predictions by the factor that a verified model came out dearer by; a cheaper one is ignored."""
        for metric in METRICS:
            if measured.of(metric) > predicted.of(metric) > 0:
                self.margins[metric] *= measured.of(metric) / predicted.of(metric)

    def loosen(self, pairs: Sequence[tuple[Cost, Cost]]) -> bool:
        """Lower later predictions of latency by the factor that all of some (predicted, measured) models came out
        cheaper by at least; whether there is one."""
        dearest = max(measured.latency_us / predicted.latency_us for predicted, measured in pairs)
        if dearest >= 1.0:
            return False
        self.margins["latency"] *= dearest
        return True

    def notes(self, model: onnx.ModelProto) -> list[str]:
        """What to know about a model's prediction: how many measurements it rests on, its error on unseen models."""
        notes = [*self.profile.warnings, *self.profile.notes]
        if environment := self.profile.header.memory.environment:
            chosen = " ".join(f"{name}={value}" for name, value in environment.items())
            notes.append(f"memory: of a process with {chosen} in its environment; the model has to be run so")
        for what, found in zip(("latency", "memory"), self.fits(self._sum_us(model)), strict=True):
            if found.error is None:
                notes.append(f"{what}: predicted from {found.records} measured models, too few to check it on others")
            else:
                worst = f"{found.worst_error or 0.0:.1%} (worst of {found.checked})"
                notes.append(f"{what}: error on unseen models {found.error:.1%} (median), {worst}")
        return notes

    def _sum_us(self, model: onnx.ModelProto) -> float:
        return self.prices.total(kernel.key for kernel in self.device.lowered(model).kernels).us

    def _similar(self, total_us: float) -> list[ModelRecord]:
        """The measured models that say something about one whose kernels add up to `total_us`."""
        return [record for record in self.profile.models if 1 / _SIMILAR < record.kernel_sum_us / total_us < _SIMILAR]


def priced(kernels: Iterable[Kernel], prices: PriceList) -> list[Kernel]:
    """All of a model's kernels with their times in it, and where these come from."""
    executed = list(kernels)
    found = prices.of_model(kernel.key for kernel in executed)
    return [replace(k, mean_us=found[k.key].us, provenance=found[k.key].provenance) for k in executed]


def _terms(
    kernel_sum_us: float, nodes: float, size_bytes: float, activation_bytes: float, traffic: float | None
) -> tuple[float, ...]:
    """What a latency is made of. The same kernel is faster in a smaller model, whose weights and activations are in a
    nearer cache; what prices don't say of that by themselves (`growth.py`) follows the products with the logarithms of
    both and of the traffic, in units of 1 MB, and with their squares, since caches have ends."""
    weights, activations = (math.log(max(count, 1e3) / 1e6) for count in (size_bytes, activation_bytes))
    moved = math.log(max(traffic, 1e3) / 1e6) if traffic is not None else 0.0
    products = (weights, activations, weights**2, activations**2, moved, moved**2)
    return (kernel_sum_us, nodes, 1.0, *(kernel_sum_us * product for product in products))


def _record_terms(record: ModelRecord, *, traffic_known: bool) -> tuple[float, ...]:
    """Of a measured model, by what its kernels were predicted to take before it was measured, where that is known: what
    its own trace says of its kernels would hide what the correction is to find."""
    foreseen = record.predicted_us if (record.foreseen or 0.0) >= _FORESEEN else None
    sum_us, traffic = foreseen or record.kernel_sum_us, record.traffic_bytes if traffic_known else None
    return _terms(sum_us, record.nodes, record.size_bytes, record.activation_bytes, traffic)


def _fit_latency(records: Sequence[ModelRecord]) -> Fit:
    """The correction; its error is that of models that were foreseen, each left out of the fit. The stated deviation is
    the larger of what the median and the 95th percentile say: a few wild ones aren't taken for the rule."""
    usable = [r for r in records if r.kernel_sum_us > 0]
    # Where one of them doesn't tell, the terms of the traffic are zero in all, and so are their coefficients.
    known = all(record.traffic_bytes is not None for record in usable)
    terms = [_record_terms(record, traffic_known=known) for record in usable]
    found = fit(terms, [record.measured_us for record in usable], _LATENCY_PRIOR)
    foreseen = [(r.foreseen or 0.0) >= _FORESEEN and bool(r.predicted_us) for r in usable]
    errors = [error for known, error in zip(foreseen, found.errors, strict=False) if known]
    if len(errors) < _ENOUGH_CHECKED:
        return replace(found, error=None, worst_error=None, p95_error=None, deviation=None)
    middle, high = np.percentile(errors, [50, 95])
    return replace(
        found,
        error=float(middle),
        worst_error=max(errors),
        p95_error=float(high),
        checked=len(errors),
        deviation=float(max(middle / MEDIAN_DEVIATION, high / _TWO_SIDED_95)),
    )


def _fit_memory(records: Sequence[ModelRecord]) -> Fit:
    rows, peaks = [], []
    for r in records:
        if r.memory_bytes and r.working_bytes is not None:
            kept = (r.nodes, r.integer_nodes or 0, bool(r.weight_only), r.working_bytes)
            rows.append(_memory_terms(r.size_bytes, r.reordered_bytes or 0, r.activation_bytes, *kept))
            peaks.append(float(r.memory_bytes))
    return fit(rows, peaks, _MEMORY_PRIOR, nonnegative=True, enough=_ENOUGH_WEIGHED)


def _memory_terms(
    size_bytes: float,
    reordered_bytes: float,
    activation_bytes: float,
    nodes: float,
    integers: float,
    weight_only: bool,
    working: float,
) -> tuple[float, ...]:
    """What a process's memory is made of. Code that is read from the disk counts, too: that for unpacking weights takes
    a megabyte."""
    return (1.0, size_bytes, reordered_bytes, activation_bytes, nodes, integers, float(weight_only), working)
