"""The way to a plan: nothing at first, the plan itself in the end, and never back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automl_compress.core.masks import NO_MASK
from automl_compress.core.plan import Plan
from automl_compress.recovery.approach import cubic, eased, plan_at, removal_order
from automl_compress.recovery.nested import write_back
from automl_compress.techniques.sparsify import mask_of
from tests import tiny
from tests.recovery.support import KEPT, make
from tests.tiny import graph

PLAN = Plan(kept=KEPT, masks={"head": "0.5"}, drop=frozenset())
SHARES = st.floats(0, 1)


def test_the_cubic_schedule_is_zhu_and_guptas() -> None:
    assert (cubic(-1), cubic(0), cubic(1), cubic(2)) == (0, 0, 1, 1)
    assert cubic(0.5) == pytest.approx(1 - 0.5**3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SHARES, SHARES)
def test_what_is_gone_stays_gone(one: float, other: float) -> None:
    order = {name: [c for c in range(graph().group[name].size) if c not in kept] for name, kept in KEPT.items()}
    early, late = (plan_at(PLAN, graph(), share, order) for share in sorted((one, other)))
    for name, group in graph().group.items():
        everything = tuple(range(group.size))
        first, then = early.kept.get(name, everything), late.kept.get(name, everything)
        assert set(KEPT.get(name, everything)) <= set(then) <= set(first)


def test_the_ends_are_nothing_and_the_plan() -> None:
    order = removal_order(tiny.teacher(), graph(), PLAN)
    nothing = plan_at(PLAN, graph(), 0.0, order)
    assert not nothing.kept
    assert set(nothing.masks.values()) == {NO_MASK}
    assert plan_at(PLAN, graph(), 1.0, order) is PLAN


@pytest.mark.parametrize("mask", ["0.6", "0.5 by row", "<0.4", "<0.2 by row", "2:8"])
def test_an_eased_mask_takes_less_the_smaller_the_share(mask: str) -> None:
    weight = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    counts = [int(mask_of(weight, eased(mask, share)).sum()) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == weight.numel()
    assert counts[-1] == int(mask_of(weight, mask).sum())


def test_small_channels_go_first() -> None:
    model = tiny.teacher()
    with torch.no_grad():
        model.block.conv1.weight[4] *= 1e-3
        model.block.conv1.weight[12] *= 1e-2
    assert removal_order(model, graph(), PLAN)["block.conv1"][:2] == [4, 12]


@pytest.mark.parametrize("drop", [frozenset(), frozenset({"block"})])
def test_what_a_part_learned_is_written_back_to_its_place(drop: frozenset[str]) -> None:
    """Cutting again gives the part; what it lacks is as it was."""
    plan = Plan(kept=KEPT, drop=drop)
    whole = tiny.teacher()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    part = make(plan, whole)
    torch.manual_seed(0)
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    write_back(whole, part, graph(), plan)
    again = make(plan, whole)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in part.state_dict().items())
    gone = [c for c in range(32) if c not in KEPT["down"]]
    assert torch.equal(whole.down.weight[gone], before["down.weight"][gone])
