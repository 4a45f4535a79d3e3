"""A float ONNX graph as a PyTorch module, whose initializers can be trained.

Made from the very graph that is delivered (batch-norms folded, shapes rewritten), so that what is observed or learned
on it holds there. Operators that it doesn't know are refused when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from automl_compress.errors import ExportError
from automl_compress.techniques.onnx_graph import LAYER_OPERATORS, GraphView
from automl_compress.techniques.quantization.onnx_operators import OPERATORS

Read = Callable[[str], Any]


class OnnxModule(nn.Module):
    """Runs a graph node by node; a value is let go after its last use.

    Weights and biases of layers and norms are parameters, everything else stays constant, statistics of batch-norms
    included. Raises ExportError for an operator that is not in `OPERATORS`.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.model = model
        self.view = GraphView(model.graph)
        unknown = sorted({node.op_type for node in self.view.nodes} - OPERATORS.keys())
        if unknown:
            raise ExportError(f"no PyTorch counterpart of ONNX operators {', '.join(unknown)}")
        self.constants: dict[str, Any] = {}
        self._keys: dict[str, str] = {}
        trained = _trained(self.view)
        for name, stored in self.view.initializers.items():
            value = torch.from_numpy(np.array(numpy_helper.to_array(stored)))
            if value.is_floating_point() and name in trained:
                self._keys[name] = f"p{len(self._keys)}"
                self.register_parameter(self._keys[name], nn.Parameter(value))
            else:
                self.constants[name] = value
        self._last = {value: i for i, node in enumerate(self.view.nodes) for value in node.input}

    def parameter(self, name: str) -> Tensor:
        """The initializer of that name."""
        if name in self._keys:
            value: Tensor = getattr(self, self._keys[name])
            return value
        found: Tensor = self.constants[name]
        return found

    def key(self, name: str) -> str | None:
        """The parameter's name in this module; None for a constant."""
        return self._keys.get(name)

    def tensors(self) -> Mapping[str, np.ndarray]:
        """Name -> the parameters as they are now."""
        return {name: getattr(self, key).detach().cpu().numpy() for name, key in self._keys.items()}

    def run_node(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Any]:
        """A node's outputs, in order."""
        result = OPERATORS[node.op_type](node, inputs)
        return list(result) if isinstance(result, tuple | list) else [result]

    def read(self, values: Mapping[str, Any], name: str) -> Any:
        """A node's input: a value of the graph, an initializer, or None where it is left out."""
        if not name:
            return None
        return values[name] if name in values else self.parameter(name)

    def forward(self, *inputs: Tensor, each: Callable[[onnx.NodeProto, list[Any]], None] | None = None) -> Any:
        """The graph's output, or a tuple of them. `each` sees every node with its inputs before it runs."""
        values: dict[str, Any] = dict(zip(self.view.inputs, inputs, strict=True))
        for index, node in enumerate(self.view.nodes):
            arguments = [self.read(values, name) for name in node.input]
            if each:
                each(node, arguments)
            values.update(zip(node.output, self.run_node(node, arguments), strict=False))
            self.let_go(values, index)
        outputs = tuple(self.read(values, name) for name in self.view.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def let_go(self, values: dict[str, Any], index: int) -> None:
        for name in set(self.view.nodes[index].input):
            if self._last.get(name) == index and name not in self.view.outputs:
                values.pop(name, None)


def _trained(view: GraphView) -> set[str]:
    """The initializers that layers, norms and additions of one number a channel read."""
    names: set[str] = set()
    for node in view.nodes:
        if node.op_type in (*LAYER_OPERATORS, "LayerNormalization", "BatchNormalization"):
            names.update(node.input[1:3])
        elif node.op_type in ("Add", "Mul"):
            names.update(name for name in node.input if name in view.initializers and max(_dims(view, name)) > 1)
    return names


def _dims(view: GraphView, name: str) -> list[int]:
    return [1, *view.initializers[name].dims]
