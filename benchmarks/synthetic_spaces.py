"""Networks and tables in which everything is known: residual stages of bottleneck blocks, as large as wanted.

Losses add up exactly, so that the best plan within a budget can be computed. Costs are like those that were measured of
convolutions on processors: a layer takes the time of the next full block of channels, 16 in 32 bits and 16 or 32 in 8
bits, a ragged last block costs extra, and every layer has an overhead. Two widths decide a layer's cost, since the
channels inside of a block join its convolutions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_DECISIONS = 6  # of one block: two groups, three bit-widths, whether it is removed
_STAGES = 3


def network(decisions: int) -> Any:
    """A `core.graph.Graph` of about as many decisions: a stem, three stages of bottleneck blocks that each share one
    residual stream, and a linear layer."""
    from automl_compress.core.graph import Block, Graph, Layer

    blocks = max(1, round((decisions - 2 - 2 * _STAGES) / _DECISIONS))
    layers: list[Layer] = []
    groups: list[Any] = []
    removable: list[Block] = []
    producers: dict[str, list[str]] = {}
    consumers: dict[str, list[str]] = {}

    def conv(
        name: str, source: str, inputs: int, target: str, outputs: int, size: int, kernel: int, **more: Any
    ) -> None:
        layers.append(
            Layer(
                name=name, kind="conv", weight=f"{name}.weight", bias=None, in_channels=inputs, out_channels=outputs,
                kernel=(kernel, kernel), stride=(1, 1), input_shape=(1, inputs, size, size),
                output_shape=(1, outputs, size, size), params=kernel**2 * inputs * outputs,
                macs=(kernel * size) ** 2 * inputs * outputs, in_groups=(source,) if source else (),
                out_groups=(target,), **more,
            )
        )  # fmt: skip
        producers.setdefault(target, []).append(name)
        consumers.setdefault(source, []).append(name)

    sizes: dict[str, int] = {}
    before, width = "", 3
    for stage in range(_STAGES):
        stream, channels, size = f"stage{stage}", 64 * 2**stage, 32 // 2**stage
        sizes[stream] = channels
        conv(f"{stream}.enter", before, width, stream, channels, size, 3)
        for number in range(blocks // _STAGES + (stage < blocks % _STAGES)):
            name, inner = f"{stream}.{number}", channels // 2
            parts = [f"{name}.conv{i}" for i in (1, 2, 3)]
            sizes |= {f"{name}.a": inner, f"{name}.b": inner}
            conv(parts[0], stream, channels, f"{name}.a", inner, size, 1, blocks=(name,))
            conv(parts[1], f"{name}.a", inner, f"{name}.b", inner, size, 3, blocks=(name,))
            conv(parts[2], f"{name}.b", inner, stream, channels, size, 1, blocks=(name,))
            removable.append(
                Block(name=name, layers=tuple(parts), modules=tuple(parts), output=name, addition=f"{name}.add",
                      shape=(1, channels, size, size))
            )  # fmt: skip
        before, width = stream, channels
    layers.append(
        Layer(
            name="head", kind="linear", weight="head.weight", bias="head.bias", in_channels=width, out_channels=100,
            input_shape=(1, width), output_shape=(1, 100), params=100 * width + 100, macs=100 * width,
            in_groups=(before,),
        )
    )  # fmt: skip
    consumers.setdefault(before, []).append("head")
    groups = [_group(name, sizes[name], producers[name], consumers.get(name, [])) for name in sizes]
    return Graph(layers=tuple(layers), groups=tuple(groups), blocks=tuple(removable), input_shapes=((1, 3, 32, 32),))


def space_of(graph: Any) -> Any:
    """Sparsities in eighths, 8 or 32 bits a layer, and blocks that may be removed."""
    from automl_compress.search.space.rules import SpaceFile
    from automl_compress.search.space.space import resolve

    rules = [
        {"match": {"kind": "channel-group"}, "sparsity": [i / 8 for i in range(8)]},
        {"match": {"kind": "block"}, "drop": True},
        {"match": {"kind": "layer"}, "bits": [8, 32]},
    ]
    file = SpaceFile.model_validate({"name": "synthetic", "rules": rules})
    return resolve(file, graph, {"conv": (8, 32), "linear": (8, 32)})


def table_of(space: Any, graph: Any, seed: int) -> Any:
    """An `AdditiveTable` of random losses and staircase costs."""
    from automl_compress.core.plan import Plan
    from automl_compress.search.table.table import AdditiveTable, LayerCost

    rng = np.random.default_rng(seed)
    quality: dict[Any, float] = {}
    for decision in space.decisions:
        importance = float(np.exp(rng.normal(0.0, 1.0)))
        if decision.kind == "sparsity":
            shape = rng.uniform(1.5, 3.0)
            quality |= {(decision.name, o): importance * float(o) ** shape for o in decision.options}
        elif decision.kind == "drop":
            quality |= {(decision.name, False): 0.0, (decision.name, True): 1.5 * importance}
        elif decision.kind == "bits":
            quality |= {(decision.name, o): 0.0 if o == 32 else 0.1 * importance for o in decision.options}
    layers: dict[str, dict[Any, Any]] = {}
    block8 = int(rng.choice([16, 32]))
    for layer in graph.layers:
        entries = {}
        for inputs in _widths(space, graph, layer, "in"):
            for outputs in _widths(space, graph, layer, "out"):
                for bits in (8, 32):
                    entries[inputs, outputs, bits] = LayerCost(
                        latency_us=_latency(layer, inputs, outputs, bits, block8),
                        size_bytes=layer.params
                        / (layer.in_channels * layer.out_channels)
                        * inputs
                        * outputs
                        * bits
                        / 8,
                    )
        layers[layer.name] = entries
    whole = AdditiveTable(layers=layers)
    sum_us = whole.plan_cost(graph, Plan()).latency_us
    return AdditiveTable(quality=quality, layers=layers, fixed=LayerCost(latency_us=0.02 * sum_us, size_bytes=4000.0))


def _latency(layer: Any, inputs: int, outputs: int, bits: int, block8: int) -> float:
    """Microseconds: by full blocks of output channels, more for a ragged last one, at a rate for the bit-width."""
    block = 16 if bits == 32 else block8
    full = -(-outputs // block) * block
    ragged = 0.0 if outputs % block == 0 else 0.25 * block
    macs: float = layer.macs / (layer.in_channels * layer.out_channels) * inputs * (full + ragged)
    return 2.0 + macs / (40e3 if bits == 32 else 130e3)


def _widths(space: Any, graph: Any, layer: Any, side: Any) -> list[int]:
    from automl_compress.core.plan import Plan

    names = layer.in_groups if side == "in" else layer.out_groups
    if not names:
        return [layer.in_channels if side == "in" else layer.out_channels]
    size = graph.group[names[0]].size
    kept = {Plan(sparsity={"": float(o)}).kept_count("", size) for o in space.options(f"sparsity.{names[0]}")}
    return sorted(graph.width(layer, side, {names[0]: count}) for count in kept)


def _group(name: str, size: int, producers: list[str], consumers: list[str]) -> Any:
    from automl_compress.core.graph import ChannelGroup, Place

    ones = tuple((c,) for c in range(size))
    return ChannelGroup(
        name=name, size=size, producers=tuple(producers), consumers=tuple(consumers),
        places=(
            *(Place(tensor=f"{layer}.weight", dim=0, positions=ones, role="producer") for layer in producers),
            *(Place(tensor=f"{layer}.weight", dim=1, positions=ones, role="consumer") for layer in consumers),
        ),
    )  # fmt: skip
