"""Trying cuts: nothing is offered on the word of the rules alone.

All groups are cut at once, and the result is compared with the reference. Where the cut model raises, the module that
was running tells which numbers in the code are wrong; where it differs, groups are bisected.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations, product

import torch
from torch import Tensor, nn

from automl_compress.core.graph import ChannelGroup, Graph
from automl_compress.errors import raised
from automl_compress.model.attributes import CONTAINERS, STANDARD, Candidate, Decision, decide
from automl_compress.model.reference import Reference
from automl_compress.model.surgery import cut

_log = logging.getLogger(__name__)
TOLERANCE = 1e-3
_MAX_ATTRIBUTE_TRIALS = 24

Pattern = Callable[[int, int], Sequence[int]]  # (number of the group, its size) -> kept channels


def every_second(number: int, size: int) -> Sequence[int]:
    """Half of the channels: the cut that most users ask for."""
    return range(0, size, 2)


def uneven(number: int, size: int) -> Sequence[int]:
    """Another count for each group, so that no number fits by accident."""
    count = size - 1 - number % max(1, size - 1)
    return range(size - count, size)


def the_first_few(number: int, size: int) -> Sequence[int]:
    """Nearly everything goes, and the last index with it."""
    return range(1 + 3 * number % max(1, size // 4))


PATTERNS = (every_second, uneven, the_first_few)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a cut was rejected: what was raised and the module that ran, if it raised."""

    reason: str
    module: str | None = None


@dataclass
class Trial:
    """Cuts of one traced model, compared with its reference."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    reference: Reference
    graph: Graph
    atoms: Mapping[str, Sequence[int]]
    attributes: Sequence[Candidate]
    choice: dict[Decision, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # group -> reason

    def __post_init__(self) -> None:
        self._kinds = {name: type(module) for name, module in self.model.named_modules(remove_duplicate=False)}
        self._number = {group.name: number for number, group in enumerate(self.graph.groups)}

    def settled(self, *, known_good: bool = False) -> Graph:
        """The graph with the groups that can be cut, and the attributes that follow them. `known_good` says that
        everything can."""
        if known_good:
            return self._with(self.graph.groups)
        active = self._settle(list(self.graph.groups))
        for pattern in PATTERNS:
            if self._fails(active, pattern) is not None:
                active = self._added([], active, pattern)
        return self._with(active)

    def first_failure(self) -> Failure | None:
        """What happens when everything is cut, numbers in the code having been mended as far as possible."""
        groups = list(self.graph.groups)
        for pattern in PATTERNS:
            failure = self._fails(groups, pattern)
            while failure is not None:
                mended = self._mended(groups, failure, pattern)
                if mended is failure:
                    return failure
                failure = mended
        return None

    def kind(self, module: str) -> type:
        return self._kinds[module]

    def _settle(self, groups: list[ChannelGroup]) -> list[ChannelGroup]:
        active, aside = list(groups), []
        while (failure := self._fails(active, every_second)) is not None:
            mended = self._mended(active, failure, every_second)
            if mended is not failure:
                continue
            suspects = self._touching(active, failure.module) if failure.module is not None else []
            if not suspects or len(suspects) == len(active):
                return self._added([], groups, every_second)
            active = [group for group in active if group not in suspects]
            aside += suspects
        return self._added(active, aside, every_second) if aside else active

    def _added(self, base: list[ChannelGroup], more: list[ChannelGroup], pattern: Pattern) -> list[ChannelGroup]:
        """`base` and those of `more` with which it still agrees."""
        for unit in _siblings(more):
            base = self._added_unit(base, unit, pattern)
        return base

    def _added_unit(self, base: list[ChannelGroup], unit: list[ChannelGroup], pattern: Pattern) -> list[ChannelGroup]:
        failure = self._fails([*base, *unit], pattern)
        while failure is not None:
            mended = self._mended([*base, *unit], failure, pattern)
            if mended is failure:
                break
            failure = mended
        if failure is None:
            return [*base, *unit]
        if len(unit) == 1:
            self.refused[unit[0].name] = failure.reason
            return base
        first = self._added_unit(base, unit[:1], pattern)
        if first == base:  # siblings share their code
            self.refused.update(dict.fromkeys((group.name for group in unit), failure.reason))
            return base
        half = (len(unit) + 1) // 2
        base = self._added_unit(first, unit[1:half], pattern) if half > 1 else first
        return self._added_unit(base, unit[half:], pattern)

    def _mended(self, groups: Sequence[ChannelGroup], failure: Failure, pattern: Pattern) -> Failure | None:
        """What happens with other meanings of the attributes of the module that raised; `failure` itself if no other
        meaning gets beyond that module."""
        if failure.module is None:
            return failure
        kind = self._kinds[failure.module]
        open_decisions: dict[Decision, int] = {}
        for candidate in self.attributes:
            if self._kinds[candidate.user] is kind:
                open_decisions[candidate.decision] = max(
                    open_decisions.get(candidate.decision, 0), len(candidate.options)
                )
        before = dict(self.choice)
        further: tuple[dict[Decision, int], Failure] | None = None
        for choice in _other_choices(open_decisions, before):
            self.choice = before | choice
            now = self._fails(groups, pattern)
            if now is None:
                return None
            if further is None and now.module is not None and self._kinds[now.module] is not kind:
                further = (self.choice, now)
        self.choice = before
        if further is None:
            return failure
        self.choice, now = further
        return now

    def _touching(self, groups: Sequence[ChannelGroup], module: str) -> list[ChannelGroup]:
        """The groups that the numbers in the code of this kind of module count."""
        kind, walk = self._kinds[module], self.reference.walk
        touched: set[int] = set()
        for constant in walk.constants:
            if constant.ids is not None and self._kinds.get(constant.module) is kind:
                touched.update(atom for atoms in walk.channels.sets(constant.ids) for atom in atoms)
        return [group for group in groups if touched.intersection(self.atoms[group.name])]

    def _with(self, groups: Sequence[ChannelGroup]) -> Graph:
        names = {group.name for group in groups}
        kept = tuple(group for group in self.graph.groups if group.name in names)
        attributes = []
        for attribute in decide(self.attributes, self.choice):
            positions = {group: where for group, where in attribute.positions.items() if group in names}
            if positions:
                attributes.append(replace(attribute, positions=positions))
        return replace(self.graph, groups=kept, attributes=tuple(attributes))

    def _fails(self, groups: Sequence[ChannelGroup], pattern: Pattern) -> Failure | None:
        """Cut these groups; None if the result equals the reference."""
        if not groups:
            return None
        kept = {group.name: frozenset(pattern(self._number[group.name], group.size)) for group in groups}
        running: list[str] = []
        try:
            small = cut(self.model, self._with(groups), kept=kept)
            with torch.no_grad(), _watched(small) as running:
                outputs = small(*self.inputs)
        except (MemoryError, torch.OutOfMemoryError):  # says nothing of the cut
            raise
        except Exception as error:  # whatever the user's forward raises on smaller tensors means the same: not this cut
            reason = raised(error)[:160]
            innermost = running[-1] if running else ""
            _log.debug("%d groups: %s in %r", len(groups), reason, innermost)
            return Failure(reason=reason, module=self._to_blame(innermost))
        return self._differs(outputs, groups, kept)

    def _to_blame(self, module: str) -> str:
        """The code that gave a standard layer the wrong shape is that of the module around it."""
        while module and issubclass(self._kinds[module], (*STANDARD, *CONTAINERS)):
            module = module.rpartition(".")[0]
        return module

    def _differs(
        self, outputs: object, groups: Sequence[ChannelGroup], kept: Mapping[str, frozenset[int]]
    ) -> Failure | None:
        removed = [
            atom
            for group in groups
            for channel, atom in enumerate(self.atoms[group.name])
            if channel not in kept[group.name]
        ]
        distance = deviation(outputs, self.reference.run(self.inputs, removed))
        if distance <= TOLERANCE:
            return None
        _log.debug("%d groups: differ by %g", len(groups), distance)
        return Failure(reason=f"a cut changes what the rest computes (by {distance:.2g} of the outputs' scale)")


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules that are running, outermost first; what is left after an exception is where it was."""
    running: list[str] = []
    handles = []

    def leave(*_: object) -> None:
        running.pop()

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: running.append(path)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _other_choices(options: Mapping[Decision, int], current: Mapping[Decision, int]) -> Iterator[dict[Decision, int]]:
    """Choices of the decisions' options other than the current one: those that change one decision, then two."""
    count = 0
    for changed in (1, 2):
        for decisions in combinations(options, changed):
            others = [[n for n in range(options[d] + 1) if n != current.get(d, 0)] for d in decisions]
            for numbers in product(*others):
                if count < _MAX_ATTRIBUTE_TRIALS:
                    yield dict(zip(decisions, numbers, strict=True))
                    count += 1


def _siblings(groups: Sequence[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Groups at the same place of repeated blocks."""
    units: dict[tuple[str, int], list[ChannelGroup]] = {}
    for group in groups:
        units.setdefault((re.sub(r"\d+", "*", group.name), len(group.places)), []).append(group)
    return list(units.values())


def deviation(one: object, other: object) -> float:
    """The largest difference of two outputs (tensors, or nested lists, tuples and mappings of them), as a share of the
    largest value; infinite if their shapes differ or a value isn't finite."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or not bool(torch.isfinite(one.float()).all()):
            return float("inf")
        if not one.numel():
            return 0.0
        one, other = one.detach(), other.detach()
        scale = max(float(other.abs().max()), 1e-6)
        return float((one.float() - other.float()).abs().max()) / scale
    left, right = _flat(one), _flat(other)
    if len(left) != len(right):
        return float("inf")
    return max((deviation(a, b) for a, b in zip(left, right, strict=True)), default=0.0)


def _flat(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _flat(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _flat(item)]
    return []
