"""What a cut model must compute: the original, run operator by operator, in which removed channels take no part.

Where an operator sums products over channels, removed ones count as zero: the same as zeroing all consumers. Where it
computes statistics over them (layer norm, softmax over channels), equality with that is impossible, and the statistics
are taken over the channels that stay. Everything else runs as traced, at full size, so an error in a rule shows as a
difference.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from automl_compress.model.labels import Ids, Labels
from automl_compress.model.walk import Walk, base_operator


class Reference:
    """Runs a walked program with some atoms removed."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self._nodes = list(walk.program.graph.nodes)
        self._last_use: dict[Node, Node] = {}
        for node in self._nodes:
            for value in node.all_input_nodes:
                self._last_use[value] = node

    def run(
        self, inputs: Sequence[Tensor], removed: Collection[int], *, passed: Mapping[str, str] | None = None
    ) -> Any:
        """The outputs for a batch of the size that was traced. `passed`: node name -> node whose value it takes."""
        gone = _Gone(self.walk, frozenset(removed))
        by_name = {node.name: node for node in self._nodes}
        values: dict[Node, Any] = dict(_placeholders(self.walk.program, inputs))
        needed = set(passed.values()) if passed else set()
        result: Any = None
        with torch.no_grad():
            for node in self._nodes:
                if passed and node.name in passed:
                    values[node] = values[by_name[passed[node.name]]]
                elif node.op == "call_function":
                    values[node] = self._call(node, values, gone)
                elif node.op == "get_attr":
                    values[node] = getattr(self.walk.program.graph_module, str(node.target))
                elif node.op == "output":
                    result = map_arg(node.args[0], values.__getitem__)
                for value in node.all_input_nodes:
                    if self._last_use.get(value) is node and value.name not in needed:
                        values.pop(value, None)
        return result

    def _call(self, node: Node, values: Mapping[Node, Any], gone: _Gone) -> Any:
        target: Any = node.target
        if gone.any:
            if node in self.walk.statistics:
                return self._over_what_stays(node, values, gone)
            if node in self.walk.contracted:
                values = {**{n: values[n] for n in node.all_input_nodes}}
                for operand, dim in self.walk.contracted[node]:
                    values[operand] = gone.zeroed(values[operand], dim, self.walk.labels(operand)[dim])
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        return target(*args, **kwargs)

    def _over_what_stays(self, node: Node, values: Mapping[Node, Any], gone: _Gone) -> Any:
        """Run the operator on tensors without the removed channels; its results are full again, zero where removed."""
        target: Any = node.target
        small = {
            n: gone.without(values[n], self.walk.labels(n)) if isinstance(values[n], Tensor) else values[n]
            for n in node.all_input_nodes
        }
        args, kwargs = map_arg((node.args, node.kwargs), small.__getitem__)
        result = target(*self._resized(node, list(args), gone), **kwargs)
        if isinstance(result, (tuple, list)):
            return type(result)(
                gone.full(part, labels, shape)
                for part, labels, shape in zip(result, self.walk.parts(node), self.walk.shapes(node), strict=True)
            )
        return gone.full(result, self.walk.labels(node), self.walk.shape(node))

    def _resized(self, node: Node, args: list[Any], gone: _Gone) -> list[Any]:
        name = base_operator(node)
        if name in ("layer_norm", "rms_norm"):
            args[1] = list(args[0].shape[-len(args[1]) :])
        elif name == "group_norm":
            source = node.args[0]
            assert isinstance(source, Node)
            outer, _ = self.walk.channels.split(
                self.walk.labels(source)[1], (args[1], self.walk.shape(source)[1] // args[1])
            )
            args[1] -= gone.count(outer)
        return args


class _Gone:
    """The removed atoms, and what that means for tensors."""

    def __init__(self, walk: Walk, atoms: frozenset[int]) -> None:
        self.any = bool(atoms)
        self._channels, self._atoms = walk.channels, atoms
        self._known: dict[int, tuple[Ids, np.ndarray]] = {}

    def where(self, ids: Ids | None) -> np.ndarray | None:
        """The removed indices of a dimension; None if there are none."""
        if ids is None:
            return None
        # The array is kept beside its answer, so that its id can't be given to another one.
        known = self._known.get(id(ids))
        if known is None:
            flags = [bool(self._atoms.intersection(atoms)) for atoms in self._channels.sets(ids)]
            known = self._known[id(ids)] = (ids, np.flatnonzero(flags))
        return known[1] if len(known[1]) else None

    def count(self, ids: Ids | None) -> int:
        found = self.where(ids)
        return 0 if found is None else len(found)

    def zeroed(self, value: Tensor, dim: int, ids: Ids | None) -> Tensor:
        found = self.where(ids)
        return value if found is None else value.index_fill(dim, torch.from_numpy(found), 0)

    def without(self, value: Tensor, labels: Labels) -> Tensor:
        for dim, ids in enumerate(labels):
            found = self.where(ids)
            if found is not None and value.shape[dim] == len(ids):  # type: ignore[arg-type]
                stay = np.setdiff1d(np.arange(value.shape[dim]), found)
                value = value.index_select(dim, torch.from_numpy(stay))
        return value

    def full(self, value: Any, labels: Labels, shape: tuple[int, ...]) -> Any:
        if not isinstance(value, Tensor):
            return value
        for dim, ids in enumerate(labels):
            found = self.where(ids)
            if found is not None and value.shape[dim] < shape[dim]:
                stay = np.setdiff1d(np.arange(shape[dim]), found)
                size = (*value.shape[:dim], shape[dim], *value.shape[dim + 1 :])
                value = value.new_zeros(size).index_copy(dim, torch.from_numpy(stay), value)
        return value


def _placeholders(program: ExportedProgram, inputs: Sequence[Tensor]) -> dict[Node, Any]:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names.update(signature.inputs_to_lifted_tensor_constants)
    stored = {**program.state_dict, **program.constants}
    given = dict(zip(signature.user_inputs, inputs, strict=True))
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    return {node: stored[names[node.name]] if node.name in names else given[node.name] for node in nodes}
