"""Variants that show the device every shape the space can reach, and the additive table that their kernels make.

A latency table's entry is what the runtime really executed for a layer in its surroundings: the layer's own kernel and
the reorders, conversions and additions that ran with it, averaged over the variants in which the layer had that shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from automl_compress.core.budget import Provenance
from automl_compress.core.graph import Graph, Layer
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.hardware.device.kernels import Kernel
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.sensitivity import Sensitivity
from automl_compress.search.table.table import AdditiveTable, LayerCost, Shape, least_certain
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS, Executions, format_of
from automl_compress.techniques.quantization.weights import block_of

MAX_VARIANTS = 64
_MIN_VARIANTS = 12
_CANDIDATES = 40
_DROP_SHARE = 0.08
_LOW_BITS_OVERHEAD_BYTES = 160  # names and zero points of a quantized layer in the file
_SCALE_BYTES = 4 + 4 + 1  # a float scale, an int32 bias in place of a float one, and an int8 zero point a channel


def covering_plans(
    space: SearchSpace,
    graph: Graph,
    *,
    executions: Executions = DEFAULT_EXECUTIONS,
    seed: int = 0,
    limit: int = MAX_VARIANTS,
) -> list[Plan]:
    """Plans that together show each layer at each (input, output, bits) that the space reaches at full student width.

    Greedy: of some random plans, the one that shows most that is new. Layers of equal key count as one, and so do
    bit-widths that one kernel computes. The first plan is the untouched original, the second is quantized throughout,
    so that both ends are among the fitted models.
    """
    rng = np.random.default_rng(seed)
    wanted = _reachable(space, graph, executions)
    low = plain_bits(space)
    plans = [Plan(), uniform_bits(space, low)] if low is not None else [Plan()]
    seen: set[tuple[str, Shape]] = set().union(*(_shapes(graph, plan, executions) for plan in plans))
    while len(plans) < limit and (wanted - seen or len(plans) < _MIN_VARIANTS):
        candidates = [random_plan(space, rng, drop_share=_DROP_SHARE) for _ in range(_CANDIDATES)]
        best = max(candidates, key=lambda plan: len((_shapes(graph, plan, executions) & wanted) - seen))
        if not (_shapes(graph, best, executions) & wanted) - seen and len(plans) >= _MIN_VARIANTS:
            break
        plans.append(best)
        seen |= _shapes(graph, best, executions)
    return plans


def plain_bits(space: SearchSpace) -> int | None:
    """The bit-width to quantize a whole network to: 8 where that is offered, else the lowest; None without choice."""
    offered = {int(option) for d in space.decisions if d.kind == "bits" for option in d.options}
    return None if not offered else 8 if 8 in offered else min(offered)


def computed_bits(kind: str, bits: int, executions: Executions) -> int:
    """The bit-width whose kernels compute a layer: 8 for fewer bits in integer kernels, 32 for what is only stored."""
    form = format_of(kind, bits, executions)
    return {"integer": 8, "folded": FULL_BITS, "float": FULL_BITS, "blocks": bits}[form]


def random_plan(space: SearchSpace, rng: np.random.Generator, *, drop_share: float) -> Plan:
    """Each decision drawn evenly from its options at full student width; blocks are removed with a probability,
    and nothing is masked, which changes no kernel."""
    params: dict[str, Any] = dict(space.neutral())
    for decision in space.decisions:
        if decision.kind == "drop":
            params[decision.name] = (
                bool(rng.random() < drop_share) if True in decision.options else params[decision.name]
            )
        elif decision.kind not in ("width", "mask"):
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
    executions: Executions = DEFAULT_EXECUTIONS,
    widths: Mapping[str, Sequence[int]] | None = None,
) -> AdditiveTable:
    """The table from lowered variants: `kernels[i]` are the executed kernels of `plans[i]`, `totals[i]` its predicted
    latency in microseconds; `original_bytes` is the original's file size.

    A bit-width that the same kernel computes as another (`executions`) takes that one's time; `widths` are the
    bit-widths on offer, layer by layer.
    """
    sums: dict[tuple[str, Shape], list[float]] = defaultdict(list)
    sources: dict[tuple[str, Shape], set[Provenance]] = defaultdict(set)
    unowned: list[float] = []
    for plan, executed, total in zip(plans, kernels, totals, strict=True):
        owned: dict[str, float] = defaultdict(float)
        known: dict[str, set[Provenance]] = defaultdict(set)
        for kernel in executed:
            owned[kernel.layer or ""] += kernel.mean_us or 0.0
            known[kernel.layer or ""].add(kernel.provenance)
        # Kernel sums and whole models differ by the correction; spread over the layers it keeps sums near predictions.
        factor = total / max(sum(owned.values()), 1e-9)
        for name, (inputs, outputs) in plan.widths(graph).items():
            bits = computed_bits(graph.layer[name].kind, plan.layer_bits(name), executions)
            place = graph.layer[name].key, (inputs, outputs, bits)
            sums[place].append(owned.pop(name, 0.0) * factor)
            sources[place] |= known[name]
        unowned.append(sum(owned.values()) * factor)
    by_key: dict[str, dict[Shape, float]] = defaultdict(dict)
    for (key, shape), values in sums.items():
        by_key[key][shape] = float(np.mean(values))
    layers = {
        layer.name: {
            (inputs, outputs, bits): LayerCost(
                latency_us=us, size_bytes=layer_bytes(layer, (inputs, outputs, bits), executions)
            )
            for (inputs, outputs, computed), us in by_key[layer.key].items()
            for bits in {computed, *(widths or {}).get(layer.name, ())}
            if computed_bits(layer.kind, bits, executions) == computed
        }
        for layer in graph.layers
    }
    weights = sum(layer_bytes(layer, (layer.in_channels, layer.out_channels, FULL_BITS)) for layer in graph.layers)
    fixed = LayerCost(latency_us=float(np.median(unowned)), size_bytes=max(0.0, original_bytes - weights))
    told = {layer.name: _told(layer, layers[layer.name], sources, executions) for layer in graph.layers}
    return AdditiveTable(quality=quality, layers=layers, fixed=fixed, sources=told)


def _told(
    layer: Layer, shapes: Iterable[Shape], sources: Mapping[tuple[str, Shape], set[Provenance]], executions: Executions
) -> dict[Shape, Provenance]:
    """Where each shape's time comes from."""
    return {
        (i, o, bits): least_certain(
            sources.get((layer.key, (i, o, computed_bits(layer.kind, bits, executions))), set())
        )
        for i, o, bits in shapes
    }


def layer_bytes(
    layer: Layer, shape: Shape, executions: Executions = DEFAULT_EXECUTIONS, *, groups: int | None = None
) -> float:
    """Bytes of a layer's weights in the file at (input channels, output channels, bits), scales included; `groups` of
    a convolution are left (default: all)."""
    inputs, outputs, bits = shape
    weights = float(outputs if layer.in_axis == layer.out_axis else inputs * outputs / (groups or layer.groups))
    for size in layer.kernel:
        weights *= size
    form = format_of(layer.kind, bits, executions)
    if layer.transposed and form == "integer":
        form, bits = "float", FULL_BITS  # there is no integer kernel for it, and it stays as it is
    stored, plain_bias = weights * bits / 8, 4 * outputs
    if form == "float":
        return stored + plain_bias
    if form == "integer":
        return stored + outputs * (_SCALE_BYTES + 4) + _LOW_BITS_OVERHEAD_BYTES
    if form == "blocks":
        blocks = outputs * -(-inputs // block_of(inputs, bits))
        return stored + blocks * (4 + bits / 8) + plain_bias + _LOW_BITS_OVERHEAD_BYTES
    return stored + plain_bias + (0 if bits == 16 else 4 * outputs) + _LOW_BITS_OVERHEAD_BYTES


def _shapes(graph: Graph, plan: Plan, executions: Executions) -> set[tuple[str, Shape]]:
    found = set()
    for name, (inputs, outputs) in plan.widths(graph).items():
        layer = graph.layer[name]
        found.add((layer.key, (inputs, outputs, computed_bits(layer.kind, plan.layer_bits(name), executions))))
    return found


def weight_bytes(graph: Graph, plan: Plan, executions: Executions = DEFAULT_EXECUTIONS) -> float:
    """Bytes of all layers' weights in the file under a plan, scales included."""
    kept = plan.kept_counts(graph)
    total = 0.0
    for name, widths in plan.widths(graph).items():
        layer = graph.layer[name]
        groups = graph.convolution_groups(layer, kept)
        total += layer_bytes(layer, (*widths, plan.layer_bits(name)), executions, groups=groups)
    return total


def _reachable(space: SearchSpace, graph: Graph, executions: Executions) -> set[tuple[str, Shape]]:
    """Every (layer key, shape) at full student width, for layers with at most one group on each side."""
    result: set[tuple[str, Shape]] = set()
    for layer in graph.layers:
        offered = space.options(f"bits.{layer.name}") or (FULL_BITS,)
        bits = {computed_bits(layer.kind, int(b), executions) for b in offered}
        for one in _sparsities(space, layer.in_groups):
            for other in _sparsities(space, layer.out_groups):
                sparsity: Mapping[str, float] = {
                    **{g: float(one) for g in layer.in_groups},
                    **{g: float(other) for g in layer.out_groups},
                }
                widths = Plan(sparsity=sparsity).widths(graph)[layer.name]
                result |= {(layer.key, (*widths, b)) for b in bits}
    return result


def _sparsities(space: SearchSpace, groups: Sequence[str]) -> Sequence[Any]:
    """The first group's options; none to choose from means that everything stays."""
    return (space.options(f"sparsity.{groups[0]}") if groups else ()) or (0.0,)
