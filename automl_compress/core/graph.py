"""The network as the program sees it: layers, channel groups, removable blocks. Plain values without tensors.

A *channel group* is the unit of pruning: channels of several parameters that must be kept or removed together because
some operator ties them (residual addition, concatenation, depthwise convolution, normalisation). Where each channel of
the group lies in each parameter is an explicit index map, so a channel may have several places (a convolution's channel
that is flattened to 7x7 columns of a linear layer has 49 there).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Literal

LayerKind = Literal["conv", "linear"]
End = Literal["in", "out"]


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

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution, whose weight has the input channels first."""
        return self.kind == "conv" and self.in_axis < self.out_axis


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
class Attribute:
    """An integer in the model's Python objects that counts channels, such as `num_heads` or an entry of a list of split
    sizes: `path` leads to it from `module`. `positions[group][c]` are the indices, of `size` that it counts, which go
    with channel c of a group."""

    module: str
    path: tuple[str | int, ...]
    size: int
    positions: Mapping[str, tuple[tuple[int, ...], ...]]


Cells = tuple[tuple[int, tuple[str, ...]], ...]
"""How many indices belong to which groups, none included."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Numbers that the traced operators of a module contain, and what they count: sizes of a tensor (`shape`), amounts
    by which it is padded (`pad`, all beginnings before all ends), the end of a range (`end`), parts of a split
    (`split`), groups of a norm (`groups`), the width that attention scales its logits for (`scale`)."""

    module: str
    kind: Literal["shape", "pad", "end", "split", "groups", "scale"]
    values: tuple[int, ...]
    cells: tuple[Cells, ...]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A part that can be removed whole: a residual branch, so that only its shortcut remains, or a repeated layer.

    `output` names the traced value that vanishes and `replacement` the one that stands in for it. `layers` are the
    layers that go, `modules` the outermost modules that only this part uses, in execution order. `ending` says what
    replaces the last of them: zeros (it is then added to the shortcut) or its input. `shape` is that module's output
    shape (batch 1), and `channels[dim][group][c]` are the indices along a dimension of it that go with channel c.
    """

    name: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    output: str
    replacement: str = ""
    addition: str = ""
    ending: Literal["zeros", "input"] = "zeros"
    shape: tuple[int, ...]
    channels: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A layer's channels that are left whole, and why."""

    layer: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A traced model: what it consists of, what can be removed, and what was left alone and why.

    `attributes` are the numbers in the model's objects that follow its channels, `numbers` those in traced operators.
    `skipped` lists operators that the MAC count doesn't cover, with how often they occur; `sizes` are the shapes of all
    stored tensors. `fingerprint` identifies the structure (not the weights): caches and run folders of another
    structure are recognised by it.
    """

    layers: tuple[Layer, ...]
    groups: tuple[ChannelGroup, ...]
    blocks: tuple[Block, ...]
    frozen: tuple[Frozen, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    numbers: tuple[Numbers, ...] = ()
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

    @cached_property
    def alternatives(self) -> dict[str, frozenset[str]]:
        """Group -> the groups that narrow the same indices in another way, as heads and their width do."""
        result: dict[str, set[str]] = {group.name: set() for group in self.groups}
        for holders in self._holders.values():
            for names in set(holders.values()):
                for name in names:
                    result[name].update(other for other in names if other != name)
        return {name: frozenset(others) for name, others in result.items()}

    def width(self, layer: Layer, side: End, kept: Mapping[str, int]) -> int:
        """The layer's input or output channels when each group keeps `kept[group]` of its channels (absent: all).

        Exact for groups that share no index, and for grids (heads times width), of which the shares multiply.
        """
        return self.count(self._cells[layer.name, side], kept)

    def count(self, cells: Iterable[tuple[int, tuple[str, ...]]], kept: Mapping[str, int]) -> int:
        """How many indices are left when each group keeps `kept[group]` of its channels (absent: all)."""
        total = 0.0
        for count, names in cells:
            share = 1.0
            for name in names:
                share *= kept.get(name, self.group[name].size) / self.group[name].size
            total += count * share
        return round(total)

    def groups_of(self, layer: Layer, side: End) -> tuple[str, ...]:
        """The groups that make the layer's input or output narrower."""
        return self._groups_of[layer.name, side]

    @cached_property
    def _groups_of(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return {
            place: tuple(dict.fromkeys(name for _, names in cells for name in names))
            for place, cells in self._cells.items()
        }

    @cached_property
    def _holders(self) -> dict[tuple[str, int], dict[int, tuple[str, ...]]]:
        """(tensor, dimension) -> index -> the groups that it belongs to."""
        result: dict[tuple[str, int], dict[int, tuple[str, ...]]] = {}
        for group in self.groups:
            for place in group.places:
                holders = result.setdefault((place.tensor, place.dim), {})
                for where in place.positions:
                    for position in where:
                        holders[position] = (*holders.get(position, ()), group.name)
        return result

    @cached_property
    def _cells(self) -> dict[tuple[str, str], list[tuple[int, tuple[str, ...]]]]:
        """(layer, side) -> how many channels belong to which groups, none included."""
        sides = (("in", "out"), ("out", "in"))
        return {
            (layer.name, side): self._side_cells(layer, side, other) for layer in self.layers for side, other in sides
        }

    def _side_cells(self, layer: Layer, side: str, other: str) -> list[tuple[int, tuple[str, ...]]]:
        axes = {"in": layer.in_axis, "out": layer.out_axis}
        channels = {"in": layer.in_channels, "out": layer.out_channels}
        holders = self._holders.get((layer.weight, axes[side]), {})
        if layer.groups == 1 or (axes["in"] == axes["out"] and channels["in"] == channels["out"]):
            return _counted(holders.get(position, ()) for position in range(channels[side]))
        # With groups, the weight's dimension holds one group's channels; whole groups show along the other dimension.
        outer = self._group_holders(layer, axes[other], max(1, channels[other] // layer.groups))
        within = channels[side] // layer.groups
        if self.sizes.get(layer.weight, (0,) * 8)[axes[side]] != within:  # this side lies along the weight in full
            return _counted(holders.get(position, ()) for position in range(channels[side]))
        if axes["in"] == axes["out"]:
            return _counted(names for names in outer for _ in range(within))
        return _counted((*names, *holders.get(i, ())) for names in outer for i in range(within))

    def _group_holders(self, layer: Layer, axis: int, block: int) -> list[tuple[str, ...]]:
        """The groups that each of a convolution's groups goes with, which lie in blocks along an axis of its weight."""
        across = self._holders.get((layer.weight, axis), {})
        whole = {
            group.name
            for group in self.groups
            for place in group.places
            if (place.tensor, place.dim) == (layer.weight, axis)
            and all(len({position // block for position in where}) * block == len(where) for where in place.positions)
        }
        starts = range(0, layer.groups * block, block)
        return [tuple(name for name in across.get(start, ()) if name in whole) for start in starts]

    def convolution_groups(self, layer: Layer, kept: Mapping[str, int]) -> int:
        """How many groups a convolution has left when each channel group keeps `kept[group]` of its channels."""
        return max(1, self.count(self._convolution_cells[layer.name], kept)) if layer.groups > 1 else 1

    @cached_property
    def _convolution_cells(self) -> dict[str, list[tuple[int, tuple[str, ...]]]]:
        """Layer -> how many of its groups go with which channel groups."""
        grouped = [layer for layer in self.layers if layer.groups > 1]
        blocks = {
            layer.name: self.sizes.get(layer.weight, (layer.out_channels,))[0] // layer.groups for layer in grouped
        }
        return {layer.name: _counted(self._group_holders(layer, 0, max(1, blocks[layer.name]))) for layer in grouped}

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @cached_property
    def fingerprint(self) -> str:
        # Numbers follow from the rest, and there are many.
        text = json.dumps(asdict(replace(self, numbers=())), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _counted(cells: Iterable[tuple[str, ...]]) -> list[tuple[int, tuple[str, ...]]]:
    return [(count, names) for names, count in Counter(cells).items()]
