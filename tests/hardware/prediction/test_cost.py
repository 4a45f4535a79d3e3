from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from automl_compress.core.budget import Cost
from automl_compress.errors import ProfileError
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.kernels import structure_digest
from automl_compress.hardware.prediction.cost import CostModel
from automl_compress.hardware.prediction.fit import fit
from automl_compress.hardware.prediction.measure import Filled, measure_variants, spread_evenly
from automl_compress.hardware.profile.profile import DeviceProfile
from tests.hardware.simulated import FACTS, OVERHEAD_US, SimulatedRuntime, chain, node_times

GENERATOR = random.Random(0)
WIDTHS = [(32, *(GENERATOR.choice((8, 16, 24, 32)) for _ in range(GENERATOR.randint(1, 6))), 10) for _ in range(24)]
VARIANTS = [chain(*widths) for widths in WIDTHS]
UNSEEN = [chain(32, 16, 24, 8, 10), chain(32, 32, 32, 32, 10), chain(32, 24, 16, 16, 32, 8, 10)]


def true_us(model: object) -> float:
    nodes = node_times(model)  # type: ignore[arg-type]
    return sum(node[3] for node in nodes) + OVERHEAD_US * len(nodes)


def test_filling_twice_measures_nothing_the_second_time(device: Device, profile: DeviceProfile) -> None:
    first = measure_variants(device, VARIANTS)
    assert first.kernels > 0
    assert first.models == len(profile.models) >= 14
    assert first.memories == 5
    assert not first.troubles
    before = dict(device.requests)
    assert measure_variants(device, VARIANTS) == Filled()
    assert device.requests == before


def test_a_new_process_finds_everything_in_the_file(device: Device, profile: DeviceProfile) -> None:
    measure_variants(device, VARIANTS)
    with Device(DeviceProfile(profile.path, FACTS), launch=SimulatedRuntime) as again:
        assert measure_variants(again, VARIANTS).requests == 0
        model = CostModel(again.profile, again)
        model.predict(VARIANTS[0])
        assert model.measurements == 0
        assert set(again.requests) == {"lower"}


def test_a_fill_that_was_killed_goes_on_where_it_stopped(device: Device, profile: DeviceProfile) -> None:
    measure_variants(device, VARIANTS[:5], whole_models=3, memories=0)
    traced = device.requests["trace"]
    with Device(DeviceProfile(profile.path, FACTS), launch=SimulatedRuntime) as again:
        measure_variants(again, VARIANTS)
        rest = again.requests["trace"]
    with Device(DeviceProfile(profile.path, FACTS), launch=SimulatedRuntime) as once:
        assert measure_variants(once, VARIANTS).requests == 0
    assert traced + rest <= len(VARIANTS)


def test_predictions_for_unseen_models_are_right_where_the_runtime_is_regular(
    device: Device, profile: DeviceProfile
) -> None:
    measure_variants(device, VARIANTS)
    model = CostModel(profile, device, original=VARIANTS[0])
    latency, memory = model.fits(true_us(UNSEEN[0]))
    assert latency.error is not None
    assert latency.error < 0.02
    assert memory.trusted
    for unseen in UNSEEN:
        cost = model.predict(unseen)
        assert cost.latency_us == pytest.approx(true_us(unseen), rel=0.05)
        assert cost.size_bytes == len(unseen.SerializeToString())
        assert cost.memory_bytes == pytest.approx(1_000_000 + 3 * unseen.ByteSize(), rel=0.1)
        assert cost.provenance == "interpolated"
    assert len(model.notes(UNSEEN[0])) == 2


def test_another_networks_overheads_do_not_disturb(device: Device, profile: DeviceProfile) -> None:
    measure_variants(device, VARIANTS)
    alone = CostModel(profile, device, original=VARIANTS[0]).predict(UNSEEN[0])
    measure_variants(device, [chain(512, n, 512, 10) for n in range(256, 512, 32)])
    beside = CostModel(profile, device, original=VARIANTS[0]).predict(UNSEEN[0])
    # What is known of how much kernels differ from model to model rests on all that were seen.
    assert replace(beside, latency_error=alone.latency_error) == alone
    assert beside.latency_error == pytest.approx(alone.latency_error, rel=0.1)
    assert CostModel(profile, device).predict(UNSEEN[0]).latency_us == pytest.approx(alone.latency_us, rel=0.05)


def test_a_drift_between_turns_is_divided_out(profile: DeviceProfile) -> None:
    with Device(profile, launch=lambda s: SimulatedRuntime(s, drift=0.05)) as device:
        measure_variants(device, VARIANTS, memories=0)
        assert device.requests["trace"] > 1
    reference = profile.model(structure_digest(VARIANTS[0]))
    assert reference is not None
    for variant in VARIANTS:
        record = profile.model(structure_digest(variant))
        if record is not None:
            expected = true_us(variant) / true_us(VARIANTS[0])
            assert record.measured_us / reference.measured_us == pytest.approx(expected, rel=1e-4)


def test_unknown_kernels_are_measured_on_the_spot_and_kept(device: Device, profile: DeviceProfile) -> None:
    model = CostModel(profile, device)
    first = model.predict(VARIANTS[0])
    assert model.measurements == 1
    assert first.provenance == "estimated"
    assert all(kernel.mean_us is not None for kernel in model.lower(VARIANTS[0]))
    model.predict(VARIANTS[0])
    assert model.measurements == 1
    assert not device.requests["compare"]


def test_a_foreign_profile_is_not_added_to(profile: DeviceProfile) -> None:
    foreign = DeviceProfile(profile.path)
    assert foreign.warnings
    with Device(foreign, launch=SimulatedRuntime) as device, pytest.raises(ProfileError, match="--profile local"):
        CostModel(foreign, device).predict(VARIANTS[0])
    assert device.requests["trace"] == 0


def test_shares_of_layers_add_up_to_the_whole(device: Device, profile: DeviceProfile) -> None:
    measure_variants(device, VARIANTS)
    model = CostModel(profile, device)
    shares = model.by_layer(UNSEEN[0])
    assert set(shares) == {"fc0", "fc1", "fc2", "fc3"}
    assert sum(shares.values()) == pytest.approx(model.predict(UNSEEN[0]).latency_us)


def test_a_dearer_model_tightens_and_a_cheaper_one_changes_nothing(device: Device, profile: DeviceProfile) -> None:
    model = CostModel(profile, device)
    before = model.predict(VARIANTS[0])
    dearer = Cost(
        latency_us=before.latency_us * 1.1, size_bytes=before.size_bytes, memory_bytes=before.memory_bytes / 2
    )
    model.tighten(before, dearer)
    after = model.predict(VARIANTS[0])
    assert after.latency_us == pytest.approx(dearer.latency_us)
    assert (after.size_bytes, after.memory_bytes) == (before.size_bytes, before.memory_bytes)
    model.tighten(after, dearer)
    assert model.predict(VARIANTS[0]).latency_us == pytest.approx(dearer.latency_us)


def test_an_anchor_puts_predictions_on_the_scale_of_today(device: Device, profile: DeviceProfile) -> None:
    model = CostModel(profile, device)
    ratio = model.predict(VARIANTS[1]).latency_us / model.predict(VARIANTS[0]).latency_us
    for today in (123.0, 456.0):
        model.anchor(VARIANTS[0], today)
        assert model.predict(VARIANTS[0]).latency_us == pytest.approx(today)
        assert model.predict(VARIANTS[1]).latency_us == pytest.approx(today * ratio)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 9, 10, 50])
def test_models_to_measure_are_spread_over_the_list(count: int) -> None:
    keys = [str(i) for i in range(10)]
    chosen = spread_evenly(keys, count)
    assert len(chosen) == min(count, 10) == len(set(chosen))
    if count > 1:
        assert (chosen[0], chosen[-1]) == ("0", "9")


def records(count: int, noise: float = 0.0) -> tuple[list[tuple[float, float, float]], list[float]]:
    generator = np.random.default_rng(0)
    rows = [(float(generator.uniform(100, 1000)), float(generator.integers(20, 60)), 1.0) for _ in range(count)]
    values = [1.05 * k - 0.8 * n + 5 for k, n, _ in rows]
    return rows, [v * float(1 + noise * generator.standard_normal()) for v in values]


def test_a_fit_without_measurements_is_the_prior() -> None:
    assert fit((), (), (1.0, 0.0, 0.0))((100.0, 5.0, 1.0)) == 100


def test_a_fit_on_few_measurements_only_scales_the_prior() -> None:
    found = fit([(100.0, 10.0, 1.0), (200.0, 10.0, 1.0)], [90.0, 180.0], (1.0, 0.0, 0.0))
    assert found((150.0, 99.0, 1.0)) == pytest.approx(135)
    assert not found.trusted


def test_a_fit_finds_negative_overheads_and_ignores_an_outlier() -> None:
    rows, values = records(14, noise=0.005)
    values[3] *= 1.5
    found = fit(rows, values, (1.0, 0.0, 0.0))
    assert found.error is not None
    assert found.error < 0.03
    for (k, n, one), value in zip(*records(14), strict=True):
        assert found((k, n, one)) == pytest.approx(value, rel=0.03)


def test_a_fit_does_not_run_away_beyond_what_was_seen() -> None:
    rows, values = records(14)
    found = fit(rows, values, (1.0, 0.0, 0.0))
    for row in ((1.0, 500.0, 1.0), (1e6, 1.0, 1.0), (50.0, 5000.0, 1.0)):
        assert 0.5 * row[0] < found(row) < 1.5 * row[0]


def test_nonnegative_coefficients_are_nonnegative() -> None:
    found = fit(
        [(1.0, s, a) for s, a in ((10, 5), (20, 9), (30, 1), (40, 2))],
        [12, 21, 33, 44],
        (0, 1, 1),
        nonnegative=True,
        enough=4,
    )
    assert min(found.coefficients) >= 0
