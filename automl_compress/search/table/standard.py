"""Networks made up to show a device the kernels that most networks consist of, in surroundings like theirs.

Each is a chain of layers of one kind at widths on and off the grid of the runtime's layouts: convolutions (plain,
strided, depthwise, grouped, 1x1, transposed, 1-D), linear layers and attention with their normalisations and
activations, embeddings. Each is measured in 32 bits, in 8, and in a mixture. The weights are random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from automl_compress.core.plan import FULL_BITS
from automl_compress.techniques.quantization.calibrate import activation_tensors
from automl_compress.techniques.quantization.rewrite import quantize

_OPSET = 20
_WIDTHS = (3, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
_LENGTH = 10
_BITS = {"Conv": (FULL_BITS, 8), "MatMul": (FULL_BITS, 8, 4, 2), "Gemm": (FULL_BITS, 8, 4, 2)}
KINDS = (
    "plain",
    "strided",
    "depthwise",
    "pointwise",
    "grouped",
    "transposed",
    "sequence",
    "linear",
    "attention",
    "tokens",
)


def standard_models(seed: int = 0) -> Iterator[tuple[str, onnx.ModelProto]]:
    """(name, model) pairs in a fixed order: each kind at several sizes, in 32 bits, in 8, and in a mixture.

    The mixtures show what lies at the borders between bit-widths, and layers whose weights alone have fewer bits.
    """
    rng, mixing = (np.random.default_rng(seeds) for seeds in (seed, [seed, 1]))
    for size in (32, 16, 8, 56):
        for kind in KINDS:
            for number in range(2):
                chain = _Chain(rng)
                getattr(chain, f"_{kind}")(size)
                model = chain.model()
                name = f"{kind}-{size}-{number}"
                yield name, model
                layers = {node.name: _BITS[node.op_type] for node in model.graph.node if node.op_type in _BITS}
                mixed = {layer: int(mixing.choice(widths)) for layer, widths in layers.items()}
                for how, bits in (("int8", dict.fromkeys(layers, 8)), ("mixed", mixed)):
                    if set(bits.values()) != {FULL_BITS}:
                        ranges = dict.fromkeys(activation_tensors(model, bits), (-2.0, 2.0))
                        yield f"{name}-{how}", quantize(model, bits, ranges)


@dataclass
class _Chain:
    """A graph that grows at its end. `shape` is that of the value there, for one sample."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    value: str = "x"
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def model(self) -> onnx.ModelProto:
        output = helper.make_tensor_value_info(self.value, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "standard", self.inputs, [output], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)

    def _plain(self, size: int) -> None:
        width = self._image(size)
        for _ in range(_LENGTH // 2):
            hidden = self._width(128)
            before = self.value
            self._conv(width, hidden, 3)
            self._node("Relu")
            self._conv(hidden, width, 3)
            self._node("Add", before)
            self._node("Relu")

    def _strided(self, size: int) -> None:
        width = self._image(size)
        while size >= 4:
            for kernel, stride in ((3, 1), (3, 2)):
                wider = self._width(256)
                self._conv(width, wider, kernel, stride)
                self._node("Relu")
                width = wider
            size //= 2
        self._node("GlobalAveragePool")
        self._node("Flatten")
        self._linear(width, 10, gemm=True)

    def _depthwise(self, size: int) -> None:
        width = self._image(size)
        for kernel in (3, 5, 3):
            hidden = self._width(256)
            before = self.value
            self._conv(width, hidden, 1)
            self._node("Clip", self._constant(np.float32(0)), self._constant(np.float32(6)))
            self._conv(hidden, hidden, kernel, groups=hidden)
            self._node("HardSwish")
            self._conv(hidden, width, 1)
            self._node("Add", before)

    def _pointwise(self, size: int) -> None:
        width = self._image(size)
        for _ in range(_LENGTH):
            wider = self._width(256)
            self._conv(width, wider, 1)
            self._node("Relu")
            width = wider

    def _grouped(self, size: int) -> None:
        width = self._image(size)
        for groups in (2, 4, 8):
            hidden = groups * max(4, self._width(128) // groups)
            self._conv(width, hidden, 1)
            self._node("Relu")
            self._conv(hidden, hidden, 3, groups=groups)
            self._node("Sigmoid")
            self._conv(hidden, width, 1)

    def _transposed(self, size: int) -> None:
        width = self._image(max(4, size // 4))
        for kernel in (2, 3, 4):
            wider = self._width(64)
            weight = self._weight(width, wider, kernel, kernel)
            bias = self._weight(wider)
            self._node("ConvTranspose", weight, bias, strides=[2, 2], layer=True)
            self._node("Relu")
            self._conv(wider, wider, 3)
            self._node("LeakyRelu", alpha=0.1)
            width = wider

    def _sequence(self, size: int) -> None:
        width = self._width(64)
        self._input(width, size * 4)
        for kernel in (3, 5, 7, 3):
            wider = self._width(128)
            weight = self._weight(wider, width, kernel)
            pads = [kernel // 2, kernel // 2]
            self._node("Conv", weight, self._weight(wider), pads=pads, kernel_shape=[kernel], layer=True)
            self._node("Relu")
            width = wider

    def _linear(self, before: int, after: int | None = None, *, gemm: bool = False) -> None:
        if after is None:
            width = self._width(256)
            self._input(width)
            for activation in ("Relu", "Gelu", "Tanh", "Sigmoid", "Relu"):
                wider = self._width(512)
                self._linear(width, wider, gemm=True)
                self._node(activation)
                width = wider
        elif gemm:
            self._node("Gemm", self._weight(after, before), self._weight(after), transB=1, layer=True)
        else:
            self._node("MatMul", self._weight(before, after), layer=True)
            self._node("Add", self._weight(after))

    def _attention(self, size: int) -> None:
        heads, depth = int(self.rng.choice([2, 4, 8])), int(self.rng.choice([16, 24, 32, 64]))
        width = heads * depth
        self._input(size, width)
        before = self.value
        self._norm(width)
        source, parts = self.value, []
        for _ in range(3):
            self.value = source
            self._linear(width, width)
            self._node("Reshape", self._constant(np.array([0, 0, heads, depth], np.int64)))
            self._node("Transpose", perm=[0, 2, 1, 3])
            parts.append(self.value)
        self.value = parts[1]
        self._node("Transpose", perm=[0, 1, 3, 2])
        keys, self.value = self.value, parts[0]
        self._node("MatMul", keys)
        self._node("Mul", self._constant(np.float32(depth**-0.5)))
        self._node("Softmax", axis=-1)
        self._node("MatMul", parts[2])
        self._node("Transpose", perm=[0, 2, 1, 3])
        self._node("Reshape", self._constant(np.array([0, 0, width], np.int64)))
        self._linear(width, width)
        self._node("Add", before)
        before = self.value
        self._norm(width)
        hidden = self._width(512)
        self._linear(width, hidden)
        self._node("Gelu")
        self._linear(hidden, width)
        self._node("Add", before)

    def _tokens(self, size: int) -> None:
        """An embedding, and layers over tokens."""
        width = self._width(256)
        table = self._weight(1000, width)
        self.inputs.append(helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", size]))
        self.nodes.append(helper.make_node("Gather", [table, "x"], ["embedded"], name="embedding"))
        self.value = "embedded"
        for activation in ("Relu", "Gelu"):
            self._norm(width)
            wider = self._width(512)
            self._linear(width, wider)
            self._node(activation)
            width = wider
        self._node("ReduceMean", self._constant(np.array([1], np.int64)), keepdims=0)
        self._linear(width, 10, gemm=True)

    def _image(self, size: int) -> int:
        self._input(3, size, size)
        width = self._width(64)
        self._conv(3, width, 3)
        self._node("Relu")
        return width

    def _input(self, *shape: int) -> None:
        self.inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape]))

    def _conv(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        weight = self._weight(after, before // groups, kernel, kernel)
        self._node(
            "Conv",
            weight,
            self._weight(after),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=groups,
            layer=True,
        )

    def _norm(self, width: int) -> None:
        self._node("LayerNormalization", self._weight(width), self._weight(width))

    def _node(self, op: str, *more: str, layer: bool = False, **attributes: Any) -> None:
        output = f"v{len(self.nodes)}"
        name = f"layer{len(self.nodes)}" if layer else f"node{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.value, *more], [output], name=name, **attributes))
        self.value = output

    def _weight(self, *shape: int) -> str:
        scale = 1.0 / np.sqrt(max(1, int(np.prod(shape[1:]))))
        return self._constant((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def _constant(self, value: np.ndarray | np.generic) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _width(self, largest: int, choices: Sequence[int] = _WIDTHS) -> int:
        return int(self.rng.choice([width for width in choices if 3 < width <= largest]))
