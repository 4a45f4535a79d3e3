from __future__ import annotations

import math

import numpy as np
import pytest

from automl_compress.hardware.prediction.interpolate import PriceList, place_of
from automl_compress.hardware.prediction.kernel_key import read_key
from automl_compress.hardware.profile.schema import KernelRecord


def conv_key(inputs: int, outputs: int, size: int = 16, groups: int = 1) -> str:
    value = f"float[1,{inputs},{size},{size}]>float[1,{outputs},{size},{size}]"
    return f"Conv|{value}|w float[{outputs},{inputs // groups},3,3]|k3x3 s1x1 p1 g{groups}|relu"


def records(times: dict[str, float], **more: object) -> dict[str, KernelRecord]:
    return {key: KernelRecord(key=key, mean_us=us, spread=0.02, **more) for key, us in times.items()}  # type: ignore[arg-type]


def smooth_us(inputs: int, outputs: int) -> float:
    return 2.0 + 0.01 * inputs * outputs + 0.02 * inputs


def stairs_us(inputs: int, outputs: int) -> float:
    """Outputs are computed in whole blocks of 16; where one isn't full, all of it is slow."""
    return (2.0 + 0.2 * inputs * math.ceil(outputs / 16)) * (1.5 if outputs % 16 else 1.0)


GRID = (8, 16, 24, 32, 40, 48, 64, 80, 96)


def test_a_key_is_taken_apart_into_family_and_sizes() -> None:
    one, other = read_key(conv_key(16, 32)), read_key(conv_key(8, 24, size=8))
    assert one.family == other.family
    assert one.sizes == (1, 16, 16, 16, 1, 32, 16, 16, 32, 16, 3, 3, 1)
    assert (one.op, one.inputs[0].shape, one.weights[0].bytes) == ("Conv", (1, 16, 16, 16), 32 * 16 * 9 * 4)
    assert read_key(conv_key(16, 16, groups=16)).family != one.family
    assert read_key(conv_key(16, 16, groups=16)).family == read_key(conv_key(8, 8, groups=8)).family
    assert read_key("anything").sizes == ()


def test_work_is_what_the_shapes_say() -> None:
    place = place_of(conv_key(16, 32))
    assert place.work[1] == pytest.approx(16 * 32 * 9 * 256 / 1e6)
    assert place.work[2:5] == pytest.approx((16 * 256 * 4 / 1e4, 32 * 256 * 4 / 1e4, 16 * 32 * 9 * 4 / 1e4))


def test_what_was_measured_has_its_price() -> None:
    prices = PriceList(records({conv_key(16, 32): 12.5}))
    assert (prices[conv_key(16, 32)].us, prices[conv_key(16, 32)].provenance) == (12.5, "measured")


@pytest.mark.parametrize("law", [smooth_us, stairs_us])
def test_sizes_between_measured_ones_are_interpolated(law: object) -> None:
    us = law  # type: ignore[assignment]
    rng = np.random.default_rng(0)
    known = {(i, o) for i in GRID for o in GRID} - {(int(i), int(o)) for i, o in rng.choice(GRID, (20, 2))}
    prices = PriceList(records({conv_key(i, o): us(i, o) for i, o in known}))  # type: ignore[operator]
    unknown = [(i, o) for i in GRID for o in GRID if (i, o) not in known]
    misses = [abs(prices[conv_key(i, o)].us / us(i, o) - 1) for i, o in unknown]  # type: ignore[operator]
    assert np.median(misses) < 0.03
    assert max(misses) < 0.15
    assert {prices[conv_key(i, o)].provenance for i, o in unknown} == {"interpolated"}


def test_the_further_from_anything_measured_the_less_certain() -> None:
    prices = PriceList(records({conv_key(i, o): smooth_us(i, o) for i in GRID for o in GRID}))
    near, far = prices[conv_key(36, 36)], prices[conv_key(1024, 2048, size=64)]
    assert near.error < 0.1
    assert far.error > 2 * near.error


def test_without_a_family_it_is_an_estimate_and_says_so() -> None:
    prices = PriceList(records({conv_key(i, o): smooth_us(i, o) for i in GRID for o in GRID}))
    related = prices[conv_key(16, 16, groups=16)]
    unrelated = prices["Softmax|float[1,64]>float[1,64]|axis=-1"]
    assert related.provenance == unrelated.provenance == "estimated"
    assert 0.1 < related.error < unrelated.error
    assert PriceList({})["Relu|float[4]>float[4]"].provenance == "estimated"


def test_between_estimates_lies_an_estimate() -> None:
    times = {conv_key(i, o): smooth_us(i, o) for i in GRID for o in GRID}
    prices = PriceList(records(times, provenance="estimated"))
    assert prices[conv_key(36, 36)].provenance == "estimated"
    assert prices[conv_key(36, 36)].error > 0.1


def test_a_total_adds_up_and_is_as_good_as_its_weakest_part() -> None:
    prices = PriceList(records({conv_key(i, o): smooth_us(i, o) for i in GRID for o in GRID}))
    known = [conv_key(16, 16), conv_key(16, 16), conv_key(32, 16)]
    total = prices.total(known)
    assert total.us == pytest.approx(2 * smooth_us(16, 16) + smooth_us(32, 16))
    assert (total.provenance, total.measured_share, total.guess_error) == ("measured", 1.0, 0.0)
    mixed = prices.total([*known, conv_key(36, 36)])
    assert mixed.provenance == "interpolated"
    assert 0 < mixed.guess_error < mixed.error
    assert 0.5 < mixed.measured_share < 1
    assert prices.total([*known, "Softmax|float[1,64]>float[1,64]"]).provenance == "estimated"
    assert prices.total([]).us == 0


def depthwise_key(channels: int) -> str:
    value = f"uint8[1,12,12,{channels}]"
    return f"QLinearConv|{value}>{value}|w int8[{channels},1,3,3]|k3x3 s1x1 p1 g{channels}|channels_last=1"


def test_channels_that_are_left_over_after_blocks_of_eight_are_told_from_others() -> None:
    """As a depthwise kernel does it that computes eight channels at a time and the rest one by one."""

    def us(channels: int) -> float:
        return 2.0 + 0.5 * (channels // 8) + 1.5 * (channels % 8)

    prices = PriceList(records({depthwise_key(c): us(c) for c in range(4, 120, 5)}))
    unseen = [c for c in range(4, 120) if c % 5 != 4]
    misses = sorted(abs(prices[depthwise_key(c)].us / us(c) - 1) for c in unseen)
    assert misses[len(misses) // 2] < 0.05
    assert misses[int(0.9 * len(misses))] < 0.25
