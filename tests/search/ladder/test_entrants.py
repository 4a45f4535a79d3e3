"""Which plans are trained: the milder of those that look alike, and plans that remove different blocks."""

from __future__ import annotations

from dataclasses import replace

from automl_compress.core.plan import Plan
from automl_compress.search.ladder.entrants import in_order, relaxed, variants
from automl_compress.search.table.losses import additive_loss
from automl_compress.search.table.pricing import uniform_bits
from tests.search.networks import residual, space_of, table_for

GRAPH = residual(blocks=4)
SPACE = space_of(GRAPH)
TABLE = table_for(SPACE, GRAPH, 1)
QUALITY = TABLE.quality
SEVERE = SPACE.plan({d.name: d.options[-1] for d in SPACE.decisions if d.kind == "sparsity"} | {"drop.b0": True})


def _cost(plan: Plan) -> float:
    return TABLE.plan_cost(GRAPH, plan).latency_us


def _loss(plan: Plan) -> float:
    return additive_loss(SPACE, plan, QUALITY)


def test_cuts_are_undone_until_nothing_more_fits() -> None:
    limit = 1.3 * _cost(SEVERE)
    milder = relaxed(SPACE, SEVERE, QUALITY, lambda plan: _cost(plan) <= limit)
    assert milder is not None
    assert _cost(milder) <= limit
    assert _loss(milder) < _loss(SEVERE)
    assert milder.bits == SEVERE.bits
    params = SPACE.params(milder)
    for decision in SPACE.decisions:
        if decision.kind in ("sparsity", "drop"):
            for option in decision.options[: decision.options.index(params[decision.name])]:
                other = SPACE.plan({**params, decision.name: option})
                inside_of_what_is_gone = SPACE.plan_key(other) == SPACE.plan_key(milder)
                assert inside_of_what_is_gone or _cost(other) > limit, "one more would have fitted"


def test_a_plan_that_does_not_fit_is_not_relaxed_and_one_without_cuts_stays() -> None:
    assert relaxed(SPACE, SEVERE, QUALITY, lambda plan: False) is None
    quantized = uniform_bits(SPACE, 8)
    assert relaxed(SPACE, quantized, QUALITY, lambda plan: True) == quantized


def test_fewer_bits_buy_room_for_cuts_to_be_undone() -> None:
    limit = _cost(SEVERE)
    found = variants(SPACE, [SEVERE], QUALITY, uniform_bits(SPACE, 8).bits, lambda plan: _cost(plan) <= limit)
    assert found
    assert SPACE.plan_key(SEVERE) not in {SPACE.plan_key(plan) for plan in found}
    assert all(_cost(plan) <= limit for plan in found)
    assert any(plan.bits and plan.drop < SEVERE.drop for plan in found) or any(
        sum(plan.sparsity.values()) < sum(SEVERE.sparsity.values()) for plan in found
    )


def _dropping(*blocks: str, sparsity: float = 0.0) -> Plan:
    narrow = next(d.name for d in SPACE.decisions if d.kind == "sparsity")
    return SPACE.plan({f"drop.{block}": True for block in blocks} | {narrow: sparsity})


def test_of_plans_that_a_figure_can_not_tell_apart_the_milder_one_is_first() -> None:
    mild, severe = Plan(), _dropping(sparsity=0.5)
    values = [(severe, 0.905), (mild, 0.900)]
    order = {"quality": QUALITY, "places": 1}
    assert in_order(SPACE, values, error=lambda _: 0.01, **order)[0] == mild
    assert in_order(SPACE, values, error=lambda _: 0.001, **order)[0] == severe
    assert in_order(SPACE, [], error=lambda _: 0.0, **order) == []


def test_plans_that_remove_other_blocks_come_before_further_ones_of_the_same() -> None:
    one, like_one, two = _dropping("b0"), _dropping("b0", sparsity=0.5), _dropping("b1")
    values = [(one, 0.9), (like_one, 0.89), (two, 0.7)]
    found = in_order(SPACE, values, QUALITY, error=lambda _: 0.0, places=2)
    assert found == [one, two, like_one]


def test_other_blocks_don_t_count_for_a_plan_that_loses_far_more() -> None:
    one, like_one, two = _dropping("b0"), _dropping("b0", sparsity=0.5), _dropping("b1")
    values = [(one, 0.9), (like_one, 0.89), (two, 0.7)]
    found = in_order(SPACE, values, QUALITY, error=lambda _: 0.0, original=1.0, places=2)
    assert found == [one, like_one, two]
    near = [(one, 0.9), (like_one, 0.89), (two, 0.81)]
    assert in_order(SPACE, near, QUALITY, error=lambda _: 0.0, original=1.0, places=2) == [one, two, like_one]


def test_a_plan_that_is_always_trained_takes_the_last_place_and_not_the_first() -> None:
    plans = [_dropping(f"b{i}") for i in range(4)]
    values = [(plan, 0.9 - 0.1 * i) for i, plan in enumerate(plans)]
    always = [replace(plans[3])]
    found = in_order(SPACE, values, QUALITY, error=lambda _: 0.0, always=always, places=3)
    assert found[:3] == [plans[0], plans[1], plans[3]]
    assert sorted(p.key for p in found) == sorted(p.key for p in plans)
    alone = in_order(SPACE, values, QUALITY, error=lambda _: 0.0, always=always, places=1)
    assert alone[0] == plans[0]
