"""Which of a student's features is compared with which of its teacher's, and which channels of it.

A feature is what a layer reads: it lies behind norm and activation, it is there in a quantized student too, and for a
student that was cut from its teacher the layer's own weight tells which channels are left. So a pair needs no adapter:
the student's channel i is the teacher's channel `channels[i]`. A layer that reads behind a removed block is compared
with what the teacher has there, the block's work included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from automl_compress.core.graph import Graph, Layer
from automl_compress.core.plan import Plan
from automl_compress.model.surgery import kept_indices

# Of the layers that read one resolution (tokens are one), every so many is compared, at most so many.
_EVERY, _AT_MOST = 2, 4


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What a layer of the student reads, beside what one of the teacher reads.

    student, teacher  names of layers, which are the paths of their modules
    channel_dim       where their channels lie: 1 for convolutions, -1 for linear layers
    channels          the teacher's channels that the student's are, in order; None: all
    widths            channels of student and teacher where they have nothing in common but the place: an adapter is
                      learned between them; None for a student that was cut from its teacher
    """

    student: str
    teacher: str
    channel_dim: int
    channels: tuple[int, ...] | None = None
    widths: tuple[int, int] | None = None


def pair_layers(graph: Graph, plan: Plan, model: nn.Module) -> tuple[Pair, ...]:
    """The pairs of a student that was cut from `model` by a plan with selected channels: for each resolution the last
    layer that reads it, and some before it. A cut is made all along the depth, and what it did is learned faster where
    it was done than from the end of the network (`benchmarks/RESULTS.md`).

    Left out are layers that read the model's input, that removed blocks contain, that the model's own code calls (only
    standard modules tell what they read), and convolutions whose groups lost channels inside.
    """
    kept = kept_indices(graph, kept=plan.kept, drop=plan.drop)
    inputs = {shape[1:] for shape in graph.input_shapes}
    by_resolution: dict[tuple[int, ...], list[Pair]] = {}
    for layer in graph.layers:
        if plan.drop.intersection(layer.blocks) or layer.input_shape[1:] in inputs or not is_watchable(model, layer):
            continue
        found = _input_channels(layer, kept)
        if found is not None:
            dim = _channel_dim(layer)
            pair = Pair(student=layer.name, teacher=layer.name, channel_dim=dim, channels=found[0])
            by_resolution.setdefault(_positions(layer, dim), []).append(pair)
    return tuple(pair for pairs in by_resolution.values() for pair in _spread(pairs))


def pair_by_resolution(student: Graph, teacher: Graph, model: nn.Module, original: nn.Module) -> tuple[Pair, ...]:
    """The pairs of a student of any other architecture: for each resolution that layers of both read, the last layer
    of either kind, convolution or linear. Their channels have nothing in common, so an adapter is learned."""
    last: list[dict[tuple[int, tuple[int, ...]], Layer]] = []
    for graph, network in ((student, model), (teacher, original)):
        inputs = {shape[1:] for shape in graph.input_shapes}
        layers = [x for x in graph.layers if x.input_shape[1:] not in inputs and is_watchable(network, x)]
        last.append({(_channel_dim(layer), _positions(layer, _channel_dim(layer))): layer for layer in layers})
    return tuple(
        Pair(
            student=last[0][place].name,
            teacher=last[1][place].name,
            channel_dim=place[0],
            widths=(last[0][place].input_shape[place[0]], last[1][place].input_shape[place[0]]),
        )
        for place in last[0]
        if place in last[1]
    )


def is_watchable(model: nn.Module, layer: Layer) -> bool:
    """Whether the layer is a standard module's, so that what the module reads is what the layer reads."""
    owner = dict(model.named_modules(remove_duplicate=False)).get(layer.name)
    return isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd))


def _channel_dim(layer: Layer) -> int:
    return 1 if layer.kind == "conv" else -1


def _positions(layer: Layer, channel_dim: int) -> tuple[int, ...]:
    """A layer's input shape without samples and channels."""
    return tuple(layer.input_shape[2:] if channel_dim == 1 else layer.input_shape[1:-1])


def _input_channels(layer: Layer, kept: Mapping[tuple[str, int], list[int]]) -> tuple[tuple[int, ...] | None] | None:
    """The channels that the layer still reads (None: all of them), in a tuple; None where the weight can't tell."""
    indices = kept.get((layer.weight, layer.in_axis))
    if layer.groups == 1 or layer.groups == layer.in_channels == layer.out_channels:
        return (None if indices is None else tuple(indices),)
    # With groups, the weight's dimensions show parts of the input only.
    untouched = all((layer.weight, axis) not in kept for axis in (layer.in_axis, layer.out_axis))
    return (None,) if untouched else None


def _spread(pairs: Sequence[Pair]) -> list[Pair]:
    """The last, and some before it at equal distances."""
    count = min(_AT_MOST, -(-len(pairs) // _EVERY))
    step = len(pairs) / count
    return [pairs[round((number + 1) * step) - 1] for number in range(count)]
