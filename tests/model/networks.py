"""Small networks that show one way each in which channels are coupled."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.core.graph import Graph


class Residual(nn.Module):
    """A block with a projected shortcut where the width changes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.project = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(self.project(x) + y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = Residual(8, 8), Residual(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


class Flattened(nn.Module):
    """Convolution channels that become several columns each of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden, self.head = nn.Linear(6 * 4 * 4, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.max_pool2d(functional.gelu(self.norm(self.conv(x))), 2)
        return self.head(torch.tanh(self.hidden(y.flatten(1))))


class Concatenated(nn.Module):
    """Two branches side by side, consumed together; a depthwise convolution and a gate on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.squeeze, self.excite = nn.Conv2d(10, 3, 1), nn.Conv2d(3, 10, 1)
        self.out = nn.Conv2d(10, 7, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(torch.cat([self.left(x), self.right(x)], dim=1))
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head(self.out(y * gate).amax((2, 3)))


class Padded(nn.Module):
    """A zero-padded shortcut: the stem's channels lie amid the sum's. How many are padded is in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.outer(functional.relu(self.inner(x)))
        return self.head((y + functional.pad(x, (0, 0, 0, 0, 2, 2))).mean((2, 3)))


class HardWired(nn.Module):
    """A view that names the number of features: a cut would break the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.free = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.free(self.conv(x).view(-1, 4 * 64))))


class Tied(nn.Module):
    """One module used twice, so its input and output channels are the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.twice, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.enter(x.mean((2, 3))))
        return self.head(functional.relu(self.twice(functional.relu(self.twice(y)))))


class Odd(nn.Module):
    """An operator that no rule describes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.logit(self.conv(x), eps=0.1).cummax(dim=1).values.mean((2, 3)))


NETWORKS = {network.__name__: network for network in (ResNet, Flattened, Concatenated, Padded, HardWired, Tied, Odd)}
INPUT = (2, 3, 8, 8)


def silenced(model: nn.Module, graph: Graph, removed: Mapping[str, Iterable[int]]) -> nn.Module:
    """A copy of full size in which no layer reads the removed channels; for groups that only layers read."""
    result = copy.deepcopy(model)
    tensors = dict(result.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, channels in removed.items():
            gone = list(channels)
            for place in graph.group[name].places:
                if place.role == "consumer":
                    index = torch.tensor([p for c in gone for p in place.positions[c]], dtype=torch.long)
                    tensors[place.tensor].index_fill_(place.dim, index, 0)
    return result


def make(name: str, seed: int = 0) -> nn.Module:
    """The network with random weights and plausible batch-norm statistics, in eval mode."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()
