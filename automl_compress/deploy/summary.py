"""A finished run's `result.json` as a few lines of text, and the readings of it that the report shares."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from automl_compress.core.budget import format_metric
from automl_compress.errors import RunFolderError

FIELDS = {"latency": "latency_us", "size": "size_bytes", "memory": "memory_bytes"}
SCHEMA = "automl-compress/result"
VERSION = 1
HEADLINES = {
    "met": "met: the delivered model was measured and is within every budget",
    "estimated": "estimated: by estimate the delivered model is within every budget; it was not measured on the device",
    "infeasible": "infeasible: no reachable model is within the budget",
    "interrupted": "interrupted: the search did not finish; the same command with the same -o continues it",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One budget against the delivered model's figure, in microseconds or bytes; None without a delivered model.

    `provenance` of that figure: a size is always measured, latency and memory only on the device itself.
    """

    metric: str
    limit: float
    measured: float | None
    nearest: float | None
    provenance: str = "measured"

    @property
    def met(self) -> bool:
        return self.measured is not None and self.measured <= self.limit

    @property
    def outcome(self) -> str:
        """'met', 'missed', 'met by estimate', 'missed by estimate', or 'no model'."""
        if self.measured is None:
            return "no model"
        return ("met" if self.met else "missed") + ("" if self.provenance == "measured" else " by estimate")


def verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """Every budget of a `result.json` object with the delivered model's figure."""
    delivered = result.get("delivered") or _worst(result.get("front", {}))
    return [
        Verdict(
            metric=metric,
            limit=limit,
            measured=delivered.get(FIELDS[metric]),
            nearest=result.get("nearest", {}).get(metric),
            provenance="measured" if metric == "size" else delivered.get("provenance", "measured"),
        )
        for metric, limit in result["budget"].items()
    ]


def _worst(front: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The highest figure of any model of a front, which each budget is held against."""
    models = list(front.values())
    if not models:
        return {}
    worst: dict[str, Any] = {field: max(model[field] for model in models) for field in FIELDS.values()}
    return {**worst, "provenance": models[0].get("provenance", "measured")}


def headline(result: Mapping[str, Any]) -> str:
    """The outcome in one line."""
    if result.get("front"):
        how = "measured" if result["status"] == "met" else "estimated, not measured on the device"
        return f"{result['status']}: {len(result['front'])} models, each better than all cheaper ones, {how}"
    status = str(result["status"])
    if result.get("goal") and status == "met":
        return "met: the delivered model was measured, is good enough and within every budget"
    if result.get("goal") and status == "infeasible":
        return "infeasible: no model that was found is good enough and within every budget"
    return HEADLINES.get(status, status)


def models(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The models of a `result.json` object by name: the original, the baselines, the delivered one."""
    named = {
        "original": result.get("original"),
        **result.get("baselines", {}),
        **result.get("front", {}),
        "delivered": result.get("delivered"),
    }
    return ((name, figures) for name, figures in named.items() if figures)


def estimated(result: Mapping[str, Any]) -> bool:
    """Whether latency and memory in a `result.json` object are anything but measured on the device."""
    return any(figures.get("provenance", "measured") != "measured" for _, figures in models(result))


def read_result(run: Path) -> dict[str, Any]:
    """The `result.json` object of a run folder (or of the file itself). Raises RunFolderError where there is none."""
    path = run / "result.json" if run.is_dir() else run
    if not run.exists():
        raise RunFolderError(f"{run}: no such run folder")
    if not path.exists():
        raise RunFolderError(f"{run}: holds no result.json; the run has not finished, -o {run} resumes it")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); start the run again with -o {path.parent}") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise RunFolderError(f"{path} is not the result of a run: its schema is not {SCHEMA!r}")
    if result.get("version") != VERSION:
        raise RunFolderError(f"{path} has version {result.get('version')!r}; this program reads version {VERSION}")
    return result


def summarize(result: Mapping[str, Any]) -> str:
    """The outcome, each budget with the figure that decided, and a table of the models."""
    asked = [_verdict_line(verdict) for verdict in verdicts(result)]
    asked += [f"  {line}" for line in goal_lines(result)]
    if result.get("binding"):
        asked.append(f"  most of the cheapest plan's cost: {', '.join(result['binding'])}")
    lines = [headline(result), *(["", *asked] if asked else [])]
    rows = [_model_row(name, figures) for name, figures in models(result)]
    if rows:
        how = "estimated " if estimated(result) else ""
        headers = ("model", "metric", "test", f"{how}latency", "ratio", "size", f"{how}memory")
        lines += ["", *_table([headers, *rows])]
    lines += _standing_lines(result)
    address = result.get("device", {}).get("address", "local")
    if address != "local":
        lines += ["", f"measured on {address}"]
    if result.get("notes"):
        lines += ["", *(f"note: {note}" for note in result["notes"])]
    return "\n".join(lines)


def standings(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """How the search did beside the baselines, in words, by rung; empty where nothing was compared."""
    titles = {"one-shot": "before training, on the samples of trials", "full": "trained, on all validation data"}
    found: dict[str, list[str]] = {}
    for standing in result.get("standings", ()):
        found.setdefault(titles.get(standing["rung"], standing["rung"]), []).append(standing["text"])
    return found


def _standing_lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for title, texts in standings(result).items():
        lines += ["", f"beside the baselines, {title}:", *(f"  {text}" for text in texts)]
    return lines


def goal_lines(result: Mapping[str, Any]) -> list[str]:
    """How good the model had to stay, and what was to be as little as possible; nothing for a search within budgets."""
    goal = result.get("goal")
    if not goal:
        return []
    least, delivered = goal["metric_at_least"], result.get("delivered")
    line = f"{'metric':8} at least {format_metric('metric', least)} ({goal['asked']})"
    if delivered:
        line += f", measured {format_metric('metric', delivered['metric'])}: met"
    elif "metric" in result.get("nearest", {}):
        line += f", nearest reached {format_metric('metric', result['nearest']['metric'])}"
    what = goal["minimise"]
    lines = [line]
    if delivered and result.get("original"):
        share = delivered[FIELDS[what]] / result["original"][FIELDS[what]]
        lines.append(f"{what:8} as little as was found: {share:.3f} of the original's")
    return lines


def nearest_text(nearest: Mapping[str, float], binding: Sequence[str]) -> str:
    """'nearest reachable: latency 310 us, size 90 KB; most of it is taken by conv1, fc'; empty if nothing is known."""
    reach = ", ".join(f"{metric} {format_metric(metric, value)}" for metric, value in nearest.items())
    parts = [f"nearest reachable: {reach}"] if reach else []
    parts += [f"most of it is taken by {', '.join(binding)}"] if binding else []
    return "; ".join(parts)


def _verdict_line(verdict: Verdict) -> str:
    line = f"  {verdict.metric:8} at most {format_metric(verdict.metric, verdict.limit)}"
    if verdict.measured is not None:
        line += f", {verdict.provenance} {format_metric(verdict.metric, verdict.measured)}: {verdict.outcome}"
    if verdict.nearest is not None:
        line += f", nearest reachable {format_metric(verdict.metric, verdict.nearest)}"
    return line


def _model_row(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    test = figures.get("test_metric")
    return (
        name,
        f"{figures['metric']:.4f}",
        "-" if test is None else f"{test:.4f}",
        format_metric("latency", figures["latency_us"]),
        f"{figures['latency_ratio']:.3f}",
        format_metric("size", figures["size_bytes"]),
        format_metric("memory", figures["memory_bytes"]),
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as aligned text: the first column to the left, figures to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
