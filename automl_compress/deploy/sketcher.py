"""Plans in outline, without building their models: which nodes remain, what runs in integers, how wide values are.

The sizes of values are found once: the original's shapes, and how much each shrinks with every channel that a group
loses, from one model for each group. Where several groups share a dimension they either lie beside each other in it,
and what they lose adds up, or make a grid (heads and their width), and their shares multiply; one model in which all
are cut tells which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import onnx
from numpy.typing import NDArray

from automl_compress.core.graph import Graph
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.deploy.export import Template
from automl_compress.hardware.prediction.sketch import Skeleton, Sketch
from automl_compress.techniques.onnx_graph import LAYER_OPERATORS, GraphView, layer_of
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS, Executions
from automl_compress.techniques.quantization.placement import place

_GEOMETRY = ("kernel_shape", "strides", "pads", "dilations", "perm", "axes", "mode")
_PRODUCTS = ("MatMul", "Gemm")
_CACHED = 4096
Shape = tuple[int, ...]
Array = NDArray[np.float64]


class Sketcher:
    """Sketches plans of one traced model.

    original  its ONNX model, as `template` fills it
    narrowed  a plan that cuts some channels -> its float ONNX model; called once for each group, and once for all
    size_of   a plan -> bytes of its layers' weights in the file
    executions    how layers of each kind run at each bit-width
    """

    def __init__(
        self,
        template: Template,
        graph: Graph,
        original: onnx.ModelProto,
        narrowed: Callable[[Plan], onnx.ModelProto],
        size_of: Callable[[Plan], float],
        executions: Executions = DEFAULT_EXECUTIONS,
    ) -> None:
        self._template, self._graph, self._size_of = template, graph, size_of
        self._executions = executions
        self._original = _without_weights(original)
        shapes = value_shapes(original)
        names = list(shapes)
        self._value = {name: number for number, name in enumerate(names)}
        self._rank = np.array([len(shapes[name]) for name in names])
        self._full = _table([shapes[name] for name in names])
        self._slopes: dict[str, Array] = {}
        for group in graph.groups:
            plan = Plan(sparsity={group.name: 0.5})
            removed = group.size - plan.kept_count(group.name, group.size)
            cut = value_shapes(narrowed(plan))
            smaller = _table([cut.get(name, shapes[name]) for name in names], self._full.shape[1])
            self._slopes[group.name] = (self._full - smaller) / max(removed, 1)
        self._grid = self._grid_dimensions(names, shapes, narrowed)
        self._skeleton = lru_cache(_CACHED)(self._make_skeleton)

    def __call__(self, plan: Plan) -> Sketch:
        """The plan in outline, as 8-bit layers, removed blocks and channel counts leave it."""
        model, view, skeleton, first_reads, writes = self._skeleton(plan.drop)
        bits = {name: width for name, width in plan.bits.items() if width != FULL_BITS}
        placement = place(model, bits, self._executions, view=view)
        dims = self._dims(plan)
        numbers = dims.prod(axis=1)
        last = dims[np.arange(len(dims)), np.maximum(self._rank - 1, 0)]
        channels = np.where(self._rank == 4, dims[:, 1], last)
        # A product's channels lie last, whatever its rank.
        product = [op in _PRODUCTS for op in skeleton.ops]
        quantized = [placement.quantized(site) for site in skeleton.sites]
        return Sketch(
            skeleton=skeleton,
            integer=[site in placement.integer for site in skeleton.sites],
            quantized=quantized,
            omitted=[site in placement.omitted for site in skeleton.sites],
            bits=[plan.layer_bits(layer) if layer else FULL_BITS for layer in skeleton.layers],
            read=np.where(product, last[first_reads], channels[first_reads]).astype(int).tolist(),
            written=np.where(product, last[writes], channels[writes]).astype(int).tolist(),
            read_numbers=numbers[first_reads].astype(int).tolist(),
            written_numbers=numbers[writes].astype(int).tolist(),
            size_terms=(
                self._size_of(plan),
                float(len(placement.roots)),
                float(len(placement.integer)),
                float(len(skeleton.sites)),
                1.0,
            ),
        )

    def _dims(self, plan: Plan) -> Array:
        lost = np.zeros_like(self._full)
        share = np.ones_like(self._full)
        for group in self._graph.groups:
            removed = group.size - plan.kept_count(group.name, group.size)
            if removed:
                gone = removed * self._slopes[group.name]
                lost += gone
                share *= 1 - gone / self._full
        return np.where(self._grid, np.rint(self._full * share), self._full - lost)

    def _grid_dimensions(
        self, names: Sequence[str], shapes: Mapping[str, Shape], narrowed: Callable[[Plan], onnx.ModelProto]
    ) -> NDArray[np.bool_]:
        """Which sizes are products of what groups keep."""
        shared = sum((slopes != 0 for slopes in self._slopes.values()), np.zeros(self._full.shape, dtype=int)) > 1
        self._grid = shared
        if not shared.any():
            return shared
        plan = Plan(sparsity={group.name: 0.5 for group in self._graph.groups})
        cut = value_shapes(narrowed(plan))
        found = _table([cut.get(name, shapes[name]) for name in names], self._full.shape[1])
        grid: NDArray[np.bool_] = shared & (self._dims(plan) == found)
        return grid

    def _make_skeleton(self, drop: frozenset[str]) -> tuple[onnx.ModelProto, GraphView, Skeleton, list[int], list[int]]:
        model = onnx.ModelProto()
        model.CopyFrom(self._original)
        self._template.drop_blocks(model.graph, drop)
        view = GraphView(model.graph)
        positions = {value: i for i, node in enumerate(view.nodes) for value in node.output if value}
        known = self._graph.layer
        layers = [layer_of(node.name) if node.op_type in LAYER_OPERATORS else "" for node in view.nodes]
        reads = [[v for v in node.input if v and v not in view.initializers] for node in view.nodes]
        skeleton = Skeleton(
            sites=tuple(node.output[0] for node in view.nodes),
            ops=tuple(node.op_type for node in view.nodes),
            kinds=tuple(
                known[layer].key if layer in known else _kind(node)
                for node, layer in zip(view.nodes, layers, strict=True)
            ),
            layers=tuple(layer if layer in known else None for layer in layers),
            inputs=tuple(tuple(positions.get(value, -1) for value in values) for values in reads),
        )
        writes = [self._value[site] for site in skeleton.sites]
        first = [self._value[values[0]] if values else own for values, own in zip(reads, writes, strict=True)]
        return model, view, skeleton, first, writes


def _kind(node: onnx.NodeProto) -> str:
    """An operator with what of its attributes changes how it runs."""
    values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute if item.name in _GEOMETRY}
    return " ".join([node.op_type, *(f"{name}={values[name]}" for name in _GEOMETRY if name in values)])


def value_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Value -> shape for one sample; sizes that can't be inferred count as 1."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = 1
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    shapes: Mapping[str, tuple[int | None, ...]] = GraphView(inferred.graph).shapes
    produced = [value for node in inferred.graph.node for value in node.output if value]
    values = [*(value.name for value in inferred.graph.input), *produced]
    return {name: tuple(size or 1 for size in shapes.get(name, ())) for name in values}


def _table(shapes: list[Shape], rank: int = 0) -> Array:
    """Shapes as rows, filled up with ones."""
    rank = max([rank, 1, *(len(shape) for shape in shapes)])
    return np.array([[*shape, *[1] * (rank - len(shape))] for shape in shapes], dtype=float)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large constants have a shape and no values: where quantization goes doesn't depend on them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if math.prod(tensor.dims) > 64:
            tensor.ClearField("raw_data")
    return copy
