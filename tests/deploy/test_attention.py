from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from automl_compress.core.plan import Plan
from automl_compress.deploy.export import Template
from automl_compress.deploy.verify import check_float
from automl_compress.model.trace import trace
from automl_compress.techniques.evidence import Evidence
from automl_compress.techniques.importance import l2
from automl_compress.techniques.prune import Ranking, apply_plan, select_channels


class Attention(nn.Module):
    """Keys and values of different widths after a cut, in calls that look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 4)
        self.heads = 4

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = (layer(x).view(batch, length, self.heads, -1) for layer in (self.query, self.key, self.value))
        query, key, value = (part.transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, length, -1))
        result: Tensor = self.down(torch.relu(self.up(x))).mean(dim=1)
        return result


@pytest.mark.parametrize("drop", [frozenset(), frozenset({"all"})])
def test_cut_attention_is_filled_into_the_template(drop: frozenset[str]) -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    inputs = (torch.randn(2, 6, 32),)
    graph = trace(model, inputs)
    sparsities = dict(zip((group.name for group in graph.groups), (0.5, 0.25, 0.125, 0.5), strict=False))
    assert len(graph.groups) >= 4
    template = Template(model, inputs, graph)
    blocks = frozenset(block.name for block in graph.blocks) if drop else drop
    ranking = Ranking(Evidence(model, graph), l2)
    plan = select_channels(graph, Plan(sparsity=sparsities, drop=blocks), ranking)
    smaller = apply_plan(model, graph, plan)
    filled = template.fill(smaller, plan)
    assert not template.notes
    check_float(filled, smaller, (torch.randn(3, 6, 32),))


def test_repeated_encoder_layers_are_cut_and_removed_in_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    # The sequence is as long as a head is wide: sizes alone don't tell what a number counts.
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True) for _ in range(3)]
    model, inputs = nn.Sequential(nn.Linear(4, 16), *layers, nn.Linear(16, 3)).eval(), (torch.randn(2, 8, 4),)
    graph = trace(model, inputs)
    template = Template(model, inputs, graph)
    monkeypatch.setattr(template, "_export_alone", lambda model: pytest.fail("a plan was exported by itself"))
    repeated = [block.name for block in graph.blocks if block.ending == "input"]
    assert len(repeated) > 1
    for drop in ([], repeated[:1], repeated):
        plan = Plan(sparsity=dict.fromkeys(graph.group, 0.5), drop=frozenset(drop))
        plan = select_channels(graph, plan, Ranking(Evidence(model, graph), l2))
        smaller = apply_plan(model, graph, plan)
        check_float(template.fill(smaller, plan), smaller, (torch.randn(3, 8, 4),))


def test_any_number_of_heads_is_filled_in_where_the_sequence_is_as_long_as_a_head_is_wide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 16, dropout=0.0, batch_first=True)
    model, inputs = nn.Sequential(nn.Linear(4, 32), layer, nn.Linear(32, 3)).eval(), (torch.randn(2, 8, 4),)
    graph = trace(model, inputs)
    heads = next(group.name for group in graph.groups if group.size == 4)
    template = Template(model, inputs, graph)
    ranking = Ranking(Evidence(model, graph), l2)

    def cut(kept: int) -> tuple[nn.Module, Plan]:
        plan = select_channels(graph, Plan(sparsity={heads: 1 - kept / 4}), ranking)
        return apply_plan(model, graph, plan), plan

    with monkeypatch.context() as patch:
        patch.setattr(template, "_export_alone", lambda model: pytest.fail("a plan was exported by itself"))
        for smaller, plan in map(cut, (1, 3, 2)):
            check_float(template.fill(smaller, plan), smaller, (torch.randn(3, 8, 4),))


def test_a_template_that_fits_one_number_of_channels_is_checked_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, inputs = Attention().eval(), (torch.randn(2, 6, 32),)
    graph = trace(model, inputs)
    template = Template(model, inputs, graph)
    checked: list[Plan] = []
    monkeypatch.setattr(template, "_check", lambda filled, model: checked.append(plan))
    group = graph.groups[0]
    for left in (0.5, 0.5, 0.75):
        plan = select_channels(graph, Plan(sparsity={group.name: 1 - left}), Ranking(Evidence(model, graph), l2))
        template.fill(apply_plan(model, graph, plan), plan)
    assert len(checked) == 2
