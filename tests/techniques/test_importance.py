"""Scores order channels by the weights that produce them, whatever the scale of a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.core.graph import ChannelGroup, Graph, Place
from automl_compress.errors import SpaceError, TaskError
from automl_compress.model.trace import trace
from automl_compress.techniques import evidence as module
from automl_compress.techniques.evidence import Evidence
from automl_compress.techniques.importance import CRITERIA, batch_norm, criterion, fisher, l1, l2, random, taylor
from tests.model.networks import INPUT, NETWORKS, make

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [((torch.randn(5, *INPUT[1:], generator=GENERATOR),), torch.randint(0, 5, (5,), generator=GENERATOR))] * 2

ROWS = torch.tensor([[3.0, 4.0], [0.0, 6.0], [1.0, 1.0]])


def evidence_of(model: nn.Module, seed: int = 0) -> Evidence:
    graph = trace(model, (torch.randn(INPUT),))
    return Evidence(model, graph, BATCHES, loss=functional.cross_entropy, seed=seed)


def linear_and_group() -> tuple[Evidence, ChannelGroup]:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].weight.data = ROWS.clone()
    ones = ((0,), (1,), (2,))
    places = (
        Place(tensor="0.weight", dim=0, positions=ones, role="producer"),
        Place(tensor="1.weight", dim=1, positions=ones, role="consumer"),
    )
    group = ChannelGroup(name="0", size=3, places=places, producers=("0",), consumers=("1",))
    return Evidence(model, Graph(layers=(), groups=(group,), blocks=())), group


def test_scores_are_the_norms_of_the_rows_over_their_mean() -> None:
    evidence, group = linear_and_group()
    one, two = torch.tensor([7.0, 6.0, 2.0]).double(), torch.tensor([5.0, 6.0, 2.0**0.5]).double()
    torch.testing.assert_close(l1(evidence, group), one / one.mean())
    torch.testing.assert_close(l2(evidence, group), two / two.mean())
    assert l1(evidence, group).argmax() != l2(evidence, group).argmax()


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_consumers_and_the_scale_of_a_layer_don_t_count(name: str) -> None:
    evidence, group = linear_and_group()
    before = criterion(name)(evidence, group)
    with torch.no_grad():
        evidence.model[1].weight.normal_()
        evidence.model[0].weight.mul_(-7)
    torch.testing.assert_close(criterion(name)(evidence, group), before)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", CRITERIA)
def test_every_channel_of_every_group_gets_a_score_and_the_model_stays_as_it_is(name: str, network: str) -> None:
    model = make(network)
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evidence = evidence_of(model)
    for group in evidence.graph.groups:
        scores = criterion(name)(evidence, group)
        if scores is None:
            assert name == "batch-norm"
            continue
        assert scores.shape == (group.size,)
        assert bool((scores >= 0).all())
        assert len(set(scores.tolist())) > 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()][:4] == [False, True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_coupled_layers_all_have_a_say() -> None:
    model = make("ResNet")
    evidence = evidence_of(model)
    group = evidence.graph.group["second.conv2"]
    assert set(group.producers) == {"second.conv2", "second.project"}
    before = l2(evidence, group)
    with torch.no_grad():
        model.second.project.weight[3] *= 100
    assert l2(evidence, group)[3] > before[3]


def gated_losses(model: nn.Module, group: str, gates: Tensor) -> Tensor:
    """Each sample's loss with factors on the channels of the group of `networks.ResNet`, where they are read."""
    (x,), targets = BATCHES[0]
    shaped = gates.view(1, -1, 1, 1)
    y = model.stem(x)
    if group == "first.conv1":
        first = model.first
        z = first.conv2(functional.relu(first.bn1(first.conv1(y))) * shaped)
        y = functional.relu(y + first.bn2(z))
        outputs = model.head(model.second(y).mean((2, 3)))
    else:  # the residual stream after the second block, read by the head
        outputs = model.head((model.second(model.first(y)) * shaped).mean((2, 3)))
    return functional.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("group", ["first.conv1", "second.conv2"])
def test_gradients_are_those_of_a_factor_on_each_channel_sample_by_sample(group: str) -> None:
    model = make("ResNet")
    evidence = evidence_of(model)
    size = evidence.graph.group[group].size
    wanted = torch.autograd.functional.jacobian(lambda gates: gated_losses(model, group, gates), torch.ones(size))
    found = evidence.gate_gradients[group]
    assert found is not None
    assert found.shape == (10, size)
    torch.testing.assert_close(found[:5].float(), wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        taylor(evidence, evidence.graph.group[group])[:].float(), wanted.abs().mean(0), rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(
        fisher(evidence, evidence.graph.group[group]).float(), wanted.square().mean(0) / 2, rtol=1e-3, atol=1e-5
    )


def test_small_batches_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evidence_of(make("Concatenated")).gate_gradients
    monkeypatch.setattr(module, "GRADIENT_BATCH", 2)
    for name, gradients in evidence_of(make("Concatenated")).gate_gradients.items():
        torch.testing.assert_close(gradients, whole[name])


def test_batch_norm_scales_are_read_where_there_are_any() -> None:
    model = make("ResNet")
    evidence = evidence_of(model)
    with torch.no_grad():
        model.first.bn1.weight[2] = -50
    scores = batch_norm(evidence, evidence.graph.group["first.conv1"])
    assert scores is not None
    torch.testing.assert_close(scores.float(), model.first.bn1.weight.detach().abs())
    plain = evidence_of(make("Concatenated"))
    assert all(batch_norm(plain, group) is None for group in plain.graph.groups)


def test_the_baseline_is_seeded_and_differs_from_group_to_group() -> None:
    model = make("ResNet")
    one, same, other = evidence_of(model), evidence_of(model), evidence_of(model, seed=1)
    first, second = one.graph.groups[0], one.graph.groups[1]
    assert torch.equal(random(one, first), random(same, first))
    assert not torch.equal(random(one, first), random(other, first))
    assert random(one, first).tolist()[:4] != random(one, second).tolist()[:4]


@pytest.mark.parametrize("name", ["taylor", "fisher", "obs"])
def test_a_criterion_that_looks_at_data_says_that_there_is_none(name: str) -> None:
    model = make("ResNet")
    graph = trace(model, (torch.randn(INPUT),))
    with pytest.raises(TaskError, match="training samples"):
        criterion(name)(Evidence(model, graph, [], loss=functional.cross_entropy), graph.groups[0])


def test_an_unknown_criterion_is_refused_with_those_that_exist() -> None:
    with pytest.raises(SpaceError, match=r"'best'.*l1, l2"):
        criterion("best")
