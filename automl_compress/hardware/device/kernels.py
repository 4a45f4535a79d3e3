"""Executed kernels: what identifies one, which layer it belongs to, and how much memory they keep alive.

A kernel's key says everything that decides its time and nothing else, so that equal kernels of different layers and
models share a measurement: operator, layout, types and shapes of what it reads and writes, weights, attributes, and
what the runtime fused into it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx

from automl_compress.core.budget import Provenance
from automl_compress.hardware.device.executed import RawKernel

LAYER_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What the runtime fuses into a layer's kernel, which then carries the name of the last one's output.
# fmt: off
_FUSED_AFTER = frozenset({
    "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Mish", "Gelu", "Elu", "Add", "Sum",
    "Mul", "BatchNormalization", "QuantizeLinear", "DequantizeLinear", "Identity", "Cast",
})
# fmt: on
# fmt: off
_FROM_WEIGHT = frozenset({
    "DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Cast", "Mul", "Identity", "Unsqueeze", "Squeeze",
})
# fmt: on
_ADDED_SUFFIX = re.compile(r"(?:_nchwc|_token_\d+|_nhwc|_quant|/MatMulAddFusion)$")
_BITS = re.compile(r"\d+")
_BYTES = {"float": 4, "double": 8, "bool": 1}
_SMALL = 64


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One executed kernel of a model.

    layer    who it is charged to: the layer itself, or for helpers (reorders, additions, Quantize ...) the layer
             executed just before, the first layer for leading ones; None in a model without layers
    role     "layer" if it computes the layer, else "helper"
    mean_us  its time in microseconds; None if no one measured it
    provenance  of that time
    reads, writes    names of values in the graph that the runtime made; empty where it doesn't tell
    """

    key: str
    op: str
    layer: str | None
    mean_us: float | None
    role: Literal["layer", "helper"] = "helper"
    provenance: Provenance = "measured"
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What the runtime executes for one structure, whose digest is `key`; the peak of activations alive at a time."""

    key: str
    kernels: tuple[Kernel, ...]
    activation_bytes: int


def key_of(raw: RawKernel) -> str:
    """'Conv.nchwc|float[1,16,32,32]>float[1,16,32,32]|w float[16,16,3,3]|k3x3 s1x1 p1 g1|relu'."""
    op = f"{raw.op}.{raw.layout}" if raw.layout else raw.op
    parts = (op, f"{','.join(raw.inputs)}>{','.join(raw.outputs)}", raw.detail)
    return "|".join(part for part in parts if part)


def kernels_of(model: onnx.ModelProto, raw: Sequence[RawKernel]) -> list[Kernel]:
    """The kernels that were executed for a model, in order, each with the layer that it is charged to."""
    owners = _Owners(model.graph)
    own = [owners.of(kernel) for kernel in raw]
    current = next((layer for layer in own if layer is not None), None)
    kernels = []
    for kernel, layer in zip(raw, own, strict=True):
        current = layer or current
        mean = kernel.mean_us if math.isfinite(kernel.mean_us) else None
        role: Literal["layer", "helper"] = "layer" if layer else "helper"
        kernels.append(
            Kernel(
                key=key_of(kernel),
                op=kernel.op,
                layer=current,
                mean_us=mean,
                role=role,
                reads=kernel.reads,
                writes=kernel.writes,
            )
        )
    return kernels


def layer_nodes(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Layer name -> its node: the convolutions and products whose weight is constant (possibly dequantized first)."""
    producers = {o: node for node in graph.node for o in node.output}
    initializers = {i.name for i in graph.initializer}
    found = {}
    for node in graph.node:
        named = node.op_type in LAYER_OPERATORS and node.name and len(node.input) > 1
        if named and any(_sources(name, producers, initializers) for name in node.input[:2]):
            found[node.name] = node
    return found


def live_bytes(raw: Sequence[RawKernel]) -> int:
    """The peak of activations that are alive at the same time, in bytes, without what kernels use inside."""
    if not any(kernel.writes for kernel in raw):
        return max((_size(kernel.inputs) + _size(kernel.outputs) for kernel in raw), default=0)
    last = {name: step for step, kernel in enumerate(raw) for name in (*kernel.writes, *kernel.reads)}
    sizes: dict[str, int] = {}
    peak = 0
    for step, kernel in enumerate(raw):
        sizes.update((name, _size((kind,))) for name, kind in zip(kernel.writes, kernel.outputs, strict=False))
        for name, kind in zip(kernel.reads, kernel.inputs, strict=False):
            sizes.setdefault(name, _size((kind,)))
        peak = max(peak, sum(sizes.values()))
        sizes = {name: size for name, size in sizes.items() if last[name] > step}
    return peak


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of a model's constants, without what describes them."""
    return sum(math.ceil(math.prod(item.dims) * _type_bits(item.data_type) / 8) for item in model.graph.initializer)


def _type_bits(data_type: int) -> int:
    """Bits of one number of an ONNX type: 32 for FLOAT, 4 for INT4."""
    name = onnx.TensorProto.DataType.Name(data_type).lower()
    return {"float": 32, "double": 64, "bool": 8, "string": 8}.get(name) or int(_BITS.findall(name)[0])


def structure_digest(model: onnx.ModelProto) -> str:
    """Equal for models that the runtime lowers to the same kernels; weights don't count.

    Small constants count with their values (axes, pads), and scales and zero points with which of them are equal, as
    the runtime removes Quantize/Dequantize pairs of equal parameters, and a zero point at the end of its range makes a
    Relu superfluous.
    """
    digest = hashlib.sha256()
    classes: dict[bytes, int] = {}
    for item in model.graph.initializer:
        digest.update(f"{item.name} {item.data_type} {list(item.dims)} ".encode())
        digest.update(_value_mark(item, classes))
    for node in model.graph.node:
        digest.update(f"{node.domain}.{node.op_type} {list(node.input)} {list(node.output)} {node.name}".encode())
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            digest.update(attribute.SerializeToString(deterministic=True))
    for value in (*model.graph.input, *model.graph.output):
        digest.update(value.SerializeToString(deterministic=True))
    digest.update(str(sorted((o.domain, o.version) for o in model.opset_import)).encode())
    return digest.hexdigest()[:16]


class _Owners:
    """Finds the layer that a kernel computes, by the traces that its name, values and constants keep of the model's."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.layers = layer_nodes(graph)
        self.values = dict(self._values(graph))
        self.constants = dict(self._constants(graph))

    def of(self, kernel: RawKernel) -> str | None:
        if kernel.name in self.layers:
            return kernel.name
        if not any(op in kernel.op for op in LAYER_OPERATORS):
            return None
        for name in (*_shortened(kernel.name), *kernel.writes):
            if name in self.layers:
                return name
        for name in (*kernel.constants, *_shortened(kernel.name), *kernel.writes):
            owner = self.constants.get(name) or self.values.get(name)
            if owner is not None:
                return owner
        return self._by_prefix(kernel.constants)

    def _by_prefix(self, constants: Sequence[str]) -> str | None:
        """The runtime derives constants' names from the model's: 'conv1.weight' becomes 'conv1.weight_token_3'."""
        for name in constants:
            matches = [c for c in self.constants if name.startswith(c)]
            if matches:
                return self.constants[max(matches, key=len)]
        return None

    def _values(self, graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
        """Value -> layer for what a layer produces, directly or through operators that are fused into it."""
        consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                consumers[name].append(node)
        seen: set[str] = set()
        # Backwards, since where two layers meet in an addition the runtime fuses it into the later one.
        for layer, node in reversed(list(self.layers.items())):
            frontier = list(node.output)
            while frontier:
                name = frontier.pop()
                if name in seen:
                    continue
                seen.add(name)
                yield name, layer
                frontier += [o for c in consumers[name] if c.op_type in _FUSED_AFTER for o in c.output]

    def _constants(self, graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
        """Initializer -> layer for those that only one layer's weight and bias are made of."""
        producers = {o: node for node in graph.node for o in node.output}
        initializers = {i.name for i in graph.initializer}
        users: dict[str, set[str]] = defaultdict(set)
        for layer, node in self.layers.items():
            for name in node.input:
                for constant in _sources(name, producers, initializers):
                    users[constant].add(layer)
        return ((constant, next(iter(layers))) for constant, layers in users.items() if len(layers) == 1)


def _shortened(name: str) -> Iterator[str]:
    """The name, and the names that remain when what the runtime appends is cut off step by step."""
    yield name
    while (shorter := _ADDED_SUFFIX.sub("", name)) != name:
        yield shorter
        name = shorter


def _sources(name: str, producers: Mapping[str, onnx.NodeProto], initializers: set[str]) -> list[str]:
    """The initializers that a value is made of, if it is made of nothing else."""
    if name in initializers:
        return [name]
    node = producers.get(name)
    if node is None or (node.op_type not in _FROM_WEIGHT and node.op_type != "Constant"):
        return []
    if node.op_type == "Constant":
        return [name]
    first = _sources(node.input[0], producers, initializers)
    return first + [i for i in node.input[1:] if i in initializers] if first else []


def _size(kinds: Sequence[str]) -> int:
    return sum(math.prod(_dims(kind)) * _item_bytes(kind.partition("[")[0]) for kind in kinds)


def _dims(kind: str) -> list[int]:
    """'float[1,16]' -> [1, 16]; a type without a shape counts as one number."""
    return [int(d) for d in kind.partition("[")[2].rstrip("]").split(",") if d.isdigit()]


def _item_bytes(name: str) -> int:
    """Bytes of one number: what the type's name says ('int64' 8, 'bfloat16' 2), rounded up to one."""
    if name in _BYTES:
        return _BYTES[name]
    bits = _BITS.search(name)
    return max(1, int(bits[0]) // 8) if bits else 1


def _value_mark(item: onnx.TensorProto, classes: dict[bytes, int]) -> bytes:
    """What of a constant's value can change the kernels."""
    count = math.prod(item.dims)
    if count > _SMALL:
        return b""
    value = onnx.numpy_helper.to_array(item).tobytes()
    if item.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.BOOL):
        return value
    if count == 1 and item.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8):
        extreme = int(onnx.numpy_helper.to_array(item).reshape(-1)[0])
        if extreme in (0, 255, -128, 127):
            return value
    if count == 1:
        return b"=%d" % classes.setdefault(value, len(classes))
    return b""
