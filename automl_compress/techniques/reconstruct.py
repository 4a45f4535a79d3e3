"""One-shot repair by least squares: what consumed the removed channels learns to do without them.

For a layer y = W x, removing columns of x and refitting W on calibration data is least squares in closed form, and all
that is needed of the data is the Gram matrix G = sum x x^T over unfolded inputs: W' = W G[:, K] G[K, K]^-1 for the kept
columns K. The same matrix says which channels to remove: eliminating one block of columns c at a time costs
tr(W_c inv(inv(G)_cc) W_c^T) (optimal brain surgeon; Hassibi & Stork 1993, applied to channels as in Kurtic et al. 2023,
"ZipLM"). Both need one pass over a few hundred samples, and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.core.graph import ChannelGroup, Graph, Layer
from automl_compress.core.plan import Plan

# A Gram matrix has (input channels x kernel)^2 entries and is inverted once: beyond this, one takes more than 100 MB.
MAX_COLUMNS = 3456
_MAX_ROWS = 8192  # a batch
_DAMPING = 1e-3


@dataclass(frozen=True, kw_only=True)
class Gram:
    """sum x x^T over calibration inputs of one layer [columns + 1, columns + 1], float64; the last column is the
    constant 1 that carries the bias."""

    matrix: Tensor

    def damped(self) -> Tensor:
        """With a ridge of a thousandth of the mean diagonal, so that dead channels can be inverted."""
        size = self.matrix.shape[0]
        ridge = _DAMPING * self.matrix.diagonal().mean()
        return self.matrix + ridge * torch.eye(size, dtype=self.matrix.dtype)


def collect_grams(model: nn.Module, graph: Graph, batches: Iterable[tuple[Tensor, ...]]) -> dict[str, Gram]:
    """Gram matrices of the inputs of every layer that consumes a channel group, by layer name.

    `model` is the original in eval mode. Layers that are grouped, not 2-D convolutions or linear, or larger than
    MAX_COLUMNS are left out; their channels are chosen by magnitude and not refitted.
    """
    wanted = {layer.name: layer for layer in graph.layers if _refittable(layer)}
    sums: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = []
    for name, layer in wanted.items():
        if name in modules and isinstance(modules[name], (nn.Conv2d, nn.Linear)):
            handles.append(modules[name].register_forward_pre_hook(_collector(layer, sums)))
    try:
        with torch.no_grad():
            for inputs in batches:
                model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Gram(matrix=matrix) for name, matrix in sums.items()}


def elimination_scores(model: nn.Module, group: ChannelGroup, graph: Graph, grams: Mapping[str, Gram]) -> Tensor | None:
    """Scores [group size]: when each channel is eliminated, first 0; None where a consumer has no Gram.

    Channels go one by one, each time the one whose loss, after the best refit of what is left, is least.
    """
    consumers = [graph.layer[name] for name in group.consumers]
    if not consumers or any(layer.name not in grams for layer in consumers):
        return None
    stored = dict(model.named_parameters(remove_duplicate=False))
    states = [_Elimination(_matrix(stored, layer), grams[layer.name], _columns(layer, group)) for layer in consumers]
    scores = torch.zeros(group.size, dtype=torch.float64)
    left = list(range(group.size))
    for rank in range(group.size):
        losses = sum(state.losses(left) for state in states)
        assert isinstance(losses, Tensor)
        channel = left[int(losses.argmin())]
        for state in states:
            state.remove(channel)
        left.remove(channel)
        scores[channel] = rank
    return scores


def refit(model: nn.Module, original: nn.Module, graph: Graph, plan: Plan, grams: Mapping[str, Gram]) -> None:
    """Replace, in place, the weights of every layer of the cut `model` that lost inputs by their least-squares refit.

    `plan` must have its channels selected; layers in removed blocks and layers without a Gram stay as they are.
    """
    stored = dict(original.named_parameters(remove_duplicate=False))
    target = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for layer in graph.layers:
            lost = [name for name in layer.in_groups if name in plan.kept]
            if not lost or layer.name not in grams or plan.drop.intersection(layer.blocks):
                continue
            gone = {column for name in lost for column in _removed_columns(layer, graph.group[name], plan.kept[name])}
            weight, bias = _refitted(_matrix(stored, layer), grams[layer.name], gone)
            rows = _kept_rows(layer, graph, plan)
            shape = target[layer.weight].shape
            target[layer.weight].copy_(weight[rows].reshape(shape))
            if layer.bias:
                target[layer.bias].copy_(bias[rows])


class _Elimination:
    """The state of one consumer while channels are eliminated: weights refitted so far, inverse of what is left."""

    def __init__(self, weight: Tensor, gram: Gram, columns: list[list[int]]) -> None:
        self._columns = columns
        self._weight = weight.clone()
        self._inverse = torch.linalg.inv(gram.damped())

    def losses(self, channels: list[int]) -> Tensor:
        index = torch.tensor([self._columns[c] for c in channels])
        blocks = self._inverse[index.unsqueeze(2), index.unsqueeze(1)]  # [channels, k, k]
        weights = self._weight[:, index].permute(1, 2, 0)  # [channels, k, out]
        losses: Tensor = (weights * torch.linalg.solve(blocks, weights)).sum(dim=(1, 2))
        return losses

    def remove(self, channel: int) -> None:
        columns = self._columns[channel]
        stripe = self._inverse[:, columns]
        solved = torch.linalg.solve(stripe[columns], stripe.T)  # [k, all]
        self._weight -= self._weight[:, columns] @ solved
        self._inverse -= stripe @ solved
        # Exactly zero, so that rounding of what is gone can't come back through later updates; a unit diagonal keeps
        # the block invertible should it be asked for again.
        self._inverse[columns] = 0
        self._inverse[:, columns] = 0
        self._inverse[columns, columns] = 1


def _refittable(layer: Layer) -> bool:
    columns = layer.in_channels
    for size in layer.kernel:
        columns *= size
    return bool(layer.in_groups) and layer.groups == 1 and layer.in_axis == 1 and columns <= MAX_COLUMNS


def _collector(layer: Layer, sums: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    def collect(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = _rows(module, arguments[0])
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        gram = (rows.T @ rows).double()
        sums[layer.name] = sums[layer.name] + gram if layer.name in sums else gram

    return collect


def _rows(module: nn.Module, source: Tensor) -> Tensor:
    """The inputs that each output position sees, one a row [positions, columns]."""
    if isinstance(module, nn.Conv2d):
        padding = module.padding
        if isinstance(padding, str):
            total = [
                d * (k - 1) if padding == "same" else 0
                for d, k in zip(module.dilation, module.kernel_size, strict=True)
            ]
            source = functional.pad(
                source, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
            )
            padding = (0, 0)
        unfolded = functional.unfold(source, module.kernel_size, module.dilation, padding, module.stride)
        # Evenly spaced positions of every sample say as much as all of them; an odd step doesn't meet the same columns
        # of the image in every row.
        step = -(-unfolded.shape[0] * unfolded.shape[2] // _MAX_ROWS) | 1
        return unfolded[:, :, ::step].transpose(1, 2).reshape(-1, unfolded.shape[1])
    rows = source.reshape(-1, source.shape[-1])
    return rows[:: -(-len(rows) // _MAX_ROWS)]


def _matrix(stored: Mapping[str, Tensor], layer: Layer) -> Tensor:
    """A layer's weight and bias as one matrix [out, columns + 1], float64."""
    weight = stored[layer.weight].detach().cpu().double().flatten(1)
    bias = stored[layer.bias].detach().cpu().double() if layer.bias else weight.new_zeros(len(weight))
    return torch.cat([weight, bias.unsqueeze(1)], dim=1)


def _columns(layer: Layer, group: ChannelGroup) -> list[list[int]]:
    """Channel -> its columns in the layer's unfolded input."""
    size = 1
    for k in layer.kernel:
        size *= k
    place = next(p for p in group.places if p.tensor == layer.weight and p.dim == layer.in_axis)
    return [[position * size + k for position in positions for k in range(size)] for positions in place.positions]


def _removed_columns(layer: Layer, group: ChannelGroup, kept: tuple[int, ...]) -> list[int]:
    stay = set(kept)
    return [column for c, columns in enumerate(_columns(layer, group)) if c not in stay for column in columns]


def _kept_rows(layer: Layer, graph: Graph, plan: Plan) -> list[int]:
    gone: set[int] = set()
    for name in layer.out_groups:
        if name in plan.kept:
            group, stay = graph.group[name], set(plan.kept[name])
            place = next(p for p in group.places if p.tensor == layer.weight and p.dim == layer.out_axis)
            gone |= {row for c, rows in enumerate(place.positions) if c not in stay for row in rows}
    return [row for row in range(layer.out_channels) if row not in gone]


def _refitted(matrix: Tensor, gram: Gram, gone: set[int]) -> tuple[Tensor, Tensor]:
    """Weight [out, kept columns] and bias [out] that reproduce matrix @ x best from the columns that stay."""
    full = gram.damped()
    keep = [column for column in range(len(full)) if column not in gone]
    solution = torch.linalg.solve(full[keep][:, keep], full[keep] @ matrix.T).T
    return solution[:, :-1].float(), solution[:, -1].float()
