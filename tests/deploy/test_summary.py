from __future__ import annotations

import json
from pathlib import Path

import pytest

from automl_compress.core.result import Figures, Result
from automl_compress.deploy.summary import read_result, summarize
from automl_compress.errors import RunFolderError

ORIGINAL = Figures(metric=0.92, latency_us=750.0, size_bytes=1_100_000, memory_bytes=5_200_000)
RESULT = Result(
    status="infeasible",
    budget={"latency": 30.0, "size": 900_000},
    original=ORIGINAL,
    baselines={"uniform int8": Figures(metric=0.91, latency_us=340.0, size_bytes=350_000, memory_bytes=3_100_000)},
    nearest={"latency": 120.0},
    binding=("conv1",),
    notes=("conv3 is left whole: its shape depends on the data",),
)


def test_the_summary_of_a_result_says_what_result_json_says(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(RESULT.to_json()))
    text = summarize(read_result(tmp_path))
    assert text == summarize(RESULT.to_json())
    assert "latency  at most 30 us, nearest reachable 120 us" in text
    assert "uniform int8  0.9100     -   340 us  1.000  350 KB  3.1 MB" in text
    assert "note: conv3 is left whole" in text


def test_a_budget_is_met_only_by_a_measured_figure() -> None:
    delivered = Figures(metric=0.9, latency_us=29.0, size_bytes=1_000_000, memory_bytes=1)
    result = Result(status="met", budget={"latency": 30.0, "size": 900_000}, original=ORIGINAL, delivered=delivered)
    text = summarize(result.to_json())
    assert "measured 29 us: met" in text
    assert "measured 1 MB: missed" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "damaged"),
        ("[]", "not the result of a run"),
        ('{"schema": "other"}', "not the result of a run"),
        ('{"schema": "automl-compress/result", "version": 99}', "version 99"),
        (None, "has not finished"),
    ],
)
def test_a_folder_without_a_good_result_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(RunFolderError, match=said):
        read_result(tmp_path)
