"""Rules for operators that compute statistics over channels: means, maxima, norms, softmax.

Removing a channel changes what these give for all others, so a cut model can't equal the original; it must equal the
original whose statistics are over the channels that stay. The walk notes where this happens, and the check reproduces
it. Statistics over positions, or over a group of channels that goes whole, change nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import Node

from automl_compress.model.contractions import tie_or_freeze
from automl_compress.model.labels import Labels
from automl_compress.model.shapes import argument, dims_of

if TYPE_CHECKING:
    from automl_compress.model.walk import Walk

_OTHER = "its scale or shift has channels that can't be removed"


def batch_norm(walk: Walk, node: Node) -> Labels:
    """Per-channel scale, shift and statistics along dimension 1; statistics over the others if they aren't stored."""
    source = node.args[0]
    assert isinstance(source, Node)
    labels = walk.labels(source)
    for operand in walk.tensors(node)[1:]:
        tie_or_freeze(walk, labels[1], walk.labels(operand)[0], _OTHER)
    walk.note_statistics(node)
    return labels


def layer_norm(walk: Walk, node: Node) -> Labels:
    """Layer and RMS norm: statistics over the last dimensions, which scale and shift share."""
    source, *learned = walk.tensors(node)
    normalised: Any = node.args[1]
    labels = walk.labels(source)
    for operand in learned:
        for ids, other in zip(labels[-len(normalised) :], walk.labels(operand), strict=True):
            tie_or_freeze(walk, ids, other, _OTHER)
    for size, ids in zip(normalised, labels[-len(normalised) :], strict=True):
        walk.note_constant(node, size, ids)
    walk.note_statistics(node)
    return labels


def group_norm(walk: Walk, node: Node) -> Labels:
    """Statistics over each group of dimension 1: whole groups may go without changing the rest."""
    source, *learned = walk.tensors(node)
    labels = walk.labels(source)
    for operand in learned:
        tie_or_freeze(walk, labels[1], walk.labels(operand)[0], _OTHER)
    groups = int(node.args[1])  # type: ignore[arg-type]
    if groups > 1:
        outer, _ = walk.channels.split(labels[1], (groups, walk.shape(source)[1] // groups))
        walk.note_constant(node, groups, outer)
        walk.note_numbers(node, "groups", (groups,), (outer,))
    walk.note_statistics(node)
    return labels


def reduce(walk: Walk, node: Node) -> Any:
    """Mean, maximum and their like: the dimensions over which they go vanish or become 1. A sum is a contraction."""
    source = walk.tensors(node)[0]
    labels = walk.labels(source)
    wanted = argument(node, 1, "dim", None)
    if isinstance(wanted, bool):
        wanted = None
    dims = dims_of(wanted if wanted not in (None, []) else list(range(len(labels))), max(len(labels), 1))
    walk.note_statistics(node)
    if isinstance(node.meta["val"], (list, tuple)):
        return [_reduced(labels, dims, len(shape)) for shape in walk.shapes(node)]
    return _reduced(labels, dims, len(walk.shape(node)))


def vector_norm(walk: Walk, node: Node) -> Labels:
    """The norm's order comes before the dimensions."""
    labels = walk.labels(walk.tensors(node)[0])
    wanted = argument(node, 2, "dim", None)
    dims = dims_of(wanted if wanted not in (None, []) else list(range(len(labels))), len(labels))
    walk.note_statistics(node)
    return _reduced(labels, dims, len(walk.shape(node)))


def _reduced(labels: Labels, dims: list[int], rank: int) -> Labels:
    if rank == len(labels):
        return tuple(None if dim in dims else ids for dim, ids in enumerate(labels))
    return tuple(ids for dim, ids in enumerate(labels) if dim not in dims)


def along_dim(walk: Walk, node: Node) -> Labels:
    """Softmax, cumulative sums: every value depends on the others along a dimension, which keeps its size."""
    walk.note_statistics(node)
    return walk.labels(walk.tensors(node)[0])


def spatial(walk: Walk, node: Node) -> Labels:
    """Pooling and resizing: the last dimensions are mixed, those before pass."""
    labels = walk.labels(walk.tensors(node)[0])
    name = str(node.target)
    spatial_dims = next((n for n in (1, 2, 3) if f"{n}d" in name), 0)
    spatial_dims = 2 if "bilinear" in name or "bicubic" in name else 1 if "linear1d" in name else spatial_dims
    leading = len(labels) - spatial_dims
    for ids in labels[leading:]:
        walk.channels.freeze(ids, f"{walk.title(node)} mixes these positions")
    result: Labels = (*labels[:leading], *[None] * spatial_dims)
    return result


def pairs(walk: Walk, node: Node) -> list[Labels]:
    """Max pooling that returns indices as well."""
    labels = spatial(walk, node)
    return [labels] * len(walk.shapes(node))


def prelu(walk: Walk, node: Node) -> Labels:
    """A slope for all channels, or one a channel along dimension 1."""
    source, slope = walk.tensors(node)
    labels, slopes = walk.labels(source), walk.labels(slope)
    if walk.shape(slope) != (1,) and len(labels) > 1:
        tie_or_freeze(walk, labels[1], slopes[0], _OTHER)
    return labels
