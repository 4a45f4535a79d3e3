"""The other direction is read as it was meant, and nonsense is refused with the way out."""

from __future__ import annotations

import pytest

from automl_compress.core.goal import Front, Goal, parse_aim
from automl_compress.errors import InputError


def goal(**options: str) -> Goal:
    found = parse_aim(options.get("max_drop"), options.get("min_metric"), None, options.get("minimise"))
    assert isinstance(found, Goal)
    return found


def test_without_either_there_is_no_goal() -> None:
    assert parse_aim(None, None, None, None) is None


def test_a_front_has_some_models_over_what_is_minimised() -> None:
    found = parse_aim(None, None, 5, "size")
    assert isinstance(found, Front)
    assert (found.points, found.minimise) == (5, "size")
    for points in (1, 0, -3, 51):
        with pytest.raises(InputError, match="2 to 50"):
            parse_aim(None, None, points, None)
    with pytest.raises(InputError, match="one model and --front for several"):
        parse_aim("1%", None, 5, None)


@pytest.mark.parametrize(
    ("options", "original", "least"),
    [
        ({"max_drop": "1%"}, 0.9, 0.891),
        ({"max_drop": "1%"}, -200.0, -202.0),
        ({"max_drop": "0.01"}, 0.9, 0.89),
        ({"max_drop": "0"}, 0.9, 0.9),
        ({"max_drop": "3"}, 30.0, 27.0),
        ({"min_metric": "0.85"}, 0.9, 0.85),
        ({"min_metric": "-1.5"}, -1.0, -1.5),
    ],
)
def test_percent_is_of_the_originals_metric_and_a_number_in_its_units(
    options: dict[str, str], original: float, least: float
) -> None:
    found = goal(**options)
    assert found.least_metric(original) == pytest.approx(least)
    assert found.reached(found.least_metric(original), original)
    assert not found.reached(found.least_metric(original) - 1e-6, original)


def test_the_latency_is_minimised_unless_something_else_is_named() -> None:
    assert goal(max_drop="1%").minimise == "latency"
    assert goal(max_drop="1%", minimise="size").minimise == "size"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_drop": "-1%"}, "at least 0"),
        ({"max_drop": "100%"}, "below 100%"),
        ({"max_drop": "nan"}, "can't be read"),
        ({"max_drop": "a little"}, "can't be read"),
        ({"max_drop": "1 percent"}, "can't be read"),
        ({"max_drop": ""}, "can't be read"),
        ({"min_metric": "91%"}, "--max-drop"),
        ({"min_metric": "inf"}, "can't be read"),
        ({"max_drop": "1%", "min_metric": "0.9"}, "one of them"),
        ({"max_drop": "1%", "minimise": "energy"}, "latency, size, memory"),
        ({"minimise": "size"}, "--max-drop"),
    ],
)
def test_nonsense_is_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        goal(**options)


def test_a_share_of_nothing_means_nothing() -> None:
    with pytest.raises(InputError, match="--min-metric"):
        goal(max_drop="1%").least_metric(0.0)
