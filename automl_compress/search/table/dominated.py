"""Options that this device makes pointless: fewer channels that are not faster, fewer bits that are slower.

They are taken out of the space before the search, with a note that gives the figures: which options are worth having is
a finding of its own. What is slower in one combination but has its use in another stays, and is noted, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from automl_compress.core.budget import Cost, Provenance
from automl_compress.core.graph import Graph, Layer
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.search.space.offers import LeftOut, Option
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.pricing import uniform_bits
from automl_compress.search.table.table import ADDITIVE, AdditiveTable, Shape, least_certain

# Averages over variants differ by a few percent; a smaller difference proves nothing.
_CLEARLY = 1.05
_MOST_FINDINGS = 8
_SLOWER_BITS = " bits are slower here"
_SOURCES: Mapping[Provenance, str] = {
    "measured": "from measured kernels",
    "interpolated": "from interpolated kernels",
    "estimated": "estimated",
}


def drop_dominated(
    space: SearchSpace,
    graph: Graph,
    table: AdditiveTable,
    *,
    metrics: Sequence[str] = ("latency", "size"),
    predict: Callable[[Plan], Cost] | None = None,
) -> SearchSpace:
    """Take out what can't help to meet limits on `metrics`, and note why.

    * A sparsity for which keeping more channels is nowhere dearer in any of `metrics`. "Nowhere" is at every bit-width
      on offer and whatever the neighbouring groups keep, by the table, at student width 1. Fewer channels are always a
      smaller file and less memory, so this happens only where neither is limited.
    * A layer's bit-width that is slower than 32 bits at every width on offer, by the table, and also in surroundings of
      32 bits and of its own bit-width, by `predict` (borders between precisions included). Without `predict`, or with
      more than latency limited, bit-widths stay.
    """
    if "memory" not in metrics:
        space = _drop_sparsities(space, graph, table, metrics)
    if predict is not None and set(metrics) == {"latency"}:
        space = _drop_bits(space, graph, table, predict)
    return replace(space, notes=(*space.notes, *_staircases(space, graph, table)))


def _drop_sparsities(space: SearchSpace, graph: Graph, table: AdditiveTable, metrics: Sequence[str]) -> SearchSpace:
    options = {d.name: d.options for d in space.decisions}
    left_out: list[LeftOut] = []
    for decision in space.decisions:
        if decision.kind != "sparsity":
            continue
        size = graph.group[decision.target].size
        counts = {option: _kept(size, option) for option in decision.options}
        costs = {option: _touching_costs(space, graph, table, decision.target, counts[option]) for option in counts}
        left: list[Option] = []
        for option in decision.options:
            wider = (o for o in left if counts[o] > counts[option])
            better = next((o for o in wider if _nowhere_dearer(costs[o], costs[option], metrics)), None)
            if better is None:
                left.append(option)
            else:
                text = _group_text(space, graph, table, decision.target, counts[option], counts[better])
                left_out.append(LeftOut(decision=decision.name, option=option, reason=text))
        options[decision.name] = tuple(left)
    return _with_options(space, options, left_out)


def _drop_bits(space: SearchSpace, graph: Graph, table: AdditiveTable, predict: Callable[[Plan], Cost]) -> SearchSpace:
    options = {d.name: d.options for d in space.decisions}
    left_out: list[LeftOut] = []
    for decision in space.decisions:
        if decision.kind != "bits" or FULL_BITS not in decision.options:
            continue
        layer = graph.layer[decision.target]
        for bits in (int(option) for option in decision.options if option != FULL_BITS):
            if _slower_at_every_width(space, graph, table, layer, bits) and _slower_among(
                (Plan(), uniform_bits(space, bits)), layer.name, bits, predict
            ):
                options[decision.name] = tuple(o for o in options[decision.name] if o != bits)
                left_out.append(LeftOut(decision=decision.name, option=bits, reason=_bits_text(table, layer, bits)))
    return _with_options(space, options, left_out)


def _with_options(
    space: SearchSpace, options: dict[str, tuple[Option, ...]], left_out: Sequence[LeftOut]
) -> SearchSpace:
    """The space with other options; a decision with a single one is none."""
    decisions = tuple(replace(d, options=options[d.name]) for d in space.decisions)
    return replace(
        space,
        decisions=tuple(d for d in decisions if len(d.options) > 1),
        fixed={**space.fixed, **{d.name: d.options[0] for d in decisions if len(d.options) == 1}},
        notes=(
            *space.notes,
            *(f"{line}: not offered" for line in _together((e.decision.partition(".")[2], e.reason) for e in left_out)),
        ),
        left_out=(*space.left_out, *left_out),
    )


def _together(notes: Iterable[tuple[str, str]]) -> list[str]:
    """'conv1, conv2: text' for what holds of several; equal layers share their measurements."""
    names: dict[str, list[str]] = {}
    for name, text in notes:
        names.setdefault(text, []).append(name)
    return [f"{', '.join(found)}: {text}" for text, found in names.items()]


def _slower_at_every_width(space: SearchSpace, graph: Graph, table: AdditiveTable, layer: Layer, bits: int) -> bool:
    return all(
        table.cost(layer.name, (*widths, bits)).latency_us
        > _CLEARLY * table.cost(layer.name, (*widths, FULL_BITS)).latency_us
        for widths in _widths(space, graph, layer)
    )


def _slower_among(surroundings: Sequence[Plan], layer: str, bits: int, predict: Callable[[Plan], Cost]) -> bool:
    """Whether the layer makes the whole model slower at that bit-width, whatever the others run at."""
    for plan in surroundings:
        others = {name: b for name, b in plan.bits.items() if name != layer}
        without = predict(replace(plan, bits=others)).latency_us
        if predict(replace(plan, bits={**others, layer: bits})).latency_us < without:
            return False
    return True


def _staircases(space: SearchSpace, graph: Graph, table: AdditiveTable) -> list[str]:
    """What stays on offer though a wider layer is faster at the same bit-width: the clearest cases."""
    found: list[tuple[float, str, str]] = []
    for layer in graph.layers:
        outputs = sorted({out for _, out in _widths(space, graph, layer)})
        seen: set[tuple[float, ...]] = set()
        for bits in _bits_of(space, layer.name):
            shapes = [(layer.in_channels, out, bits) for out in outputs]
            known = [shape for shape in shapes if shape in table.layers[layer.name]]
            us = {shape: table.cost(layer.name, shape).latency_us for shape in known}
            pairs = [(a, b) for a in known for b in known if b[1] > a[1] and us[a] > _CLEARLY * us[b]]
            if pairs and tuple(us.values()) not in seen:  # fewer bits in the same kernels take the same time
                seen.add(tuple(us.values()))
                narrow, wide = max(pairs, key=lambda pair: us[pair[0]] / us[pair[1]])
                how = _source(table, layer.name, (narrow, wide))
                found.append(
                    (
                        us[narrow] / us[wide],
                        layer.name,
                        f"{bits} bits with {narrow[1]} channels is slower here ({us[narrow]:.1f} us) "
                        f"than with {wide[1]} ({us[wide]:.1f} us; {how})",
                    )
                )
    found.sort(key=lambda finding: -finding[0])
    notes = _together([(name, text) for _, name, text in found])
    more = len(notes) - _MOST_FINDINGS
    return notes[:_MOST_FINDINGS] + ([f"and {more} more like it"] if more > 0 else [])


def _group_text(space: SearchSpace, graph: Graph, table: AdditiveTable, group: str, fewer: int, more: int) -> str:
    """'12 channels are not faster here than 16 (8 bits: 43.1 us against 28.5; from measured kernels)'.

    The figures are those of all layers on the group at one bit-width, their other groups whole.
    """
    layers = [layer for layer in graph.layers if group in (*layer.in_groups, *layer.out_groups)]
    widths = sorted({bits for layer in layers for bits in _bits_of(space, layer.name)})
    parts, shapes = [], []
    for bits in widths:
        sums = []
        for kept in (fewer, more):
            own = [
                (layer.name, (*_shape(graph, layer, {group: kept}), _nearest(_bits_of(space, layer.name), bits)))
                for layer in layers
            ]
            shapes += own
            sums.append(sum(table.cost(name, shape).latency_us for name, shape in own))
        parts.append(f"{bits} bits: {sums[0]:.1f} us against {sums[1]:.1f}")
    how = _SOURCES[least_certain(table.known(name, shape) for name, shape in shapes)]
    return f"{fewer} channels are not faster here than {more} ({'; '.join(parts)}; {how})"


def _bits_text(table: AdditiveTable, layer: Layer, bits: int) -> str:
    shapes = [(layer.in_channels, layer.out_channels, b) for b in (bits, FULL_BITS)]
    slow, fast = (table.cost(layer.name, shape).latency_us for shape in shapes)
    return (
        f"{bits}{_SLOWER_BITS} than {FULL_BITS} at every width ({slow:.1f} us against {fast:.1f} with all channels; "
        f"{_source(table, layer.name, shapes)})"
    )


def is_about_bits(note: str, layer: str) -> bool:
    """Whether a note of the space says that a bit-width of this layer isn't offered."""
    names, _, text = note.partition(": ")
    return layer in names.split(", ") and _SLOWER_BITS in text


def _touching_costs(
    space: SearchSpace, graph: Graph, table: AdditiveTable, group: str, kept: int
) -> list[NDArray[np.float64]]:
    """For each layer on the group: its costs when the group keeps `kept`, a row for each of all neighbours' widths and
    bits, a column for each of `ADDITIVE`."""
    result = []
    for layer in graph.layers:
        if group not in (*layer.in_groups, *layer.out_groups):
            continue
        widths = np.array([_shape(graph, layer, case) for case in _cases(space, graph, layer, {group: kept})])
        costs = [table.costs(layer.name, widths, bits) for bits in _bits_of(space, layer.name)]
        # A layer that can be removed while others on the group stay must not be what pays for the wider option.
        result.append(np.concatenate([*costs, np.zeros((1, len(ADDITIVE)))] if layer.blocks else costs))
    return result


def _nowhere_dearer(wide: list[NDArray[np.float64]], narrow: list[NDArray[np.float64]], metrics: Sequence[str]) -> bool:
    """Whether the worst case over everything else is not above zero, metric by metric."""
    worst = sum(((w - n).max(axis=0) for w, n in zip(wide, narrow, strict=True)), np.zeros(len(ADDITIVE)))
    return all(worst[ADDITIVE.index(metric)] <= 0 for metric in metrics)


def _cases(space: SearchSpace, graph: Graph, layer: Layer, fixed: dict[str, int]) -> list[dict[str, int]]:
    """What the groups on a layer may keep, `fixed` ones aside."""
    cases = [dict(fixed)]
    for other in dict.fromkeys((*layer.in_groups, *layer.out_groups)):
        if other not in fixed:
            size = graph.group[other].size
            kept = [_kept(size, option) for option in space.options(f"sparsity.{other}") or (0.0,)]
            cases = [{**case, other: count} for case in cases for count in kept]
    return cases


def _widths(space: SearchSpace, graph: Graph, layer: Layer) -> set[tuple[int, int]]:
    """The (input, output) channels that the layer may have."""
    return {_shape(graph, layer, case) for case in _cases(space, graph, layer, {})}


def _shape(graph: Graph, layer: Layer, kept: dict[str, int]) -> tuple[int, int]:
    return graph.width(layer, "in", kept), graph.width(layer, "out", kept)


def _bits_of(space: SearchSpace, layer: str) -> tuple[int, ...]:
    return tuple(int(option) for option in space.options(f"bits.{layer}") or (FULL_BITS,))


def _nearest(options: Sequence[int], bits: int) -> int:
    return min(options, key=lambda option: abs(option - bits))


def _kept(size: int, sparsity: Option) -> int:
    return Plan(sparsity={"": float(sparsity)}).kept_count("", size)


def _source(table: AdditiveTable, layer: str, shapes: Sequence[Shape]) -> str:
    return _SOURCES[least_certain(table.known(layer, shape) for shape in shapes)]
