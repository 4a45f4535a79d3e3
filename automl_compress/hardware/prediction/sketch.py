"""A model in outline: what decides which kernels the runtime makes of it, without weights. Values only.

Building a plan's ONNX model and letting the runtime lower it takes tens of milliseconds; a sketch takes one. What the
runtime makes of a sketch is learned from models that it did lower (`surroundings.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import mul

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """The nodes of a graph in execution order, and who reads whom; the same for all plans that remove the same blocks.

    sites   name of each node's first output
    ops     its operator
    kinds   what it is apart from sizes: operator, kernel, strides ...
    layers  name of the layer that it computes, None for other nodes
    inputs  positions of the nodes whose values it reads; -1 stands for an input of the model
    """

    sites: tuple[str, ...]
    ops: tuple[str, ...]
    kinds: tuple[str, ...]
    layers: tuple[str | None, ...]
    inputs: tuple[tuple[int, ...], ...]

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the nodes that read each node's value."""
        found: list[list[int]] = [[] for _ in self.ops]
        for position, sources in enumerate(self.inputs):
            for source in sources:
                if source >= 0:
                    found[source].append(position)
        return tuple(tuple(users) for users in found)

    @cached_property
    def readings(self) -> tuple[int, ...]:
        """How often each node's value is written or read."""
        return tuple(1 + len(users) for users in self.users)

    @cached_property
    def last_users(self) -> tuple[int, ...]:
        """Position of the last node that reads each node's value; that of the end for those that nothing reads."""
        return tuple(max(users, default=len(self.ops)) for users in self.users)

    @cached_property
    def position(self) -> dict[str, int]:
        return {site: position for position, site in enumerate(self.sites)}


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """A plan's model in outline. Every sequence has one entry for each node of the skeleton.

    integer    whether the node is to run in 8-bit integers
    quantized  whether its value is kept as 8-bit integers, for whoever reads it
    omitted    whether it vanishes, since quantization does the same (a Relu before a Quantize)
    bits       of a layer's weights, 32 for other nodes
    read, written              channels of the first value that it reads and of the one that it writes
    read_numbers, written_numbers    how many numbers those values have, for one sample
    size_terms                 what a file's size follows: bytes of layers' weights, numbers of quantized values, of
                               nodes in integers, and of nodes, 1
    """

    skeleton: Skeleton
    integer: Sequence[bool]
    quantized: Sequence[bool]
    omitted: Sequence[bool]
    bits: Sequence[int]
    read: Sequence[int]
    written: Sequence[int]
    read_numbers: Sequence[int]
    written_numbers: Sequence[int]
    size_terms: tuple[float, ...]

    @cached_property
    def value_bytes(self) -> list[float]:
        """Of each node's value."""
        return [
            0.0 if gone else count * (1.0 if small else 4.0)
            for count, small, gone in zip(self.written_numbers, self.quantized, self.omitted, strict=True)
        ]

    def moved_bytes(self) -> float:
        """What all nodes read and write, weights included, were no node fused with another."""
        moved: float = sum(map(mul, self.value_bytes, self.skeleton.readings))
        return moved + self.size_terms[0]


def fit_size(sketches: Sequence[Sketch], sizes: Sequence[int]) -> NDArray[np.float64]:
    """Coefficients of `Sketch.size_terms` for the file's bytes, from structures whose size is known."""
    terms = np.array([sketch.size_terms for sketch in sketches])
    relative = terms / np.asarray(sizes, dtype=float)[:, None]
    found, _ = nnls(relative, np.ones(len(sizes)))
    return np.asarray(found, dtype=float)
