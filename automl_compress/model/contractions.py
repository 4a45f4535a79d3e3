"""Rules for operators that sum products over channels: convolutions, linear layers, matrix products, attention."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from automl_compress.model.labels import Ids, Labels

if TYPE_CHECKING:
    from automl_compress.model.walk import Walk

_UNKNOWN_INPUT = "its input has channels that can't be removed"


def tie_or_freeze(walk: Walk, one: Ids | None, other: Ids | None, reason: str) -> None:
    """One channel each, or, where only one side has labels or the sizes differ, none that may go."""
    if one is not None and other is not None and len(one) == len(other):
        walk.channels.tie(one, other)
    else:
        walk.channels.freeze(one, reason)
        walk.channels.freeze(other, reason)


def convolution(walk: Walk, node: Node) -> Labels:
    """Weight [out, in / groups, ...]. With groups, input and output are grids of (group, channel in the group):
    whole groups may go, or the same channels of every group."""
    source, weight, bias = operands(node)
    kernel = walk.labels(weight)
    entering = walk.labels(source)[1]
    leaving = kernel[0]
    groups = _groups(node, 6)
    if groups == 1:
        tie_or_freeze(walk, entering, kernel[1], _UNKNOWN_INPUT)
    else:
        outer, _ = _enter_groups(walk, node, entering, kernel[1], groups, walk.shape(source)[1])
        by_group, _ = walk.channels.split(leaving, (groups, walk.shape(node)[1] // groups))
        tie_or_freeze(walk, outer, by_group, _UNKNOWN_INPUT)
    return _convolved(walk, node, source, bias, leaving)


def transposed_convolution(walk: Walk, node: Node) -> Labels:
    """Weight [in, out / groups, ...]."""
    source, weight, bias = operands(node)
    kernel = walk.labels(weight)
    entering = walk.labels(source)[1]
    tie_or_freeze(walk, entering, kernel[0], _UNKNOWN_INPUT)
    groups = _groups(node, 6)
    leaving = kernel[1]
    if groups > 1:
        width = walk.shape(weight)[1]
        outer, _ = walk.channels.split(kernel[0], (groups, walk.shape(source)[1] // groups))
        walk.note_constant(node, groups, outer)
        leaving = walk.channels.merge([outer, kernel[1]], (groups, width))
    return _convolved(walk, node, source, bias, leaving)


def _enter_groups(
    walk: Walk, node: Node, entering: Ids | None, within: Ids | None, groups: int, channels: int
) -> list[Ids | None]:
    outer, inner = walk.channels.split(entering, (groups, channels // groups))
    walk.note_constant(node, groups, outer)
    if channels > groups:
        tie_or_freeze(walk, inner, within, _UNKNOWN_INPUT)
    return [outer, inner]


def _convolved(walk: Walk, node: Node, source: Node, bias: Node | None, leaving: Ids | None) -> Labels:
    along = walk.labels(source)[2:]
    if (
        any(ids is not None for ids in along)
        and walk.shape(source)[2:] == walk.shape(node)[2:]
        and walk.shape(source)[1] == 1
    ):
        # A filter that slides over channels (efficient channel attention): neighbours are those that stay.
        walk.note_statistics(node)
    else:
        for ids in along:
            walk.channels.freeze(ids, f"{walk.title(node)} mixes these positions")
        along = (None,) * len(along)
    walk.contract(node, source, 1)
    if bias is not None:
        tie_or_freeze(walk, leaving, walk.labels(bias)[0], "a bias of another size")
    return (walk.labels(source)[0], leaving, *along)


def _groups(node: Node, position: int) -> int:
    arguments: tuple[Any, ...] = node.args
    return int(arguments[position]) if len(arguments) > position else 1


def linear(walk: Walk, node: Node) -> Labels:
    """Weight [out, in] applied to the last dimension."""
    source, weight, bias = operands(node)
    labels = walk.labels(source)
    out, into = walk.labels(weight)
    tie_or_freeze(walk, labels[-1], into, _UNKNOWN_INPUT)
    walk.contract(node, source, -1)
    if bias is not None:
        tie_or_freeze(walk, out, walk.labels(bias)[0], "a bias of another size")
    return (*labels[:-1], out)


def product(walk: Walk, node: Node) -> Labels:
    """[..., m, k] times [..., k, n]; vectors on either side; an addend first for addmm and baddbmm."""
    tensors: Any = node.args
    addend = tensors[0] if len(tensors) > 2 else None
    left, right = tensors[-2:] if addend is None else tensors[1:3]
    one, other = walk.labels(left), walk.labels(right)
    inner = other[-2] if len(other) > 1 else other[0]
    tie_or_freeze(walk, one[-1], inner, _UNKNOWN_INPUT)
    walk.contract(node, left, -1)
    rank = max(len(one), len(other)) - 2
    outer = broadcast(walk, node, [(left, one[:-2]), (right, other[:-2])], walk.shape(node)[: max(rank, 0)])
    result = (*outer, *one[-2:-1], *(other[-1:] if len(other) > 1 else ()))
    if addend is not None:
        return broadcast_with(walk, node, addend, result)
    return result


def broadcast(
    walk: Walk, node: Node, parts: list[tuple[Node, Labels]], shape: tuple[int, ...]
) -> tuple[Ids | None, ...]:
    """Tie the leading dimensions of several operands, aligned at the right, as broadcasting does."""
    result: list[Ids | None] = [None] * len(shape)
    whole: set[int] = set()
    for source, labels in parts:
        sizes = walk.shape(source)[: len(labels)]
        for back in range(1, len(labels) + 1):
            if sizes[-back] != shape[-back] or sizes[-back] == 1:
                continue  # every channel of the others meets the same value
            dim, ids = len(shape) - back, labels[-back]
            if ids is None:
                whole.add(dim)
            elif result[dim] is None:
                result[dim] = ids
            else:
                tie_or_freeze(walk, result[dim], ids, "")
    for dim in whole:
        if result[dim] is not None:
            walk.channels.freeze(result[dim], f"{walk.title(node)} meets values whose channels can't be removed")
            result[dim] = None
    return tuple(result)


def broadcast_with(walk: Walk, node: Node, addend: Node, labels: Labels) -> Labels:
    """Labels of a result to which a value that broadcasts is added."""
    shape, known = walk.shape(node), walk.labels(addend)
    for back in range(1, len(known) + 1):
        if walk.shape(addend)[-back] == shape[-back] and shape[-back] > 1:
            tie_or_freeze(walk, labels[-back], known[-back], f"{walk.title(node)} adds values of fixed size")
    return labels


def attention(walk: Walk, node: Node) -> Labels:
    """Queries [..., heads, l, e], keys [..., heads, s, e], values [..., heads, s, ev] give [..., heads, l, ev].

    Width e of queries and keys is contracted; the default scale follows it, so a cut model's logits are scaled for the
    width that is left. With grouped queries, query heads are a grid of (key head, its queries).
    """
    arguments: Any = node.args
    query, key, value = arguments[:3]
    mask = arguments[3] if len(arguments) > 3 else node.kwargs.get("attn_mask")
    q, k, v = (list(walk.labels(operand)) for operand in (query, key, value))
    tie_or_freeze(walk, q[-1], k[-1], _UNKNOWN_INPUT)
    tie_or_freeze(walk, k[-2], v[-2], _UNKNOWN_INPUT)
    walk.note_statistics(node)
    if node.kwargs.get("scale") is None:
        walk.note_numbers(node, "scale", (walk.shape(query)[-1],), (q[-1],))
    heads, shared = (walk.shape(operand)[-3] if len(q) > 2 else 1 for operand in (query, key))
    shape = walk.shape(node)
    if heads != shared and node.kwargs.get("enable_gqa"):
        outer, _ = walk.channels.split(q[-3], (shared, heads // shared))
        for ids in (k[-3], v[-3]):
            tie_or_freeze(walk, outer, ids, _UNKNOWN_INPUT)
        batch = broadcast(walk, node, [(o, tuple(x[:-3])) for o, x in ((query, q), (key, k), (value, v))], shape[:-3])
        leading: Labels = (*batch, q[-3])
    else:
        leading = broadcast(walk, node, [(o, tuple(x[:-2])) for o, x in ((query, q), (key, k), (value, v))], shape[:-2])
    if isinstance(mask, Node):
        scores = (*leading, q[-2], k[-2])
        sizes = (*shape[:-2], walk.shape(query)[-2], walk.shape(key)[-2])
        known = walk.labels(mask)
        for back in range(1, len(known) + 1):
            if walk.shape(mask)[-back] == sizes[-back] and sizes[-back] > 1:
                tie_or_freeze(walk, scores[-back], known[-back], f"{walk.title(node)} has a mask of fixed size")
    return (*leading, q[-2], v[-1])


def einsum(walk: Walk, node: Node) -> Labels:
    """Equal letters are equal channels; letters that the result lacks are contracted."""
    arguments: Any = node.args
    equation, values = str(arguments[0]).replace(" ", ""), list(arguments[1])
    if "." in equation or "->" not in equation:
        for value in values:
            for ids in walk.labels(value):
                walk.channels.freeze(ids, f"{walk.title(node)} has an equation that is not understood: {equation}")
        return (None,) * len(walk.shape(node))
    terms, result = equation.split("->")
    seen: dict[str, list[tuple[Ids | None, int]]] = defaultdict(list)
    for term, value in zip(terms.split(","), values, strict=True):
        for dim, letter in enumerate(term):
            seen[letter].append((walk.labels(value)[dim], walk.shape(value)[dim]))
            if letter not in result:
                walk.contract(node, value, dim)
    labels: dict[str, Ids | None] = {}
    for letter, columns in seen.items():
        wide = [ids for ids, size in columns if size > 1]
        for ids in wide[1:]:
            tie_or_freeze(walk, wide[0], ids, _UNKNOWN_INPUT)
        labels[letter] = wide[0] if wide else None
    return tuple(labels[letter] for letter in result)


def operands(node: Node) -> tuple[Node, Node, Node | None]:
    """Input, weight, bias."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    source, weight = node.args[0], node.args[1]
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    return source, weight, bias if isinstance(bias, Node) else None
