"""Cutting a model: channels taken out of every parameter that holds them, branches replaced by zeros.

The result is an instance of the user's own class with smaller parameters, trainable and exportable.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from automl_compress.core.graph import Block, Graph
from automl_compress.errors import PlanError, TaskError


class Zeros(nn.Module):
    """Stands where a removed branch ended: zeros of that branch's shape, so that only the shortcut remains."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, source: Tensor, *_: object) -> Tensor:
        return source.new_zeros((source.shape[0], *self.shape[1:]))


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy; TaskError if the model can't be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise TaskError(
            f"the model can't be copied ({type(error).__name__}: {error}); it must support copy.deepcopy"
        ) from error


def cut(model: nn.Module, graph: Graph, *, kept: Mapping[str, Iterable[int]], drop: Iterable[str] = ()) -> nn.Module:
    """A copy of `model` with only the `kept` channels of each named group and without the blocks in `drop`.

    Groups that are not named stay whole. Raises PlanError where a group or block isn't the model's.
    """
    result = copy_model(model)
    keep = _kept_positions(graph, kept)
    _shrink_tensors(result, keep)
    for module in result.modules():
        refresh_attributes(module)
    dropped = [graph.block[name] for name in sorted(drop) if _known(graph, name)]
    for block in dropped:
        remove_block(result, block, kept_shape(graph, block, keep))
    return result


def kept_shape(graph: Graph, block: Block, keep: Mapping[tuple[str, int], list[int]]) -> tuple[int, ...]:
    """The shape of a removed branch's output once the channels around it were cut."""
    shape = list(block.shape)
    last = graph.layer[block.layers[-1]]
    left = keep.get((last.weight, last.out_axis))
    if left is not None:
        shape[1 if last.kind == "conv" else -1] = len(left)
    return tuple(shape)


def remove_block(model: nn.Module, block: Block, shape: tuple[int, ...]) -> None:
    """Replace the branch's last module by zeros and its other modules by identities, in place."""
    for path in block.modules[:-1]:
        model.set_submodule(path, nn.Identity())
    model.set_submodule(block.modules[-1], Zeros(shape))


def silence_channels(model: nn.Module, graph: Graph, removed: Mapping[str, Iterable[int]]) -> nn.Module:
    """A copy of full size in which nothing reads the removed channels: the reference that a cut model must equal."""
    result = copy_model(model)
    tensors = dict(result.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, channels in removed.items():
            gone = list(channels)
            for place in graph.group[name].places:
                if place.role == "consumer":
                    index = torch.tensor([p for c in gone for p in place.positions[c]], dtype=torch.long)
                    tensors[place.tensor].index_fill_(place.dim, index.to(tensors[place.tensor].device), 0)
    return result


def _known(graph: Graph, name: str) -> bool:
    if name not in graph.block:
        raise PlanError(f"plan: the model has no block {name!r}")
    return True


def _kept_positions(graph: Graph, kept: Mapping[str, Iterable[int]]) -> dict[tuple[str, int], list[int]]:
    """(tensor, dim) -> the indices that stay, ascending. Several groups may share an axis (a concatenation)."""
    gone: dict[tuple[str, int], set[int]] = {}
    sizes: dict[tuple[str, int], int] = {}
    for name, channels in kept.items():
        if name not in graph.group:
            raise PlanError(f"plan: the model has no channel group {name!r}")
        group = graph.group[name]
        stay = set(channels)
        if not stay or not stay <= set(range(group.size)):
            raise PlanError(f"plan: {name} has channels 0 to {group.size - 1}, asked to keep {sorted(stay)[:8]}")
        for place in group.places:
            spot = (place.tensor, place.dim)
            gone.setdefault(spot, set()).update(
                position
                for channel in range(group.size)
                if channel not in stay
                for position in place.positions[channel]
            )
    for spot in gone:
        sizes[spot] = graph.sizes[spot[0]][spot[1]]
    return {spot: [i for i in range(sizes[spot]) if i not in away] for spot, away in gone.items() if away}


def _shrink_tensors(model: nn.Module, keep: Mapping[tuple[str, int], list[int]]) -> None:
    spots: dict[str, dict[int, list[int]]] = {}
    for (tensor, dim), indices in keep.items():
        spots.setdefault(tensor, {})[dim] = indices
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None:
                    owners.setdefault(id(value), []).append((module, name))
    named = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    for tensor, dims in spots.items():
        old = named[tensor]
        new = old.detach()
        for dim, indices in dims.items():
            new = new.index_select(dim, torch.tensor(indices, dtype=torch.long, device=new.device))
        new = new.clone(memory_format=torch.contiguous_format)
        value = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        for module, name in owners[id(old)]:  # a tied parameter stays tied
            setattr(module, name, value)


def refresh_attributes(module: nn.Module) -> None:
    """Bring the size attributes of a standard module in line with its parameters."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd) and isinstance(weight, Tensor):
        depthwise = module.groups == module.in_channels and module.groups > 1
        if depthwise:
            module.groups = module.in_channels = module.out_channels = weight.shape[0]
        else:
            out, into = (1, 0) if module.transposed else (0, 1)
            module.out_channels = weight.shape[out] * (module.groups if module.transposed else 1)
            module.in_channels = weight.shape[into] * (1 if module.transposed else module.groups)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        for value in (module.weight, module.running_mean):
            if isinstance(value, Tensor):
                module.num_features = value.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
