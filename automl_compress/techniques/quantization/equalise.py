"""Cross-layer equalisation: scaling channels between two layers so that all use the range of one activation scale.

A channel c between two layers can be multiplied by 1/s_c in the first and by s_c in the second: what the network
computes stays the same, since what lies between (nothing, Relu, or a Clip that is not reached) keeps positive factors.
After Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", with the observed
range of the activation in place of the first layer's weights: those have a scale for each channel anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from automl_compress.techniques.onnx_graph import GraphView, attribute, layer_of
from automl_compress.techniques.quantization.formats import weight_axis
from automl_compress.techniques.quantization.placement import clamp_bounds

Array = NDArray[np.float32]
# Factors beyond this say more of dead channels than of ranges.
_LARGEST_FACTOR = 64.0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two layers' nodes, the activation between them, and the bound above which it is clipped (infinity: none)."""

    first: onnx.NodeProto
    second: onnx.NodeProto
    activation: str
    bound: float


def pairs(view: GraphView) -> list[Pair]:
    """Layers with a weight each and nothing else reading what lies between; one of them a convolution by channel."""
    found = []
    for node in view.nodes:
        if node.op_type != "Conv" or not _plain(node, view):
            continue
        value, bound = node.output[0], float("inf")
        while (user := view.only_user(value)) is not None:
            limits = clamp_bounds(user, view)
            if limits is None or limits[0] != 0.0:
                break
            value, bound = user.output[0], min(bound, limits[1])
        by_channel = user is not None and (_depthwise(node, view) or _depthwise(user, view))
        if user is not None and user.op_type == "Conv" and user.input[0] == value and by_channel and _plain(user, view):
            found.append(Pair(first=node, second=user, activation=value, bound=bound))
    return found


def equalised(view: GraphView, channel_ranges: Mapping[str, Array], *, rounds: int = 2) -> dict[str, Array]:
    """Initializer name -> its new value, for every weight and bias that equalisation changes.

    `channel_ranges` holds the largest absolute value of each channel for the activations of `pairs`; channels that
    never were positive stay as they are.
    """
    tensors: dict[str, Array] = {}

    def read(name: str) -> Array:
        if name not in tensors:
            value = view.constant(name)
            assert value is not None
            tensors[name] = value.astype(np.float32)
        return tensors[name]

    ranges = {name: value.astype(np.float64).copy() for name, value in channel_ranges.items()}
    for _ in range(rounds):
        for pair in pairs(view):
            reach = ranges[pair.activation]
            factor = _factors(reach, read(pair.second.input[1]), pair, view)
            shape = (-1, *[1] * (read(pair.first.input[1]).ndim - 1))
            tensors[pair.first.input[1]] = (read(pair.first.input[1]) / factor.reshape(shape)).astype(np.float32)
            if len(pair.first.input) > 2:
                tensors[pair.first.input[2]] = (read(pair.first.input[2]) / factor).astype(np.float32)
            second = read(pair.second.input[1])
            along = factor.reshape(shape) if _depthwise(pair.second, view) else factor.reshape(1, -1, *shape[2:])
            tensors[pair.second.input[1]] = (second * along).astype(np.float32)
            ranges[pair.activation] = reach / factor
    return tensors


def _factors(reach: NDArray[np.float64], second: Array, pair: Pair, view: GraphView) -> NDArray[np.float64]:
    """What each channel is divided by: more where its range is wide, less where the second layer's weights are."""
    alive = reach > 1e-6 * max(float(reach.max()), 1e-30)
    if not alive.any():
        return np.ones_like(reach)
    if _depthwise(pair.second, view):
        weights = np.ones_like(reach)  # each channel has a scale of its own there
        factor = reach / reach[alive].max()
    else:
        weights = np.abs(second).max(axis=(0, *range(2, second.ndim))).astype(np.float64)
        alive &= weights > 0
        factor = np.sqrt(reach / np.maximum(weights, 1e-30))
        factor /= np.exp(np.log(factor[alive]).mean()) if alive.any() else 1.0
    factor = np.clip(np.where(alive, factor, 1.0), 1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    if np.isfinite(pair.bound):
        # The clip must stay where it is: a channel that reaches it isn't touched, and no other may come to reach it.
        factor = np.where(reach >= 0.98 * pair.bound, 1.0, np.maximum(factor, reach / (0.98 * pair.bound)))
    return factor


def _plain(node: onnx.NodeProto, view: GraphView) -> bool:
    """One convolution with constant weight and bias that no other node shares, ungrouped or by channel."""
    constants = [name for name in node.input[1:] if name]
    own = all(name in view.initializers and len(view.users[name]) == 1 for name in constants)
    grouped = attribute(node, "group", 1) != 1 and not _depthwise(node, view)
    return own and not grouped and layer_of(node.name) == node.name and weight_axis(node, view) == 0


def _depthwise(node: onnx.NodeProto, view: GraphView) -> bool:
    weight = view.initializers.get(node.input[1]) if node.op_type == "Conv" and len(node.input) > 1 else None
    return weight is not None and weight.dims[1] == 1 and attribute(node, "group", 1) == weight.dims[0] > 1
