from __future__ import annotations

import io

import pytest

from automl_compress.progress import PlainProgress, RichProgress, SilentProgress, format_seconds, make_progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_at_stages_and_at_intervals() -> None:
    clock, stream = Clock(), io.StringIO()
    with PlainProgress(stream, every=5.0, clock=clock) as progress:
        progress.stage("search", 10)
        for _ in range(10):
            clock.now += 2.0
            progress.advance(infeasible=3)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[0s] search 0/10"
    assert lines[1] == "[6s] search 3/10  14s left  infeasible 3"
    assert [line.split("]")[0] for line in lines] == ["[0s", "[6s", "[12s", "[18s", "[20s"]
    assert "search 10/10" in lines[-1]


def test_the_best_so_far_and_its_cost_are_shown() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every=0.0, clock=Clock())
    progress.stage("search")
    progress.best(0.91234, "0.38 of the latency, predicted")
    assert stream.getvalue().splitlines()[-1] == "[0s] search  best 0.9123 at 0.38 of the latency, predicted"
    progress.another("for another device:")
    progress.stage("search")
    assert stream.getvalue().splitlines()[-2:] == ["[0s] for another device:", "[0s] search"]


def test_a_note_is_said_at_once() -> None:
    stream = io.StringIO()
    PlainProgress(stream, clock=Clock()).note("conv3 is left whole")
    assert stream.getvalue() == "[0s] conv3 is left whole\n"


def test_time_left_is_known_from_pace_and_from_the_limit() -> None:
    clock = Clock()
    progress = SilentProgress(clock=clock)
    progress.stage("search", 100, seconds=60.0)
    assert progress.seconds_left == 60.0
    clock.now = 10.0
    progress.advance(50)
    assert progress.seconds_left == 10.0
    progress.stage("verify")
    assert progress.seconds_left is None


def test_a_terminal_gets_a_live_line_and_notes_above_it() -> None:
    clock, stream = Clock(), Terminal()
    with make_progress(stream, clock=clock) as progress:
        assert isinstance(progress, RichProgress)
        progress.stage("measure [/bold]", 4)
        progress.advance(4, failed=1)
        progress.note("[/red] is printed as it is")
    shown = stream.getvalue()
    assert "[/red] is printed as it is" in shown
    assert "measure [/bold] 4/4  failed 1" in shown
    progress.close()
    assert stream.getvalue() == shown


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_dumb_terminal_and_a_pipe_get_plain_lines(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(stream), PlainProgress)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.9, "59s"), (75, "1m15s"), (3600, "1h00m"), (7260, "2h01m")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
