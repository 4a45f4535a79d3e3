"""Every call of a layer is seen with what it needs to be made again, and its site is where its output is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.core.graph import Graph
from automl_compress.model.trace import trace
from automl_compress.techniques.calls import Call, LayerCalls, Reader, Site
from automl_compress.techniques.rows import input_rows, sample_positions, value_rows
from tests.model.networks import INPUT, NETWORKS, make

X = torch.randn(4, *INPUT[1:], generator=torch.Generator().manual_seed(0))


class Watching(LayerCalls):
    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__(model, graph)
        self.calls: list[tuple[Call, Tensor]] = []
        self.sites: list[tuple[Site, Reader, Tensor]] = []

    def returned(self, call: Call, output: Tensor) -> None:
        self.calls.append((call, output.clone()))

    def reached(self, site: Site, reader: Reader) -> None:
        self.sites.append((site, reader, site.value.clone()))


def watch(model: nn.Module, x: Tensor = X) -> Watching:
    watching = Watching(model, trace(model, (x,)))
    with torch.no_grad(), watching:
        model(x)
    return watching


class Convolutions(nn.Module):
    """One layer of any kind, called without a module of its own."""

    def __init__(self, dims: int, groups: int, padding: int | str, stride: int, dilation: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4 // groups, *(3, 2, 2)[:dims]))
        self.bias = nn.Parameter(torch.randn(6))
        self.arguments = stride, padding, dilation, groups
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return getattr(functional, f"conv{self.dims}d")(x, self.weight, self.bias, *self.arguments)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("groups", "padding", "stride", "dilation"), [(1, 0, 2, 1), (2, 1, 1, 2), (2, "same", 1, 1)])
def test_rows_times_weights_are_the_output(
    dims: int, groups: int, padding: int | str, stride: int, dilation: int
) -> None:
    torch.manual_seed(0)
    model = Convolutions(dims, groups, padding, stride, dilation)
    watching = watch(model, torch.randn(3, 4, *(9, 8, 7)[:dims]))
    ((call, output),) = watching.calls
    assert call.groups == groups
    torch.testing.assert_close(call.again(call.weight, call.bias), output)
    assert call.output_shape == (output.shape[0], *output.shape[2:])
    positions = sample_positions(call, 20)
    rows = input_rows(call, positions)
    by_group = model.weight.detach().view(groups, -1, rows.shape[2])
    found = torch.einsum("rgc,goc->rgo", rows, by_group).flatten(1) + model.bias.detach()
    torch.testing.assert_close(found, value_rows(output, call, positions), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_are_seen_in_order_and_can_be_called_again(name: str) -> None:
    model = make(name)
    watching = watch(model)
    graph = trace(model, (X,))
    assert list(dict.fromkeys(call.layer.name for call, _ in watching.calls)) == [layer.name for layer in graph.layers]
    for call, output in watching.calls:
        torch.testing.assert_close(call.again(call.weight, call.bias), output)


def test_sites_are_behind_the_batch_norm_and_know_the_shortcut() -> None:
    model = make("ResNet")
    sites = {site.call.layer.name: (site, reader) for site, reader, _ in watch(model).sites if not site.added}
    assert {name: reader for name, (_, reader) in sites.items()} == {
        "stem": "other",
        "first.conv1": "rectifier",
        "first.conv2": "sum",
        "second.conv1": "rectifier",
        "second.conv2": "other",
        "second.project": "sum",
    }
    site = sites["first.conv1"][0]
    norm = model.first.bn1
    torch.testing.assert_close(site.scale, norm.weight / (norm.running_var + norm.eps).sqrt())
    assert site.mean is norm.running_mean


def test_a_value_is_its_layers_output_times_the_scale_plus_a_constant_per_channel() -> None:
    model = make("ResNet")
    watching = watch(model)
    outputs = {call.layer.name: output for call, output in watching.calls}
    for site, _, value in watching.sites:
        if site.added:
            continue
        rest = value - outputs[site.call.layer.name] * (1 if site.scale is None else site.per_channel(site.scale))
        spread = rest.transpose(0, 1).flatten(1).std(dim=1) if rest.ndim > 2 else rest.std(dim=0)
        assert float(spread.max()) < 1e-4


def test_scales_and_dropout_are_followed_and_what_mixes_channels_is_not() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gamma = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4, 1, 1))
            self.out, self.norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.dropout(self.conv(x), training=self.training) * self.gamma
            return functional.relu(self.norm(self.out(functional.relu(y))))

    torch.manual_seed(0)
    model = Scaled().eval()
    sites = {site.call.layer.name: (site, reader) for site, reader, _ in watch(model).sites}
    site, reader = sites["conv"]
    assert reader == "rectifier"
    torch.testing.assert_close(site.scale, model.gamma.detach().flatten())
    assert sites["out"][1] == "other"
    assert sites["out"][0].scale is None


def test_watching_changes_nothing() -> None:
    for name in NETWORKS:
        model = make(name)
        watching = Watching(model, trace(model, (X,)))
        with torch.no_grad():
            before = model(X)
            with watching:
                assert torch.equal(model(X), before)
