"""Models are predicted by what others say of their kernels."""

from __future__ import annotations

import pytest

from automl_compress.hardware.device.device import Device
from automl_compress.hardware.prediction.foresee import foresee
from automl_compress.hardware.prediction.kernel_key import traffic_bytes
from automl_compress.hardware.prediction.measure import measure_variants
from automl_compress.hardware.profile.profile import DeviceProfile
from automl_compress.hardware.profile.schema import KernelRecord

from .test_cost import VARIANTS


def test_a_model_is_foreseen_without_its_own_trace(device: Device, profile: DeviceProfile) -> None:
    measure_variants(device, VARIANTS)
    models = {low.key: [kernel.key for kernel in low.kernels] for low in map(device.lowered, VARIANTS)}
    known = dict(profile.kernels)
    foresee(profile, models)
    assert dict(profile.kernels) == known
    measured = {key: record for key in models if (record := profile.model(key)) is not None}
    assert len(measured) > 5
    for key, record in measured.items():
        kernels = models[key]
        assert record.predicted_us is not None
        assert record.foreseen is not None
        own = traffic_bytes(kernels)
        if any(known[kernel].without({own}) is None for kernel in kernels):
            assert record.foreseen < 1
        assert record.predicted_us == pytest.approx(record.kernel_sum_us, rel=0.25)


def test_what_a_kernel_was_without_some_models() -> None:
    record = KernelRecord(
        key="Relu|float[1,8]>float[1,8]",
        mean_us=2.0,
        spread=0.7,
        bursts_us=(1.0, 1.0, 1.1, 3.0, 3.0, 3.2),
        traffic_bytes=(10, 20),
        count=2,
    )
    first = record.without({20})
    assert first is not None
    assert (first.mean_us, first.count, first.traffic_bytes, first.bursts_us) == (1.0, 1, (10,), (1.0, 1.0, 1.1))
    assert first.spread == pytest.approx(0.1)
    assert record.without({30}) is record
    assert record.without({10, 20}) is None
