"""What a model will cost on the device, before anything is trained.

latency   which kernels the runtime will execute (found by asking it), each priced from the profile, and a correction
          for what lies between kernels, fitted on models that were measured whole
size      the bytes of the file, exactly
memory    learned from file size and live activations of models that were weighed
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import onnx

from automl_compress.core.budget import METRICS, Cost
from automl_compress.hardware.device import Device
from automl_compress.hardware.fit import Fit, fit
from automl_compress.hardware.kernels import Kernel, Lowered, structure_digest, weight_bytes
from automl_compress.hardware.measure import kernel_sum_us, measure_variants, missing_kernels
from automl_compress.hardware.profile import DeviceProfile
from automl_compress.hardware.schema import ModelRecord

# What the runtime's allocator takes at first, the file with its parsed and packed copies, and the activations.
_MEMORY_PRIOR = (1.8e6, 3.0, 1.0)
# Weighing repeats to a few percent and the prior is close, so that fewer models do than for the latency.
_ENOUGH_WEIGHED = 4
_LATENCY_PRIOR = (1.0, 0.0, 0.0)
# Another network's overheads say something about this one only if both take a similar time.
_SIMILAR = 4.0


class CostModel:
    """Predicts costs on `device` from `profile`; measures kernels that the profile doesn't know and stores them.

    original  the model whose variants are priced: the correction then rests on its variants. Without it, and until one
              of them was measured whole, it rests on models of similar size
    margins   metric -> factor >= 1 that predictions are raised by, since verified models came out dearer (`tighten`)
    scale     what today's latencies are of those in the profile (`anchor`): clocks and load differ from day to day
    """

    def __init__(self, profile: DeviceProfile, device: Device, *, original: onnx.ModelProto | None = None) -> None:
        self.profile = profile
        self.device = device
        self.margins: dict[str, float] = dict.fromkeys(METRICS, 1.0)
        self.scale = 1.0
        self._family = structure_digest(original) if original is not None else None
        self._measurements = 0
        self._fits: dict[tuple[ModelRecord, ...], tuple[Fit, Fit]] = {}

    @property
    def measurements(self) -> int:
        """How many measurements this object has caused; 0 where the profile knew everything."""
        return self._measurements

    def lower(self, model: onnx.ModelProto) -> list[Kernel]:
        """The kernels that the runtime executes, priced; `mean_us` is None for those that the profile lacks."""
        prices = self.profile.kernels
        return [
            Kernel(
                key=kernel.key,
                op=kernel.op,
                layer=kernel.layer,
                role=kernel.role,
                mean_us=prices[kernel.key].mean_us if kernel.key in prices else None,
                provenance=prices[kernel.key].provenance if kernel.key in prices else "estimated",
            )
            for kernel in self.device.lowered(model).kernels
        ]

    def predict(self, model: onnx.ModelProto) -> Cost:
        """The cost of one sample. Kernels without a time are measured first and stored.

        Provenance is "interpolated" where every kernel was measured and the correction rests on enough whole models,
        else "estimated". Raises DeviceError if the runtime refuses the model, ProfileError if a kernel is unknown and
        the profile is another machine's.
        """
        latency, memory = self.fits(model)
        lowered = self.device.lowered(model)
        total = kernel_sum_us(self.profile, lowered.kernels)
        size = model.ByteSize()
        certain = all(self.profile.kernels[k.key].provenance == "measured" for k in lowered.kernels)
        return Cost(
            latency_us=latency((total, len(lowered.kernels), 1.0)) * self.scale * self.margins["latency"],
            size_bytes=size * self.margins["size"],
            memory_bytes=self._memory_bytes(model, lowered, memory) * self.margins["memory"],
            provenance="interpolated" if certain and latency.trusted else "estimated",
        )

    def _memory_bytes(self, model: onnx.ModelProto, lowered: Lowered, process: Fit) -> float:
        if self.profile.header.memory.model == "tensors":
            return float(weight_bytes(model) + lowered.activation_bytes)
        return process((1.0, model.ByteSize(), lowered.activation_bytes))

    def fits(self, model: onnx.ModelProto) -> tuple[Fit, Fit]:
        """What a model is predicted by.

        Latency in microseconds from (sum of kernels in microseconds, number of kernels, 1), memory in bytes from
        (1, file size, live activations).
        """
        self._know(model)
        records = tuple(self._comparable(kernel_sum_us(self.profile, self.device.lowered(model).kernels)))
        if records not in self._fits:
            self._fits[records] = (_fit_latency(records), _fit_memory(records))
        return self._fits[records]

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

    def notes(self, model: onnx.ModelProto) -> list[str]:
        """What to know about a model's prediction: how many measurements it rests on, its error on unseen models."""
        notes = [*self.profile.warnings, *self.profile.notes]
        for what, found in zip(("latency", "memory"), self.fits(model), strict=True):
            if found.error is None:
                notes.append(f"{what}: predicted from {found.records} measured models, too few to check it on others")
            else:
                worst = f"{found.worst_error or 0.0:.1%} (worst of {found.records})"
                notes.append(f"{what}: error on unseen models {found.error:.1%} (median), {worst}")
        return notes

    def _know(self, model: onnx.ModelProto) -> None:
        if missing_kernels(self.profile, self.device.lowered(model).kernels):
            filled = measure_variants(self.device, [model], whole_models=0, memories=0)
            self._measurements += filled.requests

    def _comparable(self, total_us: float) -> list[ModelRecord]:
        """The measured models that say something about one whose kernels add up to `total_us`."""
        variants = [record for record in self.profile.models if record.family == self._family]
        if variants:
            return variants
        return [record for record in self.profile.models if 1 / _SIMILAR < record.kernel_sum_us / total_us < _SIMILAR]


def _fit_latency(records: Sequence[ModelRecord]) -> Fit:
    usable = [r for r in records if r.kernel_sum_us > 0]
    rows = [(r.kernel_sum_us, r.nodes, 1.0) for r in usable]
    return fit(rows, [r.measured_us for r in usable], _LATENCY_PRIOR)


def _fit_memory(records: Sequence[ModelRecord]) -> Fit:
    weighed = [(r, r.memory_bytes) for r in records if r.memory_bytes]
    rows = [(1.0, r.size_bytes, r.activation_bytes) for r, _ in weighed]
    return fit(rows, [float(peak) for _, peak in weighed], _MEMORY_PRIOR, nonnegative=True, enough=_ENOUGH_WEIGHED)
