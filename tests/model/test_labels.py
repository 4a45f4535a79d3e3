"""Channels form classes: ties join them whatever their order, and a frozen class stays frozen."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from automl_compress.model.labels import Channels

SIZE = 12
PAIRS = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)), max_size=20)


def channels(pairs: list[tuple[int, int]]) -> Channels:
    result = Channels()
    result.fresh(SIZE)
    for one, other in pairs:
        result.tie(np.array([one]), np.array([other]))
    return result


def components(pairs: list[tuple[int, int]]) -> list[set[int]]:
    sets = [{i} for i in range(SIZE)]
    for one, other in pairs:
        left, right = (next(s for s in sets if i in s) for i in (one, other))
        if left is not right:
            left |= right
            sets.remove(right)
    return sets


@given(PAIRS)
def test_channels_have_one_root_exactly_where_ties_connect_them(pairs: list[tuple[int, int]]) -> None:
    roots = channels(pairs).root(np.arange(SIZE))
    for part in components(pairs):
        assert {int(roots[i]) for i in part} == {min(part)}


@given(PAIRS, st.integers(0, SIZE - 1), st.booleans())
def test_freezing_reaches_the_whole_class_before_and_after_ties(
    pairs: list[tuple[int, int]], frozen: int, early: bool
) -> None:
    known = channels([] if early else pairs)
    known.freeze(np.array([frozen]), "why")
    if early:
        for one, other in pairs:
            known.tie(np.array([one]), np.array([other]))
    part = next(part for part in components(pairs) if frozen in part)
    for channel in range(SIZE):
        assert known.frozen(channel) == ("why" if channel in part else None)


def test_fresh_channels_are_new_and_free() -> None:
    known = Channels()
    first, second = known.fresh(3), known.fresh(2)
    known.freeze(first, "used")
    assert not set(first.tolist()) & set(second.tolist())
    assert [known.frozen(int(c)) for c in second] == [None, None]


def test_the_first_reason_is_kept() -> None:
    known = channels([])
    known.freeze(np.array([3]), "first")
    known.freeze(np.array([3]), "second")
    known.freeze(None, "nobody")
    assert known.frozen(3) == "first"


def test_a_channel_in_several_places_is_tied_to_all_of_them() -> None:
    known = Channels()
    rows, columns = known.fresh(2), known.fresh(6)
    known.tie(np.repeat(rows, 3), columns)
    assert known.root(columns).tolist() == [0, 0, 0, 1, 1, 1]
