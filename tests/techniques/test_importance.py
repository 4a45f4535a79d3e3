"""Scores order channels by the weights that produce them, whatever the scale of a layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automl_compress.core.graph import ChannelGroup, Place
from automl_compress.errors import SpaceError
from automl_compress.model.trace import trace
from automl_compress.techniques.importance import CRITERIA, criterion, l1, l2
from tests.model.networks import INPUT, NETWORKS, make

ROWS = torch.tensor([[3.0, 4.0], [0.0, 6.0], [1.0, 1.0]])


def linear_and_group() -> tuple[nn.Module, ChannelGroup]:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].weight.data = ROWS.clone()
    ones = ((0,), (1,), (2,))
    places = (
        Place(tensor="0.weight", dim=0, positions=ones, role="producer"),
        Place(tensor="1.weight", dim=1, positions=ones, role="consumer"),
    )
    return model, ChannelGroup(name="0", size=3, places=places, producers=("0",), consumers=("1",))


def test_scores_are_the_norms_of_the_rows_over_their_mean() -> None:
    model, group = linear_and_group()
    one, two = torch.tensor([7.0, 6.0, 2.0]).double(), torch.tensor([5.0, 6.0, 2.0**0.5]).double()
    torch.testing.assert_close(l1(model, group), one / one.mean())
    torch.testing.assert_close(l2(model, group), two / two.mean())
    assert l1(model, group).argmax() != l2(model, group).argmax()


@pytest.mark.parametrize("name", CRITERIA)
def test_consumers_and_the_scale_of_a_layer_don_t_count(name: str) -> None:
    model, group = linear_and_group()
    before = criterion(name)(model, group)
    with torch.no_grad():
        model[1].weight.normal_()
        model[0].weight.mul_(-7)
    torch.testing.assert_close(criterion(name)(model, group), before)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", CRITERIA)
def test_every_channel_of_every_group_gets_a_score(name: str, network: str) -> None:
    model = make(network)
    for group in trace(model, (torch.randn(INPUT),)).groups:
        scores = criterion(name)(model, group)
        assert scores.shape == (group.size,)
        assert bool((scores > 0).all())


def test_coupled_layers_all_have_a_say() -> None:
    model = make("ResNet")
    group = trace(model, (torch.randn(INPUT),)).group["second.conv2"]
    assert set(group.producers) == {"second.conv2", "second.project"}
    before = l2(model, group)
    with torch.no_grad():
        model.second.project.weight[3] *= 100
    assert l2(model, group)[3] > before[3]


def test_an_unknown_criterion_is_refused_with_those_that_exist() -> None:
    with pytest.raises(SpaceError, match=r"'best'.*l1, l2"):
        criterion("best")
