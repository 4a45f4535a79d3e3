"""Weights as integers: how they are rounded where nothing better is known, and how they are stored.

Formats `integer` and `folded` have one scale for each output channel and are symmetric around zero. Format `blocks` has
a scale and a zero point for each block of input channels of each output channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from automl_compress.techniques.quantization.formats import Format

Array = NDArray[np.float32]
Integers = NDArray[np.int16]

SMALLEST_BLOCK = 16
# MatMulNBits in ONNX Runtime 1.32 (AVX-512): with 2 bits other blocks are 2 to 3 times slower, with 4 and 8 bits longer
# blocks are faster, and beyond 128 only by a few percent more.
BLOCKS = {2: 64, 4: 128, 8: 128}
_TYPES = {
    (2, True): onnx.TensorProto.INT2,
    (2, False): onnx.TensorProto.UINT2,
    (4, True): onnx.TensorProto.INT4,
    (4, False): onnx.TensorProto.UINT4,
    (8, True): onnx.TensorProto.INT8,
    (8, False): onnx.TensorProto.UINT8,
}
# Fractions of a channel's largest weight that are tried as the largest that isn't clipped.
SHRINKS = tuple(np.linspace(1.0, 0.3, 29))


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """One layer's weights as integers, in the shape [outputs, inputs] (a convolution's inputs are channels x kernel).

    integers  [outputs, inputs]
    scales    [outputs] for one scale a channel, [outputs, blocks] by block
    zeros     None where symmetric, else [outputs, blocks]
    block     how many inputs share a scale; 0 for all
    """

    bits: int
    integers: Integers
    scales: Array
    zeros: Integers | None = None
    block: int = 0

    def values(self) -> Array:
        """What the integers stand for, [outputs, inputs]."""
        if self.zeros is None:
            return (self.integers * self.scales[:, None]).astype(np.float32)
        columns = np.arange(self.integers.shape[1]) // self.block
        return ((self.integers - self.zeros[:, columns]) * self.scales[:, columns]).astype(np.float32)


def limits(bits: int) -> tuple[int, int]:
    """Lowest and highest symmetric integer. Eight bits leave out -128, which some kernels saturate on."""
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def block_of(inputs: int, bits: int) -> int:
    """The block length for a layer with so many inputs: a power of two from SMALLEST_BLOCK to that of `BLOCKS`."""
    block = BLOCKS[bits]
    while block > SMALLEST_BLOCK and block >= 2 * inputs:
        block //= 2
    return block


def nearest(
    weight: Array, bits: int, form: Format, importance: Array | None = None, *, draft: bool = False
) -> QuantizedWeight:
    """Every weight [outputs, inputs] at the nearest integer, with the scales that lose least.

    `importance` weighs the squared errors of inputs [inputs]: their mean squares, where calibration has seen them. A
    `draft` clips nothing and takes no search: enough where only the integers' number and type count.
    """
    weight = weight.astype(np.float32)
    shrinks = (1.0,) if draft or bits == 8 else SHRINKS
    if form == "blocks":
        return _nearest_by_block(weight, bits, importance, shrinks)
    scales = channel_scales(weight, bits, importance, shrinks)
    low, high = limits(bits)
    integers = np.clip(np.rint(weight / scales[:, None]), low, high).astype(np.int16)
    return QuantizedWeight(bits=bits, integers=integers, scales=scales)


def channel_scales(
    weight: Array, bits: int, importance: Array | None = None, shrinks: Sequence[float] = SHRINKS
) -> Array:
    """Symmetric scale [outputs] of each channel of `weight` [outputs, inputs].

    With 8 bits nothing is clipped. With fewer, the least squared error over a grid of clippings decides.
    """
    largest = np.abs(weight).max(axis=1).astype(np.float64)
    low, high = limits(bits)
    if bits == 8:
        return positive(largest / high)
    best_error = np.full(len(weight), np.inf)
    best = positive(largest / high)
    for shrink in shrinks:
        # The lowest integer has no counterpart on the other side, so a little more than the largest weight may count.
        scales = positive(largest * shrink / (high + 0.5))
        errors = np.clip(np.rint(weight / scales[:, None]), low, high) * scales[:, None] - weight
        error = (errors**2 if importance is None else errors**2 * importance).sum(axis=1)
        better = error < best_error
        best, best_error = np.where(better, scales, best), np.where(better, error, best_error)
    return best.astype(np.float32)


def positive(scales: NDArray[np.float64]) -> Array:
    """Scales as float32, with a small one in place of (nearly) zero: that of a channel without weights.

    Small, since a bias is rounded to multiples of input scale x weight scale.
    """
    result = scales.astype(np.float32)
    return np.where(result < 1e-20, np.float32(1e-8), result).astype(np.float32)


def block_parameters(
    part: Array, bits: int, importance: Array | None = None, shrinks: Sequence[float] = SHRINKS
) -> tuple[Array, Integers]:
    """Scale and zero point [outputs] for one block of inputs [outputs, block], by the least squared error."""
    high = 2**bits - 1
    lowest, highest = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
    best_error = np.full(len(part), np.inf)
    best = (np.ones(len(part), np.float32), np.zeros(len(part), np.int16))
    for shrink in shrinks if bits < 8 else (1.0,):
        scales = positive((highest - lowest).astype(np.float64) * shrink / high)
        zeros = np.clip(np.rint(-lowest * shrink / scales), 0, high).astype(np.int16)
        steps = np.clip(np.rint(part / scales[:, None]) + zeros[:, None], 0, high) - zeros[:, None]
        errors = steps * scales[:, None] - part
        error = (errors**2 if importance is None else errors**2 * importance).sum(axis=1)
        better = error < best_error
        best = (np.where(better, scales, best[0]), np.where(better, zeros, best[1]))
        best_error = np.where(better, error, best_error)
    return best[0].astype(np.float32), best[1].astype(np.int16)


def _nearest_by_block(weight: Array, bits: int, importance: Array | None, shrinks: Sequence[float]) -> QuantizedWeight:
    block = block_of(weight.shape[1], bits)
    integers = np.zeros(weight.shape, np.int16)
    scales, zeros = [], []
    for start in range(0, weight.shape[1], block):
        part = weight[:, start : start + block]
        weights = None if importance is None else importance[start : start + block]
        scale, zero = block_parameters(part, bits, weights, shrinks)
        steps = np.rint(part / scale[:, None]) + zero[:, None]
        integers[:, start : start + block] = np.clip(steps, 0, 2**bits - 1)
        scales.append(scale)
        zeros.append(zero)
    return QuantizedWeight(
        bits=bits, integers=integers, scales=np.stack(scales, 1), zeros=np.stack(zeros, 1), block=block
    )


def packed(name: str, integers: NDArray[np.int16], bits: int, *, signed: bool) -> onnx.TensorProto:
    """An ONNX tensor of 2-, 4- or 8-bit integers, several to a byte, the first in the lowest bits."""
    each = 8 // bits
    flat = (integers.reshape(-1) & (2**bits - 1)).astype(np.uint8)
    flat = np.concatenate([flat, np.zeros(-len(flat) % each, np.uint8)])
    data = np.zeros(len(flat) // each, np.uint8)
    for position in range(each):
        data |= flat[position::each] << np.uint8(bits * position)
    return helper.make_tensor(name, _TYPES[bits, signed], list(integers.shape), data.tobytes(), raw=True)
