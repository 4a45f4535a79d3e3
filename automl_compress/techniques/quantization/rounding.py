"""Rounding weights so that a layer's outputs change least, not its weights.

The error of a row of weights w that becomes q is (w - q) H (w - q)^T, with H the second moments of the layer's inputs.

* `compensated` rounds input after input and lets the inputs that are left make up for each error: optimal brain
  quantization in a fixed order (Frantar et al. 2023, "GPTQ").
* `adapted` then moves single integers by one step where that lowers the error further: the objective of AdaRound (Nagel
  et al. 2020), minimised by coordinate descent instead of by gradient.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from automl_compress.techniques.quantization.formats import Format
from automl_compress.techniques.quantization.inputs import InputMoments
from automl_compress.techniques.quantization.weights import (
    Array,
    Integers,
    QuantizedWeight,
    block_of,
    block_parameters,
    channel_scales,
    limits,
)

_DAMPING = 0.01
_PASSES = 3
Matrix = NDArray[np.float64]


def rounded(weight: Array, bits: int, form: Format, moments: InputMoments) -> QuantizedWeight:
    """Integers for `weight` [outputs, inputs] of a layer with these moments; its groups share the outputs evenly."""
    groups = len(moments.gram)
    parts = np.split(weight.astype(np.float64), groups)
    found = [_group(part, bits, form, gram) for part, gram in zip(parts, moments.gram, strict=True)]
    if groups == 1:
        return found[0]
    integers = np.concatenate([part.integers for part in found])
    return replace(found[0], integers=integers, scales=np.concatenate([part.scales for part in found]))


def corrected_bias(weight: Array, found: QuantizedWeight, bias: Array, moments: InputMoments) -> Array:
    """The bias [outputs] with which the outputs' means stay as they were (Nagel et al. 2019, section 4.2)."""
    error = np.split((found.values() - weight).astype(np.float64), len(moments.mean))
    shift = np.concatenate([part @ mean for part, mean in zip(error, moments.mean, strict=True)])
    return np.asarray(bias - shift, np.float32)


def _group(weight: Matrix, bits: int, form: Format, gram: Matrix) -> QuantizedWeight:
    gram = gram.copy()
    dead = np.diag(gram) <= 0
    gram[dead, dead] = 1.0
    weight = np.where(dead, 0.0, weight)  # what never varies from zero needs no weight
    gram[np.diag_indices(len(gram))] += _DAMPING * float(np.diag(gram).mean())
    return adapted(weight, compensated(weight, bits, form, gram), gram)


def compensated(weight: Matrix, bits: int, form: Format, gram: Matrix) -> QuantizedWeight:
    """`weight` [outputs, inputs] rounded one input after the other, given positive definite `gram` [inputs, inputs]."""
    left = weight.copy()
    columns = weight.shape[1]
    importance = np.diag(gram).astype(np.float32)
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    block = block_of(columns, bits) if form == "blocks" else columns
    low, high = (0, 2**bits - 1) if form == "blocks" else limits(bits)
    integers = np.zeros(weight.shape, np.int16)
    scales: list[Array] = []
    zeros: list[Integers] = []
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = left[:, start:stop].astype(np.float32)
        if form == "blocks":
            scale, zero = block_parameters(part, bits, importance[start:stop])
        else:
            scale, zero = channel_scales(part, bits, importance), np.zeros(len(part), np.int16)
        scales.append(scale)
        zeros.append(zero)
        for column in range(start, stop):
            steps = np.clip(np.rint(left[:, column] / scale) + zero, low, high)
            steps = np.where(weight[:, column] == 0, zero, steps)  # what a mask took stays zero
            integers[:, column] = steps
            error = (left[:, column] - (steps - zero) * scale) / upper[column, column]
            left[:, column:] -= np.outer(error, upper[column, column:])
    if form == "blocks":
        return QuantizedWeight(
            bits=bits, integers=integers, scales=np.stack(scales, 1), zeros=np.stack(zeros, 1), block=block
        )
    return QuantizedWeight(bits=bits, integers=integers, scales=scales[0])


def adapted(weight: Matrix, found: QuantizedWeight, gram: Matrix) -> QuantizedWeight:
    """`found` with single integers moved by one step where that lowers the outputs' error."""
    integers = found.integers.copy()
    error = found.values().astype(np.float64) - weight
    low, high = (0, 2**found.bits - 1) if found.block else limits(found.bits)
    gradient = error @ gram
    for _ in range(_PASSES):
        moved = False
        for column in range(weight.shape[1]):
            scale = found.scales[:, column // found.block] if found.block else found.scales
            step = -np.sign(gradient[:, column])
            gain = np.abs(gradient[:, column]) * 2 - scale * gram[column, column]
            after = integers[:, column] + step
            takes = (gain > 1e-12) & (after >= low) & (after <= high) & (weight[:, column] != 0)
            if not takes.any():
                continue
            moved = True
            integers[:, column] += np.where(takes, step, 0).astype(np.int16)
            gradient += np.outer(np.where(takes, step * scale, 0.0), gram[column])
        if not moved:
            break
    return replace(found, integers=integers)
