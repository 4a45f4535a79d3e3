"""Small synthetic networks and tables, so that the search is tested without any model."""

from __future__ import annotations

from itertools import product

import numpy as np

from automl_compress.core.budget import Cost
from automl_compress.core.graph import Block, ChannelGroup, Graph, Layer, Place
from automl_compress.core.plan import Plan
from automl_compress.search.space.rules import SpaceFile
from automl_compress.search.space.space import SearchSpace, resolve
from automl_compress.search.table.table import AdditiveTable, LayerCost

NATIVE = {"conv": (8, 32), "linear": (8, 32)}


def conv(name: str, inputs: int, outputs: int, **links: object) -> Layer:
    return Layer(
        name=name, kind="conv", weight=f"{name}.weight", bias=None, in_channels=inputs, out_channels=outputs,
        kernel=(3, 3), stride=(1, 1), input_shape=(1, inputs, 8, 8), output_shape=(1, outputs, 8, 8),
        params=9 * inputs * outputs, macs=9 * 64 * inputs * outputs, **links,
    )  # fmt: skip


def group(
    name: str, size: int, producer: str, consumer: str, blocks: tuple[str, ...] = (), copies: int = 1
) -> ChannelGroup:
    ones = tuple((c,) for c in range(size))
    many = tuple(tuple(range(c * copies, (c + 1) * copies)) for c in range(size))
    return ChannelGroup(
        name=name, size=size, producers=(producer,), consumers=(consumer,), blocks=blocks,
        places=(
            Place(tensor=f"{producer}.weight", dim=0, positions=ones, role="producer"),
            Place(tensor=f"{consumer}.weight", dim=1, positions=many, role="consumer"),
        ),
    )  # fmt: skip


def residual(blocks: int = 2, size: int = 8, stem: int = 4, columns: int = 3) -> Graph:
    """A prunable stem whose channels are flattened into a convolution, then residual blocks, then a linear layer."""
    layers = [conv("stem", 3, stem, out_groups=("stem",)), conv("widen", stem * columns, size, in_groups=("stem",))]
    groups = [group("stem", stem, "stem", "widen", copies=columns)]
    removable = []
    for i in range(blocks):
        first, second, name = f"b{i}.conv1", f"b{i}.conv2", f"b{i}"
        layers.append(conv(first, size, size, out_groups=(first,), blocks=(name,)))
        layers.append(conv(second, size, size, in_groups=(first,), blocks=(name,)))
        groups.append(group(first, size, first, second, blocks=(name,)))
        removable.append(
            Block(name=name, layers=(first, second), modules=(first, second), output=second, addition=f"add{i}",
                  shape=(1, size, 8, 8))
        )  # fmt: skip
    head = Layer(
        name="head", kind="linear", weight="head.weight", bias="head.bias", in_channels=size, out_channels=10,
        input_shape=(1, size), output_shape=(1, 10), params=10 * size + 10, macs=10 * size,
    )  # fmt: skip
    return Graph(layers=(*layers, head), groups=tuple(groups), blocks=tuple(removable), input_shapes=((1, 3, 8, 8),))


def space_of(graph: Graph, *, sparsity: list[float] | None = None, width: list[float] | None = None) -> SearchSpace:
    rules: list[dict[str, object]] = [
        {"match": {"kind": "channel-group"}, "sparsity": sparsity or [0.25, 0.5, 0.75]},
        {"match": {"kind": "block"}, "drop": True},
        {"match": {"kind": "layer"}, "bits": [8, 32]},
    ]
    if not graph.blocks:
        del rules[1]
    file = SpaceFile.model_validate({"name": "test", "width": width or [1.0, 0.5], "rules": rules})
    return resolve(file, graph, NATIVE)


def every_plan(space: SearchSpace, width: float = 1.0) -> list[Plan]:
    names = [d.name for d in space.decisions if d.name != "width"]
    fixed = {"width": width} if "width" in space.decision else {}
    choices = product(*(space.decision[name].options for name in names))
    return [space.plan({**fixed, **dict(zip(names, values, strict=True))}) for values in choices]


def table_for(space: SearchSpace, graph: Graph, seed: int = 0, *, rough: float = 0.3) -> AdditiveTable:
    """Random losses that grow with the effect, and costs like a device's: by MACs, cheaper in 8 bits, not smooth."""
    rng = np.random.default_rng(seed)
    quality = {}
    for decision in space.decisions:
        losses = np.cumsum(rng.uniform(0.1, 1.0, len(decision.options) - 1))
        quality.update({(decision.name, o): float(v) for o, v in zip(decision.options[1:], losses, strict=True)})
    layers = {}
    for layer in graph.layers:
        entries = {}
        for inputs in _widths(space, graph, layer, "in"):
            for outputs in _widths(space, graph, layer, "out"):
                for bits in (8, 32):
                    scale = inputs * outputs * (0.5 if bits == 8 else 1.0) * rng.uniform(1 - rough, 1 + rough)
                    size = inputs * outputs * 9 * bits / 8
                    entries[inputs, outputs, bits] = LayerCost(latency_us=5 + scale, size_bytes=size)
        layers[layer.name] = entries
    return AdditiveTable(quality=quality, layers=layers, fixed=LayerCost(latency_us=3.0, size_bytes=50.0))


def additive_cost(table: AdditiveTable, graph: Graph, plan: Plan, *, overhead: float = 1.0) -> Cost:
    cost = table.plan_cost(graph, plan)
    return Cost(
        latency_us=cost.latency_us * overhead, size_bytes=cost.size_bytes, memory_bytes=cost.size_bytes * 3 + 1000
    )


def _widths(space: SearchSpace, graph: Graph, layer: Layer, side: str) -> list[int]:
    groups = layer.in_groups if side == "in" else layer.out_groups
    cases: list[dict[str, int]] = [{}]
    for name in groups:
        size = graph.group[name].size
        kept = {Plan(sparsity={name: float(s)}).kept_count(name, size) for s in space.options(f"sparsity.{name}")}
        cases = [{**case, name: count} for case in cases for count in sorted(kept or {size})]
    return sorted({graph.width(layer, side, case) for case in cases})


def depthwise(size: int = 8) -> Graph:
    """A pointwise, a depthwise and a pointwise convolution: the depthwise one has the same group on both sides."""
    group_of = ChannelGroup(
        name="expand", size=size, producers=("expand", "mix"), consumers=("mix", "project"),
        places=tuple(
            Place(tensor=f"{name}.weight", dim=dim, positions=tuple((c,) for c in range(size)), role="producer")
            for name, dim in (("expand", 0), ("mix", 0), ("project", 1))
        ),
    )  # fmt: skip
    mix = conv("mix", size, size, in_groups=("expand",), out_groups=("expand",), in_axis=0, out_axis=0, groups=size)
    layers = (conv("expand", 4, size, out_groups=("expand",)), mix, conv("project", size, 4, in_groups=("expand",)))
    return Graph(layers=layers, groups=(group_of,), blocks=(), input_shapes=((1, 4, 8, 8),))


def concatenated(size: int = 8) -> Graph:
    """Two convolutions whose outputs are concatenated for a third."""

    def part(name: str, first: int) -> ChannelGroup:
        ones = tuple((c,) for c in range(size))
        shifted = tuple((first + c,) for c in range(size))
        return ChannelGroup(
            name=name, size=size, producers=(name,), consumers=("join",),
            places=(
                Place(tensor=f"{name}.weight", dim=0, positions=ones, role="producer"),
                Place(tensor="join.weight", dim=1, positions=shifted, role="consumer"),
            ),
        )  # fmt: skip

    layers = (
        conv("left", 3, size, out_groups=("left",)),
        conv("right", 3, size, out_groups=("right",)),
        conv("join", 2 * size, 4, in_groups=("left", "right")),
    )
    return Graph(layers=layers, groups=(part("left", 0), part("right", size)), blocks=(), input_shapes=((1, 3, 8, 8),))
