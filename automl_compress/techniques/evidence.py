"""What criteria may ask for: the model, calibration data, and what is computed from them once for all groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from automl_compress.core.graph import Graph
from automl_compress.errors import TaskError
from automl_compress.techniques.calls import Call, LayerCalls
from automl_compress.techniques.reconstruct import elimination_losses

GRADIENT_BATCH = 32
Batch = tuple[tuple[Tensor, ...], Tensor]


@dataclass(eq=False)
class Evidence:
    """A model in eval mode on the CPU (never modified) and labelled calibration batches, computed on when asked.

    batches  inputs and targets, or a function that gives them, so that nothing is loaded for a criterion without data
    loss     (model's outputs, targets) -> mean loss of a batch
    seed     of the random baseline
    """

    model: nn.Module
    graph: Graph
    batches: Sequence[Batch] | Callable[[], Sequence[Batch]] = ()
    loss: Callable[..., Tensor] | None = None
    seed: int = 0

    @cached_property
    def data(self) -> Sequence[Batch]:
        return self.batches() if callable(self.batches) else self.batches

    @cached_property
    def eliminations(self) -> dict[str, Tensor | None]:
        """Group name -> losses of eliminating its channels one by one [group size]; see `elimination_losses`."""
        self._require_data()
        return elimination_losses(self.model, self.graph, [inputs for inputs, _ in self.data])

    @cached_property
    def gate_gradients(self) -> dict[str, Tensor | None]:
        """Group name -> derivative of each sample's loss by a factor on each channel [samples, group size].

        The factor stands where the channel is read: at the inputs of all layers that consume the group. None where no
        such layer was seen (it runs inside of an operator that runs as one).
        """
        self._require_data()
        if self.loss is None:
            raise TaskError("a criterion that takes gradients needs the task's loss")
        parts = [_gate_gradients(self.model, self.graph, self.loss, *batch) for batch in _small(self.data)]
        result: dict[str, Tensor | None] = {}
        for group in self.graph.groups:
            found = [part[group.name] for part in parts if group.name in part]
            result[group.name] = torch.cat(found) if found else None
        return result

    def _require_data(self) -> None:
        if not self.data:
            raise TaskError("a criterion that looks at data needs training samples, and there are none")


class _Inputs(LayerCalls):
    """Keeps the calls of layers and their outputs."""

    def __init__(self, model: nn.Module, graph: Graph, wanted: set[str]) -> None:
        super().__init__(model, graph)
        self.seen: list[tuple[Call, Tensor]] = []
        self._wanted = wanted

    def returned(self, call: Call, output: Tensor) -> None:
        if call.layer.name in self._wanted:
            self.seen.append((call, output))


def _gate_gradients(
    model: nn.Module, graph: Graph, loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], targets: Tensor
) -> dict[str, Tensor]:
    """Group name -> [samples, group size] for one batch.

    The gradient at a layer's output, taken back through that layer alone, is what its input owes to this consumer;
    times the input and summed over positions it is the derivative by a factor on the input's channel.
    """
    consumers = {name for group in graph.groups for name in group.consumers}
    watch = _Inputs(model, graph, consumers)
    # Parameters may be frozen; an input that wants gradients makes every layer's output part of the graph.
    leaves = tuple(part.detach().requires_grad_() if part.is_floating_point() else part for part in inputs)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    with torch.enable_grad():
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with watch:
                outputs = model(*leaves)
            total = loss(outputs, targets) * len(targets)
            grads = torch.autograd.grad(total, [out for _, out in watch.seen], allow_unused=True)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    by_layer: dict[str, Tensor] = {}
    for (call, _), grad in zip(watch.seen, grads, strict=True):
        if grad is not None:
            name, found = call.layer.name, _by_channel(call, grad)
            by_layer[name] = by_layer[name] + found if name in by_layer else found
    result: dict[str, Tensor] = {}
    for group in graph.groups:
        for name in group.consumers:
            if name in by_layer:
                found = _gather(by_layer[name], graph, group.name, name)
                result[group.name] = result[group.name] + found if group.name in result else found
    return result


def _small(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The same samples in batches of at most GRADIENT_BATCH: all activations live while gradients are taken."""
    for inputs, targets in batches:
        for start in range(0, len(targets), GRADIENT_BATCH):
            part = slice(start, start + GRADIENT_BATCH)
            yield tuple(each[part] for each in inputs), targets[part]


def _by_channel(call: Call, grad: Tensor) -> Tensor:
    """Derivatives by a factor on each input channel [samples, channels], from the gradient at the output."""
    source = call.source.detach().requires_grad_()
    with torch.enable_grad():
        bias = None if call.bias is None else call.bias.detach()
        again = Call(**{**vars(call), "source": source}).again(call.weight.detach(), bias)
    (back,) = torch.autograd.grad(again, source, grad)
    product = (back * source.detach()).double()
    if call.stride:
        return product.flatten(2).sum(dim=2) if product.ndim > 2 else product
    return product.reshape(len(product), -1, product.shape[-1]).sum(dim=1)


def _gather(values: Tensor, graph: Graph, group: str, name: str) -> Tensor:
    """[samples, input channels] of a layer -> [samples, group size]."""
    layer = graph.layer[name]
    result = values.new_zeros(len(values), graph.group[group].size)
    inputs = graph.sizes[layer.weight][layer.in_axis]
    for place in graph.group[group].places:
        if place.tensor == layer.weight and place.dim == layer.in_axis:
            for channel, positions in enumerate(place.positions):
                for position in positions:
                    # A grouped convolution has one such input in each of its groups.
                    result[:, channel] += values[:, position::inputs].sum(dim=1)
    return result
