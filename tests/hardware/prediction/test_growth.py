"""The same kernel is slower in a model that moves more bytes; what a profile knows of that goes into its prices."""

from __future__ import annotations

import pytest

from automl_compress.hardware.prediction.growth import Growth, learn_growth
from automl_compress.hardware.prediction.interpolate import PriceList
from automl_compress.hardware.prediction.kernel_key import traffic_bytes
from automl_compress.hardware.profile.schema import KernelRecord

EXPONENT = 0.1
MB = 10**6


def relu(size: int) -> str:
    return f"Relu|float[1,{size}]>float[1,{size}]"


def seen(key: str, us: float, *traffic: int, exponent: float = EXPONENT) -> KernelRecord:
    """A kernel that takes `us` in a model of 1 MB, as it was seen in models of some traffic."""
    times = [us * (t / MB) ** exponent for t in traffic]
    mean = sum(times) / len(times)
    return KernelRecord(
        key=key, mean_us=mean, spread=0.0, bursts_us=tuple(times), traffic_bytes=traffic, count=len(traffic)
    )


def test_the_exponent_is_what_kernels_that_were_seen_in_several_models_show() -> None:
    records = [seen(relu(100 * n), 5.0 * n, MB, 4 * MB, 16 * MB) for n in range(1, 20)]
    growth = learn_growth(records)
    assert growth.exponents["Relu"] == pytest.approx(EXPONENT, rel=0.1)
    assert growth.factor("Relu", growth.typical_bytes) == 1
    assert growth.factor("Relu", 8 * growth.typical_bytes) == pytest.approx(8**EXPONENT, rel=0.05)


def test_an_operator_that_was_seen_once_grows_like_the_others() -> None:
    records = [seen(relu(100 * n), 5.0 * n, MB, 16 * MB) for n in range(1, 20)]
    growth = learn_growth([*records, seen("Softmax|float[1,8]>float[1,8]", 7.0, MB)])
    assert growth.factor("Softmax", 10 * growth.typical_bytes) == pytest.approx(10**growth.other)


def test_nothing_grows_where_it_is_not_known_what_kernels_were_seen_in() -> None:
    record = KernelRecord(key=relu(100), mean_us=9.0, spread=0.1, bursts_us=(8.9, 9.0, 9.8), count=1)
    growth = learn_growth([record, record.merged(record)])
    assert growth == Growth()
    assert growth.factor("Relu", 5e9) == 1
    assert growth.typical(record) == record


def test_kernels_seen_in_small_and_in_large_models_have_prices_that_compare() -> None:
    taught = {relu(n): seen(relu(n), n / 100, MB, 20 * MB) for n in range(200, 4000, 200)}
    small, large = relu(5000), relu(5008)
    prices = PriceList(taught | {small: seen(small, 50.0, MB), large: seen(large, 50.0, 20 * MB)})
    assert prices[small].us == pytest.approx(prices[large].us, rel=0.03)
    assert prices[small].provenance == "measured"


def test_a_model_is_priced_at_its_own_traffic() -> None:
    keys = [relu(n) for n in range(200_000, 1_000_000, 40_000)]
    prices = PriceList({key: seen(key, 20.0, MB, 20 * MB) for key in keys})
    few, many = prices.of_model(keys[:1]), prices.of_model(keys)
    ratio = (traffic_bytes(keys) / traffic_bytes(keys[:1])) ** EXPONENT
    assert many[keys[0]].us / few[keys[0]].us == pytest.approx(ratio, rel=0.05)
    assert prices.total(keys).us == pytest.approx(sum(price.us for price in many.values()))


def test_merged_sightings_keep_the_traffic_of_each() -> None:
    one, other = seen(relu(10), 5.0, MB), seen(relu(10), 5.0, 9 * MB)
    both = one.merged(other)
    assert both.traffic_bytes == (MB, 9 * MB)
    assert [traffic for _, traffic in both.sightings] == [MB, 9 * MB]
    assert learn_growth([both]).typical_bytes == pytest.approx(3 * MB)


def test_a_sighting_without_traffic_leaves_the_kernel_as_it_is() -> None:
    known = seen(relu(10), 5.0, MB)
    unknown = KernelRecord(key=relu(10), mean_us=5.0, spread=0.0, bursts_us=(5.0,), count=1)
    assert known.merged(unknown).sightings == []
