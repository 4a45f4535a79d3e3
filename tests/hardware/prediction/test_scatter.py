"""How much kernels differ from model to model is learned, and how often one was seen decides how far it is believed."""

from __future__ import annotations

import numpy as np
import pytest

from automl_compress.hardware.prediction.growth import Growth
from automl_compress.hardware.prediction.interpolate import PriceList
from automl_compress.hardware.prediction.scatter import Scatter, learn_scatter
from automl_compress.hardware.profile.schema import KernelRecord

AT_1US, EXPONENT = 0.4, -0.5


def relu(size: int, values: list[float]) -> KernelRecord:
    """Seen once in each of as many models, all of equal traffic."""
    return KernelRecord(
        key=f"Relu|float[1,{size}]>float[1,{size}]",
        mean_us=float(np.mean(values)),
        spread=0.01,
        bursts_us=tuple(values),
        traffic_bytes=(1000,) * len(values),
        count=len(values),
    )


def test_the_scatter_of_short_and_long_kernels_is_found() -> None:
    rng = np.random.default_rng(0)
    records = []
    for i, us in enumerate(np.geomspace(2, 200, 400)):
        deviation = AT_1US * us**EXPONENT
        records.append(relu(i + 1, (us * np.exp(rng.normal(0, deviation, 6))).tolist()))
    found = learn_scatter(records, Growth())
    for us in (3.0, 100.0):
        assert found(us) == pytest.approx(AT_1US * us**EXPONENT, rel=0.2)


def test_few_kernels_tell_no_scatter() -> None:
    assert learn_scatter([relu(8, [1.0, 2.0])], Growth()) == Scatter()


def test_a_kernel_that_was_seen_once_is_drawn_to_its_family_and_one_seen_often_is_believed() -> None:
    noise = np.exp(np.random.default_rng(1).normal(0, 0.15, (30, 6)))
    records = [relu(size, (size / 10 * row).tolist()) for size, row in zip(range(100, 400, 10), noise, strict=True)]
    family = {record.key: record for record in records}
    once, often = relu(255, [25.5 * 1.2]), relu(255, [25.5 * 1.2] * 500)
    drawn, believed = (PriceList({**family, r.key: r})[r.key] for r in (once, often))
    assert 25.5 * 0.95 < drawn.us < 25.5 * 1.1
    assert believed.us == pytest.approx(25.5 * 1.2, rel=0.05)
    assert believed.error < drawn.error
    assert drawn.provenance == believed.provenance == "measured"
    alone = PriceList({once.key: once})[once.key]
    assert alone.us == pytest.approx(once.mean_us)
