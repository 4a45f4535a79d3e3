"""How the delivered model was trained, for the report: a row and a stretch of curves for each of its trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "-"


def training_rows(training: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each training (a `TrainingLog.to_json`), in order."""
    return [
        {
            "label": str(log["label"]),
            "steps": str(log["steps"][-1]) if log["steps"] else "0",
            "loss": f"{log['losses'][0]:.4g} → {log['losses'][-1]:.4g}" if log["losses"] else MISSING,
            "metric": MISSING if log["metric"] is None else f"{log['metric']:.4f} ({log['delivered']})",
            "pace": f"{log['images'] / log['seconds']:.0f} images/s" if log["seconds"] else MISSING,
            "computed": str(log["computed"]),
            "rollbacks": str(log["rollbacks"]),
        }
        for log in training
    ]


def training_chart(training: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A plotly figure: loss, learning rate and metric by step, trainings one after the other; None without any."""
    logs = [log for log in training if log["steps"]]
    if not logs:
        return None
    traces, borders, start = [], [], 0
    for log in logs:
        steps = [start + step for step in log["steps"]]
        traces.append(_line(f"loss: {log['label']}", steps, log["losses"], "y"))
        traces.append({**_line("learning rate", steps, log["learning_rates"], "y2"), "showlegend": False})
        if log["metrics"]:
            metrics = [list(column) for column in zip(*log["metrics"], strict=True)]
            line = _line(f"metric: {log['label']}", [start + step for step in metrics[0]], metrics[1], "y3")
            traces.append({**line, "mode": "lines+markers"})
        start = steps[-1]
        borders.append(start)
    axis = {"automargin": True}
    layout = {
        "height": 480,
        "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
        "xaxis": {"title": {"text": "step"}, "anchor": "y2"},
        "yaxis": {**axis, "title": {"text": "loss"}, "domain": [0.36, 1.0]},
        "yaxis2": {**axis, "title": {"text": "rate"}, "domain": [0.0, 0.14]},
        "yaxis3": {**axis, "title": {"text": "metric"}, "domain": [0.18, 0.32]},
        "legend": {"orientation": "h", "y": 1.14},
        "shapes": [
            {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "#d1d5db"}}
            for x in borders[:-1]
        ],
    }
    return {"data": traces, "layout": layout}


def _line(name: str, steps: Sequence[int], values: Sequence[float], axis: str) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "name": name, "x": list(steps), "y": list(values), "yaxis": axis}
