"""Rules for operators that arrange values anew without computing: reshape, permute, expand, repeat, shuffle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.fx import Node

from automl_compress.model.contractions import tie_or_freeze
from automl_compress.model.labels import Ids, Labels

if TYPE_CHECKING:
    from automl_compress.model.walk import Walk

_MAX_COPIES = 1024  # a dimension repeated more often than this is one of positions, never of channels


def permute(walk: Walk, node: Node) -> Labels:
    labels = walk.labels(walk.tensors(node)[0])
    return tuple(labels[dim] for dim in dims_of(node.args[1], len(labels)))


def transpose(walk: Walk, node: Node) -> Labels:
    """Two dimensions change places; the last two if none are named."""
    labels = list(walk.labels(walk.tensors(node)[0]))
    wanted = [node.args[1], node.args[2]] if len(node.args) > 2 else [-2, -1]
    if len(labels) > 1:
        one, other = dims_of(wanted, len(labels))
        labels[one], labels[other] = labels[other], labels[one]
    return tuple(labels)


def move_dims(walk: Walk, node: Node) -> Labels:
    labels = walk.labels(walk.tensors(node)[0])
    rank = len(labels)
    sources, targets = dims_of(node.args[1], rank), dims_of(node.args[2], rank)
    order = [dim for dim in range(rank) if dim not in sources]
    for target, source in sorted(zip(targets, sources, strict=True)):
        order.insert(target, source)
    return tuple(labels[dim] for dim in order)


def reshape(walk: Walk, node: Node) -> Labels:
    """Match runs of dimensions with equal products: what merges becomes a grid, what is split was one."""
    source = walk.tensors(node)[0]
    before, after = walk.shape(source), walk.shape(node)
    labels = walk.labels(source)
    result: list[Ids | None] = []
    for old, new in matching_runs(before, after):
        merged = walk.channels.merge([labels[dim] for dim in old], [before[dim] for dim in old])
        result += walk.channels.split(merged, [after[dim] for dim in new])
        _note_products(walk, node, [labels[dim] for dim in old], [before[dim] for dim in old])
        _note_products(walk, node, result[len(result) - len(new) :], [after[dim] for dim in new])
    for size, ids in zip(after, result, strict=True):
        walk.note_constant(node, size, ids)
    return tuple(result)


def _note_products(walk: Walk, node: Node, labels: Sequence[Ids | None], sizes: Sequence[int]) -> None:
    """The code may name the product of neighbouring sizes, or divide it by one of them."""
    for start in range(len(sizes)):
        for end in range(start + 2, len(sizes) + 1):
            merged = walk.channels.merge(labels[start:end], sizes[start:end])
            walk.note_constant(node, math.prod(sizes[start:end]), merged)


def matching_runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of equal product into the shortest runs of dimensions with equal products.

    (2, 8, 4, 4) and (2, 128) give [([0], [0]), ([1, 2, 3], [1])].
    """
    runs, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        old, new = list(range(i, min(i + 1, len(before)))), list(range(j, min(j + 1, len(after))))
        i, j = i + len(old), j + len(new)
        while math.prod(before[d] for d in old) != math.prod(after[d] for d in new):
            if math.prod(before[d] for d in old) < math.prod(after[d] for d in new):
                old.append(i)
                i += 1
            else:
                new.append(j)
                j += 1
        runs.append((old, new))
    return runs


def unsqueeze(walk: Walk, node: Node) -> Labels:
    labels = list(walk.labels(walk.tensors(node)[0]))
    labels.insert(dims_of(node.args[1], len(labels) + 1)[0], None)
    return tuple(labels)


def squeeze(walk: Walk, node: Node) -> Labels:
    source = walk.tensors(node)[0]
    shape = walk.shape(source)
    wanted = dims_of(node.args[1], len(shape)) if len(node.args) > 1 else range(len(shape))
    return tuple(ids for dim, ids in enumerate(walk.labels(source)) if not (dim in wanted and shape[dim] == 1))


def expand(walk: Walk, node: Node) -> Labels:
    """Dimensions of size 1 are repeated, and how often may change; the others keep their channels."""
    source = walk.tensors(node)[0]
    shape, before = walk.shape(node), walk.shape(source)
    added = len(shape) - len(before)
    result: list[Ids | None] = []
    for dim, size in enumerate(shape):
        if dim >= added and before[dim - added] == size:
            result.append(walk.labels(source)[dim - added])
        else:
            result.append(walk.channels.fresh_axis(size) if 1 < size <= _MAX_COPIES and dim > 0 else None)
        walk.note_constant(node, size, result[-1])
    return tuple(result)


def repeat(walk: Walk, node: Node) -> Labels:
    """The whole tensor side by side, several times along each dimension."""
    source = walk.tensors(node)[0]
    times: Any = node.args[1]
    labels = walk.labels(source)
    padded = (*[None] * (len(times) - len(labels)), *labels)
    return tuple(None if ids is None else np.tile(ids, int(n)) for ids, n in zip(padded, times, strict=True))


def repeat_interleave(walk: Walk, node: Node) -> Labels:
    """Each index several times in a row along one dimension."""
    source = walk.tensors(node)[0]
    wanted = argument(node, 2, "dim", None)
    labels = list(walk.labels(source))
    if wanted is None or not isinstance(node.args[1], int):
        for ids in labels:
            walk.channels.freeze(ids, f"{walk.title(node)} repeats these channels")
        return (None,) * len(walk.shape(node))
    dim = dims_of(wanted, len(labels))[0]
    ids = labels[dim]
    if ids is not None:
        copies = walk.channels.fresh_axis(node.args[1])
        labels[dim] = walk.channels.merge([ids, copies], (len(ids), node.args[1]))
        walk.note_constant(node, node.args[1], copies)
    return tuple(labels)


def flip(walk: Walk, node: Node) -> Labels:
    labels = walk.labels(walk.tensors(node)[0])
    turned = dims_of(node.args[1], len(labels))
    return tuple(ids[::-1] if ids is not None and dim in turned else ids for dim, ids in enumerate(labels))


def roll(walk: Walk, node: Node) -> Labels:
    """Positions move along some dimensions; channels there would have to move by fewer."""
    labels = list(walk.labels(walk.tensors(node)[0]))
    for dim in dims_of(argument(node, 2, "dims", []), len(labels)):
        walk.channels.freeze(labels[dim], f"{walk.title(node)} shifts these channels")
        labels[dim] = None
    return tuple(labels)


def shuffle_channels(walk: Walk, node: Node) -> Labels:
    """[groups x channels] becomes [channels x groups] along dimension 1."""
    labels = list(walk.labels(walk.tensors(node)[0]))
    count, groups = walk.shape(node)[1], int(node.args[1])  # type: ignore[arg-type]
    outer, inner = walk.channels.split(labels[1], (groups, count // groups))
    walk.note_constant(node, groups, outer)
    labels[1] = walk.channels.merge([inner, outer], (count // groups, groups))
    return tuple(labels)


def pixels_to_positions(walk: Walk, node: Node) -> Labels:
    """pixel_shuffle, fold: each channel was several neighbouring input channels."""
    source = walk.tensors(node)[0]
    labels = walk.labels(source)
    rank, before, after = len(walk.shape(node)), walk.shape(source), walk.shape(node)
    dim = rank - 3 if operator_is(node, "pixel_shuffle") else 1
    channels, inner = walk.channels.split(labels[dim], (after[dim], before[dim] // after[dim]))
    walk.channels.freeze(inner, f"{walk.title(node)} spreads them over positions")
    return (*labels[:dim], channels, *[None] * (rank - dim - 1))


def positions_to_pixels(walk: Walk, node: Node) -> Labels:
    """pixel_unshuffle, unfold: each channel becomes several neighbouring output channels."""
    source = walk.tensors(node)[0]
    labels = walk.labels(source)
    rank, before, after = len(walk.shape(node)), walk.shape(source), walk.shape(node)
    dim = rank - 3 if operator_is(node, "pixel_unshuffle") else 1
    ids = labels[dim]
    spread = None if ids is None else np.repeat(ids, after[dim] // before[dim])
    return (*labels[:dim], spread, *[None] * (rank - dim - 1))


def create(walk: Walk, node: Node) -> Labels:
    """A new tensor of a shape that the code names: it takes part in whatever it meets."""
    shape = walk.shape(node)
    labels = tuple(
        walk.channels.fresh_axis(size) if 1 < size <= _MAX_COPIES and dim > 0 else None
        for dim, size in enumerate(shape)
    )
    for size, ids in zip(shape, labels, strict=True):
        walk.note_constant(node, size, ids)
    return labels


def plain(walk: Walk, node: Node) -> Labels:
    """A new tensor that holds no channels."""
    return (None,) * len(walk.shape(node))


def same(walk: Walk, node: Node) -> Labels:
    return walk.labels(walk.tensors(node)[0])


def tie_second(walk: Walk, node: Node) -> Labels:
    """view_as, expand_as and their like take the second tensor's shape, and with it its channels, where both agree."""
    one, other = walk.tensors(node)[:2]
    if walk.shape(one) == walk.shape(other):
        for a, b in zip(walk.labels(one), walk.labels(other), strict=True):
            if a is not None or b is not None:
                tie_or_freeze(walk, a, b, f"{walk.title(node)} takes a fixed shape")
        return walk.labels(one)
    return reshape(walk, node) if math.prod(walk.shape(one)) == math.prod(walk.shape(other)) else expand(walk, node)


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument by position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def dims_of(value: Any, rank: int) -> list[int]:
    """Dimensions counted from 0, of one number or a list."""
    return [int(dim) % rank for dim in (value if isinstance(value, (list, tuple)) else [value])]


def operator_is(node: Node, name: str) -> bool:
    return str(getattr(node.target, "overloadpacket", "")).endswith(f".{name}")
