"""The network as the program sees it: layers, channel groups, removable blocks. Plain values without tensors.

A *channel group* is the unit of pruning: channels of several parameters that must be kept or removed together because
some operator ties them (residual addition, concatenation, depthwise convolution, normalisation). Where each channel of
the group lies in each parameter is an explicit index map, so a channel may have several places (a convolution's channel
that is flattened to 7x7 columns of a linear layer has 49 there).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Literal

LayerKind = Literal["conv", "linear"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One operation with weights whose width or bit-width can be chosen.

    Shapes are those of one sample with the batch dimension first (batch 1). `macs` counts one multiply-add as one, for
    one sample. `in_groups` and `out_groups` name the channel groups, frozen ones not included, that its input and
    output channels belong to; `in_axis` and `out_axis` are the weight's dimensions along which these lie (the same one
    for a depthwise convolution). `blocks` are the removable blocks that contain it.
    """

    name: str
    kind: LayerKind
    weight: str
    bias: str | None
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1
    in_axis: int = 1
    out_axis: int = 0
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    params: int
    macs: int
    in_groups: tuple[str, ...] = ()
    out_groups: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its shape signature, free of names: layers with equal keys cost the same."""
        return "/".join(
            str(part)
            for part in (self.kind, self.input_shape, self.output_shape, self.kernel, self.stride, self.groups)
        )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a group's channels lie in one parameter or buffer: `positions[c]` are channel c's indices along `dim`."""

    tensor: str
    dim: int
    positions: tuple[tuple[int, ...], ...]
    role: Literal["producer", "follower", "consumer"]


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that are kept or removed together. `producers` and `consumers` are layer names."""

    name: str
    size: int
    places: tuple[Place, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Block:
    """A residual branch that can be removed whole, so that only the shortcut remains.

    `output` names the traced value that becomes zero, `layers` the layers that go, `modules` the leaf modules that only
    this branch uses, in execution order (the last one produces `output`), and `shape` the output's shape (batch 1).
    """

    name: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    output: str
    addition: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A layer's channels that are left whole, and why."""

    layer: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A traced model: what it consists of, what can be removed, and what was left alone and why.

    `skipped` lists operators that the MAC count doesn't cover, with how often they
    occur; `sizes` are the shapes of all stored tensors. `fingerprint` identifies the
    structure (not the weights): caches and run folders that belong to another structure are recognised by it.
    """

    layers: tuple[Layer, ...]
    groups: tuple[ChannelGroup, ...]
    blocks: tuple[Block, ...]
    frozen: tuple[Frozen, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    input_shapes: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def layer(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def group(self) -> dict[str, ChannelGroup]:
        return {group.name: group for group in self.groups}

    @cached_property
    def block(self) -> dict[str, Block]:
        return {block.name: block for block in self.blocks}

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @cached_property
    def fingerprint(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
