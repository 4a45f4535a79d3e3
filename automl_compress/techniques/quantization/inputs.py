"""What the layers of a float graph read: second moments of their inputs, from one pass over calibration samples."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from automl_compress.techniques.onnx_graph import attribute, layer_of
from automl_compress.techniques.quantization.formats import weight_axis
from automl_compress.techniques.quantization.onnx_module import OnnxModule

# A Gram matrix of so many columns takes 100 MB; a layer with more is rounded without one.
MAX_COLUMNS = 3456
_MAX_ROWS = 2048  # a batch and layer


@dataclass(frozen=True, kw_only=True)
class InputMoments:
    """Moments of the inputs x of each output position of one layer; groups of a convolution are kept apart.

    gram  E[x x^T], [groups, columns, columns]
    mean  E[x], [groups, columns]
    """

    gram: NDArray[np.float64]
    mean: NDArray[np.float64]


def input_moments(
    module: OnnxModule, batches: Iterable[tuple[Tensor, ...]], layers: Collection[str]
) -> dict[str, InputMoments]:
    """Layer -> moments of its inputs, all calls of a layer together.

    Left out are layers with more than MAX_COLUMNS inputs to an output, and those that are neither a convolution nor a
    product with a constant weight.
    """
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def each(node: onnx.NodeProto, inputs: list[Any]) -> None:
        layer = layer_of(node.name)
        if layer not in layers or weight_axis(node, module.view) is None or node.op_type == "ConvTranspose":
            return
        rows = _rows(node, inputs)
        if rows.shape[2] > MAX_COLUMNS:
            return
        gram, mean = (rows.transpose(1, 2) @ rows).double(), rows.sum(1).double()
        before = sums.get(layer)
        count = rows.shape[1]
        sums[layer] = (gram, mean, count) if before is None else (before[0] + gram, before[1] + mean, before[2] + count)

    with torch.no_grad():
        for inputs in batches:
            module(*inputs, each=each)
    return {
        layer: InputMoments(gram=(gram / count).numpy(), mean=(mean / count).numpy())
        for layer, (gram, mean, count) in sums.items()
    }


def _rows(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    """The inputs that each output position sees [groups, positions, columns], evenly thinned out."""
    x: Tensor = inputs[0]
    if node.op_type != "Conv":
        x = x.T if node.op_type == "Gemm" and attribute(node, "transA", 0) else x
        flat = x.reshape(-1, x.shape[-1])
        return flat[:: -(-len(flat) // _MAX_ROWS)].unsqueeze(0)
    weight: Tensor = inputs[1]
    kernel = list(weight.shape[2:])
    while len(kernel) < 2:
        kernel, x = [1, *kernel], x.unsqueeze(2)
    rank = weight.ndim - 2
    pads = list(attribute(node, "pads", [])) or [0] * 2 * rank
    sides = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[rank + axis])]
    strides, dilations = (
        [1] * (2 - rank) + list(attribute(node, name, [1] * rank)) for name in ("strides", "dilations")
    )
    group = attribute(node, "group", 1)
    # Fewer samples rather than fewer positions: unfolding multiplies the memory by the kernel's size.
    positions = x.shape[0] * (x.shape[2] // strides[0] + 1) * (x.shape[3] // strides[1] + 1)
    x = functional.pad(x[:: max(1, positions // (4 * _MAX_ROWS))], sides)
    unfolded = functional.unfold(x, tuple(kernel), tuple(dilations), 0, tuple(strides))
    # An odd step doesn't meet the same columns of the image in every row.
    step = -(-unfolded.shape[0] * unfolded.shape[2] // _MAX_ROWS) | 1
    parts = unfolded[:, :, ::step].reshape(len(x), group, -1, len(range(0, unfolded.shape[2], step)))
    return parts.permute(1, 0, 3, 2).reshape(group, -1, parts.shape[2])
