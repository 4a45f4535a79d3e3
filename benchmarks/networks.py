"""Networks that more than one benchmark looks at, with random weights: speed doesn't depend on them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "examples" / "cifar10_resnet20"))

from resnet import ResNet20


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the sum with the input where shapes agree (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [*_conv(inputs, hidden, 1), nn.ReLU6()] if expansion != 1 else []
        depthwise = [*_conv(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        self.body = nn.Sequential(*expand, *depthwise, *_conv(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, table 2."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        plan = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        layers: list[nn.Module] = [*_conv(3, 32, 3, 2), nn.ReLU6()]
        inputs = 32
        for expansion, outputs, repeats, stride in plan:
            for i in range(repeats):
                layers.append(InvertedResidual(inputs, outputs, stride if i == 0 else 1, expansion))
                inputs = outputs
        layers += [*_conv(inputs, 1280, 1), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits


class Encoder(nn.Module):
    """A transformer encoder: 64 tokens of width 256, 4 layers, 4 heads, hidden width 1024; their mean is classified."""

    def __init__(self, width: int = 256, layers: int = 4, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.classifier(self.norm(x).mean(dim=1))
        return logits


class EncoderLayer(nn.Module):
    """Normalised before each branch (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        hidden: Tensor = self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return x + hidden

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return projected


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (ResNet20, (3, 32, 32)),
    "mobilenetv2-96": (MobileNetV2, (3, 96, 96)),
    "encoder": (Encoder, (64, 256)),
}
"""Name -> (constructor, shape of one sample)."""


def build(name: str) -> nn.Module:
    """A network of `NETWORKS` with repeatable random weights, ready for inference."""
    torch.manual_seed(0)
    return NETWORKS[name][0]().eval()
