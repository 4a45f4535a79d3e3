"""What the system's own accounts come to, worked out by hand."""

from __future__ import annotations

import os

import pytest

from automl_compress.hardware.measuring.conditions import (
    conditions,
    parse_loadavg,
    parse_stat,
    parse_throttled,
    pinned_cores,
    snapshot,
)

TICK = os.sysconf("SC_CLK_TCK")


def stat(*rows: tuple[float, ...]) -> str:
    """/proc/stat with (user, idle, steal) seconds for all cores, core 0, core 1 …"""
    names = ["cpu", *(f"cpu{i}" for i in range(len(rows)))]
    lines = [
        f"{name} {int(user * TICK)} 0 0 {int(idle * TICK)} 0 0 0 {int(steal * TICK)} 0 0"
        for name, (user, idle, steal) in zip(names, rows, strict=False)
    ]
    return "\n".join([*lines, "intr 1 2 3", "ctxt 12"])


def moment(clock: float, own: float, text: str, **more: object) -> dict[str, object]:
    return {"clock": clock, "own_seconds": own, "switches": int(clock), **parse_stat(text, [1]), **more}


def test_what_others_took_is_all_that_was_busy_without_the_measuring_process() -> None:
    before = moment(100, 1.0, stat((50, 100, 0), (20, 80, 0), (30, 20, 0)))
    after = moment(110, 10.0, stat((64, 105, 1), (24, 86, 0), (39.5, 20, 0.5)))
    found = conditions(before, after)
    assert found["seconds"] == 10
    assert found["involuntary_switches"] == 10
    assert found["others_busy"] == pytest.approx((14 - 9) / 20)
    assert found["pinned_others_busy"] == pytest.approx((9.5 - 9) / 10)
    assert found["steal"] == pytest.approx(0.05)


def test_a_clock_counts_at_its_lower_and_throttling_by_what_was_added() -> None:
    text = stat((0, 0, 0), (0, 0, 0), (0, 0, 0))
    before = moment(0, 0, text, khz=2_000_000, thermal_throttles=4, throttled_seconds=1.5)
    after = moment(1, 0, text, khz=1_500_000, thermal_throttles=6, throttled_seconds=1.75, max_khz=2_400_000)
    found = conditions(before, after)
    assert (found["khz"], found["max_khz"]) == (1_500_000, 2_400_000)
    assert (found["thermal_throttles"], found["throttled_seconds"]) == (2, 0.25)


def test_what_the_system_does_not_tell_is_absent() -> None:
    bare = {"clock": 0.0, "own_seconds": 0.0, "switches": 0}
    assert conditions(bare, {**bare, "clock": 1.0}) == {"seconds": 1.0, "involuntary_switches": 0}
    assert parse_loadavg("") == {}
    assert parse_stat("", [0]) == {}
    assert parse_throttled("nr_periods 0") is None


def test_the_system_s_own_notations_are_read() -> None:
    assert parse_loadavg("1.24 0.54 0.23 3/100 6369") == {"load_1min": 1.24, "runnable": 2}
    assert parse_throttled("nr_throttled 3\nthrottled_usec 2500000\n") == 2.5
    assert parse_throttled("nr_throttled 3\nthrottled_time 2500000000\n") == 2.5


def test_this_machine_can_be_looked_at() -> None:
    now = snapshot(pinned_cores())
    assert now["clock"] > 0
    assert now["own_seconds"] > 0
