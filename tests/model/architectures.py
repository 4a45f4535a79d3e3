"""Small models written as users write them: attention in several hands, grids of channels, tied weights, U-Nets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Fused projection and explicit softmax; the width of the output comes from the input, as in many libraries."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Transformer(nn.Module):
    """Pre-norm layers over patches, a class token, a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 5, 12))
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(4))
        self.attention = nn.ModuleList(Attention(12, 3) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)) for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for i in range(2):
            x = x + self.attention[i](self.norms[2 * i](x))
            x = x + self.mlp[i](self.norms[2 * i + 1](x))
        return self.head(x[:, 0])


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Decoder(nn.Module):
    """Grouped queries, separate projections, gated feed-forward, and an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = 4, 2, 6
        self.embed = nn.Embedding(11, 16)
        self.norm, self.last = RMSNorm(16), RMSNorm(16)
        self.q, self.k = nn.Linear(16, 24, bias=False), nn.Linear(16, 12, bias=False)
        self.v, self.o = nn.Linear(16, 12, bias=False), nn.Linear(24, 16, bias=False)
        self.gate, self.up, self.down = nn.Linear(16, 20), nn.Linear(16, 20), nn.Linear(20, 16)
        self.out = nn.Linear(16, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        B, T, _ = y.shape
        n = self.norm(y)
        q = self.q(n).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(n).view(B, T, self.groups, self.head_dim).transpose(1, 2)
        v = self.v(n).view(B, T, self.groups, self.head_dim).transpose(1, 2)
        k, v = (part.repeat_interleave(self.heads // self.groups, dim=1) for part in (k, v))
        z = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y + self.o(z.transpose(1, 2).reshape(B, T, -1))
        y = y + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.out(self.last(y))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and the skipped features beside it; group norm on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.down2 = nn.Conv2d(8, 12, 3, 2, 1)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.join, self.out = nn.Conv2d(14, 10, 3, padding=1), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = functional.relu(self.norm(self.down1(x)))
        b = self.up(functional.relu(self.down2(a)))
        return self.out(functional.relu(self.join(torch.cat([a, b], 1))))


class Shuffled(nn.Module):
    """Halves, a shuffle of channels written as a reshape, and pixels made of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.right, self.mix = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        y = torch.cat([left, self.right(right)], dim=1)
        B, C, H, W = y.shape
        y = y.view(B, 2, C // 2, H, W).transpose(1, 2).reshape(B, C, H, W)
        return self.head(functional.pixel_shuffle(self.mix(y), 2).amax((2, 3)))


class Split(nn.Module):
    """Parts of unequal width whose sizes stand in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [4, 6]
        self.enter, self.left, self.right = nn.Linear(3, 10), nn.Linear(4, 7), nn.Linear(6, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.enter(x.mean((2, 3))), self.sizes, dim=1)
        return self.head(functional.relu(self.left(a)) * self.right(b))


class Encoder(nn.Module):
    """torch's own encoder layer, whose attention insists on its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 12)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.enter(x.flatten(2).transpose(1, 2)[:, :7])).amax(1))


class Signal(nn.Module):
    """Convolutions along time, and a recurrent layer, whose cells no rule describes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 6, 3, padding=1)
        self.memory, self.head = nn.LSTM(6, 7, batch_first=True), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(functional.relu(self.first(x.flatten(2))))
        return self.head(self.memory(y.transpose(1, 2))[0][:, -1])


IMAGES, TOKENS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(14).view(2, 7) % 11
MODELS = {model.__name__: model for model in (Transformer, Decoder, UNet, Shuffled, Split, Encoder, Signal)}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """The model with random weights in eval mode, and its input."""
    torch.manual_seed(0)
    return MODELS[name]().eval(), TOKENS if name == "Decoder" else IMAGES
