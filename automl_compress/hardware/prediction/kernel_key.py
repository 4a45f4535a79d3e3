"""What a kernel's key says, taken apart: types and shapes, and the sizes that kernels of one family differ in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_TENSOR = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
# Numbers outside of shapes that follow the number of channels; K and N are those of weights packed into blocks.
_CHANNELS = re.compile(r"\b(g|channels=|[KN]=)(\d+)")
_DIGITS = re.compile(r"\d+")
_FLOAT_BITS = {"float": 32, "double": 64, "bool": 8}
FULL_BITS = 32
_VECTOR = 4
_FEWEST_VECTORIZED = 16
BLOCKED = ".nchwc"
_INTEGER = ("QLinear", "QGemm", "MatMulInteger", "DynamicQuantizeMatMul")
_INTEGER_CONVOLUTION = "QLinearConv"
_WEIGHT_ONLY = "MatMulNBits"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A type and shape as a kernel's key has them."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Of one number: 32 for float, 8 for int8 and uint8."""
        found = _DIGITS.search(self.dtype)
        return _FLOAT_BITS.get(self.dtype) or (int(found[0]) if found else FULL_BITS)

    @property
    def bytes(self) -> int:
        return math.ceil(self.count * self.bits / 8)


@dataclass(frozen=True, kw_only=True)
class KernelParts:
    """A key taken apart (see `kernels.key_of`); a part that can't be read counts as absent.

    op       executed operator with its layout, e.g. "Conv.nchwc"; `name` is the operator alone
    inputs, outputs    activations; `weights`: constants with more than one dimension
    details  geometry, attributes, what was fused
    family   the key with every size taken out: kernels of one family differ in nothing but `sizes`, and are computed by
             the same algorithm
    core     the family without what was fused into the kernel; kernels of one core that read one value more or less
             (an addition) have `core_sizes` of equal number
    """

    op: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    details: tuple[str, ...]
    family: str
    sizes: tuple[int, ...]
    core: str
    core_sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.op.partition(".")[0]

    @property
    def bytes(self) -> int:
        """Of everything that it reads and writes, weights included."""
        return sum(tensor.bytes for tensor in (*self.inputs, *self.outputs, *self.weights))

    @property
    def grouped(self) -> bool:
        """Whether it is a convolution in groups, such as a depthwise one."""
        return " gN" in self.family


@lru_cache(maxsize=100_000)
def read_key(key: str) -> KernelParts:
    """Take a key apart."""
    op, _, rest = key.partition("|")
    signature, *details = rest.split("|") if rest else [""]
    before, _, after = signature.partition(">")
    weights = next((part[2:] for part in details if part.startswith("w ")), "")
    family, sizes = [op], []
    for part in (signature, *details):
        for _, dims in _TENSOR.findall(part):
            sizes += [int(size) for size in dims.split(",") if size]
        sizes += [int(number) for _, number in _CHANNELS.findall(part)]
        part = _TENSOR.sub(lambda m: f"{m[1]}[{m[2].count(',') + 1 if m[2] else 0}]", part)
        # A convolution with groups is another algorithm than one without.
        family.append(_CHANNELS.sub(lambda m: f"{m[1]}{'1' if m[0] == 'g1' else 'N'}", part))
    if _ragged(op, " gN" in "|".join(family), _tensors(weights)):
        family.append("ragged")
    tensors = (*_tensors(before)[:1], *_tensors(after)[:1], *_tensors(weights)[:1])
    geometry = next((part for part in family if part.startswith("k") and " s" in part), "")
    kinds = ",".join(f"{tensor.dtype}[{len(tensor.shape)}]" for tensor in tensors)
    return KernelParts(
        op=op,
        inputs=_tensors(before),
        outputs=_tensors(after),
        weights=_tensors(weights),
        details=tuple(details),
        family="|".join(family),
        sizes=tuple(sizes),
        core="|".join((op.replace("Fused", ""), kinds, geometry)),
        core_sizes=tuple(size for tensor in tensors for size in tensor.shape),
    )


def _ragged(op: str, grouped: bool, weights: tuple[Tensor, ...]) -> bool:
    """Whether an integer convolution can't be computed in whole vectors: it takes up to three times as long then, and
    is another algorithm. At 48x48 positions, 12 to 72 channels take 27 us, 9 to 72 take 74 us; most is for the outputs.
    """
    if not op.startswith("QLinearConv") or grouped or not weights or len(weights[0].shape) < 2:
        return False
    written, read = weights[0].shape[:2]
    return bool(written % _VECTOR or read % _VECTOR) or written < _FEWEST_VECTORIZED


def traffic_bytes(keys: Iterable[str]) -> int:
    """What a model that executes these kernels reads and writes in one run, kernel by kernel."""
    return sum(read_key(key).bytes for key in keys)


def reordered_bytes(keys: Iterable[str]) -> int:
    """Bytes of the weights that the runtime puts into its blocked layout."""
    return sum(tensor.bytes for key in keys if (part := read_key(key)).op.endswith(BLOCKED) for tensor in part.weights)


def integer_nodes(keys: Iterable[str]) -> int:
    """How many kernels compute in integers; each keeps packed weights, scales and zero points."""
    return sum(read_key(key).name.startswith(_INTEGER) for key in keys)


def runs_weight_only(keys: Iterable[str]) -> bool:
    """Whether weights of fewer bits are unpacked inside of a kernel: what does that takes memory, once for all."""
    return any(read_key(key).name == _WEIGHT_ONLY for key in keys)


def working_bytes(keys: Iterable[str]) -> int:
    """What the integer convolution that needs most keeps besides what it reads and writes: sums of 32 bits of all its
    outputs, and, unless it is 1x1, the address of each row of inputs for each position."""
    return max((_sums_bytes(read_key(key)) for key in keys if key.startswith(_INTEGER_CONVOLUTION)), default=0)


def _sums_bytes(parts: KernelParts) -> int:
    if not parts.outputs or not parts.weights:
        return 0
    written, area = parts.outputs[0].count, math.prod(parts.weights[0].shape[2:])
    return working_bytes_of(written, parts.weights[0].shape[0], area)


def working_bytes_of(written: int, channels: int, area: int) -> int:
    """`working_bytes` of a convolution that writes so many numbers in so many channels by a kernel of that area."""
    return 4 * written + (8 * area * written // max(channels, 1) if area > 1 else 0)


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(dtype=dtype, shape=tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _TENSOR.findall(text)
    )
