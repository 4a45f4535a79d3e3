"""The additive table: what each option costs in quality, and each layer at each width and bit-width on the device.

Adding up layers ignores what happens between them, so the sums are estimates. They rank plans and aim a search; a
budget is decided by the cost model, which lowers the whole plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from automl_compress.core.budget import Provenance
from automl_compress.core.graph import Graph, Layer
from automl_compress.core.plan import Plan
from automl_compress.search.space.offers import Option

ADDITIVE = ("latency", "size")
"""The metrics that add up over layers, in the order in which arrays hold them."""
_LEAST_SHARE = 0.05  # of the loss by fewer bits that always counts
_LEAST_CERTAIN_FIRST: tuple[Provenance, ...] = ("estimated", "interpolated", "measured")
QualityKey = tuple[str, Option]
Shape = tuple[int, int, int]
"""(input channels, output channels, bits) of one layer."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer adds: microseconds for one sample, bytes of the file."""

    latency_us: float = 0.0
    size_bytes: float = 0.0

    def of(self, metric: str) -> float:
        """'latency' in microseconds, 'size' in bytes. Memory doesn't add up over layers: KeyError."""
        return {"latency": self.latency_us, "size": self.size_bytes}[metric]

    def __add__(self, other: LayerCost) -> LayerCost:
        return LayerCost(latency_us=self.latency_us + other.latency_us, size_bytes=self.size_bytes + other.size_bytes)

    def scaled(self, factor: float) -> LayerCost:
        return LayerCost(latency_us=self.latency_us * factor, size_bytes=self.size_bytes * factor)


@dataclass(frozen=True, kw_only=True)
class AdditiveTable:
    """Estimates that are added up.

    quality  (decision name, option) -> estimated quality loss, >= 0; absent means 0, as for doing nothing
    layers   layer name -> (input channels, output channels, bits) -> cost; at least one entry for every layer
    fixed    what no decision changes
    sources  layer name -> shape -> where its latency comes from
    joint    layer name -> by what share of itself the loss by fewer bits would change if all output channels went
    """

    quality: Mapping[QualityKey, float] = field(default_factory=dict)
    joint: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Mapping[Shape, LayerCost]]
    sources: Mapping[str, Mapping[Shape, Provenance]] = field(default_factory=dict)
    fixed: LayerCost = field(default_factory=LayerCost)

    def cost(self, layer: str, shape: Shape) -> LayerCost:
        """The layer's cost at that shape.

        A shape that isn't in the table is taken from the nearest one that is (the same bits if there is any, then the
        smallest relative distance of both channel counts), scaled by the product of the channel counts.
        """
        entries = self.layers[layer]
        if shape in entries:
            return entries[shape]
        nearest = min(entries, key=lambda other: (other[2] != shape[2], _distance(shape, other), other))
        return entries[nearest].scaled(shape[0] * shape[1] / (nearest[0] * nearest[1]))

    def costs(self, layer: str, widths: NDArray[np.int64], bits: int) -> NDArray[np.float64]:
        """`cost` at many (input, output) widths: an array of rows, one column for each of `ADDITIVE`."""
        entries = sorted(self.layers[layer])
        known = np.array(entries, dtype=np.int64)
        prices = np.array([[self.layers[layer][entry].of(m) for m in ADDITIVE] for entry in entries])
        one, other = widths[:, None, :2], known[None, :, :2]
        far = (np.abs(one - other) / np.maximum(np.maximum(one, other), 1)).sum(axis=2)
        nearest = (far + 10.0 * (known[:, 2] != bits)).argmin(axis=1)
        share = widths.prod(axis=1) / known[nearest, :2].prod(axis=1)
        return np.asarray(prices[nearest] * share[:, None], dtype=np.float64)

    def share_of_bits(self, layer: Layer, outputs: NDArray[np.int64]) -> NDArray[np.float64]:
        """What of the layer's loss by fewer bits counts where it has so many output channels; 1 where nothing is
        known of width and bits together. It's positive."""
        change = self.joint.get(layer.name, 0.0) * (1.0 - outputs / layer.out_channels)
        return np.maximum(_LEAST_SHARE, 1.0 + change)

    def joint_loss(self, graph: Graph, plan: Plan, quality: Mapping[QualityKey, float]) -> float:
        """What the bits of a plan's layers lose more (less: negative) at the plan's widths than at full width."""
        if not self.joint:
            return 0.0
        total = 0.0
        for name, (_, outputs) in plan.widths(graph).items():
            alone = quality.get((f"bits.{name}", plan.layer_bits(name)), 0.0)
            if name in self.joint and alone:
                total += alone * (float(self.share_of_bits(graph.layer[name], np.array(outputs))) - 1.0)
        return total

    def known(self, layer: str, shape: Shape) -> Provenance:
        """Where the layer's latency at that shape comes from: "estimated" where it is scaled from another shape."""
        return self.sources.get(layer, {}).get(shape, "estimated")

    def plan_cost(self, graph: Graph, plan: Plan) -> LayerCost:
        """The sum over the layers that remain under a plan, `fixed` included."""
        total = self.fixed
        for name, (inputs, outputs) in plan.widths(graph).items():
            total += self.cost(name, (inputs, outputs, plan.layer_bits(name)))
        return total


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A plan, its loss and cost by the table, and the proven gap (0: optimal, infinity: nothing)."""

    plan: Plan
    loss: float
    cost: LayerCost
    gap: float


def least_certain(found: Iterable[Provenance]) -> Provenance:
    """What may be said of a figure that is made of several: "estimated" if one of them is; of none "measured"."""
    known = set(found)
    return next((p for p in _LEAST_CERTAIN_FIRST if p in known), "measured")


def kept_options(options: Sequence[Option], size: int, width: float) -> dict[int, Option]:
    """Channels that a group of `size` keeps -> the lowest of the sparsities that leaves as many at a student width."""
    found: dict[int, Option] = {}
    for option in options or (0.0,):
        found.setdefault(Plan(width=width, sparsity={"": float(option)}).kept_count("", size), option)
    return found


def nearest_option(options: Sequence[Option], size: int, count: int) -> Option:
    """The sparsity that, in a student of full width, keeps the number of channels nearest to `count`."""
    return min(options, key=lambda o: abs(Plan(sparsity={"": float(o)}).kept_count("", size) - count))


def _distance(shape: Shape, other: Shape) -> float:
    return sum(abs(a - b) / max(a, b, 1) for a, b in zip(shape[:2], other[:2], strict=True))
