"""Calibration rows: what sampled output positions of a layer read, and the values there."""

from __future__ import annotations

from itertools import product
from math import prod

import torch
from torch import Tensor

from automl_compress.techniques.calls import Call

ROWS = 8192
_ENTRIES = 1 << 25  # of one layer's rows: 128 MB in float32
_FEWEST = 256


def sample_positions(call: Call, rows: int = ROWS) -> Tensor:
    """Evenly spaced flat positions of all samples' outputs, ascending; at most `rows`, fewer for very wide inputs.

    Evenly spaced ones say as much as all of them; an odd step doesn't meet the same columns of the image in every row.
    """
    count = prod(call.output_shape)
    rows = max(_FEWEST, min(rows, _ENTRIES // (columns(call) * call.groups)))
    step = -(-count // rows)
    return torch.arange(0, count, step | 1)


def columns(call: Call) -> int:
    """Inputs that one output reads."""
    return call.weight[0].numel()


def input_rows(call: Call, positions: Tensor) -> Tensor:
    """What each position reads [rows, groups, columns], columns in the order of the flattened weight's."""
    if not call.stride:
        return call.source.reshape(-1, call.source.shape[-1])[positions].unsqueeze(1)
    sample, *corner = torch.unravel_index(positions, call.output_shape)
    source = call.padded().movedim(1, -1)
    parts = []
    for offset in product(*(range(size) for size in call.weight.shape[2:])):
        index = [c * s + o * d for c, s, o, d in zip(corner, call.stride, offset, call.dilation, strict=True)]
        parts.append(source[(sample, *index)])
    return torch.stack(parts, dim=-1).reshape(len(positions), call.groups, -1)


def value_rows(value: Tensor, call: Call, positions: Tensor) -> Tensor:
    """A value of the shape of the layer's output at these positions [rows, channels]."""
    last = value.movedim(call.channel_dim, -1)
    return last[torch.unravel_index(positions, last.shape[:-1])]
