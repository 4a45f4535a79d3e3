"""Masks take exactly what they say, and what they took stays zero."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from automl_compress.core.plan import Plan
from automl_compress.model.trace import trace
from automl_compress.techniques.prune import apply_plan
from automl_compress.techniques.repair import record_targets, repair
from automl_compress.techniques.sparsify import (
    apply_masks,
    compensated,
    compressed_bytes,
    held_masks,
    mask_of,
    masks_in_force,
    zero_shares,
)
from tests.model.networks import INPUT, make

IMAGES = torch.randn(48, *INPUT[1:], generator=torch.Generator().manual_seed(1))
SHAPES = st.sampled_from([(6, 8), (5, 30), (4, 8, 3), (6, 12, 3, 3), (8, 1, 3, 3), (3, 4, 2, 2, 2)])


def weights(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(SHAPES, st.sampled_from(["0.5", "0.9", "0.01", "0.5 by row", "<0.7", "<0.3 by row", "2:4", "1:4", "3:8"]))
def test_what_stays_is_not_smaller_than_what_goes_and_masking_twice_changes_nothing(
    shape: tuple[int, ...], text: str
) -> None:
    weight = weights(shape)
    mask = mask_of(weight, text)
    assert mask.shape == weight.shape
    assert mask.dtype == torch.bool
    assert torch.equal(mask_of(weight * mask, text) & mask, mask & (weight != 0))
    if ":" in text or mask.all() or not mask.any():
        return
    scores = (
        weight.abs() / weight.flatten(1).norm(dim=1).view(-1, *[1] * (len(shape) - 1))
        if "row" in text
        else weight.abs()
    )
    assert scores[mask].min() >= scores[~mask].max()
    if not text.startswith("<"):
        assert int((~mask).sum()) == round(float(text.split()[0]) * weight.numel())


@given(SHAPES, st.sampled_from([(2, 4), (1, 4), (1, 2), (3, 8)]))
def test_a_pattern_keeps_the_largest_of_each_group_of_inputs(shape: tuple[int, ...], pattern: tuple[int, int]) -> None:
    kept, of = pattern
    weight = weights(shape)
    mask = mask_of(weight, f"{kept}:{of}").movedim(1, -1).flatten(0, -2)
    rows = weight.abs().movedim(1, -1).flatten(0, -2)
    for start in range(0, shape[1], of):
        part, sizes = mask[:, start : start + of], rows[:, start : start + of]
        count = min(kept, part.shape[1])
        assert bool((part.sum(dim=1) == count).all())
        threshold = sizes.sort(dim=1, descending=True).values[:, count - 1 : count]
        assert torch.equal(part, sizes >= threshold)


def test_none_keeps_everything() -> None:
    assert mask_of(weights((3, 4)), "none").all()


def test_a_masked_model_is_the_dense_one_with_zeros() -> None:
    model = make("ResNet")
    graph = trace(model, (IMAGES,))
    plan = Plan(masks={"first.conv1": "2:4", "second.conv2": "0.75", "head": "none"})
    masked, by_hand = apply_plan(model, graph, plan).eval(), apply_plan(model, graph, plan).eval()
    apply_masks(masked, graph, plan)
    with torch.no_grad():
        for name, text in masks_in_force(graph, plan).items():
            weight = by_hand.get_submodule(name).weight
            weight[~mask_of(weight, text)] = 0
        assert torch.equal(masked(IMAGES), by_hand(IMAGES))
    assert {name: value.shape for name, value in masked.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    shares = zero_shares(masked, graph)
    assert shares["first.conv1"] == 0.5
    assert shares["second.conv2"] == pytest.approx(0.75, abs=1e-3)
    assert shares["head"] == 0
    held = held_masks(masked, graph, plan)
    assert set(held) == {"first.conv1.weight", "second.conv2.weight"}
    assert all(torch.equal(mask, masked.get_parameter(name) != 0) for name, mask in held.items())


def test_layers_of_removed_blocks_have_no_mask() -> None:
    model = make("ResNet")
    graph = trace(model, (IMAGES,))
    plan = Plan(masks={"first.conv1": "0.5", "head": "0.5"}, drop=frozenset({"first"}))
    assert masks_in_force(graph, plan) == {"head": "0.5"}
    small = apply_plan(model, graph, plan).eval()
    apply_masks(small, graph, plan)
    assert zero_shares(small, graph)["head"] == pytest.approx(0.5, abs=0.02)


def test_what_stays_makes_up_for_what_goes() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    gram = (rows.T @ rows).double().unsqueeze(0)
    weight = weights((1, 5, 12))
    mask = mask_of(weight[0], "0.5").unsqueeze(0)
    found = compensated(weight, mask, gram)
    assert bool((found[~mask] == 0).all())
    for row in range(5):
        stays = mask[0, row]
        wanted = np.linalg.lstsq(
            rows[:, stays].double().numpy(), (rows.double() @ weight[0, row].double()).numpy(), rcond=None
        )[0]
        np.testing.assert_allclose(found[0, row, stays], wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compensated(weight, torch.ones_like(mask), gram), weight.double())


@pytest.mark.parametrize("text", ["2:4", "0.5", "0.7 by row"])
@pytest.mark.parametrize("kept", [{}, {"stem": (0, 1, 3, 4, 5, 7), "first.conv1": (0, 1, 2, 3, 5, 6)}])
def test_the_repair_leaves_masks_exact_and_the_network_nearer_to_the_original(
    text: str, kept: dict[str, tuple[int, ...]]
) -> None:
    model = make("ResNet")
    graph = trace(model, (IMAGES,))
    plan = Plan(masks={"first.conv1": text, "first.conv2": text, "second.conv2": text}, kept=kept)
    plain, repaired = apply_plan(model, graph, plan).eval(), apply_plan(model, graph, plan).eval()
    apply_masks(plain, graph, plan)
    done = repair(repaired, graph, plan, record_targets(model, graph, (IMAGES,)))
    before = {name: value.clone() for name, value in repaired.state_dict().items()}
    apply_masks(repaired, graph, plan)
    for name, value in repaired.state_dict().items():
        assert torch.equal(value, before[name])
    assert {name for name, one in done.items() if one.outcome == "masked"} == set(plan.masks)
    for name in plan.masks:
        assert zero_shares(repaired, graph)[name] >= zero_shares(plain, graph)[name] - 1e-9
    with torch.no_grad():
        fresh = torch.randn(64, *INPUT[1:], generator=torch.Generator().manual_seed(5))
        near, far = (float((m(fresh) - model(fresh)).square().mean()) for m in (repaired, plain))
    assert near < far


def test_compression_is_measured() -> None:
    zeros, noise = bytes(10_000), torch.randint(0, 256, (10_000,)).to(torch.uint8).numpy().tobytes()
    assert compressed_bytes(zeros) < 100
    assert compressed_bytes(noise) > 9_900
    assert len(zlib.decompress(zlib.compress(zeros, 9))) == 10_000


def test_a_module_without_graph_layers_has_no_shares() -> None:
    model = make("Odd")
    assert set(zero_shares(nn.Linear(2, 2), trace(model, (IMAGES,)))) == set()
