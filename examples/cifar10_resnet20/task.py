"""ResNet-20 on CIFAR-10: `automl-compress search examples/cifar10_resnet20/task.py --latency 40% -o runs/cifar`.

Reads `cifar10.npz` or the standard `cifar-10-batches-py` folder below $AC_DATA_DIR, and `resnet20_cifar10.pt` below
$AC_WEIGHTS_DIR; `run.py` takes both as arguments.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from data import load_cifar10
from resnet import ResNet20
from torch import Tensor

from automl_compress import Task

VALIDATION = 2500


class AugmentedBatches:
    """Shuffled batches with a random crop out of 4 pixels of padding and a random flip, whole batches at a time."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int = 128) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.labels)).split(self.batch_size):
            yield augment(self.images[index]), self.labels[index]


def augment(images: Tensor) -> Tensor:
    """Random crop and flip of a batch [N, 3, 32, 32]."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    rows = torch.arange(height) + torch.randint(0, 9, (count, 1))
    columns = torch.arange(width) + torch.randint(0, 9, (count, 1))
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    return padded.permute(0, 2, 3, 1)[
        torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)


def mirrored(images: Tensor) -> Tensor:
    """Every second image that is trained on is mirrored, so what the teacher says of both is averaged."""
    return images.flip(3)


def task(data: Path | None = None, weights: Path | None = None) -> Task:
    """The pretrained network with 22,500 training, 2,500 validation and all test images."""
    train, test = load_cifar10(data or Path(os.environ["AC_DATA_DIR"]))
    model = ResNet20()
    path = (weights or Path(os.environ["AC_WEIGHTS_DIR"])) / "resnet20_cifar10.pt"
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    held_out = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))
    validation, rest = held_out[:VALIDATION], held_out[VALIDATION:]
    return Task(
        model=model.eval(),
        train=AugmentedBatches(train[0][rest], train[1][rest]),
        validation=(train[0][validation], train[1][validation]),
        test=test,
        views=[mirrored],
    )
