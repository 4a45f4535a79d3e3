"""Verifying finished candidates on the device, and the account of what was done to each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from automl_compress.core.budget import Budget, Cost, format_bytes
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.core.result import Figures
from automl_compress.deploy.verify import check_float, check_quantized, executed_operators
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.savings import measure_savings, offers
from automl_compress.hardware.device.timer import ratio
from automl_compress.search.campaign.account import layer_rows, own_rows
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.techniques.sparsify import compressed_bytes, masks_in_force, zero_shares

_NOT_MEASURED = (
    "latency and memory were estimated from the profile, not measured on the device; what runs each layer, and that "
    "the outputs agree, was checked with the runtime of this machine"
)


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Figures from one run of alternating bursts, and the budget as it comes to beside that run's original.

    Where the device isn't here the figures are estimates, and `cost.provenance` says so.
    """

    original: Figures
    delivered: Figures
    baselines: Mapping[str, Figures]
    budget: Budget
    layers: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def cost(self) -> Cost:
        """What the delivered model took."""
        return self.delivered.cost

    def beside(self, original: Cost) -> Cost:
        """The same at the speed that the machine had when the search measured the original."""
        return replace(self.cost, latency_us=self.cost.latency_us / self.original.latency_us * original.latency_us)

    @property
    def met(self) -> bool:
        return self.budget.met(self.cost)


def verify(campaign: Campaign, candidate: Candidate, baselines: Mapping[str, Candidate]) -> Verified:
    """Check a candidate's outputs and kernels, and measure it with the original and the baselines side by side.

    Raises ExportError if ONNX Runtime and PyTorch disagree.
    """
    bench, device = candidate.bench or campaign.bench, campaign.device
    campaign.progress.stage("verifying on the device" if device.measures else "verifying, without the device")
    model = onnx.load(candidate.onnx)
    inputs = tuple(part[:8].float() if part.is_floating_point() else part[:8] for part in bench.samples[0])
    trained = candidate.model(bench)
    check_float(bench.template.fill(trained, candidate.plan), trained, inputs)
    bits = {layer: b for layer, b in candidate.plan.bits.items() if b != FULL_BITS}
    if bits:
        arrays = tuple(part.numpy() for part in inputs)
        check_quantized(model, arrays, device.outputs(candidate.onnx, arrays))
    names = [layer.name for layer in bench.graph.layers]
    executed = executed_operators(model, names, bits, bench.executions, device.optimized(candidate.onnx))
    paths: dict[str, Path] = {"original": campaign.folder.path / "original.onnx", "delivered": candidate.onnx}
    paths |= {name: baseline.onnx for name, baseline in baselines.items()}
    timings = device.compare(paths)
    metrics = {"delivered": candidate.metric, **{name: b.metric for name, b in baselines.items()}}
    metrics["original"] = campaign.original_metric()
    plans = {name: b.plan for name, b in {"delivered": candidate, **baselines}.items() if b.bench is None}
    masked = bool(masks_in_force(bench.graph, candidate.plan))
    figures = {
        name: Figures(
            metric=metrics[name],
            latency_us=timings[name].median_us,
            provenance=timings[name].provenance,
            latency_ratio=ratio(timings, name, "original"),
            latency_spread=timings[name].spread,
            size_bytes=path.stat().st_size,
            memory_bytes=device.memory_bytes(path),
            predicted_latency_us=campaign.predict(_choices(plans[name])).latency_us if name in plans else None,
            compressed_bytes=compressed_bytes(path.read_bytes()) if masked else None,
            plan=plans.get(name),
        )
        for name, path in paths.items()
    }
    original, delivered = figures.pop("original"), figures.pop("delivered")
    # The two ways to compare (median of ratios, ratio of medians) may differ a little: the budget must hold for both.
    delivered = replace(delivered, latency_us=max(delivered.latency_us, delivered.latency_ratio * original.latency_us))
    notes = [f"{layer.layer}: {layer.reason}" for layer in executed if not layer.ok]
    notes += candidate.notes
    if candidate.width is not None:
        notes.append(f"the delivered model is the task's own student({candidate.width:g}), taught by the original")
    elif candidate.contender:
        notes.append("the delivered model has the best plan's structure, and was trained from fresh weights")
    notes += _about_device(device, delivered)
    if device.measures:
        notes += offers(measure_savings(device, candidate.onnx))
    zeros = zero_shares(trained, bench.graph)
    if masked:
        notes.append(_about_masks(original, delivered))
    notes += [
        f"{name}: the timings spread by {t.spread:.0%}; close other programs and measure again"
        for name, t in timings.items()
        if not t.trusted
    ]
    return Verified(
        original=original,
        delivered=delivered,
        baselines=figures,
        budget=Budget.resolve(campaign.limits, original.cost),
        layers=layer_rows(campaign, candidate.plan, executed, zeros)
        if candidate.width is None
        else own_rows(bench.graph, candidate.plan, candidate.width, executed),
        notes=tuple(notes),
    )


def _about_device(device: Device, delivered: Figures) -> list[str]:
    """That nothing was measured, and where the delivered model is more than the device has in all."""
    header = device.profile.header
    pairs = [("file", delivered.size_bytes, header.device.storage_bytes)]
    if header.memory.model == "process":  # elsewhere weights may stay in storage
        pairs.append(("memory", delivered.memory_bytes, header.device.memory_bytes))
    over = [
        f"the delivered model's {what} of {format_bytes(needed)} is over the {format_bytes(there)} that the device has"
        for what, needed, there in pairs
        if there is not None and needed > there
    ]
    return over if device.measures else [_NOT_MEASURED, *over]


def _about_masks(original: Figures, delivered: Figures) -> str:
    """What masks save, as measured: nothing of the file as it is, nothing of the latency in dense kernels."""
    assert original.compressed_bytes is not None
    assert delivered.compressed_bytes is not None
    return (
        f"masks: compressed (deflate), the delivered file takes {format_bytes(delivered.compressed_bytes)} and the "
        f"original's {format_bytes(original.compressed_bytes)}; as it is, the file holds the zeros "
        f"({format_bytes(delivered.size_bytes)}), and the runtime's dense kernels get no faster by them"
    )


def _choices(plan: Plan) -> Plan:
    return replace(plan, kept={})


def final_metric(campaign: Campaign, candidate: Candidate) -> float | None:
    """The delivered ONNX file's metric on the test split; the only place where that split is read."""
    if campaign.bench.task.test is None:
        return None
    return campaign.bench.metric(onnx.load(candidate.onnx), "test")
