"""The run's account as one self-contained HTML page: what was delivered, against what, how it was measured, and why.

Every figure comes from the result, the study or the device; one that is missing is shown as missing. What was predicted
and what was measured is said beside each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from automl_compress.core.budget import format_bytes, format_metric, format_us
from automl_compress.core.plan import Plan
from automl_compress.core.result import Result
from automl_compress.deploy.pages import fill, write_page
from automl_compress.deploy.summary import Verdict, estimated, goal_lines, headline, models, standings, verdicts
from automl_compress.deploy.training import MISSING, training_chart, training_rows

MARKS = {
    "complete": {"color": "#2563eb", "symbol": "circle", "size": 8},
    "pruned": {"color": "#93a4b8", "symbol": "circle-open", "size": 7},
    "infeasible": {"color": "#d97706", "symbol": "x", "size": 8},
    "failed": {"color": "#dc2626", "symbol": "triangle-up", "size": 9},
}


class TrialRow(TypedDict, total=False):
    """One trial of the study. `state` is a key of `MARKS`; `metric` is the validation metric where one was measured."""

    number: int
    state: str
    metric: float | None
    predicted_latency_us: float | None
    predicted_size_bytes: float | None
    rung: str


class LayerRow(TypedDict, total=False):
    """One layer of the original and what became of it: the entries of `Result.layers`.

    `kept_in` / `kept_out` are the channels that remain, `bits` what the plan asks for, `asked` the same in words,
    `mask` the mask that it has, `zeros` the fraction of its weights that are zero, `runs` the operator that the runtime
    was seen to execute, `why` the reason in words. A layer of a removed block has `removed` set.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kept_in: int
    kept_out: int
    bits: int
    asked: str
    mask: str
    zeros: float
    runs: str
    macs: int
    kept_macs: int
    removed: bool
    why: str


def write_report(
    result: Result, study_rows: Sequence[Mapping[str, Any]], folder: Path, *, commands: Sequence[str] = ()
) -> Path:
    """Write `report.html` into the run folder and return its path.

    `study_rows` are `TrialRow`s, `result.layers` `LayerRow`s. `commands` are the command lines that made the run.
    """
    from plotly.offline import get_plotlyjs

    page = render(result, study_rows, commands=commands, plotly_js=get_plotlyjs())
    return write_page(folder / "report.html", page)


def render(
    result: Result, study_rows: Sequence[Mapping[str, Any]], *, commands: Sequence[str] = (), plotly_js: str
) -> str:
    """The page as text. `plotly_js` is the plotting library's source, which is put into the page."""
    data = result.to_json()
    plan = result.delivered.plan if result.delivered else None
    return fill(
        "report.html.j2",
        result=result,
        headline=headline(data),
        verdicts=[_verdict_row(verdict) for verdict in verdicts(data)],
        models=[model_row(name, figures) for name, figures in models(data)],
        standings=standings(data),
        layers=[_layer_row(layer) for layer in result.layers],
        masked=any("mask" in layer for layer in result.layers),
        goal=goal_lines(data),
        dropped=sorted(plan.drop) if plan else [],
        choices=_choices(plan),
        estimated=estimated(data),
        tested=any(figures.get("test_metric") is not None for _, figures in models(data)),
        ladder=[_ladder_row(row) for row in result.ladder],
        rungs=max((len(row["metrics"]) for row in result.ladder), default=0),
        trials=[(state, count) for state, count in result.trials.items() if count],
        chart=scatter(result, study_rows) if study_rows else None,
        training=training_rows(result.training),
        curves=training_chart(result.training),
        unplaced=sum(1 for row in study_rows if row.get("predicted_latency_us") is None),
        device=_facts(result.device),
        seconds=[(name.replace("_", " "), f"{value:.1f} s") for name, value in result.seconds.items()],
        folder=str(result.folder) if result.folder else "RUN",
        commands=list(commands),
        plotly_js=plotly_js,
        missing=MISSING,
    )


def scatter(result: Result, study_rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A plotly figure: predicted latency against metric for each trial, and the finished models among them.

    Trials without a metric (over the budget, or failed before they had one) stand in a strip of their own below; those
    without a prediction can't be placed. Raises ValueError for a state that `MARKS` lacks.
    """
    unknown = {row["state"] for row in study_rows} - set(MARKS)
    if unknown:
        raise ValueError(f"trial states must be among {', '.join(MARKS)}, found {', '.join(sorted(unknown))}")
    traces = []
    for state, mark in MARKS.items():
        placed = [r for r in study_rows if r["state"] == state and r.get("predicted_latency_us") is not None]
        for strip in (False, True):
            rows = [row for row in placed if (row.get("metric") is None) == strip]
            if rows:
                traces.append(_trial_trace(state, rows, mark, strip=strip))
    finished = list(models(result.to_json()))
    how = "estimated" if estimated(result.to_json()) else "measured"
    if finished:
        traces.append(_model_trace(finished, how))
    if result.front:
        traces.append(_front_trace(result))
    limit = result.budget.get("latency")
    layout: dict[str, Any] = {
        "height": 480,
        "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
        "xaxis": {"title": {"text": f"latency (us): predicted for trials, {how} for models"}, "anchor": "y2"},
        "yaxis": {"title": {"text": "metric (validation)"}, "domain": [0.16, 1.0]},
        "yaxis2": {"domain": [0.0, 0.1], "range": [-1, 1], "showticklabels": False, "title": {"text": "none"}},
        "legend": {"orientation": "h", "y": 1.14},
    }
    if limit is not None:
        line = {"type": "line", "yref": "paper", "x0": limit, "x1": limit, "y0": 0, "y1": 1}
        layout["shapes"] = [{**line, "line": {"color": "#16a34a", "dash": "dash", "width": 1.5}}]
        layout["annotations"] = [
            {"x": limit, "y": 1, "yref": "paper", "text": "budget", "showarrow": False, "yanchor": "bottom"}
        ]
    return {"data": traces, "layout": layout}


def _trial_trace(
    state: str, rows: Sequence[Mapping[str, Any]], mark: Mapping[str, Any], *, strip: bool
) -> dict[str, Any]:
    label = f"{state}, no metric" if strip else state
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label,
        "x": [row["predicted_latency_us"] for row in rows],
        "y": [0 for _ in rows] if strip else [row["metric"] for row in rows],
        "yaxis": "y2" if strip else "y",
        "text": [_trial_text(row) for row in rows],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": dict(mark),
    }


def _model_trace(finished: Sequence[tuple[str, Mapping[str, Any]]], how: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": f"{how} models",
        "x": [figures["latency_us"] for _, figures in finished],
        "y": [figures["metric"] for _, figures in finished],
        "text": [name for name, _ in finished],
        "textposition": "top center",
        "hovertemplate": "%{text}: %{y:.4f} at %{x:.1f} us, " + how + "<extra></extra>",
        "marker": {
            "color": ["#16a34a" if name == "delivered" else "#111827" for name, _ in finished],
            "symbol": ["star" if name == "delivered" else "diamond" for name, _ in finished],
            "size": 12,
        },
    }


def _front_trace(result: Result) -> dict[str, Any]:
    points = sorted((figures.latency_us, figures.metric) for figures in result.front.values())
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [latency for latency, _ in points],
        "y": [metric for _, metric in points],
        "hoverinfo": "skip",
        "line": {"color": "#16a34a", "width": 1},
    }


def _trial_text(row: Mapping[str, Any]) -> str:
    metric, size = row.get("metric"), row.get("predicted_size_bytes")
    parts = [
        f"trial {row.get('number', MISSING)}: {row['state']}",
        f"metric {metric:.4f}" if metric is not None else "no metric",
        f"predicted {format_us(row['predicted_latency_us'])}",
        f"predicted {format_bytes(size)}" if size is not None else "",
        str(row.get("rung", "")),
    ]
    return ", ".join(part for part in parts if part)


def _verdict_row(verdict: Verdict) -> dict[str, Any]:
    measured = verdict.measured
    return {
        "metric": verdict.metric,
        "limit": format_metric(verdict.metric, verdict.limit),
        "measured": MISSING if measured is None else format_metric(verdict.metric, measured),
        "share": MISSING if measured is None else f"{measured / verdict.limit:.1%}",
        "outcome": verdict.outcome,
        "how": verdict.provenance,
        "nearest": MISSING if verdict.nearest is None else format_metric(verdict.metric, verdict.nearest),
    }


def model_row(name: str, figures: Mapping[str, Any]) -> dict[str, str]:
    """A model's figures as text."""
    predicted = figures.get("predicted_latency_us")
    test = figures.get("test_metric")
    return {
        "name": name,
        "metric": f"{figures['metric']:.4f}",
        "test": MISSING if test is None else f"{test:.4f}",
        "latency": format_us(figures["latency_us"]),
        "ratio": f"{figures['latency_ratio']:.3f}",
        "spread": f"{figures['latency_spread']:.1%}" if figures.get("provenance") == "measured" else MISSING,
        "predicted": MISSING if predicted is None else format_us(predicted),
        "size": format_bytes(figures["size_bytes"]),
        "memory": format_bytes(figures["memory_bytes"]),
        "note": str(figures.get("note", "")),
    }


def _ladder_row(row: Mapping[str, Any]) -> dict[str, Any]:
    outcomes = {"complete": "finished", "pruned": "stopped", "fail": "failed"}
    return {
        "plan": row["plan"],
        "budget": row["budget"] or MISSING,
        "metrics": [f"{metric:.4f}" for metric in row["metrics"]],
        "outcome": outcomes.get(row["state"], row["state"]) + (f": {row['reason']}" if "reason" in row else ""),
    }


def _layer_row(layer: Mapping[str, Any]) -> dict[str, Any]:
    removed = bool(layer.get("removed"))
    return {
        "name": layer.get("name", MISSING),
        "kind": layer.get("kind", MISSING),
        "inputs": MISSING if removed else _change(layer, "in_channels", "kept_in"),
        "outputs": MISSING if removed else _change(layer, "out_channels", "kept_out"),
        "asked": MISSING if removed else layer.get("asked") or f"{layer['bits']} bits" if "bits" in layer else MISSING,
        "mask": f"{layer['mask']} ({layer['zeros']:.1%} zero)" if "mask" in layer else MISSING,
        "runs": "removed" if removed else layer.get("runs") or MISSING,
        "macs": _change(layer, "macs", "kept_macs"),
        "why": layer.get("why", ""),
        "removed": removed,
    }


def _change(layer: Mapping[str, Any], before: str, after: str) -> str:
    """'64 → 48', or the one figure when nothing changed."""
    old, new = layer.get(before), layer.get(after)
    if old is None:
        return MISSING
    return f"{old:,}" if new is None or new == old else f"{old:,} → {new:,}"


def _choices(plan: Plan | None) -> list[tuple[str, str]]:
    """The plan's choices that name no single layer."""
    if plan is None:
        return []
    pruned = sum(1 for value in plan.sparsity.values() if value)
    low = sorted({bits for bits in plan.bits.values() if bits < 32})
    return [
        ("student width", f"{plan.width:g} of the original's channels"),
        ("channel groups pruned further", str(pruned)),
        ("blocks removed", str(len(plan.drop))),
        *([("layers masked", str(len(plan.masks)))] if plan.masks else []),
        *((f"layers asked to run in {bits} bits", str(list(plan.bits.values()).count(bits))) for bits in low),
    ]


def _facts(device: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as 'runtime: threads' -> '1', in their order."""
    rows: list[tuple[str, str]] = []
    for name, value in device.items():
        label = f"{prefix}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += _facts(value, prefix=f"{label}: ")
        elif isinstance(value, (list, tuple)):
            rows.append((label, ", ".join(str(item) for item in value)))
        else:
            rows.append((label, MISSING if value is None else str(value)))
    return rows
