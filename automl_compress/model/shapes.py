"""Rules for operators that move values without computing: reshape, permute, split, join, select, pad, repeat."""

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
    for pair in range(len(amounts) // 2):
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
        for side in (left, right, joined):
            walk.note_constant(node, len(side), side)
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
