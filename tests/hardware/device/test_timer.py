from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automl_compress.core.result import Timing
from automl_compress.errors import DeviceError
from automl_compress.hardware.device import timer
from automl_compress.hardware.device.executed import Trace
from automl_compress.hardware.measuring import bursts

durations = st.lists(st.floats(min_value=0.1, max_value=1e6), min_size=1, max_size=40)


@given(durations)
def test_the_median_lies_within_the_values_and_the_raw_values_are_kept(values: list[float]) -> None:
    timing = timer.timing(values, runs=30)
    assert min(values) <= timing.median_us <= max(values)
    assert timing.values_us == tuple(values)
    assert timing.spread >= 0


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, math.inf], [0.0], [-1.0]])
def test_impossible_durations_are_refused(values: list[float]) -> None:
    with pytest.raises(DeviceError, match="durations"):
        timer.timing(values, runs=30)


def test_a_ratio_is_free_of_a_drift_that_hits_both_models() -> None:
    drift = [1.0, 1.5, 2.0, 3.0, 9.0]
    timings = {
        "original": timer.timing([100 * d for d in drift], 30),
        "small": timer.timing([40 * d for d in drift], 30),
    }
    assert timer.ratio(timings, "small", "original") == pytest.approx(0.4)
    assert timer.ratio(timings, "original", "original") == 1


def test_a_single_interruption_does_not_change_a_trimmed_mean() -> None:
    assert timer.trimmed_mean([10, 10, 11, 11, 10, 11, 10_000]) == pytest.approx(
        timer.trimmed_mean([10, 10, 11, 11, 10, 11, 12])
    )


def test_the_first_part_of_each_burst_is_discarded() -> None:
    cold_then_warm = [100.0] * 10 + [5.0] * 20
    assert timer.burst_means(cold_then_warm * 3, bursts=3, discard=0.34) == (5.0, 5.0, 5.0)


def test_a_burst_of_one_run_is_that_run() -> None:
    assert timer.burst_means([4.0, 6.0, 7.0], bursts=3, discard=0.34) == (4.0, 6.0, 7.0)


def test_spread_is_the_quartile_range_over_the_median() -> None:
    timing = timer.timing([9.0, 10.0, 10.0, 10.0, 11.0], 30)
    assert timing.spread == 0
    assert timing.trusted
    assert not Timing(values_us=(1.0,), median_us=1.0, spread=0.1, runs=1).trusted


def test_a_burst_counts_only_the_runs_after_the_discarded_ones() -> None:
    now, run_s = [0.0], iter([1.0, 1.0, *[0.001] * 4])

    def run() -> None:
        now[0] += next(run_s)

    assert bursts.burst_us(run, runs=6, discard=0.34, clock=lambda: now[0]) == pytest.approx(1000)


def test_a_burst_is_not_longer_for_a_process_that_took_the_core_meanwhile() -> None:
    now, done = [0.0], [0]

    def run() -> None:
        done[0] += 1
        now[0] += 0.009 if done[0] in (15, 22) else 0.001

    assert bursts.burst_us(run, runs=30, discard=0.34, clock=lambda: now[0]) == pytest.approx(1000)


@pytest.mark.parametrize(("calm", "expected_us"), [((12, 20), 1000), ((), 3000)])
def test_runs_that_were_interrupted_do_not_count_unless_all_were(calm: tuple[int, ...], expected_us: float) -> None:
    """Two processes share the core: most runs take three times as long, and the system says which."""
    now, done, interrupted = [0.0], [0], [0]

    def run() -> None:
        done[0] += 1
        undisturbed = done[0] in calm
        now[0] += 0.001 if undisturbed else 0.003
        interrupted[0] += not undisturbed

    found = bursts.burst_us(run, 30, 0.34, clock=lambda: now[0], interrupted=lambda: interrupted[0])
    assert found == pytest.approx(expected_us)


def test_the_pace_is_that_of_the_fastest_repetition() -> None:
    times = iter([0.0, 5.0, 5.0, 7.0, *[10.0 + 3 * i for i in range(26)]])
    assert bursts.pace_us(clock=lambda: next(times)) == pytest.approx(2e6)


@given(st.floats(min_value=1e-9, max_value=1e4))
def test_bursts_are_as_long_as_the_protocol_says_unless_a_model_is_slow(one_run_s: float) -> None:
    length = bursts.burst_length(one_run_s, {"burst_seconds": 1.0, "burst_runs": 30})
    assert bursts.SMALLEST_BURST <= length <= 30
    if one_run_s < 1 / 30:
        assert length == 30


def test_a_machine_that_slowed_down_is_told_from_a_moments_disturbance() -> None:
    slowed = Trace(kernels=(), whole_us=(100, 150, 200), pace_us=(10, 15, 20))
    disturbed = Trace(kernels=(), whole_us=(100, 101, 102), pace_us=(10, 17, 10))
    assert slowed.whole(10)[:2] == (pytest.approx(100), pytest.approx(0))
    assert disturbed.drift(10) == (1, 1, 1)
    assert disturbed.whole(10)[0] == 101
