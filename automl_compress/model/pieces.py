"""Rules for operators that take dimensions apart or put them together: join, split, slice, select, pad, index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.fx import Node

from automl_compress.model.labels import Ids, Labels
from automl_compress.model.shapes import argument, dims_of, operator_is

if TYPE_CHECKING:
    from automl_compress.model.walk import Walk


def concatenate(walk: Walk, node: Node) -> Labels:
    """Channels along the joined dimension follow one another; along all others they are the same."""
    parts: Any = node.args[0]
    parts = [part for part in parts if math.prod(walk.shape(part)) > 0]
    rank = len(walk.shape(node))
    joined = dims_of(argument(node, 1, "dim", 0), rank)[0]
    result: list[Ids | None] = []
    for dim in range(rank):
        columns = [walk.labels(part)[dim] for part in parts]
        if dim == joined and any(ids is not None for ids in columns):
            sizes = [walk.shape(part)[dim] for part in parts]
            filled = [c if c is not None else walk.channels.pinned(s) for c, s in zip(columns, sizes, strict=True)]
            result.append(np.concatenate(filled))
        elif dim == joined:
            result.append(None)
        else:
            result.append(_same_along(walk, node, columns))
    return tuple(result)


def stack(walk: Walk, node: Node) -> Labels:
    """A new dimension that holds one value each; along all others the channels are the same."""
    parts: Any = node.args[0]
    rank = len(walk.shape(node))
    at = dims_of(argument(node, 1, "dim", 0), rank)[0]
    labels = [_same_along(walk, node, [walk.labels(part)[dim] for part in parts]) for dim in range(rank - 1)]
    labels.insert(at, None)
    return tuple(labels)


def _same_along(walk: Walk, node: Node, columns: Sequence[Ids | None]) -> Ids | None:
    known = [ids for ids in columns if ids is not None]
    if len(known) < len(columns):
        for ids in known:
            walk.channels.freeze(ids, f"{walk.title(node)} joins them with values whose channels can't be removed")
        return None
    for ids in known[1:]:
        walk.channels.tie(known[0], ids)
    return known[0]


def slice_range(walk: Walk, node: Node) -> Labels:
    """A range of a dimension. Where it ends is a number in the code, which a cut has to change."""
    source = walk.tensors(node)[0]
    arguments: Any = node.args
    labels = list(walk.labels(source))
    dim = dims_of(argument(node, 1, "dim", 0), len(labels))[0]
    if operator_is(node, "narrow"):
        start, end, step = int(arguments[2]), int(arguments[2]) + int(arguments[3]), 1
    else:
        start, end, step = (argument(node, 2, "start", None), argument(node, 3, "end", None), argument(node, 4, "s", 1))
    ids = labels[dim]
    if ids is not None and walk.shape(node)[dim] != len(ids):
        chosen = ids[slice(start, end, step)]
        for part in (ids[:start] if start else None, ids[:end] if end is not None else None):
            if part is not None:
                walk.note_numbers(node, "end", (len(part),), (part,))
        for part in (ids[:start] if start else None, ids[:end] if end is not None else None, chosen):
            if part is not None:
                walk.note_constant(node, len(part), part)
        labels[dim] = chosen
    return tuple(labels)


def select(walk: Walk, node: Node) -> Labels:
    """One index of a dimension, by number: that dimension stays whole."""
    source = walk.tensors(node)[0]
    labels = list(walk.labels(source))
    dim = dims_of(node.args[1], len(labels))[0]
    walk.channels.freeze(labels.pop(dim), f"{walk.title(node)} takes one of them by number")
    return tuple(labels)


def unbind(walk: Walk, node: Node) -> list[Labels]:
    """Every index of a dimension by itself: that dimension stays whole."""
    source = walk.tensors(node)[0]
    labels = list(walk.labels(source))
    dim = dims_of(argument(node, 1, "dim", 0), len(labels))[0]
    walk.channels.freeze(labels.pop(dim), f"{walk.title(node)} takes them apart by number")
    return [tuple(labels)] * len(walk.shapes(node))


def split(walk: Walk, node: Node) -> list[Labels]:
    """Pieces of a dimension. Equal pieces stay equal, so they lose the same channels; others are free of each other."""
    source = walk.tensors(node)[0]
    dim = dims_of(argument(node, 2, "dim", 0), len(walk.shape(source)))[0]
    labels = walk.labels(source)
    sizes = [shape[dim] for shape in walk.shapes(node)]
    ids = labels[dim]
    if ids is None:
        pieces: list[Ids | None] = [None] * len(sizes)
    elif len(set(sizes)) == 1:
        which, within = walk.channels.split(ids, (len(sizes), sizes[0]))
        walk.channels.freeze(which, f"{walk.title(node)} takes them apart")
        # What stays of the grid after its outer axis was frozen is the same in every piece.
        pieces = [within] * len(sizes)
    else:
        ends = np.cumsum(sizes).tolist()
        pieces = [ids[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    walk.note_numbers(node, "split", sizes, pieces)
    for size, piece in zip(sizes, pieces, strict=True):
        walk.note_constant(node, size, piece)
    return [(*labels[:dim], piece, *labels[dim + 1 :]) for piece in pieces]


def get_item(walk: Walk, node: Node) -> Any:
    """One result of an operator that has several."""
    source, index = node.args
    assert isinstance(source, Node)
    assert isinstance(index, int)
    return walk.parts(source)[index]


def gated_halves(walk: Walk, node: Node) -> Labels:
    """glu: the first half times the sigmoid of the second."""
    source = walk.tensors(node)[0]
    labels = list(walk.labels(source))
    dim = dims_of(argument(node, 1, "dim", -1), len(labels))[0]
    halves, within = walk.channels.split(labels[dim], (2, walk.shape(node)[dim]))
    walk.channels.freeze(halves, f"{walk.title(node)} takes them apart")
    labels[dim] = within
    return tuple(labels)


def pad(walk: Walk, node: Node) -> Labels:
    """New indices before and after a dimension's. Padded channels are channels of their own; how many there are is a
    number in the code, the same on both sides where it is so now."""
    source = walk.tensors(node)[0]
    amounts: Any = node.args[1]
    mode = node.args[2] if len(node.args) > 2 and isinstance(node.args[2], str) else "constant"
    labels = list(walk.labels(source))
    rank = len(labels)
    values = [0] * (2 * rank)
    counted: list[Ids | None] = [None] * (2 * rank)
    for pair in range(len(amounts) // 2):
        values[rank - 1 - pair], values[2 * rank - 1 - pair] = int(amounts[2 * pair]), int(amounts[2 * pair + 1])
        before, after = int(amounts[2 * pair]), int(amounts[2 * pair + 1])
        dim = len(labels) - 1 - pair
        ids = labels[dim]
        if ids is None or not (before or after):
            continue
        if mode != "constant":
            walk.channels.freeze(ids, f"{walk.title(node)} pads with copies of these channels")
            labels[dim] = None
            continue
        left, right = walk.channels.fresh_axis(max(before, 0)), walk.channels.fresh_axis(max(after, 0))
        if before == after:
            walk.channels.tie(left, right)
        kept = ids[max(-before, 0) : len(ids) - max(-after, 0)]
        labels[dim] = joined = np.concatenate([left, kept, right])
        counted[dim], counted[rank + dim] = (left if before > 0 else None), (right if after > 0 else None)
        for side in (left, right, joined):
            walk.note_constant(node, len(side), side)
    walk.note_numbers(node, "pad", values, counted)
    return tuple(labels)


def index(walk: Walk, node: Node) -> Labels:
    """Advanced indexing: the indexed dimensions stay whole and vanish, the positions that were asked for take their
    place."""
    source = walk.tensors(node)[0]
    arguments: Any = node.args
    wanted = list(arguments[1])
    labels, rank = walk.labels(source), len(walk.shape(node))
    wanted += [None] * (len(labels) - len(wanted))
    for dim, which in enumerate(wanted):
        if which is not None:
            walk.channels.freeze(labels[dim], f"{walk.title(node)} takes them by number")
    left = [ids for ids, which in zip(labels, wanted, strict=True) if which is None]
    indexed = [dim for dim, which in enumerate(wanted) if which is not None]
    new: list[Ids | None] = [None] * (rank - len(left))
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if adjacent else 0
    return (*left[:at], *new, *left[at:])


def index_select(walk: Walk, node: Node) -> Labels:
    labels = list(walk.labels(walk.tensors(node)[0]))
    dim = dims_of(node.args[1], len(labels))[0]
    walk.channels.freeze(labels[dim], f"{walk.title(node)} takes them by number")
    labels[dim] = None
    return tuple(labels)


def embedding(walk: Walk, node: Node) -> Labels:
    """Rows of a table by number: the rows stay, the columns are channels."""
    table, positions = walk.tensors(node)[:2]
    rows, columns = walk.labels(table)
    walk.channels.freeze(rows, f"{walk.title(node)} looks them up by number")
    return (*walk.labels(positions), columns)
