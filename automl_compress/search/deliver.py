"""Verifying finished candidates on the device, and the account of what was done to each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from automl_compress.core.budget import Budget, Cost
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.core.result import Figures
from automl_compress.deploy.verify import ExecutedLayer, check_float, check_quantized, executed_operators
from automl_compress.hardware.timer import ratio
from automl_compress.search.campaign import Campaign
from automl_compress.search.ladder import Candidate


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Figures from one run of alternating bursts, and the budget as it comes to beside that run's original."""

    original: Figures
    delivered: Figures
    baselines: Mapping[str, Figures]
    budget: Budget
    layers: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def cost(self) -> Cost:
        """What the delivered model took, measured."""
        return _cost(self.delivered)

    @property
    def met(self) -> bool:
        return self.budget.met(self.cost)


def verify(campaign: Campaign, candidate: Candidate, baselines: Mapping[str, Candidate]) -> Verified:
    """Check a candidate's outputs and kernels, and measure it with the original and the baselines side by side.

    Raises ExportError if ONNX Runtime and PyTorch disagree.
    """
    bench, device = campaign.bench, campaign.device
    campaign.progress.stage("verifying on the device")
    model = onnx.load(candidate.onnx)
    inputs = tuple(part[:8].float() if part.is_floating_point() else part[:8] for part in bench.samples[0])
    trained = candidate.model(bench)
    check_float(bench.template.fill(trained, candidate.plan), trained, inputs)
    bits = {layer: b for layer, b in candidate.plan.bits.items() if b != FULL_BITS}
    if bits:
        check_quantized(model, tuple(part.numpy() for part in inputs))
    executed = executed_operators(model, [layer.name for layer in bench.graph.layers], bits)
    paths: dict[str, Path] = {"original": campaign.folder.path / "original.onnx", "delivered": candidate.onnx}
    paths |= {name: baseline.onnx for name, baseline in baselines.items()}
    timings = device.compare(paths)
    metrics = {"delivered": candidate.metric, **{name: b.metric for name, b in baselines.items()}}
    metrics["original"] = campaign.original_metric()
    plans = {"delivered": candidate.plan, **{name: b.plan for name, b in baselines.items()}}
    figures = {
        name: Figures(
            metric=metrics[name],
            latency_us=timings[name].median_us,
            latency_ratio=ratio(timings, name, "original"),
            latency_spread=timings[name].spread,
            size_bytes=path.stat().st_size,
            memory_bytes=device.memory_bytes(path),
            predicted_latency_us=campaign.predict(_choices(plans[name])).latency_us if name in plans else None,
            plan=plans.get(name),
        )
        for name, path in paths.items()
    }
    original, delivered = figures.pop("original"), figures.pop("delivered")
    # The two ways to compare (median of ratios, ratio of medians) may differ a little: the budget must hold for both.
    delivered = replace(delivered, latency_us=max(delivered.latency_us, delivered.latency_ratio * original.latency_us))
    notes = [f"{layer.layer}: {layer.reason}" for layer in executed if not layer.ok]
    notes += [
        f"{name}: the timings spread by {t.spread:.0%}; close other programs and measure again"
        for name, t in timings.items()
        if not t.trusted
    ]
    return Verified(
        original=original,
        delivered=delivered,
        baselines=figures,
        budget=Budget.resolve(campaign.limits, _cost(original)),
        layers=layer_rows(campaign, candidate.plan, executed),
        notes=tuple(notes),
    )


def layer_rows(campaign: Campaign, plan: Plan, executed: tuple[ExecutedLayer, ...]) -> tuple[Mapping[str, Any], ...]:
    """One row a layer of the original: what was done to it, what runs, and why."""
    graph, table = campaign.bench.graph, campaign.table
    widths, runs = plan.widths(graph), {layer.layer: layer for layer in executed}
    frozen = {entry.layer: entry.reason for entry in graph.frozen}
    rows = []
    for layer in graph.layers:
        row: dict[str, Any] = {
            "name": layer.name,
            "kind": layer.kind,
            "in_channels": layer.in_channels,
            "out_channels": layer.out_channels,
            "bits": plan.layer_bits(layer.name),
            "macs": layer.macs,
        }
        if layer.name not in widths:
            gone = ", ".join(sorted(plan.drop.intersection(layer.blocks)))
            loss = sum(
                table.quality.get((f"drop.{block}", True), 0.0) for block in plan.drop.intersection(layer.blocks)
            )
            rows.append(
                {**row, "removed": True, "kept_macs": 0, "why": f"block {gone} removed: estimated loss {loss:.3g}"}
            )
            continue
        inputs, outputs = widths[layer.name]
        share = (outputs / layer.out_channels) * (1 if layer.in_axis == layer.out_axis else inputs / layer.in_channels)
        row |= {"kept_in": inputs, "kept_out": outputs, "kept_macs": round(layer.macs * share)}
        if layer.name in runs:
            row["runs"] = runs[layer.name].operator
        rows.append({**row, "why": "; ".join(_reasons(campaign, plan, layer.name, frozen, runs))})
    return tuple(rows)


def _reasons(
    campaign: Campaign, plan: Plan, name: str, frozen: Mapping[str, str], runs: Mapping[str, ExecutedLayer]
) -> list[str]:
    graph, quality = campaign.bench.graph, campaign.table.quality
    layer, reasons = graph.layer[name], []
    for group in layer.out_groups:
        kept, size = plan.kept_count(group, graph.group[group].size), graph.group[group].size
        if kept < size:
            loss = min(
                (
                    v
                    for (n, option), v in quality.items()
                    if n == f"sparsity.{group}" and max(1, round(size * (1 - float(option)))) == kept
                ),
                default=None,
            )
            reasons.append(
                f"{kept} of {size} channels kept" + (f": estimated loss {loss:.3g}" if loss is not None else "")
            )
        else:
            reasons.append("all channels kept")
    if not layer.out_groups and name in frozen:
        reasons.append(f"channels left whole: {frozen[name]}")
    bits = plan.layer_bits(name)
    if bits != FULL_BITS:
        loss = quality.get((f"bits.{name}", bits))
        reasons.append(f"{bits} bits" + (f": estimated loss {loss:.3g}" if loss is not None else ""))
    elif any(d.name == f"bits.{name}" for d in campaign.space.decisions):
        saved = _bits_saving(campaign, plan, name)
        reasons.append(
            "32 bits: fewer would not be faster here"
            if saved <= 0
            else "32 bits: fewer would cost more quality than they save"
        )
    if name in runs and not runs[name].ok:
        reasons.append(runs[name].reason)
    return reasons


def _bits_saving(campaign: Campaign, plan: Plan, name: str) -> float:
    """What the lowest bit-width would save in microseconds at the layer's width, by the table."""
    widths = plan.widths(campaign.bench.graph)[name]
    lowest = min(int(option) for option in campaign.space.options(f"bits.{name}"))
    return (
        campaign.table.cost(name, (*widths, FULL_BITS)).latency_us
        - campaign.table.cost(name, (*widths, lowest)).latency_us
    )


def _choices(plan: Plan) -> Plan:
    return replace(plan, kept={})


def _cost(figures: Figures) -> Cost:
    return Cost(
        latency_us=figures.latency_us,
        size_bytes=figures.size_bytes,
        memory_bytes=figures.memory_bytes,
        provenance="measured",
    )


def final_metric(campaign: Campaign, candidate: Candidate) -> float | None:
    """The delivered ONNX file's metric on the test split; the only place where that split is read."""
    if campaign.bench.task.test is None:
        return None
    return campaign.bench.metric(onnx.load(candidate.onnx), "test")
