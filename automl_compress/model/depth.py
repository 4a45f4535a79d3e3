"""Removable parts of a traced model: branches of residual additions, and whole layers of a repeated kind."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from automl_compress.core.graph import Block, Graph
from automl_compress.model.attributes import CONTAINERS, positions_of
from automl_compress.model.checks import TOLERANCE, deviation
from automl_compress.model.reference import Reference
from automl_compress.model.surgery import cut
from automl_compress.model.walk import Walk, base_operator, module_stack

Atoms = Mapping[str, Sequence[int]]


def removable_blocks(model: nn.Module, walk: Walk, atoms: Atoms) -> tuple[Block, ...]:
    """Residual branches, and repeated layers that can't be removed branch by branch, in execution order."""
    branches = list(_branches(walk, atoms))
    known = {frozenset(block.layers) for block in branches}
    onward = {block.output: block.replacement for block in branches}
    whole = [
        block
        for block in _repeated_layers(model, walk)
        if frozenset(block.layers) not in known and not _leads(onward, block.output, block.replacement)
    ]
    order = {use.name: number for number, use in reversed(list(enumerate(walk.layers)))}
    found = sorted([*branches, *whole], key=lambda block: (order[block.layers[0]], -len(block.layers)))
    return _named_apart(found)


def _branches(walk: Walk, atoms: Atoms) -> Iterator[Block]:
    """Branches that end in an addition whose other side has the sum's shape and doesn't need the branch."""
    layer_nodes = {use.node for use in walk.layers}
    for node in walk.program.graph.nodes:
        if node.op != "call_function" or base_operator(node) != "add" or len(walk.tensors(node)) != 2:
            continue
        sides = walk.tensors(node)
        if any(walk.shape(side) != walk.shape(node) or side.op != "call_function" for side in sides):
            continue
        choice = _branch_side(node, sides, layer_nodes)
        block = _branch_block(walk, *choice, node, atoms) if choice else None
        if block is not None:
            yield block


def _branch_side(addition: Node, sides: list[Node], layer_nodes: set[Node]) -> tuple[Node, set[Node]] | None:
    """Which side of an addition is the branch, and its nodes. Where both hold layers, the one with more of them is, and
    the other the projected shortcut; sums of parallel equals have no branch."""
    able = [(side, branch) for side in sides if (branch := _only_for(side, addition)) & layer_nodes]
    if len(able) < 2:
        return able[0] if able else None
    able.sort(key=lambda pair: len(pair[1] & layer_nodes))
    (_, shorter), (side, branch) = able
    equal = len(shorter & layer_nodes) == len(branch & layer_nodes)
    return None if equal or base_operator(side) == "add" else (side, branch)


def _only_for(side: Node, addition: Node) -> set[Node]:
    """The nodes that nothing but this side of the addition uses."""
    members: set[Node] = set()
    frontier = [side] if set(side.users) == {addition} else []
    while frontier:
        node = frontier.pop()
        members.add(node)
        for source in node.all_input_nodes:
            if source.op == "call_function" and source not in members and source.users.keys() <= members:
                frontier.append(source)
    return members


def _branch_block(walk: Walk, side: Node, branch: set[Node], addition: Node, atoms: Atoms) -> Block | None:
    layers = tuple(dict.fromkeys(use.name for use in walk.layers if use.node in branch))
    modules = _outermost(walk, branch)
    if not modules:
        return None
    last = [node for node in walk.program.graph.nodes if node in branch and modules[-1] in module_stack(node)][-1]
    other = next(node for node in walk.tensors(addition) if node is not side)
    return Block(
        name=_common_prefix(list(layers)) or layers[0],
        layers=layers,
        modules=modules,
        output=addition.name,
        replacement=other.name,
        addition=addition.name,
        shape=(1, *walk.shape(last)[1:]),
        channels=tuple(positions_of(walk, ids, atoms) for ids in walk.labels(last)),
    )


def _outermost(walk: Walk, branch: set[Node]) -> tuple[str, ...]:
    """The modules that run nothing outside a branch and lie in no other such module, by when they finish."""
    outside: set[str] = set()
    inside: dict[str, int] = {}
    for number, node in enumerate(walk.program.graph.nodes):
        if node.op == "call_function":
            for path in module_stack(node):
                if node in branch:
                    inside[path] = number
                else:
                    outside.add(path)
    own = [path for path in inside if path and path not in outside]
    top = [path for path in own if not any(path.startswith(other + ".") for other in own)]
    return tuple(sorted(top, key=inside.__getitem__))


def _repeated_layers(model: nn.Module, walk: Walk) -> Iterator[Block]:
    """Modules with siblings of their class whose input and output hold the same channels of the same shape."""
    nodes: dict[str, list[Node]] = defaultdict(list)
    for node in walk.program.graph.nodes:
        if node.op == "call_function":
            for path in dict.fromkeys(module_stack(node)):
                nodes[path].append(node)
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        siblings = [m for m in model.get_submodule(parent).children() if type(m) is type(module)] if path else []
        if len(siblings) < 2 or not list(module.children()) or path not in nodes or type(module) in CONTAINERS:
            continue
        members = set(nodes[path])
        entering = {
            source
            for node in nodes[path]
            for source in walk.tensors(node)
            if source.op == "call_function" and source not in members
        }
        leaving = [node for node in nodes[path] if any(user not in members for user in node.users)]
        layers = tuple(dict.fromkeys(use.name for use in walk.layers if use.node in members))
        if len(entering) != 1 or len(leaving) != 1 or not layers:
            continue
        source, output = next(iter(entering)), leaving[0]
        if walk.shape(source) == walk.shape(output) and _same_channels(walk, source, output):
            yield Block(
                name=path,
                layers=layers,
                modules=(path,),
                output=output.name,
                replacement=source.name,
                ending="input",
                shape=(1, *walk.shape(output)[1:]),
            )


def _leads(onward: Mapping[str, str], start: str, end: str) -> bool:
    """Whether removing branches one by one gives the same as removing the layer whole."""
    while start in onward:
        start = onward[start]
    return start == end


def _same_channels(walk: Walk, one: Node, other: Node) -> bool:
    for a, b in zip(walk.labels(one), walk.labels(other), strict=True):
        if (a is None) != (b is None) or (
            a is not None and b is not None and walk.channels.sets(a) != walk.channels.sets(b)
        ):
            return False
    return True


def _named_apart(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Two branches in one module (attention and MLP of a transformer layer) are told apart by their first layer."""
    names = [block.name for block in blocks]
    once = [replace(b, name=b.layers[0]) if names.count(b.name) > 1 and b.ending != "input" else b for b in blocks]
    seen: dict[str, int] = defaultdict(int)
    result = []
    for block in once:
        seen[block.name] += 1
        result.append(block if seen[block.name] == 1 else replace(block, name=f"{block.name}#{seen[block.name]}"))
    return tuple(result)


def _common_prefix(names: list[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    prefix: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        prefix.append(column[0])
    return ".".join(prefix)


def blocks_that_work(
    model: nn.Module, inputs: tuple[Tensor, ...], reference: Reference, graph: Graph
) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """(those that can be taken out of the model's code, those that can't).

    Blocks that don't overlap are removed together first: on most models nothing fails and a few trials are enough.
    """

    def agree(blocks: Sequence[Block]) -> bool:
        passed = {block.output: block.replacement for block in blocks}
        trial = replace(graph, blocks=tuple(blocks))
        try:
            with torch.no_grad():
                outputs = cut(model, trial, kept={}, drop=[block.name for block in blocks])(*inputs)
        except Exception:  # whatever the user's forward raises without the branch means the same: not this block
            return False
        return deviation(outputs, reference.run(inputs, (), passed=passed)) <= TOLERANCE

    good = {block.name for layer in _disjoint(graph.blocks) for block in _agreeing(layer, agree)}
    kept = tuple(block for block in graph.blocks if block.name in good)
    return kept, tuple(block for block in graph.blocks if block.name not in good)


def _disjoint(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks in as few lists as needed for no list to hold two that share a layer."""
    lists: list[tuple[list[Block], set[str]]] = []
    for block in blocks:
        for members, taken in lists:
            if not taken.intersection(block.layers):
                members.append(block)
                taken.update(block.layers)
                break
        else:
            lists.append(([block], set(block.layers)))
    return [members for members, _ in lists]


def _agreeing(blocks: Sequence[Block], agree: Callable[[Sequence[Block]], bool]) -> list[Block]:
    if agree(blocks):
        return list(blocks)
    kinds: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        kinds[re.sub(r"\d+", "*", block.name)].append(block)
    if len(kinds) > 1:
        return [block for members in kinds.values() for block in _agreeing(members, agree)]
    if len(blocks) == 1 or (not agree(blocks[:1]) and len(blocks) > 2 and not agree(blocks[-1:])):
        return []
    half = len(blocks) // 2
    return [*_agreeing(blocks[:half], agree), *_agreeing(blocks[half:], agree)]
