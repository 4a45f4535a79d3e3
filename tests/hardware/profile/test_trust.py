from __future__ import annotations

import pytest

from automl_compress.hardware.profile.trust import REMEDIES, advice, troubles


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, ()),
        ({"seconds": 1.0, "pinned_others_busy": 0.01, "steal": 0.0, "involuntary_switches": 3}, ()),
        ({"pinned_others_busy": 0.4}, ("busy machine",)),
        ({"seconds": 0.2, "pinned_others_busy": 0.2}, ()),
        ({"seconds": 0.2, "pinned_others_busy": 0.4}, ("busy machine",)),
        ({"steal": 0.2}, ("stolen time",)),
        ({"thermal_throttles": 2}, ("heat",)),
        ({"throttled_seconds": 0.3}, ("quota",)),
        ({"khz": 1_000_000, "max_khz": 3_000_000}, ("low clock",)),
        ({"khz": 2_900_000, "max_khz": 3_000_000}, ()),
        ({"seconds": 2.0, "involuntary_switches": 1000}, ("interruptions",)),
    ],
)
def test_conditions_are_put_into_words(conditions: dict[str, float], expected: tuple[str, ...]) -> None:
    assert troubles(conditions) == expected


def test_each_trouble_has_one_remedy_however_often_it_was_seen() -> None:
    assert advice(["heat", "heat", "quota"]) == [REMEDIES["heat"], REMEDIES["quota"]]
    assert not advice([])
