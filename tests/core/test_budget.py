"""Budgets as users write them."""

from __future__ import annotations

import pytest

from automl_compress.core.budget import Budget, Cost, Limit, format_bytes, format_us, parse_budget
from automl_compress.errors import InputError

COST = Cost(latency_us=800.0, size_bytes=1_000_000, memory_bytes=4_000_000)


@pytest.mark.parametrize(
    ("metric", "text", "value"),
    [
        ("latency", "0.8ms", 800.0),
        ("latency", "350us", 350.0),
        ("latency", "350 µs", 350.0),
        ("latency", "1s", 1e6),
        ("size", "300KB", 300e3),
        ("size", "1KiB", 1024.0),
        ("memory", "2MB", 2e6),
    ],
)
def test_absolute_budgets_are_read_in_microseconds_and_bytes(metric: str, text: str, value: float) -> None:
    limit = Limit.parse(metric, text)
    assert not limit.relative
    assert limit.value == pytest.approx(value)


def test_a_percentage_is_of_the_originals_cost() -> None:
    budget = Budget.resolve(parse_budget(latency="40%", size="60%"), COST)
    assert budget.limits == pytest.approx({"latency": 320.0, "size": 600_000})


@pytest.mark.parametrize(
    ("metric", "text"),
    [("latency", t) for t in ("0", "0ms", "-5ms", "40 parsecs", "", "fast", "nanms", "1e999s", "40", "300KB", "4 0%")]
    + [("size", t) for t in ("3ms", "0%", "-1KB", "KB")],
)
def test_nonsense_is_refused_with_a_way_out(metric: str, text: str) -> None:
    with pytest.raises(InputError, match="write") as caught:
        Limit.parse(metric, text)
    assert "\n" not in str(caught.value)


def test_at_least_one_budget_is_needed() -> None:
    with pytest.raises(InputError, match="no budget"):
        parse_budget()


def test_constraints_are_zero_or_less_exactly_where_the_budget_is_met() -> None:
    budget = Budget(limits={"memory": 8e6, "latency": 800.0, "size": 500_000})
    constraints = budget.constraints(COST)
    assert list(constraints) == ["latency", "size", "memory"]
    assert constraints == pytest.approx({"latency": 0.0, "size": 1.0, "memory": -0.5})
    assert not budget.met(COST)
    assert budget.scaled({"size": 2.0}).met(COST)


def test_figures_are_readable() -> None:
    assert format_us(1234.5) == "1.23 ms"
    assert format_us(12.3) == "12.3 us"
    assert format_bytes(300_000) == "300 KB"
    assert format_bytes(12) == "12 B"
