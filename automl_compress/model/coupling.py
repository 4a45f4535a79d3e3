"""Channel groups of a walked graph: which channels may go, and where each of them lies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from automl_compress.core.graph import ChannelGroup, Frozen, Place
from automl_compress.model.labels import Ids
from automl_compress.model.walk import Walk

_MINIMUM_CHANNELS = 2

Spots = dict[tuple[str, int], tuple[int, ...]]  # (tensor, dimension) -> indices there


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """The groups of a graph, and for each group the atom of every channel."""

    groups: tuple[ChannelGroup, ...]
    atoms: dict[str, tuple[int, ...]]
    frozen: tuple[Frozen, ...]


def couple(walk: Walk) -> Coupling:
    """Partition the channels that may be cut into groups of equal surroundings; name the other layers, and why."""
    spots = _spots(walk)
    families: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for atom, where in spots.items():
        surroundings = tuple(sorted((tensor, dim, len(found)) for (tensor, dim), found in where.items()))
        families[surroundings, tuple(sorted(walk.channels.axes(atom)))].append(atom)
    order = {use.name: number for number, use in enumerate(walk.layers)}
    found = []
    for atoms in families.values():
        group = _group(walk, atoms, spots, order)
        if group is not None:
            found.append((group, tuple(atoms)))
    found.sort(key=lambda pair: (order[pair[0].name], -pair[0].size))
    names = _distinct_names([group.name for group, _ in found])
    groups = tuple(replace(group, name=name) for name, (group, _) in zip(names, found, strict=True))
    return Coupling(
        groups=groups,
        atoms={name: atoms for name, (_, atoms) in zip(names, found, strict=True)},
        frozen=_frozen_layers(walk),
    )


def _spots(walk: Walk) -> dict[int, Spots]:
    """Atom that may go -> its indices in every stored tensor. Atoms come in the order of their first index."""
    found: dict[int, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for tensor, labels in walk.stored.items():
        for dim, ids in enumerate(labels):
            if ids is not None:
                for position, atoms in enumerate(walk.channels.sets(ids)):
                    for atom in atoms:
                        found[atom][tensor, dim].append(position)
    return {atom: {spot: tuple(where) for spot, where in spots.items()} for atom, spots in found.items()}


def _group(walk: Walk, atoms: list[int], spots: dict[int, Spots], order: dict[str, int]) -> ChannelGroup | None:
    """The group of these channels; None if no layer makes them or there is nothing to choose."""
    if len(atoms) < _MINIMUM_CHANNELS:
        return None
    axes = list(spots[atoms[0]])
    uses = list(unique_layers(walk))
    producers = [use.name for use in uses if (use.weight, use.out_axis) in axes]
    consumers = [use.name for use in uses if use.in_axis != use.out_axis and (use.weight, use.in_axis) in axes]
    makers = [name for name in producers if name in consumers or not _depthwise(walk, name)]
    if not makers:
        return None
    return ChannelGroup(
        name=min(producers, key=order.__getitem__),
        size=len(atoms),
        places=tuple(
            Place(
                tensor=tensor,
                dim=dim,
                positions=tuple(spots[atom][tensor, dim] for atom in atoms),
                role=_role(walk, tensor, dim),
            )
            for tensor, dim in sorted(axes)
        ),
        producers=tuple(sorted(producers, key=order.__getitem__)),
        consumers=tuple(sorted(consumers, key=order.__getitem__)),
    )


def unique_layers(walk: Walk) -> Iterator:  # type: ignore[type-arg]
    """The first use of every layer."""
    seen: set[str] = set()
    for use in walk.layers:
        if use.name not in seen:
            seen.add(use.name)
            yield use


def _depthwise(walk: Walk, name: str) -> bool:
    return any(use.name == name and use.in_axis == use.out_axis for use in walk.layers)


def _role(walk: Walk, tensor: str, dim: int) -> Literal["producer", "follower", "consumer"]:
    for use in walk.layers:
        if tensor == use.weight and use.in_axis != use.out_axis:
            return "producer" if dim == use.out_axis else "consumer" if dim == use.in_axis else "follower"
    return "follower"


def _distinct_names(names: list[str]) -> list[str]:
    """A layer whose channels fall into several groups gives them numbered names."""
    count: dict[str, int] = defaultdict(int)
    result = []
    for name in names:
        count[name] += 1
        result.append(name if count[name] == 1 else f"{name}#{count[name]}")
    return result


def _frozen_layers(walk: Walk) -> tuple[Frozen, ...]:
    """Layers of whose output channels some must stay, with the first reason."""
    result = []
    for use in unique_layers(walk):
        ids: Ids | None = walk.stored[use.weight][use.out_axis]
        roots = np.unique(walk.channels.root(ids)).tolist() if ids is not None else []
        reasons = [reason for reason in map(walk.channels.frozen, roots) if reason]
        if reasons:
            result.append(Frozen(layer=use.name, reason=reasons[0]))
    return tuple(result)
