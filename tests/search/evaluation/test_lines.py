from __future__ import annotations

from pathlib import Path

import pytest

from automl_compress.search.evaluation.lines import append_line, read_lines

FIRST, SECOND = {"plan": "a", "metric": 0.1}, {"plan": "b", "metric": 1 / 3}


def test_what_was_appended_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    assert list(read_lines(path)) == []
    append_line(path, FIRST)
    append_line(path, SECOND)
    assert list(read_lines(path)) == [FIRST, SECOND]
    assert path.read_text(encoding="utf-8").count("\n") == 2


@pytest.mark.parametrize("length", range(40))
def test_a_kill_costs_the_line_in_flight(tmp_path: Path, length: int) -> None:
    path = tmp_path / "found.jsonl"
    append_line(path, FIRST)
    append_line(path, SECOND)
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    before = list(read_lines(path))
    append_line(path, SECOND)
    assert list(read_lines(path)) == [*before, SECOND]
    assert before == ([FIRST] if length >= whole.index(b"\n") else [])
