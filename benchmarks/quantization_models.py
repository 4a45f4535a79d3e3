"""Small networks that are trained on scikit-learn's handwritten digits for the quantization benchmark, in seconds."""

from __future__ import annotations

from itertools import pairwise

import torch
from networks import EncoderLayer
from sklearn.datasets import load_digits
from torch import Tensor, nn

from automl_compress import Task


class DigitsTransformer(nn.Module):
    """Rows of the image are 8 tokens; two encoder layers of width 64, mean, classifier."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, 8, width))
        self.layers = nn.ModuleList(EncoderLayer(width, 4) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2)) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.classifier(self.norm(x).mean(dim=1))
        return logits


def depthwise_network(width: int = 48) -> nn.Sequential:
    """Pointwise and depthwise convolutions in turns, without batch-norms, so that channels can be spread afterwards."""

    def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        depthwise = nn.Conv2d(outputs, outputs, 3, stride, 1, groups=outputs)
        return [nn.Conv2d(inputs, outputs, 1), nn.ReLU(), depthwise, nn.ReLU()]

    parts = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), *block(width, width), *block(width, 2 * width, 2)]
    return nn.Sequential(
        *parts, *block(2 * width, 2 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)
    )


def spread_channels(model: nn.Module, decades: float = 2.0) -> None:
    """Multiply channels between two convolutions by factors from 1 down to 10**-decades, and divide behind: the same
    function, with the ranges that folded batch-norms leave in badly conditioned networks."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for first, second in pairwise(convolutions):
            factor = 10 ** (-decades * torch.rand(first.out_channels, generator=random))
            first.weight.mul_(factor.reshape(-1, 1, 1, 1))
            assert first.bias is not None
            first.bias.mul_(factor)
            shape = (-1, 1, 1, 1) if second.groups > 1 else (1, -1, 1, 1)
            second.weight.div_(factor.reshape(shape))


def transformer_task(epochs: int) -> Task:
    """A transformer classifier, trained."""
    torch.manual_seed(0)
    return _trained(DigitsTransformer(), epochs)


def depthwise_task(epochs: int) -> Task:
    """A depthwise convolutional network, trained."""
    torch.manual_seed(0)
    return _trained(depthwise_network(), epochs)


def _trained(model: nn.Module, epochs: int) -> Task:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.tensor(digits.target)[order]
    parts = (slice(0, 1097), slice(1097, 1447), slice(1447, None))
    train, validation, test = ((images[part], labels[part]) for part in parts)
    orders = [torch.randperm(len(train[0])) for _ in range(epochs)]
    batches = [order[start : start + 64] for order in orders for start in range(0, len(order), 64)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=len(batches))
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0][batch]), train[1][batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rates.step()
    return Task(model=model.eval(), train=train, validation=validation, test=test)
