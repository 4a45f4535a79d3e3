from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects
import pytest

from automl_compress.core.plan import Plan
from automl_compress.core.result import Figures, Result
from automl_compress.deploy.report import LayerRow, TrialRow, render, scatter, write_report

PLAN = Plan(width=0.75, sparsity={"conv1": 0.5}, drop=frozenset({"layer2.1"}), bits={"conv1": 8})
LAYERS: tuple[LayerRow, ...] = (
    {
        "name": "conv1",
        "kind": "conv",
        "in_channels": 3,
        "out_channels": 64,
        "kept_in": 3,
        "kept_out": 24,
        "bits": 8,
        "asked": "int8",
        "runs": "QLinearConv",
        "macs": 1_769_472,
        "kept_macs": 663_552,
        "why": "cheap to prune",
    },
    {
        "name": "layer2.1.conv1",
        "kind": "conv",
        "in_channels": 64,
        "out_channels": 64,
        "macs": 9,
        "kept_macs": 0,
        "removed": True,
    },
)
RESULT = Result(
    status="met",
    budget={"latency": 300.0, "size": 400_000.0},
    original=Figures(metric=0.9173, latency_us=757.0, size_bytes=1_100_000, memory_bytes=5_200_000),
    delivered=Figures(
        metric=0.9111,
        latency_us=291.0,
        size_bytes=301_000,
        memory_bytes=3_000_000,
        latency_ratio=0.384,
        latency_spread=0.012,
        predicted_latency_us=288.0,
        test_metric=0.9099,
        plan=PLAN,
    ),
    baselines={"uniform int8": Figures(metric=0.915, latency_us=340.0, size_bytes=350_000, memory_bytes=3_100_000)},
    trials={"complete": 2, "infeasible": 1, "failed": 0},
    device={"processor": "a <b>cpu</b>", "runtime": {"name": "onnxruntime", "threads": 1}, "flags": ["avx2", "fma"]},
    layers=tuple(LAYERS),
    notes=("fc is left whole: <script>alert(1)</script>",),
    folder=Path("runs/x"),
)
TRIALS: list[TrialRow] = [
    {"number": 0, "state": "complete", "metric": 0.91, "predicted_latency_us": 288.0, "predicted_size_bytes": 3e5},
    {"number": 1, "state": "pruned", "metric": 0.5, "predicted_latency_us": 250.0},
    {"number": 2, "state": "infeasible", "metric": None, "predicted_latency_us": 700.0},
    {"number": 3, "state": "failed", "metric": None, "predicted_latency_us": None},
]


class Text(HTMLParser):
    """The visible text of a page, and whether its elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.references: list[str] = []
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"}.intersection(self.open):
            self.words.append(data)


def _page(result: Result = RESULT, trials: list[TrialRow] | None = None) -> Text:
    page = Text(
        render(result, TRIALS if trials is None else trials, commands=["automl-compress search t.py"], plotly_js="js")
    )
    assert page.open == []
    return page


def test_the_file_is_complete_in_itself(tmp_path: Path) -> None:
    path = write_report(RESULT, TRIALS, tmp_path)
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report.html"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert page.count("<script>") == 2
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)


def test_every_figure_is_there_and_says_whether_it_was_measured() -> None:
    text = _page().text
    assert "Measured on the device" in text
    assert "latency 300 us 291 us 97.0% met" in text
    assert "size 400 KB 301 KB 75.2% met" in text
    assert "delivered 0.9111 0.9099 291 us 0.384 1.2% 288 us 301 KB 3 MB" in text
    assert "uniform int8 0.9150 - 340 us" in text
    assert "predicted latency" in text
    assert "automl-compress search t.py automl-compress show runs/x automl-compress replay runs/x TASK" in text
    assert "runtime: threads 1" in text
    assert "2 complete, 1 infeasible ." in text or "2 complete, 1 infeasible." in text


def test_layers_say_what_was_asked_and_what_runs() -> None:
    text = _page().text
    assert "conv1 conv 3 64 → 24 int8 QLinearConv 1,769,472 → 663,552 cheap to prune" in text
    assert "layer2.1.conv1 conv - - - removed 9 → 0" in text
    assert "Removed blocks layer2.1" in text
    assert "student width 0.75" in text


def test_what_others_wrote_is_text_not_markup() -> None:
    page = render(RESULT, [{**TRIALS[0], "rung": "</script><script>alert(2)</script>"}], plotly_js="js")
    assert "<script>alert" not in page
    assert "<b>cpu</b>" not in page


def test_the_chart_is_a_plotly_figure_of_trials_and_models() -> None:
    figure = plotly.graph_objects.Figure(scatter(RESULT, TRIALS))
    traces = {trace.name: trace for trace in figure.data}
    assert set(traces) == {"complete", "pruned", "infeasible, no metric", "measured models"}
    assert list(traces["complete"].x) == [288.0]
    assert list(traces["measured models"].x) == [757.0, 340.0, 291.0]
    assert figure.layout.shapes[0].x0 == 300.0
    assert "1 without a prediction can't be shown." in _page().text
    with pytest.raises(ValueError, match="found running"):
        scatter(RESULT, [{"number": 4, "state": "running"}])
    assert "predicted for trials, measured for models" in figure.layout.xaxis.title.text


@pytest.mark.parametrize("status", ["infeasible", "interrupted"])
def test_a_run_without_a_model_still_gets_its_report(status: str) -> None:
    bare = Result(status=status, budget={"latency": 3.0}, original=None, nearest={"latency": 120.0}, binding=("conv1",))  # type: ignore[arg-type]
    text = _page(bare, []).text
    assert "latency 3 us - - no model 120 us" in text
    assert "No model was measured." in text
    assert "No trial was run." in text
    assert "test split" not in text


def test_a_missed_budget_is_called_missed() -> None:
    assert "missed" in _page(replace(RESULT, budget={"latency": 290.0})).text


def test_the_ladder_is_told_rung_by_rung() -> None:
    rows = (
        {"plan": "abc", "budget": "", "metrics": [0.5, 0.625], "state": "complete"},
        {"plan": "def", "budget": "latency 50.0%", "metrics": [0.25], "state": "pruned"},
        {"plan": "ghi", "budget": "", "metrics": [], "state": "fail", "reason": "<b>diverged</b>"},
    )
    told = render(replace(RESULT, ladder=rows), TRIALS, plotly_js="js")
    for text in ("rung 2", "0.6250", "stopped", "latency 50.0%", "failed: &lt;b&gt;diverged"):
        assert text in told
    assert "<b>diverged" not in told
    assert "<h2>Ladder" not in render(RESULT, TRIALS, plotly_js="js")
