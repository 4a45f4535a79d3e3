"""Cutting a model: channels taken out of every parameter that holds them, branches replaced by zeros.

The result is an instance of the user's own class with smaller parameters, trainable and exportable.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from automl_compress.core.graph import Block, Graph
from automl_compress.errors import PlanError, TaskError, raised
from automl_compress.model.attributes import set_attribute


class Zeros(nn.Module):
    """Stands where a removed branch ended: zeros of that branch's shape, so that only the shortcut remains."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, source: Tensor, *_: object, **__: object) -> Tensor:
        return source.new_zeros((source.shape[0], *self.shape[1:]))


class Skip(nn.Module):
    """Stands where a removed module was and passes its first argument on."""

    def forward(self, source: Tensor, *_: object, **__: object) -> Tensor:
        return source


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy; TaskError if the model can't be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise TaskError(f"the model can't be copied ({raised(error)}); it must support copy.deepcopy") from error


def cut(model: nn.Module, graph: Graph, *, kept: Mapping[str, Iterable[int]], drop: Iterable[str] = ()) -> nn.Module:
    """A copy of `model` with only the `kept` channels of each named group and without the blocks in `drop`.

    Groups that are not named stay whole. Raises PlanError where a group or block isn't the model's.
    """
    result = copy_model(model)
    drop = tuple(drop)
    stay = _staying(graph, kept, drop)
    _shrink_tensors(result, _kept_positions(graph, stay))
    _set_attributes(result, graph, stay)
    for module in result.modules():
        refresh_attributes(module)
    forget_caches(result)
    dropped = [graph.block[name] for name in sorted(drop) if _known(graph, name)]
    for block in dropped:
        remove_block(result, block, kept_shape(block, stay))
    return result


def kept_indices(
    graph: Graph, *, kept: Mapping[str, Iterable[int]], drop: Iterable[str] = ()
) -> dict[tuple[str, int], list[int]]:
    """(tensor, dimension) -> the indices of the original's that a model has which was `cut` so, ascending.

    Dimensions that stay whole are absent. Raises PlanError as `cut` does.
    """
    return _kept_positions(graph, _staying(graph, kept, drop))


def _staying(graph: Graph, kept: Mapping[str, Iterable[int]], drop: Iterable[str]) -> dict[str, frozenset[int]]:
    gone = {layer for name in drop if name in graph.block for layer in graph.block[name].layers}
    # What is inside of a removed block stays whole: code around what stands in for it may still count it.
    return {name: frozenset(channels) for name, channels in kept.items() if not _inside(graph, name, gone)}


def _inside(graph: Graph, group: str, layers: Collection[str]) -> bool:
    """Whether a group's channels are made and read by these layers alone."""
    found = graph.group.get(group)
    return found is not None and bool(layers) and {*found.producers, *found.consumers} <= set(layers)


def kept_shape(block: Block, kept: Mapping[str, frozenset[int]]) -> tuple[int, ...]:
    """The shape of a removed branch's output once the channels around it were cut."""
    shape = list(block.shape)
    for dim, channels in enumerate(block.channels):
        shape[dim] -= len(_removed(channels, kept))
    return tuple(shape)


def _removed(positions: Mapping[str, Sequence[Sequence[int]]], kept: Mapping[str, frozenset[int]]) -> set[int]:
    """The indices that go with the channels that are not kept; groups that are not named keep all."""
    return {
        position
        for group, channels in positions.items()
        if group in kept
        for channel, where in enumerate(channels)
        if channel not in kept[group]
        for position in where
    }


def remove_block(model: nn.Module, block: Block, shape: tuple[int, ...]) -> None:
    """Let the branch's last module give zeros, or its input, and its other modules pass on their input, in place."""
    for path in block.modules[:-1]:
        model.set_submodule(path, Skip())
    model.set_submodule(block.modules[-1], Zeros(shape) if block.ending == "zeros" else Skip())


def _known(graph: Graph, name: str) -> bool:
    if name not in graph.block:
        raise PlanError(f"plan: the model has no block {name!r}")
    return True


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and tensors that are plain attributes, by name."""
    plain = {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    return {
        **plain,
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


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
        for store in (module._parameters, module._buffers, vars(module)):
            for name, value in store.items():
                if isinstance(value, Tensor):
                    owners.setdefault(id(value), []).append((module, name))
    named = stored_tensors(model)
    for tensor, dims in spots.items():
        old = named[tensor]
        new = old.detach()
        for dim, indices in dims.items():
            new = new.index_select(dim, torch.tensor(indices, dtype=torch.long, device=new.device))
        new = new.clone(memory_format=torch.contiguous_format)
        value = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        for module, name in owners[id(old)]:  # a tied parameter stays tied
            setattr(module, name, value)


def _set_attributes(model: nn.Module, graph: Graph, kept: Mapping[str, frozenset[int]]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for attribute in graph.attributes:
        gone = _removed(attribute.positions, kept)
        if gone:
            set_attribute(modules[attribute.module], attribute.path, attribute.size - len(gone))


def forget_caches(model: nn.Module) -> None:
    """Let modules drop what they remember of their parameters, as they do when training begins, in place."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    model.eval()
    for module, mode in modes:
        module.training = mode


def refresh_attributes(module: nn.Module) -> None:
    """Bring the size attributes of a standard module in line with its parameters."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd) and isinstance(weight, Tensor):
        out, into = (1, 0) if module.transposed else (0, 1)
        if module.groups == module.in_channels and module.groups > weight.shape[0]:
            module.groups = weight.shape[0]
        module.out_channels = weight.shape[out] * (module.groups if module.transposed else 1)
        module.in_channels = weight.shape[into] * (1 if module.transposed else module.groups)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        for value in (module.weight, module.running_mean):
            if isinstance(value, Tensor):
                module.num_features = value.shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and isinstance(weight, Tensor):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm) and isinstance(weight, Tensor):
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
