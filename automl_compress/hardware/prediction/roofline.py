"""Times that nobody measured: each kernel as the longer of computing and moving data, plus a fixed overhead.

    time = max(operations / (peak at its bit-width * efficiency of its kind), bytes / bandwidth) + overhead

This is the roofline model (Williams, Waterman and Patterson, 2009) for one kernel. It knows nothing of caches, layouts
or code generation, so it is right within a factor of two rather than within percents: good for choosing between options
that differ by much, useless for a promise. Whatever comes from here is labelled "estimated".

Operations are read off a kernel's key: a multiplication with the addition that follows counts as one, as fvcore counts
them; the other operators count one for each value that they write or read, whichever is more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from automl_compress.hardware.prediction.kernel_key import FULL_BITS, KernelParts, Tensor, read_key
from automl_compress.hardware.profile.header import Roofline
from automl_compress.hardware.profile.schema import KernelRecord

Kind = Literal["conv", "depthwise", "linear", "other"]
_GROUPS = re.compile(r"(?:^| )g(\d+)(?: |$)")
_NAMED = re.compile(r"(?:^| )(K|N)=(\d+)(?: |$)")
# Their result is their input under another shape; the runtime doesn't copy it.
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape"}
_PRODUCTS = ("Gemm", "MatMul", "Attention")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one kernel has to do: operations at a bit-width, bytes of inputs, outputs and weights."""

    kind: Kind
    operations: int
    bits: int
    bytes: int


def work_of(key: str) -> Work:
    """Read a kernel's work off its key (see `kernels.key_of`). A part that can't be read counts as absent."""
    parts = read_key(key)
    tensors = (*parts.inputs, *parts.outputs, *parts.weights)
    moved = 0 if parts.name in _VIEWS else sum(tensor.bytes for tensor in tensors)
    kind, operations = _operations(parts)
    return Work(kind=kind, operations=operations, bits=_compute_bits(parts), bytes=moved)


def time_us(work: Work, roofline: Roofline) -> float:
    """What the work takes in microseconds."""
    peak = _peak_gops(roofline, work.bits) * roofline.efficiency.get(work.kind, roofline.efficiency.get("other", 1.0))
    computing_us, moving_us = work.operations / peak * 1e-3, work.bytes / roofline.bandwidth_gbps * 1e-3
    return max(computing_us, moving_us) + roofline.overhead_us


def estimate(keys: Iterable[str], roofline: Roofline) -> list[KernelRecord]:
    """A record for each key, labelled as estimated; a spread of nothing, since nothing was repeated."""
    return [
        KernelRecord(
            key=key, mean_us=time_us(work_of(key), roofline), spread=0.0, provenance="estimated", conditions="roofline"
        )
        for key in dict.fromkeys(keys)
    ]


def _operations(parts: KernelParts) -> tuple[Kind, int]:
    """The kind of operator, and its operations."""
    name, inputs, outputs, weights = parts.name, parts.inputs, parts.outputs, parts.weights
    details = parts.details
    if "Conv" in name and weights and outputs:
        groups = next((int(m[1]) for part in details if (m := _GROUPS.search(part))), 1)
        depthwise = groups > 1 and weights[0].shape[0] % groups == 0 and weights[0].shape[1:2] == (1,)
        positions = inputs[0] if "Transpose" in name and inputs else outputs[0]
        last = any("channels_last=1" in part for part in details)
        count = weights[0].count * _positions(positions, channels_last=last)
        return ("depthwise" if depthwise else "conv"), count
    if any(product in name for product in _PRODUCTS) and inputs and outputs:
        return "linear", _product_operations(parts)
    values = [tensor.count for tensor in (*inputs, *outputs)]
    return "other", 0 if name in _VIEWS else max(values, default=0)


def _positions(value: Tensor, *, channels_last: bool) -> int:
    """Batch times positions of a convolution's value."""
    places = value.shape[1:-1] if channels_last else value.shape[2:]
    return value.shape[0] * math.prod(places)


def _product_operations(parts: KernelParts) -> int:
    inputs, outputs, weights = parts.inputs, parts.outputs, parts.weights
    named = {m[1]: int(m[2]) for part in parts.details for m in _NAMED.finditer(part)}
    if "K" in named:  # weights packed into blocks: their shape says nothing
        return outputs[0].count * named["K"]
    if weights and len(weights[0].shape) == 2:
        columns = outputs[0].shape[-1] if outputs[0].shape else 1
        return weights[0].count * outputs[0].count // max(columns, 1)
    return outputs[0].count * (inputs[0].shape[-1] if inputs[0].shape else 1)


def _compute_bits(parts: KernelParts) -> int:
    """The width of the arithmetic: that of the activations read; weights that are unpacked first don't count."""
    if parts.name == "MatMulNBits" or not parts.inputs:
        return FULL_BITS
    return min(FULL_BITS, parts.inputs[0].bits)


def _peak_gops(roofline: Roofline, bits: int) -> float:
    """The rate at the bit-width, else at the next wider one that is known, else at the widest."""
    wider = [known for known in sorted(roofline.peak_gops) if known >= bits]
    return roofline.peak_gops[wider[0] if wider else max(roofline.peak_gops)]
