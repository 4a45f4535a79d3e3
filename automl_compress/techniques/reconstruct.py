"""Which channels a network misses least, from second-order statistics: elimination by optimal brain surgeon.

For a layer y = W x, removing columns of x and refitting W on calibration data is least squares in closed form, and all
that is needed of the data is the Gram matrix G = sum x x^T of what its output positions read. Eliminating one block of
columns c at a time costs tr(W_c inv(inv(G)_cc) W_c^T) (optimal brain surgeon; Hassibi & Stork 1993, applied to channels
as in Kurtic et al. 2023, "ZipLM"). It needs one pass over a few hundred samples, and no gradient.

Memory is bounded: a layer with more than MAX_COLUMNS columns gets a matrix for each part of its channels, and what is
between the parts counts as uncorrelated; layers are visited in several passes if all matrices together exceed
MAX_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from automl_compress.core.graph import ChannelGroup, Graph, Layer
from automl_compress.techniques.calls import Call, LayerCalls
from automl_compress.techniques.rows import ROWS, input_rows, sample_positions

MAX_COLUMNS = 1152  # 128 channels of a 3x3 convolution: eliminating one takes a few milliseconds
MAX_BYTES = 1 << 30
_DAMPING = 1e-3


@dataclass(frozen=True, kw_only=True)
class Gram:
    """sum x x^T over calibration inputs of one layer, for a part of its columns.

    columns   columns of the flattened weight, in the matrices' order
    matrix    one for each of the layer's convolution groups [groups, columns + 1, columns + 1], float64; the last
              column is the constant 1 that carries the bias
    """

    columns: tuple[int, ...]
    matrix: Tensor

    def damped(self) -> Tensor:
        """With a ridge of a thousandth of the mean diagonal, so that dead channels can be inverted."""
        ridge = _DAMPING * self.matrix.diagonal(dim1=1, dim2=2).mean(dim=1)
        return self.matrix + ridge.view(-1, 1, 1) * torch.eye(self.matrix.shape[1], dtype=self.matrix.dtype)


def collect_grams(
    model: nn.Module, graph: Graph, batches: Iterable[tuple[Tensor, ...]], layers: Iterable[str] | None = None
) -> dict[str, tuple[Gram, ...]]:
    """Layer name -> Gram matrices of its input, for the layers (default: all) that consume a channel group.

    `model` is the original in eval mode. A layer that no call was seen of (see `LayerCalls`) is left out.
    """
    wanted = {layer.name for layer in graph.layers if layer.in_groups and layer.in_axis != layer.out_axis}
    batches = list(batches)
    rows = 2 * ROWS // max(1, len(batches))
    collector = _Collector(model, graph, wanted if layers is None else wanted.intersection(layers), rows)
    with torch.no_grad(), collector:
        for inputs in batches:
            model(*inputs)
    return collector.grams()


def elimination_losses(
    model: nn.Module, graph: Graph, batches: Sequence[tuple[Tensor, ...]], groups: Iterable[str] | None = None
) -> dict[str, Tensor | None]:
    """Group name -> losses [group size]: squared error of the consumers, refitted, when a channel goes after all those
    with lower losses. None where a group has no consumer whose inputs were seen."""
    names = [group.name for group in graph.groups] if groups is None else list(groups)
    result: dict[str, Tensor | None] = {}
    for part in _within_memory(graph, names):
        consumers = {name for group in part for name in graph.group[group].consumers}
        grams = collect_grams(model, graph, batches, consumers)
        result |= {group: eliminate(model, graph.group[group], graph, grams) for group in part}
    return result


def eliminate(
    model: nn.Module, group: ChannelGroup, graph: Graph, grams: Mapping[str, Sequence[Gram]]
) -> Tensor | None:
    """Losses [group size] of one group, see `elimination_losses`.

    Channels go one by one, each time the one whose loss, after the best refit of what is left, is least.
    """
    stored = dict(model.named_parameters(remove_duplicate=False))
    states = [
        state
        for layer in (graph.layer[name] for name in group.consumers)
        for gram in grams.get(layer.name, ())
        for state in _states(_matrix(stored, layer), layer, group, gram)
    ]
    if not states:
        return None
    losses, total = torch.zeros(group.size, dtype=torch.float64), 0.0
    gone = torch.zeros(group.size, dtype=torch.float64)
    for _ in range(group.size):
        each = torch.stack([state.losses for state in states]).sum(dim=0) + gone
        channel = int(each.argmin())
        # Strictly ascending, so that ties keep the order in which they were eliminated.
        total = max(total * (1 + 1e-12), total + float(each[channel])) + 1e-30
        losses[channel] = total
        gone[channel] = torch.inf
        for state in states:
            state.remove(channel)
    return losses


class _Elimination:
    """One matrix while channels are eliminated: weights refitted so far, inverse of what is left.

    Columns are put in the order of the channels, so that what belongs to a channel is a view.
    losses  what each of the group's channels would cost now; 0 for one that has no column here
    """

    def __init__(self, weight: Tensor, matrix: Tensor, columns: Mapping[int, list[int]], size: int) -> None:
        self._place = {channel: index for index, channel in enumerate(columns)}
        self._each = len(next(iter(columns.values())))
        first = [column for found in columns.values() for column in found]
        order = first + sorted(set(range(matrix.shape[0])) - set(first))
        self._weight = weight.T[order].contiguous()  # [columns, out]
        self._inverse = torch.linalg.inv(matrix)[order][:, order].contiguous()
        self._channels = torch.tensor(list(columns))
        self.losses = torch.zeros(size, dtype=torch.float64)
        self._update()

    def remove(self, channel: int) -> None:
        if channel not in self._place:
            return
        start = self._place[channel] * self._each
        columns = slice(start, start + self._each)
        stripe = self._inverse[:, columns].clone()
        solved = torch.linalg.solve(stripe[columns], stripe.T)  # [k, all]
        self._weight.addmm_(solved.T, self._weight[columns].clone(), alpha=-1)
        self._inverse.addmm_(stripe, solved, alpha=-1)
        # Exactly zero, so that rounding of what is gone can't come back through later updates; a unit diagonal keeps
        # the block invertible should it be asked for again.
        self._inverse[columns] = 0
        self._inverse[:, columns] = 0
        self._inverse[columns, columns] = torch.eye(self._each, dtype=self._inverse.dtype)
        self._weight[columns] = 0
        self._update()

    def _update(self) -> None:
        count, k = len(self._channels), self._each
        weights = self._weight[: count * k].view(count, k, -1)
        inverse = self._inverse[: count * k, : count * k].unflatten(0, (count, k)).unflatten(2, (count, k))
        blocks = inverse.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [channels, k, k]
        if k == 1:
            self.losses[self._channels] = (weights.square().sum(dim=2) / blocks[:, 0]).flatten()
            return
        squares = weights @ weights.transpose(1, 2)
        self.losses[self._channels] = torch.linalg.solve(blocks, squares).diagonal(dim1=1, dim2=2).sum(dim=1)


class _Collector(LayerCalls):
    def __init__(self, model: nn.Module, graph: Graph, wanted: set[str], rows: int) -> None:
        super().__init__(model, graph)
        self._rows = rows
        self._parts = {name: column_parts(graph, graph.layer[name]) for name in wanted}
        self._sums: dict[str, list[Tensor]] = {}

    def called(self, call: Call) -> None:
        name = call.layer.name
        if name not in self._parts:
            return
        rows = input_rows(call, sample_positions(call, self._rows)).transpose(0, 1)  # [groups, rows, columns]
        ones = rows.new_ones(*rows.shape[:2], 1)
        found = []
        for part in self._parts[name]:
            x = torch.cat([rows if len(part) == rows.shape[2] else rows[:, :, list(part)], ones], dim=2)
            found.append((x.transpose(1, 2) @ x).double())
        sums = self._sums.setdefault(name, [torch.zeros_like(gram) for gram in found])
        for total, gram in zip(sums, found, strict=True):
            total += gram

    def grams(self) -> dict[str, tuple[Gram, ...]]:
        return {
            name: tuple(Gram(columns=c, matrix=m) for c, m in zip(self._parts[name], sums, strict=True))
            for name, sums in self._sums.items()
        }


def column_parts(graph: Graph, layer: Layer) -> list[tuple[int, ...]]:
    """The columns of a layer's flattened weight in parts of at most MAX_COLUMNS, no channel divided.

    One part with all columns where that is possible; else the channels of each of its groups, in order, as many in a
    part as fit (a single channel with more columns is a part of its own).
    """
    count = _width(graph, layer)
    if count <= MAX_COLUMNS:
        return [tuple(range(count))]
    parts: list[tuple[int, ...]] = []
    for name in layer.in_groups:
        each = channel_columns(layer, graph.group[name])
        size = max(1, MAX_COLUMNS // max(1, max(len(columns) for columns in each)))
        for start in range(0, len(each), size):
            parts.append(tuple(sorted({c for columns in each[start : start + size] for c in columns})))
    return parts


def channel_columns(layer: Layer, group: ChannelGroup) -> list[list[int]]:
    """Channel -> its columns in the layer's flattened weight."""
    size = prod(layer.kernel)
    result: list[list[int]] = [[] for _ in range(group.size)]
    for place in group.places:
        if place.tensor == layer.weight and place.dim == layer.in_axis:
            for channel, positions in enumerate(place.positions):
                result[channel] += [position * size + k for position in positions for k in range(size)]
    return result


def _width(graph: Graph, layer: Layer) -> int:
    return prod(graph.sizes[layer.weight][1:])


def _states(matrix: Tensor, layer: Layer, group: ChannelGroup, gram: Gram) -> Iterator[_Elimination]:
    """One elimination for each convolution group of the layer, over the columns of this part.

    None where channels have different numbers of columns: what they cost could not be compared.
    """
    where = {column: index for index, column in enumerate(gram.columns)}
    columns = {
        channel: [where[c] for c in found if c in where]
        for channel, found in enumerate(channel_columns(layer, group))
        if any(c in where for c in found)
    }
    if len({len(found) for found in columns.values()}) == 1:
        weights = matrix[:, [*gram.columns, -1]].reshape(len(gram.matrix), -1, len(gram.columns) + 1)
        for weight, damped in zip(weights, gram.damped(), strict=True):
            yield _Elimination(weight, damped, columns, group.size)


def _matrix(stored: Mapping[str, Tensor], layer: Layer) -> Tensor:
    """A layer's weight and bias as one matrix [out, columns + 1], float64."""
    weight = stored[layer.weight].detach().cpu().double().flatten(1)
    bias = stored[layer.bias].detach().cpu().double() if layer.bias else weight.new_zeros(len(weight))
    return torch.cat([weight, bias.unsqueeze(1)], dim=1)


def _within_memory(graph: Graph, names: Sequence[str]) -> Iterator[list[str]]:
    """The groups in parts whose consumers' matrices take at most MAX_BYTES together (one group at least)."""
    part: list[str] = []
    taken = 0
    for name in names:
        need = sum(_gram_bytes(graph, graph.layer[consumer]) for consumer in graph.group[name].consumers)
        if part and taken + need > MAX_BYTES:
            yield part
            part, taken = [], 0
        part.append(name)
        taken += need
    if part:
        yield part


def _gram_bytes(graph: Graph, layer: Layer) -> int:
    return 8 * layer.groups * sum((len(part) + 1) ** 2 for part in column_parts(graph, layer))
