"""A task that is learned in a second: four patterns under noise, and a small residual network that tells them apart."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.core.graph import Graph
from automl_compress.model.task import Task, prepare
from automl_compress.model.trace import trace

CLASSES = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """Input [N, 1, 8, 8], output [N, 4]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.block = Block(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(functional.relu(self.norm(self.stem(x))))
        return self.head(functional.relu(self.down(x)).mean((2, 3)))


def split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 8, 8] and classes [count]."""
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, CLASSES, (count,), generator=generator)
    return patterns[classes] + 1.2 * torch.randn(count, 1, 8, 8, generator=generator), classes


@cache
def _trained(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = Net()
    images, classes = split(512, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(4):
        for index in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[index]), classes[index]).backward()
            optimizer.step()
    return model.state_dict()


def teacher(seed: int = 0) -> nn.Module:
    model = Net()
    model.load_state_dict(_trained(seed))
    return model.eval()


def task(seed: int = 0) -> Task:
    return Task(model=teacher(seed), train=split(512, 1), validation=split(400, 2), test=split(200, 3))


@cache
def ready() -> Task:
    """The task as a run takes it; shared by tests that only read."""
    return prepare(task())


@cache
def graph() -> Graph:
    return trace(ready().model, ready().example_inputs)


def other() -> Task:
    """The same network with other weights."""
    return task(seed=1)
