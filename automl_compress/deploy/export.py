"""From PyTorch to ONNX: one slow export of the original, from which every plan's model is filled in.

Plans differ in weights, channel counts and removed blocks, not in structure otherwise, so their ONNX models are the
original's with other initializers and without some branches. That takes milliseconds instead of seconds. Where it
doesn't hold (a constant that was computed from a channel count, say) a comparison of outputs notices, and that plan's
model is exported for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.deploy.batch_norm import BatchNormPair, batch_norm_pairs, folded_tensors, named_tensors
from automl_compress.deploy.normalise import (
    find_additions,
    find_bypasses,
    normalise,
    rename_initializer,
    take_shortcuts,
)
from automl_compress.deploy.numbers import fill_numbers, find_numbers, modules_of
from automl_compress.deploy.verify import check_float
from automl_compress.errors import CompressError, ExportError, first_line
from automl_compress.model.surgery import copy_model
from automl_compress.model.trace import quiet, sample
from automl_compress.techniques.onnx_graph import LAYER_OPERATORS, layer_of

_LOUD = ("onnxscript", "onnx_ir", "torch.onnx._internal.exporter._registration")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which parameter or buffer an initializer holds: as it is, transposed, or with axes of size 1 in between."""

    tensor: str
    transposed: bool = False
    ones: tuple[int, ...] = ()

    def of(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        value = values[self.tensor]
        return np.ascontiguousarray(value.T) if self.transposed else np.expand_dims(value, self.ones)


class Template:
    """The original exported once; `fill` makes the ONNX model of a plan from it.

    model           the original; not changed
    example_inputs  its inputs, batch first
    graph           its trace

    `dynamic_batch` tells whether the batch size is free in the result; if the model fixes it, it is 1. `notes` says in
    words where the template could not be used. Raises ExportError if the model can't be exported at all.
    """

    def __init__(self, model: nn.Module, example_inputs: tuple[Tensor, ...], graph: Graph) -> None:
        self.graph = graph
        self.notes: list[str] = []
        self._examples = example_inputs
        self._verified: set[str] = set()
        distinct = _distinct_copy(model)
        program, self.dynamic_batch = export_program(distinct, example_inputs)
        self._skeleton = _to_onnx(program, sample(example_inputs, 2 if self.dynamic_batch else 1))
        modules = modules_of(self._skeleton.graph)
        repeated = {block.name: block.modules[0] for block in graph.blocks if block.ending == "input"}
        bypasses = find_bypasses(self._skeleton.graph, repeated)
        normalise(self._skeleton, graph)
        self._numbers = find_numbers(self._skeleton.graph, modules, graph)
        numbered = [cells for constant in self._numbers for cells in constant.cells]
        self._counted = {name for cells in numbered for _, names in cells for name in names}
        pairs = batch_norm_pairs(distinct, program)
        names = {tensor.name for tensor in self._skeleton.graph.initializer}
        self._pairs = tuple(pair for pair in pairs if pair.folded(names))
        self._sources = _find_sources(self._skeleton, _tensors(distinct, self._pairs))
        _name_weights(self._skeleton.graph, self._sources)
        blocks = {block.name: frozenset(block.layers) for block in graph.blocks}
        self._shortcuts = {**find_additions(self._skeleton.graph, blocks), **bypasses}
        self.usable = self._agrees(distinct, model)
        for tensor in self._skeleton.graph.initializer:
            if tensor.name in self._sources and self.usable:
                tensor.ClearField("raw_data")

    def fill(self, model: nn.Module, plan: Plan) -> onnx.ModelProto:
        """The ONNX model of `model`, which is the original after the plan's channels and blocks were removed.

        Checked against PyTorch where the plan touches a group or block that no checked plan has touched before, or
        leaves a new number of a group's channels that numbers in the graph follow; if it differs, the model is
        exported by itself. Raises ExportError if that fails as well.
        """
        touched = self._touched(plan)
        if not self.usable or not plan.drop <= self._shortcuts.keys():
            return self._export_alone(model)
        try:
            filled = self._filled(model, plan)
            if not touched <= self._verified:
                self._check(filled, model)
        except ExportError as error:
            self._note(f"{plan.key}: exported by itself, as the template does not fit ({error})")
            return self._export_alone(model)
        self._verified |= touched
        return filled

    def drop_blocks(self, graph: onnx.GraphProto, blocks: Iterable[str]) -> None:
        """Take removed blocks out of a graph that this template filled in. Raises ExportError for an unknown one."""
        missing = [block for block in blocks if block not in self._shortcuts]
        if missing:
            raise ExportError(f"block {missing[0]} is not in the exported graph; leave it out of the search space")
        take_shortcuts(graph, dict(self._shortcuts[block] for block in blocks))

    def _filled(self, model: nn.Module, plan: Plan) -> onnx.ModelProto:
        result = onnx.ModelProto()
        result.CopyFrom(self._skeleton)
        fill_numbers(result.graph, self._numbers, self.graph, plan.kept_counts(self.graph))
        self.drop_blocks(result.graph, plan.drop)
        values = _tensors(model, self._pairs)
        for tensor in result.graph.initializer:
            source = self._sources.get(tensor.name)
            if source is not None:
                if source.tensor not in values:
                    raise ExportError(f"the model has no parameter {source.tensor!r}, which the exported graph needs")
                tensor.CopyFrom(numpy_helper.from_array(source.of(values), tensor.name))
        modules = dict(model.named_modules())
        for node in result.graph.node:
            groups = getattr(modules.get(layer_of(node.name)), "groups", None)
            for attribute in node.attribute:
                if attribute.name == "group" and isinstance(groups, int):
                    attribute.i = groups
        return result

    def _touched(self, plan: Plan) -> set[str]:
        """What a plan changes in the structure: its reduced groups, with their channels where these are written into
        the graph, and removed blocks."""
        kept = plan.kept_counts(self.graph)
        reduced = {name: count for name, count in kept.items() if count < self.graph.group[name].size}
        groups = {f"group {name}" + f" {count}" * (name in self._counted) for name, count in reduced.items()}
        return groups | {f"block {name}" for name in plan.drop}

    def _agrees(self, distinct: nn.Module, model: nn.Module) -> bool:
        """Whether the graph holds no value that was computed from parameters: two sets of weights, both right."""
        try:
            for candidate in (distinct, model):
                self._check(self._filled(candidate, Plan()), candidate)
        except ExportError as error:
            self._note(f"every model is exported by itself, which is slow, as the template does not fit ({error})")
            return False
        return True

    def _check(self, filled: onnx.ModelProto, model: nn.Module) -> None:
        for batch in (1, 3) if self.dynamic_batch else (1,):
            check_float(filled, model, sample(self._examples, batch))

    def _export_alone(self, model: nn.Module) -> onnx.ModelProto:
        result = export_alone(model, self._examples)
        normalise(result, self.graph)
        _name_weights(result.graph, _find_sources(result, _tensors(model, ())))
        self._check(result, model)
        return result

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def export_alone(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
    """One model's ONNX graph as the exporter gives it. Raises ExportError if it fails or differs from PyTorch."""
    program, dynamic = export_program(model, example_inputs)
    result = _to_onnx(program, sample(example_inputs, 2 if dynamic else 1))
    check_float(result, model, sample(example_inputs, 2 if dynamic else 1))
    return result


def export_program(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> tuple[ExportedProgram, bool]:
    """(the exported program, whether its batch size is free). Raises ExportError if the model can't be exported."""
    clean = copy_model(model).cpu().float().eval()
    free = tuple({0: Dim.AUTO} for _ in example_inputs)
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(clean, sample(example_inputs, 2), dynamic_shapes=free)
        except Exception:  # a model that takes one sample only fails here and may work below
            program = None
        if program is not None and _batch_is_free(program):
            return program, True
        try:
            return torch.export.export(clean, sample(example_inputs, 1)), False
        except Exception as error:
            raise ExportError(f"the model can't be exported with torch.export: {first_line(error)}") from error


def _batch_is_free(program: ExportedProgram) -> bool:
    users = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    return all(not isinstance(node.meta["val"].shape[0], int) for node in nodes)


def _to_onnx(program: ExportedProgram, inputs: tuple[Tensor, ...]) -> onnx.ModelProto:
    try:
        with quiet(), _muted(), torch.no_grad():
            exported = torch.onnx.export(program, inputs, dynamo=True, external_data=False, verbose=False)
        assert exported is not None
        return exported.model_proto
    except CompressError:
        raise
    except Exception as error:
        cause: BaseException = error  # the exporter's own text is advice to its developers
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"the model can't be turned into ONNX: {first_line(cause)}") from error


@contextmanager
def _muted() -> Iterator[None]:
    """Silence the exporter's loggers, whose lines speak of packages that this program doesn't use."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _distinct_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and statistics all differ a little from the original's and from each other.

    The exporter stores equal values once: parameters that happen to agree now, like a fresh network's ones and zeros,
    would share an initializer and could not be filled in separately.
    """
    result = copy_model(model).cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    buffers = [buffer for name, buffer in result.named_buffers() if name.endswith(("running_mean", "running_var"))]
    with torch.no_grad():
        for value in [*result.parameters(), *buffers]:
            if value.is_floating_point():
                value.mul_(1 + 0.05 * torch.rand(value.shape, generator=generator))
                value.add_(0.01 * torch.rand(value.shape, generator=generator))
    return result


def _tensors(model: nn.Module, pairs: tuple[BatchNormPair, ...]) -> dict[str, np.ndarray]:
    """Parameters and buffers by name, with batch-norms folded where the exporter does it."""
    values = {name: value.detach().cpu().contiguous().numpy() for name, value in named_tensors(model).items()}
    values = {name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in values.items()}
    return {**values, **folded_tensors(model, pairs)}


def _find_sources(model: onnx.ModelProto, values: Mapping[str, np.ndarray]) -> dict[str, Source]:
    """Initializer name -> where its value comes from. Those that match no parameter are constants of the structure."""
    result: dict[str, Source] = {}
    for tensor in model.graph.initializer:
        if tensor.name in values and tuple(tensor.dims) == values[tensor.name].shape:
            result[tensor.name] = Source(tensor=tensor.name)
        elif tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) > 1:
            source = _matching(numpy_helper.to_array(tensor), values)
            if source is not None:
                result[tensor.name] = source
    return result


def _name_weights(graph: onnx.GraphProto, sources: dict[str, Source]) -> None:
    """Call a layer's weight `<layer>.weight` where the exporter stored it transposed under a generated name."""
    for node in graph.node:
        if node.op_type in LAYER_OPERATORS and len(node.input) > 1:
            old, new = node.input[1], f"{node.name}.weight"
            if old != new and old in sources and sources[old].tensor != old and new not in sources:
                rename_initializer(graph, old, new)
                sources[new] = sources.pop(old)


def _matching(value: np.ndarray, values: Mapping[str, np.ndarray]) -> Source | None:
    for name, candidate in values.items():
        if candidate.size != value.size or candidate.dtype != value.dtype:
            continue
        if candidate.ndim == 2 and candidate.T.shape == value.shape and np.array_equal(candidate.T, value):
            return Source(tensor=name, transposed=True)
        if value.ndim >= candidate.ndim and np.array_equal(candidate.reshape(-1), value.reshape(-1)):
            ones = _inserted_ones(candidate.shape, value.shape)
            if ones is not None:
                return Source(tensor=name, ones=ones)
    return None


def _inserted_ones(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...] | None:
    """Axes of size 1 in `after` without which it is `before`; None if it can't be had so."""
    ones, position = [], 0
    for axis, size in enumerate(after):
        if position < len(before) and before[position] == size:
            position += 1
        elif size == 1:
            ones.append(axis)
        else:
            return None
    return tuple(ones) if position == len(before) else None
