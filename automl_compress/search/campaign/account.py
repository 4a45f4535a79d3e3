"""The account of a search: what was done to each layer and why, what every trial gave, what was left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import optuna.trial
from optuna.trial import TrialState

from automl_compress.core.graph import Graph, Layer
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.deploy.verify import ExecutedLayer
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.sampling.storage import interrupted
from automl_compress.search.sampling.study import trial_states
from automl_compress.search.table.dominated import is_about_bits


def layer_rows(
    campaign: Campaign, plan: Plan, executed: tuple[ExecutedLayer, ...], zeros: Mapping[str, float]
) -> tuple[Mapping[str, Any], ...]:
    """One row a layer of the original: what was done to it, what runs, and why. `zeros`: layer name -> fraction of its
    weights that are zero in the delivered model."""
    graph, table = campaign.bench.graph, campaign.table
    widths, runs = plan.widths(graph), {layer.layer: layer for layer in executed}
    frozen = {entry.layer: entry.reason for entry in graph.frozen}
    rows = []
    for layer in graph.layers:
        row = _identified(layer, plan)
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
        if layer.name in plan.masks:
            row |= {"mask": plan.masks[layer.name], "zeros": zeros[layer.name]}
        if layer.name in runs:
            row |= {"asked": runs[layer.name].asked, "runs": runs[layer.name].operator}
        rows.append({**row, "why": "; ".join(_reasons(campaign, plan, layer.name, frozen, runs))})
    return tuple(rows)


def own_rows(
    graph: Graph, plan: Plan, width: float, executed: tuple[ExecutedLayer, ...]
) -> tuple[Mapping[str, Any], ...]:
    """One row a layer of a student of the task's own: what runs, in how many bits."""
    runs = {layer.layer: layer for layer in executed}
    rows = []
    for layer in graph.layers:
        row = _identified(layer, plan) | {
            "kept_in": layer.in_channels,
            "kept_out": layer.out_channels,
            "kept_macs": layer.macs,
            "why": f"of student({width:g})",
        }
        if layer.name in runs:
            row |= {"asked": runs[layer.name].asked, "runs": runs[layer.name].operator}
        rows.append(row)
    return tuple(rows)


def _identified(layer: Layer, plan: Plan) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "bits": plan.layer_bits(layer.name),
        "macs": layer.macs,
    }


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
    else:
        reasons += [n.partition(": ")[2] for n in campaign.space.notes if is_about_bits(n, name)]
    if name in plan.masks:
        loss = quality.get((f"mask.{name}", plan.masks[name]))
        reasons.append(f"mask {plan.masks[name]}" + (f": estimated loss {loss:.3g}" if loss is not None else ""))
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


def trial_rows(campaign: Campaign) -> list[dict[str, Any]]:
    """One row a one-shot trial that came to an end: number, budget where there were several, state, metric, cost."""
    return [
        _row(trial, state, label)
        for label, study in campaign.studies().items()
        for trial, state in trial_states(study)
        if state in ("complete", "infeasible", "pruned", "failed")
    ]


def _row(trial: optuna.trial.FrozenTrial, state: str, label: str) -> dict[str, Any]:
    predicted = trial.user_attrs.get("predicted", {})
    return {
        "number": trial.number,
        "state": state,
        "metric": trial.value if state == "complete" else None,
        "predicted_latency_us": predicted.get("latency"),
        "predicted_size_bytes": predicted.get("size"),
        "rung": f"one-shot, {label}" if label else "one-shot",
    }


def ladder_rows(campaign: Campaign) -> tuple[Mapping[str, Any], ...]:
    """One row a plan that entered the ladder: its metric at every rung that it reached, and how it ended at last; a run
    that is taken up again enters it once more."""
    rows: dict[tuple[str, str], Mapping[str, Any]] = {}
    for label, study in campaign.recovery_studies().items():
        for trial in study.get_trials(deepcopy=False):
            row = {
                "plan": trial.user_attrs["plan"],
                "budget": label,
                "metrics": [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)],
                "state": trial.state.name.lower(),
            }
            reason = trial.user_attrs.get("reason")
            rows[label, row["plan"]] = {**row, "reason": reason} if reason else row
    return tuple(rows.values())


def failures(campaign: Campaign) -> list[str]:
    """What failed, and why: of all trials, and of all models that were to be distilled."""
    found: list[str] = []
    for what, studies in (("trial", campaign.studies()), ("distillation", campaign.recovery_studies())):
        reasons: Counter[str] = Counter()
        for study in studies.values():
            trials = study.get_trials(deepcopy=False)
            gone = interrupted(trials)
            failed = [trial for trial in trials if trial.state == TrialState.FAIL and trial.number not in gone]
            reasons.update(str(trial.user_attrs.get("reason", "unknown")) for trial in failed)
        found += [f"{n} {what}{'s' if n > 1 else ''} failed: {reason}" for reason, n in reasons.most_common()]
    return found


def notes(campaign: Campaign) -> tuple[str, ...]:
    """What the report has to say about what was left alone, and how far predictions can be trusted."""
    graph = campaign.bench.graph
    reasons: dict[str, list[str]] = {}
    for entry in graph.frozen:
        reasons.setdefault(entry.reason, []).append(entry.layer)
    frozen = [f"channels left whole: {', '.join(layers)}: {reason}" for reason, layers in reasons.items()]
    skipped = [f"not counted in MACs: {name} ({count} times)" for name, count in graph.skipped.items()]
    rejected = [f"a finished model was rejected: {reason}" for reason in campaign.rejected.values()]
    return (
        *failures(campaign),
        *rejected,
        *campaign.space.notes,
        *frozen,
        *skipped,
        *campaign.costs.notes(campaign.bench.original),
    )
