"""Handwritten digits (8x8, from scikit-learn) with a small residual network that is trained here, in some seconds."""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from automl_compress import Task

WEIGHTS = Path(__file__).with_name("teacher.pt")


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
        Residual(48), Residual(48), Residual(48),
        nn.Conv2d(48, 96, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(96), nn.ReLU(),
        Residual(96), Residual(96),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


def splits() -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Train 1,097 / validation 350 / test 350 images [N, 1, 8, 8] in 0..1, shuffled once."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.tensor(digits.target)[order]
    return tuple((images[part], labels[part]) for part in (slice(0, 1097), slice(1097, 1447), slice(1447, None)))


def train_teacher(model: nn.Module, epochs: int = 12) -> None:
    images, labels = splits()[0]
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(images)).split(64)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=len(batches))
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        rates.step()


def task() -> Task:
    train, validation, test = splits()
    torch.manual_seed(0)
    model = network()
    if WEIGHTS.exists():
        model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    else:
        train_teacher(model)
        torch.save(model.state_dict(), WEIGHTS)
    return Task(model=model.eval(), train=train, validation=validation, test=test)
