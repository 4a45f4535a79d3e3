"""What is planned fits into the time that is left, the whole schedule comes first, and too little time is said."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automl_compress.errors import InputError
from automl_compress.search.campaign.timing import Clock, Costs, Rung, TooShort, allot, most_entrants, rungs, unlimited

COSTS = Costs(trial=1.0, epoch=30.0, finishing=5.0, measuring=2.0)
seconds = st.floats(0.01, 100.0)


@given(
    left=st.floats(1.0, 5000.0),
    costs=st.builds(Costs, trial=seconds, epoch=seconds, finishing=seconds, measuring=seconds),
    epochs=st.floats(0.0, 30.0),
    baselines=st.integers(0, 3),
    trials=st.integers(0, 200),
    looks=st.integers(1, 5),
)
def test_what_is_planned_fits_or_is_refused(
    left: float, costs: Costs, epochs: float, baselines: int, trials: int, looks: int
) -> None:
    try:
        found = allot(left, costs, epochs=epochs, baselines=baselines, trials=trials, looks=looks)
    except TooShort as short:
        longer = allot(
            left + short.missing + 1e-6, costs, epochs=epochs, baselines=baselines, trials=trials, looks=looks
        )
        assert longer.rungs[-1].models == 1
        return
    assert found.exploring is not None
    spent = looks * costs.ladder(found.rungs) + costs.baselines(found.baselines, found.baseline_epochs)
    assert spent + found.exploring + costs.delivery(1 + found.baselines) <= left * (1 + 1e-9)
    assert found.baselines == baselines or found.epochs <= 0.05 * epochs
    assert found.exploring >= min(trials, 1) * costs.trial * (1 - 1e-9)
    assert found.epochs <= epochs
    whole = found.rungs == rungs(epochs, most_entrants(epochs)) and found.baseline_epochs in (epochs, 0.0)
    assert whole == (not [cut for cut in found.cut if "baselines" not in cut])


def test_with_time_enough_nothing_is_cut() -> None:
    found = allot(1e6, COSTS, epochs=3, baselines=2, trials=100)
    assert (found.rungs, found.baseline_epochs, found.cut) == (unlimited(3).rungs, 3, ())


def test_a_model_is_delivered_before_others_are_finished_to_compare_it_with() -> None:
    least = COSTS.ladder(rungs(0.0, 1)) + COSTS.delivery(1) + COSTS.trial
    found = allot(least + 0.1, COSTS, epochs=3, baselines=2, trials=100)
    assert (found.baselines, found.epochs) == (0, 0.0)


def test_less_time_never_buys_more_training() -> None:
    trained = []
    for left in range(60, 2000, 20):
        try:
            trained.append(allot(left, COSTS, epochs=3, baselines=2, trials=100).epochs)
        except TooShort:
            trained.append(0.0)
    assert trained == sorted(trained)
    assert trained[0] < trained[-1] == 3


@pytest.mark.parametrize("epochs", [0.5, 1, 3, 10, 100])
def test_half_go_on_with_three_times_the_epochs(epochs: float) -> None:
    steps = rungs(epochs, most_entrants(epochs))
    assert steps[-1] == Rung(models=1, epochs=epochs)
    for rung, following in pairwise(steps):
        assert rung.models == 2 * following.models
        assert rung.epochs * 3 == pytest.approx(following.epochs)
    assert steps[0].models <= 8
    assert sum(rung.models * rung.epochs for rung in steps) <= 3 * epochs


def test_without_training_there_is_one_rung() -> None:
    assert rungs(0, 8) == (Rung(models=1, epochs=0),)
    assert unlimited(0).rungs == rungs(0, 1)


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_a_limit_that_is_too_short_is_named_with_one_that_would_do() -> None:
    hand = Hand()
    clock = Clock(deadline=160.0, now=hand)
    clock.require(60.0, "measuring")
    hand.time = 130.0
    with pytest.raises(
        InputError, match=r"--timeout 1m00s is too short: measuring takes 50s, and 30s are left; give 1m36s"
    ):
        clock.require(50.0, "measuring")
    Clock(now=hand).require(1e9, "without a limit anything")


def test_what_was_seen_lately_counts() -> None:
    hand = Hand()
    clock = Clock(deadline=1000.0, now=hand)
    assert clock.typical("trial") is None
    for took in (9.0, *[2.0] * 10):
        with clock.timing("trial"):
            hand.time += took
    assert clock.typical("trial") == 2.0
    with clock.timing("measuring", units=4):
        hand.time += 8
    assert clock.typical("measuring") == 2.0


def test_parts_share_what_was_seen_and_what_was_cut() -> None:
    hand = Hand()
    clock = Clock(deadline=220.0, now=hand)
    part = clock.part(3)
    assert part.left == pytest.approx(40.0)
    part.record("trial", 1.0)
    part.cuts.append("something")
    assert (clock.typical("trial"), clock.cuts) == (1.0, ["something"])
    assert Clock(now=hand).part(3).left is None
