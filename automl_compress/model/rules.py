"""How channels pass through each ATen operator.

A rule takes the walk and a node and returns the labels of the node's output; it ties the channels that the operator
couples and freezes those that it mixes in a way that a cut would change. Operators without a rule freeze what flows in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.fx import Node

from automl_compress.model.labels import Ids, Labels

if TYPE_CHECKING:
    from automl_compress.model.coupling import Walk

Rule = Callable[["Walk", Node], Labels]


def pointwise(walk: Walk, node: Node) -> Labels:
    """Every tensor argument is broadcast against the others; channels at the same index are one channel."""
    shape = walk.shape(node)
    result: list[Ids | None] = [None] * len(shape)
    unknown: set[int] = set()
    for operand in walk.tensors(node):
        labels, sizes = walk.labels(operand), walk.shape(operand)
        for back in range(1, len(sizes) + 1):
            ids = labels[-back]
            if sizes[-back] != shape[-back] or sizes[-back] == 1:
                continue  # broadcast: every channel of the others meets the same value
            if ids is None:
                unknown.add(len(shape) - back)
            elif result[-back] is None:
                result[-back] = ids
            else:
                walk.channels.tie(result[-back], ids)  # type: ignore[arg-type]
    for dim, ids in enumerate(result):
        if ids is not None and dim in unknown:
            walk.channels.freeze(ids, f"{walk.title(node)} meets values whose channels are not known")
    return tuple(result)


def convolution(walk: Walk, node: Node) -> Labels:
    """Weight [out, in / groups, ...]; depthwise ties output to input, other grouped convolutions are left whole."""
    source, weight, bias = _operands(node)
    return _convolve(walk, node, source, weight, bias, out_axis=0, in_axis=1, groups=_argument(node, 6, 1))


def transposed_convolution(walk: Walk, node: Node) -> Labels:
    """Weight [in, out / groups, ...]."""
    source, weight, bias = _operands(node)
    return _convolve(walk, node, source, weight, bias, out_axis=1, in_axis=0, groups=_argument(node, 6, 1))


def _convolve(
    walk: Walk, node: Node, source: Node, weight: Node, bias: Node | None, *, out_axis: int, in_axis: int, groups: int
) -> Labels:
    channels = walk.channels
    entering = walk.labels(source)[1]
    kernel = walk.labels(weight)
    out, into = kernel[out_axis], kernel[in_axis]
    out_channels = walk.shape(node)[1]
    in_channels = walk.shape(source)[1]
    if groups == 1:
        _tie_or_freeze(walk, entering, into, "its input has channels that are not known")
        leaving = out
    elif groups == in_channels and out_channels % groups == 0 and out_axis == 0 and out is not None:
        if entering is None:
            channels.freeze(out, "its input has channels that are not known")
        else:
            channels.tie(out, np.repeat(entering, out_channels // groups))
            if out_channels != in_channels:
                channels.freeze(out, "depthwise convolution with several outputs for each input")
        leaving = out
    else:
        for ids in (entering, out, into):
            channels.freeze(ids, f"grouped convolution ({groups} groups) at {walk.title(node)}")
        leaving = channels.fresh(out_channels)
        channels.freeze(leaving, f"grouped convolution ({groups} groups) at {walk.title(node)}")
    if bias is not None and leaving is not None:
        _tie_or_freeze(walk, leaving, walk.labels(bias)[0], "a bias of another size")
    return (None, leaving, *[None] * (len(walk.shape(node)) - 2))


def linear(walk: Walk, node: Node) -> Labels:
    """Weight [out, in] applied to the last dimension."""
    source, weight, bias = _operands(node)
    labels = walk.labels(source)
    out, into = walk.labels(weight)
    _tie_or_freeze(walk, labels[-1], into, "its input has channels that are not known")
    if bias is not None and out is not None:
        _tie_or_freeze(walk, out, walk.labels(bias)[0], "a bias of another size")
    return (*labels[:-1], out)


def batch_norm(walk: Walk, node: Node) -> Labels:
    """Per-channel scale, shift and statistics along dimension 1."""
    source = node.args[0]
    assert isinstance(source, Node)
    labels = walk.labels(source)
    for operand in walk.tensors(node)[1:]:
        _tie_or_freeze(walk, labels[1], walk.labels(operand)[0], "its input has channels that are not known")
    return labels


def prelu(walk: Walk, node: Node) -> Labels:
    """A slope for all channels, or one a channel along dimension 1."""
    source, slope = walk.tensors(node)
    labels, slopes = walk.labels(source), walk.labels(slope)
    if walk.shape(slope) != (1,) and len(labels) > 1:
        _tie_or_freeze(walk, labels[1], slopes[0], "its input has channels that are not known")
    return labels


def normalise_over(walk: Walk, node: Node) -> Labels:
    """Layer norm: statistics over the last dimensions, so removing a channel changes all others."""
    source = walk.tensors(node)[0]
    normalised: Any = node.args[1]
    for operand in walk.tensors(node):
        for ids in walk.labels(operand)[-len(normalised) :]:
            walk.channels.freeze(ids, f"{walk.title(node)} normalises over these channels")
    return walk.labels(source)


def spatial(walk: Walk, node: Node) -> Labels:
    """Pooling and resizing: dimensions 0 and 1 pass, the rest carries no channels."""
    labels = walk.labels(walk.tensors(node)[0])
    for ids in labels[2:]:
        walk.channels.freeze(ids, f"{walk.title(node)} mixes these positions")
    kept = labels[:2] if len(walk.shape(node)) == len(labels) else (None,) * len(labels)
    return (*kept, *[None] * (len(walk.shape(node)) - len(kept)))


def reduce(walk: Walk, node: Node) -> Labels:
    """Mean, sum, maximum over dimensions: those that carry channels are frozen, the others vanish or become 1."""
    source = walk.tensors(node)[0]
    labels = walk.labels(source)
    wanted: Any = node.args[1] if len(node.args) > 1 else None
    dims = _dims(wanted if wanted not in (None, []) else list(range(len(labels))), len(labels))
    for dim in dims:
        walk.channels.freeze(labels[dim], f"{walk.title(node)} sums over these channels")
    if len(walk.shape(node)) == len(labels):
        return tuple(None if dim in dims else ids for dim, ids in enumerate(labels))
    return tuple(ids for dim, ids in enumerate(labels) if dim not in dims)


def along_dim(walk: Walk, node: Node) -> Labels:
    """Softmax and its like: the dimension that it normalises over is frozen."""
    labels = walk.labels(walk.tensors(node)[0])
    walk.channels.freeze(labels[int(node.args[1])], f"{walk.title(node)} normalises over these channels")  # type: ignore[arg-type]
    return labels


def concatenate(walk: Walk, node: Node) -> Labels:
    """Channels along the joined dimension follow one another; along all others they are the same."""
    parts: Any = node.args[0]
    rank = len(walk.shape(node))
    joined = _dims(_argument(node, 1, 0), rank)[0]
    result: list[Ids | None] = []
    for dim in range(rank):
        columns = [walk.labels(part)[dim] for part in parts]
        known = [ids for ids in columns if ids is not None]
        if not known:
            result.append(None)
        elif len(known) < len(columns):
            for ids in known:
                walk.channels.freeze(ids, f"{walk.title(node)} joins them with values whose channels are not known")
            result.append(None)
        elif dim == joined:
            result.append(np.concatenate(known))
        else:
            for ids in known[1:]:
                walk.channels.tie(known[0], ids)
            result.append(known[0])
    return tuple(result)


def permute(walk: Walk, node: Node) -> Labels:
    labels = walk.labels(walk.tensors(node)[0])
    return tuple(labels[dim] for dim in _dims(node.args[1], len(labels)))


def transpose(walk: Walk, node: Node) -> Labels:
    labels = list(walk.labels(walk.tensors(node)[0]))
    one, other = _dims([node.args[1], node.args[2]], len(labels))
    labels[one], labels[other] = labels[other], labels[one]
    return tuple(labels)


def reshape(walk: Walk, node: Node) -> Labels:
    """Match runs of dimensions with equal products. A channel dimension may merge with positions (it then has several
    places); one that is split is frozen, since the model's code fixes how."""
    source = walk.tensors(node)[0]
    before, after = walk.shape(source), walk.shape(node)
    labels = walk.labels(source)
    result: list[Ids | None] = []
    for old, new in matching_runs(before, after):
        tracked = [dim for dim in old if labels[dim] is not None]
        if not tracked:
            result += [None] * len(new)
        elif len([dim for dim in new if after[dim] != 1]) == 1 and len(tracked) == 1:
            merged = _spread([before[dim] for dim in old], old.index(tracked[0]), labels[tracked[0]])
            result += [merged if after[dim] != 1 else None for dim in new]
        else:
            for dim in tracked:
                walk.channels.freeze(labels[dim], f"{walk.title(node)} splits these channels")
            result += [None] * len(new)
    return tuple(result)


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


def _spread(sizes: list[int], axis: int, ids: Ids | None) -> Ids | None:
    """Labels of a flattened run of dimensions of which `axis` carries the channels `ids`."""
    if ids is None:
        return None
    column = ids.reshape([-1 if dim == axis else 1 for dim in range(len(sizes))])
    return np.broadcast_to(column, sizes).ravel()


def unsqueeze(walk: Walk, node: Node) -> Labels:
    labels = list(walk.labels(walk.tensors(node)[0]))
    labels.insert(_dims(node.args[1], len(labels) + 1)[0], None)
    return tuple(labels)


def squeeze(walk: Walk, node: Node) -> Labels:
    source = walk.tensors(node)[0]
    shape = walk.shape(source)
    wanted = _dims(node.args[1], len(shape)) if len(node.args) > 1 else range(len(shape))
    return tuple(ids for dim, ids in enumerate(walk.labels(source)) if not (dim in wanted and shape[dim] == 1))


def expand(walk: Walk, node: Node) -> Labels:
    """Dimensions of size 1 are repeated; the others keep their channels."""
    labels = walk.labels(walk.tensors(node)[0])
    return (*[None] * (len(walk.shape(node)) - len(labels)), *labels)


def select_positions(walk: Walk, node: Node) -> Labels:
    """Slice or pad: dimensions that keep their size keep their channels; a channel dimension that doesn't is frozen,
    since the model's code says which channels or how many."""
    source = walk.tensors(node)[0]
    result: list[Ids | None] = []
    for ids, before, after in zip(walk.labels(source), walk.shape(source), walk.shape(node), strict=True):
        if before != after:
            walk.channels.freeze(ids, f"{walk.title(node)} selects or pads channels by number")
        result.append(ids if before == after else None)
    return tuple(result)


def same(walk: Walk, node: Node) -> Labels:
    return walk.labels(walk.tensors(node)[0])


def _tie_or_freeze(walk: Walk, known: Ids | None, other: Ids | None, reason: str) -> None:
    if known is not None and other is not None and len(known) == len(other):
        walk.channels.tie(known, other)
    else:
        walk.channels.freeze(known, reason)
        walk.channels.freeze(other, reason)


def _operands(node: Node) -> tuple[Node, Node, Node | None]:
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    source, weight = node.args[0], node.args[1]
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    return source, weight, bias if isinstance(bias, Node) else None


def _argument(node: Node, position: int, default: int) -> int:
    value: Any = node.args[position] if len(node.args) > position else default
    return int(value)


def _dims(value: Any, rank: int) -> list[int]:
    return [int(dim) % rank for dim in (value if isinstance(value, (list, tuple)) else [value])]


_POINTWISE = """relu relu_ gelu silu silu_ hardswish hardswish_ hardsigmoid hardsigmoid_ sigmoid tanh leaky_relu
leaky_relu_ elu elu_ softplus mish mish_ hardtanh hardtanh_ relu6 relu6_ clamp clamp_ clamp_min abs neg exp sqrt rsqrt
square log1p pow reciprocal dropout dropout_ feature_dropout alpha_dropout add add_ sub sub_ mul mul_ div div_ maximum
minimum where rsub selu celu logsigmoid softsign erf sin cos"""
_SAME = "clone contiguous detach alias to _to_copy type_as lift_fresh_copy dropout native_dropout"
_SPATIAL = """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d upsample_nearest2d upsample_bilinear2d upsample_nearest1d"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE.split(), pointwise),
    **dict.fromkeys(_SAME.split(), same),
    **dict.fromkeys(_SPATIAL.split(), spatial),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed_convolution),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), reduce),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax"), along_dim),
    **dict.fromkeys(("view", "reshape", "flatten", "_unsafe_view", "unflatten"), reshape),
    **dict.fromkeys(("slice", "pad", "constant_pad_nd"), select_positions),
    "linear": linear,
    "batch_norm": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm,
    "prelu": prelu,
    "layer_norm": normalise_over,
    "cat": concatenate,
    "concat": concatenate,
    "permute": permute,
    "transpose": transpose,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "expand": expand,
}
