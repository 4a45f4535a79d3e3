"""Variants that show the device every shape the space can reach, and the additive table that their kernels make.

A latency table's entry is what the runtime really executed for a layer in its surroundings: the layer's own kernel and
the reorders, conversions and additions that ran with it, averaged over the variants in which the layer had that shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from automl_compress.core.graph import Graph, Layer
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.hardware.kernels import Kernel
from automl_compress.search.sensitivity import Sensitivity
from automl_compress.search.space import SearchSpace
from automl_compress.search.table import AdditiveTable, LayerCost, Shape

MAX_VARIANTS = 64
_MIN_VARIANTS = 12
_CANDIDATES = 40
_DROP_SHARE = 0.08
_INT8_OVERHEAD_BYTES = 160  # names and zero points of a quantized layer in the file
_SCALE_BYTES = 4 + 4 + 1  # a float scale, an int32 bias in place of a float one, and an int8 zero point a channel


def covering_plans(space: SearchSpace, graph: Graph, *, seed: int = 0, limit: int = MAX_VARIANTS) -> list[Plan]:
    """Plans that together show each layer at each (input, output, bits) that the space reaches at full student width.

    Greedy: of some random plans, the one that shows most that is new. Layers of equal key count as one. The first plan
    is the untouched original, the second is quantized throughout, so that both ends are among the fitted models.
    """
    rng = np.random.default_rng(seed)
    wanted = _reachable(space, graph)
    plans = [Plan(), uniform_bits(space, min(_all_bits(space)))] if _all_bits(space) else [Plan()]
    seen: set[tuple[str, Shape]] = set().union(*(_shapes(graph, plan) for plan in plans))
    while len(plans) < limit and (wanted - seen or len(plans) < _MIN_VARIANTS):
        candidates = [random_plan(space, rng, drop_share=_DROP_SHARE) for _ in range(_CANDIDATES)]
        best = max(candidates, key=lambda plan: len((_shapes(graph, plan) & wanted) - seen))
        if not (_shapes(graph, best) & wanted) - seen and len(plans) >= _MIN_VARIANTS:
            break
        plans.append(best)
        seen |= _shapes(graph, best)
    return plans


def random_plan(space: SearchSpace, rng: np.random.Generator, *, drop_share: float) -> Plan:
    """Each decision drawn evenly from its options at full student width; blocks are removed with a probability."""
    params: dict[str, Any] = dict(space.neutral())
    for decision in space.decisions:
        if decision.kind == "drop":
            params[decision.name] = (
                bool(rng.random() < drop_share) if True in decision.options else params[decision.name]
            )
        elif decision.kind != "width":
            params[decision.name] = decision.options[int(rng.integers(len(decision.options)))]
    return space.plan(params)


def uniform_bits(space: SearchSpace, bits: int) -> Plan:
    """Every layer that may have it at this bit-width, nothing else changed."""
    params = dict(space.neutral())
    for decision in space.decisions:
        if decision.kind == "bits" and bits in decision.options:
            params[decision.name] = bits
    return space.plan(params)


def additive_table(
    graph: Graph,
    plans: Sequence[Plan],
    kernels: Sequence[Sequence[Kernel]],
    totals: Sequence[float],
    original_bytes: float,
    quality: Sensitivity,
) -> AdditiveTable:
    """The table from lowered variants: `kernels[i]` are the executed kernels of `plans[i]`, `totals[i]` its predicted
    latency in microseconds; `original_bytes` is the original's file size."""
    sums: dict[tuple[str, Shape], list[float]] = defaultdict(list)
    unowned: list[float] = []
    for plan, executed, total in zip(plans, kernels, totals, strict=True):
        owned: dict[str, float] = defaultdict(float)
        for kernel in executed:
            owned[kernel.layer or ""] += kernel.mean_us or 0.0
        # Kernel sums and whole models differ by the correction; spread over the layers it keeps sums near predictions.
        factor = total / max(sum(owned.values()), 1e-9)
        for name, (inputs, outputs) in plan.widths(graph).items():
            sums[graph.layer[name].key, (inputs, outputs, plan.layer_bits(name))].append(owned.pop(name, 0.0) * factor)
        unowned.append(sum(owned.values()) * factor)
    by_key: dict[str, dict[Shape, float]] = defaultdict(dict)
    for (key, shape), values in sums.items():
        by_key[key][shape] = float(np.mean(values))
    layers = {
        layer.name: {
            shape: LayerCost(latency_us=us, size_bytes=layer_bytes(layer, shape))
            for shape, us in by_key[layer.key].items()
        }
        for layer in graph.layers
    }
    weights = sum(layer_bytes(layer, (layer.in_channels, layer.out_channels, FULL_BITS)) for layer in graph.layers)
    fixed = LayerCost(latency_us=float(np.median(unowned)), size_bytes=max(0.0, original_bytes - weights))
    return AdditiveTable(quality=quality, layers=layers, fixed=fixed)


def layer_bytes(layer: Layer, shape: Shape) -> float:
    """Bytes of a layer's weights in the file at (input channels, output channels, bits), scales included."""
    inputs, outputs, bits = shape
    weights = float(outputs if layer.in_axis == layer.out_axis else inputs * outputs / layer.groups)
    for size in layer.kernel:
        weights *= size
    if bits == FULL_BITS:
        return 4 * (weights + outputs)
    return weights * bits / 8 + outputs * (_SCALE_BYTES + 4) + _INT8_OVERHEAD_BYTES


def _all_bits(space: SearchSpace) -> set[int]:
    return {int(option) for d in space.decisions if d.kind == "bits" for option in d.options}


def _shapes(graph: Graph, plan: Plan) -> set[tuple[str, Shape]]:
    return {
        (graph.layer[name].key, (inputs, outputs, plan.layer_bits(name)))
        for name, (inputs, outputs) in plan.widths(graph).items()
    }


def _reachable(space: SearchSpace, graph: Graph) -> set[tuple[str, Shape]]:
    """Every (layer key, shape) at full student width, for layers with at most one group on each side."""
    result: set[tuple[str, Shape]] = set()
    for layer in graph.layers:
        bits = space.options(f"bits.{layer.name}") or (FULL_BITS,)
        for one in _sparsities(space, layer.in_groups):
            for other in _sparsities(space, layer.out_groups):
                sparsity: Mapping[str, float] = {
                    **{g: float(one) for g in layer.in_groups},
                    **{g: float(other) for g in layer.out_groups},
                }
                widths = Plan(sparsity=sparsity).widths(graph)[layer.name]
                result |= {(layer.key, (*widths, int(b))) for b in bits}
    return result


def _sparsities(space: SearchSpace, groups: Sequence[str]) -> Sequence[Any]:
    """The first group's options; none to choose from means that everything stays."""
    return (space.options(f"sparsity.{groups[0]}") if groups else ()) or (0.0,)
