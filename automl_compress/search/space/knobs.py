"""Knobs: what of a network's width can be set on its own.

A channel group is one, or several together that narrow the same layers in ways of which only one may be taken (heads
and their width).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from automl_compress.core.graph import Graph

_POSITIONS = 256  # of a knob made of several groups


@dataclass(frozen=True)
class Knob:
    """Channel groups that are set together; `kept[position]` are the channels of each, from wide to narrow."""

    groups: tuple[str, ...]
    kept: tuple[tuple[int, ...], ...]


def knobs_of(graph: Graph, counts: Mapping[str, Iterable[int]]) -> list[Knob]:
    """The knobs in the graph's order, where each group may keep one of `counts`.

    Of groups that are alternatives at most one is narrowed.
    """
    return [_knob(graph, names, [sorted(counts[name], reverse=True) for name in names]) for names in _tied(graph)]


def _knob(graph: Graph, names: Sequence[str], counts: Sequence[Sequence[int]]) -> Knob:
    allowed = []
    for kept in product(*counts):
        narrowed = {n for n, k, offered in zip(names, kept, counts, strict=True) if k < offered[0]}
        if not any(graph.alternatives[name] & narrowed for name in narrowed):
            allowed.append(kept)
    if len(allowed) > _POSITIONS:
        allowed = [allowed[i] for i in np.linspace(0, len(allowed) - 1, _POSITIONS).round().astype(int)]
    return Knob(tuple(names), tuple(allowed))


def _tied(graph: Graph) -> list[list[str]]:
    """Groups that are alternatives of each other, directly or not, together."""
    result: list[list[str]] = []
    seen: set[str] = set()
    for group in graph.groups:
        if group.name in seen:
            continue
        together, waiting = [], [group.name]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                together.append(name)
                waiting += sorted(graph.alternatives[name])
        result.append(sorted(together))
    return result
