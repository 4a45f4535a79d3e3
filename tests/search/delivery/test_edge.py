"""The edge is found in a few looks, whatever recovery is worth, and nothing is claimed that was not seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automl_compress.core.plan import Plan
from automl_compress.search.delivery.edge import Edge
from automl_compress.search.evaluation.candidate import Candidate

LOOKS = 8


def model(metric: float) -> Candidate:
    return Candidate(
        plan=Plan(width=metric), ranges={}, metric=metric, weights=Path("w"), onnx=Path("m"), training=(), seconds=0.0
    )


def look(edge: Edge, worth: float, steepness: float) -> list[float]:
    """Look where the edge says; models lose `worth` of the one-shot loss, which falls as `(1 - share) ** steepness`."""
    seen = []
    while len(seen) < LOOKS and (share := edge.next()) is not None:
        seen.append(share)
        loss = worth * (1 - share) ** steepness
        edge.add(model(1 - loss), share, loss, at=share)
    return seen


@given(
    allowed=st.floats(0.002, 0.3),
    worth=st.floats(0.05, 1.0),
    steepness=st.floats(0.7, 4.0),
    low=st.floats(0.05, 0.4),
)
def test_the_cheapest_good_model_is_within_a_few_percent_of_the_edge(
    allowed: float, worth: float, steepness: float, low: float
) -> None:
    shares = [low + (1 - low) * i / 20 for i in range(21)]
    edge = Edge(low=low, high=1.0, allowed=allowed, lost=[(s, max(0.0, 1 - s) ** steepness) for s in shares])
    seen = look(edge, worth, steepness)
    assert all(low <= share <= 1.0 for share in seen)
    assert all(loss <= allowed + 1e-9 for _, loss, c in edge.found if c in edge.good)
    true = max(low, 1 - min(1.0, allowed / worth) ** (1 / steepness))
    good = [share for share, loss, _ in edge.found if loss <= allowed + 1e-9]
    if good:
        assert min(good) <= true * 1.15
    assert good or len(seen) == LOOKS or edge.highest_seen >= edge.high


def test_the_bracket_never_opens_again() -> None:
    edge = Edge(low=0.1, high=1.0, allowed=0.1, lost=[(0.5, 0.2)])
    widths = [edge.high / edge.low]
    for loss in (0.3, 0.05, 0.2, 0.0):
        share = edge.next()
        assert share is not None
        edge.add(model(1 - loss), share, loss, at=share)
        widths.append(edge.high / edge.low)
    assert widths == sorted(widths, reverse=True)


def test_after_a_look_at_far_too_little_the_bracket_is_halved() -> None:
    """One-shot losses that promise too much at the lower end are believed once."""
    edge = Edge(low=0.01, high=1.0, allowed=0.1, lost=[(0.01, 0.0)])
    first = edge.next()
    assert first is not None
    edge.nothing_at(first)
    assert edge.next() == pytest.approx((edge.low * edge.high) ** 0.5)


def test_where_nothing_is_good_enough_the_highest_budget_is_looked_at() -> None:
    edge = Edge(low=0.2, high=1.0, allowed=0.0, lost=[(0.4, 0.5), (0.9, 0.3)])
    seen = look(edge, 1.0, 0.1)
    assert edge.good == [model(1.0)]
    assert max(seen) == 1.0


def test_an_edge_that_nothing_reaches_ends() -> None:
    edge = Edge(low=0.2, high=1.0, allowed=0.01)
    for _ in range(40):
        share = edge.next()
        if share is None:
            break
        edge.nothing_at(share)
    assert share is None
    assert edge.good == []


def test_of_equally_cheap_models_the_better_one_comes_first() -> None:
    edge = Edge(low=0.2, high=1.0, allowed=0.1)
    for share, loss in ((0.5, 0.05), (0.5, 0.02), (0.7, 0.0), (0.4, 0.3), (0.5, 0.05)):
        edge.add(model(1 - loss), share, loss, at=share)
    assert [candidate.metric for candidate in edge.good] == pytest.approx([0.98, 0.95, 1.0])
