"""Numbers in a model's Python objects that count channels: heads, head widths, split sizes, groups of convolutions.

The traced code contains such numbers where it reshapes, splits, slices or pads. An integer attribute of the module that
ran that code, with the same value, is taken to be where the number comes from. Where several dimensions have that size
the attribute could mean any of them; a choice is right when the cut model runs and agrees.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from automl_compress.core.graph import Attribute
from automl_compress.model.labels import Ids
from automl_compress.model.walk import Walk, module_of

Path = tuple[str | int, ...]
Decision = tuple[str, Path]  # (class of the module, path): code is shared by class, so its meaning is, too
Positions = Mapping[str, tuple[tuple[int, ...], ...]]

# Attributes that standard modules derive from their parameters; surgery refreshes them.
_DERIVED = """in_channels out_channels in_features out_features num_features num_channels kernel_size stride padding
dilation output_padding _reversed_padding_repeated_twice num_parameters num_embeddings padding_idx output_size kdim vdim
scale_factor dim start_dim end_dim"""
DERIVED = frozenset(_DERIVED.split())
STANDARD = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.Embedding,
)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LARGEST_LIST = 64


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An attribute of `module` that code of the module `user` may read, and what it may count, likeliest first."""

    decision: Decision
    module: str
    user: str
    path: Path
    size: int
    options: tuple[Positions, ...]


def candidates(model: nn.Module, walk: Walk, atoms: Mapping[str, Sequence[int]]) -> list[Candidate]:
    """Every attribute that may count channels of the groups whose `atoms` are given.

    Modules of one class run the same code, so an attribute means the same number of that code in all of them: the
    numbers that have its value in every module come first, then the ones that have it in this module, then dimensions
    of that size whose size the code doesn't state.
    """
    owner = {atom: (group, channel) for group, members in atoms.items() for channel, atom in enumerate(members)}
    stated, other = _stated(walk), _other(walk)
    modules = list(model.named_modules(remove_duplicate=False))
    users = {name: user for name, _ in modules if (user := _user(name, stated, other)) is not None}
    modules = [(name, module) for name, module in modules if name in users]
    integers = {name: dict(_integers(module)) for name, module in modules}
    common: dict[Decision, set[int]] = {}
    for name, module in modules:
        for path, size in integers[name].items():
            matching = {number for number, (found, _) in enumerate(stated.get(users[name], ())) if found == size}
            decision = (_kind(module), path)
            common[decision] = common.get(decision, matching) & matching
    result = []
    for name, module in modules:
        for path, size in integers[name].items():
            decision = (_kind(module), path)
            here = stated.get(users[name], [])
            first = [here[number][1] for number in sorted(common[decision])]
            # A number that can't change may be the one that is meant.
            rest = [ids for found, ids in here if found == size] if not first else []
            options: list[Positions] = []
            for ids in [*first, *rest, *([] if first else other.get(users[name], {}).get(size, ()))]:
                positions = {} if ids is None else _positions(walk, ids, atoms, owner)
                if positions not in options:
                    options.append(positions)
            options.sort(key=lambda positions: not positions)
            rank = _rank(module, path, size)  # equal entries of a list mean one number each, in order
            options = options[rank:] + options[:rank] if rank < len(options) else options
            if any(options):
                result.append(
                    Candidate(
                        decision=decision, module=name, user=users[name], path=path, size=size, options=tuple(options)
                    )
                )
    return result


def _user(name: str, *known: Mapping[str, object]) -> str | None:
    """The module whose code may read another's attributes: itself if it ran, else the nearest around it that did."""
    while name and not any(name in part for part in known):
        name = name.rpartition(".")[0]
    return name if any(name in part for part in known) else None


def _rank(module: nn.Module, path: Path, size: int) -> int:
    """How many entries before this one in its list or tuple have the same value."""
    container: Any = vars(module)[str(path[0])]
    for index in path[1:-1]:
        container = container[int(index)]
    return list(container[: int(path[-1])]).count(size) if len(path) > 1 else 0


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def decide(found: Sequence[Candidate], choice: Mapping[Decision, int]) -> tuple[Attribute, ...]:
    """The attributes under a choice of options: the first unless it says otherwise; beyond the last, none."""
    result = []
    for candidate in found:
        option = choice.get(candidate.decision, 0)
        if option < len(candidate.options) and candidate.options[option]:
            result.append(
                Attribute(
                    module=candidate.module,
                    path=candidate.path,
                    size=candidate.size,
                    positions=candidate.options[option],
                )
            )
    return tuple(result)


def set_attribute(module: nn.Module, path: Path, value: int) -> None:
    """Change an integer that may lie in (nested) lists or tuples; tuples and lists are replaced, never changed."""
    first = str(path[0])
    setattr(module, first, _replaced(getattr(module, first), path[1:], value))


def _replaced(container: Any, path: Path, value: int) -> Any:
    if not path:
        return value
    index = int(path[0])
    items = [_replaced(item, path[1:], value) if i == index else item for i, item in enumerate(container)]
    return items if isinstance(container, list) else tuple(items)


def _integers(module: nn.Module) -> Iterator[tuple[Path, int]]:
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training" or (isinstance(module, STANDARD) and name in DERIVED):
            continue
        yield from _integers_in((name,), value)


def _integers_in(path: Path, value: Any) -> Iterator[tuple[Path, int]]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        yield path, int(value)
    elif type(value) in (list, tuple) and len(value) <= _LARGEST_LIST:
        for index, item in enumerate(value):
            yield from _integers_in((*path, index), item)


def _stated(walk: Walk) -> dict[str, list[tuple[int, Ids | None]]]:
    """Module -> the numbers in its code, in the order in which it ran, with the labels of what they count."""
    result: dict[str, list[tuple[int, Ids | None]]] = defaultdict(list)
    for constant in walk.constants:
        result[constant.module].append((constant.size, constant.ids))
    return result


def _other(walk: Walk) -> dict[str, dict[int, list[Ids]]]:
    """Module -> size -> labelled dimensions of that size of any value there."""
    result: dict[str, dict[int, list[Ids]]] = defaultdict(lambda: defaultdict(list))
    for node in walk.program.graph.nodes:
        if node.op != "call_function":
            continue
        for value in (*walk.tensors(node), node):
            for labels in walk.every_label(value):
                for ids in labels:
                    if ids is not None:
                        result[module_of(node)][len(ids)].append(ids)
    return result


def positions_of(walk: Walk, ids: Ids | None, atoms: Mapping[str, Sequence[int]]) -> Positions:
    """Group -> for each of its channels the indices of a dimension that go with it."""
    owner = {atom: (group, channel) for group, members in atoms.items() for channel, atom in enumerate(members)}
    return {} if ids is None else _positions(walk, ids, atoms, owner)


def _positions(
    walk: Walk, ids: Ids, atoms: Mapping[str, Sequence[int]], owner: Mapping[int, tuple[str, int]]
) -> Positions:
    found: dict[str, list[list[int]]] = {}
    for position, members in enumerate(walk.channels.sets(ids)):
        for atom in members:
            if atom in owner:
                group, channel = owner[atom]
                found.setdefault(group, [[] for _ in atoms[group]])[channel].append(position)
    return {group: tuple(tuple(where) for where in columns) for group, columns in found.items()}
