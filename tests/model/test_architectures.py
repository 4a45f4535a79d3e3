"""Models as users write them: what is offered can be cut to any size, and the result is what the trace says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from automl_compress.core.plan import Plan
from automl_compress.deploy.export import Template
from automl_compress.model.checks import deviation
from automl_compress.model.surgery import cut
from automl_compress.model.trace import Analysis, analyse, make_telling

from .architectures import MODELS, make

FOUND: dict[str, tuple[nn.Module, torch.Tensor, Analysis]] = {}


def analysed(name: str) -> tuple[nn.Module, torch.Tensor, Analysis]:
    if name not in FOUND:
        model, x = make(name)
        make_telling(model)
        FOUND[name] = (model, x, analyse(model, (x,)))
    return FOUND[name]


@pytest.mark.parametrize("name", MODELS)
def test_any_cut_runs_trains_and_equals_the_masked_original(name: str) -> None:
    model, x, analysis = analysed(name)
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        kept = {}
        for group in analysis.graph.groups:
            count = int(torch.randint(1, group.size + 1, (1,), generator=generator))
            kept[group.name] = sorted(torch.randperm(group.size, generator=generator)[:count].tolist())
        small = cut(model, analysis.graph, kept=kept)
        assert type(small) is type(model)
        assert deviation(small(x), analysis.masked({name: set(stay) for name, stay in kept.items()})) < 1e-3
        small.train()(x).float().sum().backward()
        assert all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # Heads (3) and columns of a head (4) go through the residual stream, since the code takes its width from there.
        ("Transformer", [3, 4, 20, 20]),
        # The stream, key heads with their queries, queries of each key head, columns of a head, the gated layer.
        ("Decoder", [2, 2, 6, 16, 20]),
        # Of the group norm: groups (4), channels of each (2).
        ("UNet", [2, 4, 6, 10, 12]),
        ("Split", [4, 6, 7]),
        ("Encoder", [3, 4, 20]),
        ("Signal", [8]),
    ],
)
def test_groups_are_found(name: str, sizes: list[int]) -> None:
    graph = analysed(name)[2].graph
    assert sorted(group.size for group in graph.groups) == sizes


def test_heads_and_their_width_are_alternatives_whose_shares_multiply() -> None:
    graph = analysed("Transformer")[2].graph
    heads, width = (next(g.name for g in graph.groups if g.size == size) for size in (3, 4))
    assert graph.alternatives[heads] == {width}
    qkv = graph.layer["attention.0.qkv"]
    assert graph.width(qkv, "out", {heads: 2}) == 24
    assert graph.width(qkv, "out", {heads: 2, width: 3}) == 18
    assert Plan(kept={heads: (0, 2), width: (1,)}).widths(graph)[qkv.name] == (2, 6)


def test_attributes_of_the_users_modules_follow() -> None:
    model, _, analysis = analysed("Transformer")
    heads = next(g.name for g in analysis.graph.groups if g.size == 3)
    small = cut(model, analysis.graph, kept={heads: [1]})
    assert (small.attention[0].num_heads, small.norms[0].normalized_shape) == (1, (4,))
    assert model.attention[0].num_heads == 3
    model, _, analysis = analysed("Split")
    part = next(g.name for g in analysis.graph.groups if g.size == 6)
    assert cut(model, analysis.graph, kept={part: [5]}).sizes == [4, 1]
    assert model.sizes == [4, 6]


def test_tied_weights_stay_one() -> None:
    model, _, analysis = analysed("Decoder")
    stream = next(g.name for g in analysis.graph.groups if g.size == 16)
    small = cut(model, analysis.graph, kept={stream: range(5)})
    assert small.out.weight is small.embed.weight
    assert small.embed.embedding_dim == 5


def test_layers_of_a_transformer_are_removed_branch_by_branch() -> None:
    model, x, analysis = analysed("Transformer")
    assert len(analysis.graph.blocks) == 4
    small = cut(model, analysis.graph, kept={}, drop=[block.name for block in analysis.graph.blocks])
    y = model.patches(x).flatten(2).transpose(1, 2)
    y = torch.cat([model.token.expand(2, -1, -1), y], dim=1) + model.positions
    torch.testing.assert_close(small(x), model.head(y[:, 0]))


def test_what_no_rule_describes_is_named() -> None:
    graph = analysed("Signal")[2].graph
    assert any("lstm" in entry.reason for entry in graph.frozen if entry.layer == "second")


@pytest.mark.parametrize("name", ["Transformer", "Shuffled"])
def test_the_exported_template_is_filled_for_every_group(name: str) -> None:
    model, x, analysis = analysed(name)
    template = Template(model, (x,), analysis.graph)
    for group in analysis.graph.groups:
        kept = {group.name: tuple(range(group.size - 1))}
        template.fill(cut(model, analysis.graph, kept=kept), Plan(kept=kept))
    assert template.notes == []


def test_precision_mode_and_frozen_parameters_are_the_users() -> None:
    model, x, analysis = analysed("Transformer")
    odd = copy.deepcopy(model).half().train()
    odd.head.weight.requires_grad_(False)
    found = analyse(odd, (x.half(),)).graph
    assert {g.name: g.size for g in found.groups} == {g.name: g.size for g in analysis.graph.groups}
    small = cut(odd, found, kept={g.name: range(0, g.size, 2) for g in found.groups})
    assert small.training
    assert small.head.weight.dtype == torch.float16
    assert not small.head.weight.requires_grad
    assert small.patches.weight.requires_grad
