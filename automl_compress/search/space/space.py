"""What may be decided about a network: options for the student's width, each channel group, block and layer.

A space is a file of rules; `resolve` applies them to one network. For each target the first rule that matches decides,
and a rule that never matched is an error, because it usually is a misspelt name. A list offers options beside doing
nothing, which is always among them; a single value (`sparsity: 0.5`, `bits: 8`, `drop: always`) leaves no choice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from automl_compress.core.graph import Graph
from automl_compress.core.masks import NO_MASK
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.errors import PlanError, SpaceError
from automl_compress.search.space.offers import LeftOut, Option, left_out_notes, offer, offered_bits
from automl_compress.search.space.rules import Importance, SpaceFile, check_unused, load_space
from automl_compress.search.space.targets import targets_of

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution

__all__ = ["Decision", "SearchSpace", "SpaceFile", "load_space", "offered_bits", "resolve"]

Kind = Literal["width", "sparsity", "drop", "bits", "mask"]
_KINDS: dict[str, tuple[Kind, ...]] = {"channel-group": ("sparsity",), "block": ("drop",), "layer": ("bits", "mask")}
Identity = tuple[tuple[str, ...], tuple[tuple[str, int], ...], tuple[tuple[str, int], ...], tuple[tuple[str, str], ...]]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One choice. `options` are in ascending order of effect: the first changes the network least."""

    name: str
    kind: Kind
    target: str
    options: tuple[Option, ...]

    @property
    def neutral(self) -> Option:
        """The option that changes the network least: doing nothing, unless a rule doesn't allow that."""
        return self.options[0]


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Everything that can be decided about one network.

    decisions   the choices that have more than one option
    fixed       decision name -> the only option, for choices that have one
    importance  the criterion that says which channels are kept
    notes       what the rules offered and why it isn't offered here, one line each
    left_out    the same option by option
    decided_by  decision name -> number of the rule that decides about it, from 1
    """

    name: str
    importance: Importance = "l2"
    decisions: tuple[Decision, ...]
    fixed: Mapping[str, Option] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    decided_by: Mapping[str, int] = field(default_factory=dict)
    graph: Graph = field(repr=False)

    @cached_property
    def decision(self) -> dict[str, Decision]:
        return {decision.name: decision for decision in self.decisions}

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the network's structure and all options: equal spaces have equal fingerprints."""
        options = {d.name: list(d.options) for d in self.decisions}
        text = json.dumps([self.graph.fingerprint, self.importance, options, dict(self.fixed)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def require_effect(self) -> None:
        """Raise SpaceError if the original is all that there is. A single other plan is worth delivering."""
        if not self.decisions and self.identity(self.plan({})) == self.identity(Plan()):
            reasons = "; ".join(self.notes) or "its rules and width leave everything as it is"
            raise SpaceError(
                f"space {self.name} offers nothing for this network ({reasons}): add rules, or use a preset such as cnn"
            )

    def options(self, name: str) -> tuple[Option, ...]:
        """A decision's options, also where there is only one; empty if nothing decides about that."""
        if name in self.decision:
            return self.decision[name].options
        return (self.fixed[name],) if name in self.fixed else ()

    def neutral(self) -> dict[str, Option]:
        """The parameters that change the network least."""
        return {d.name: d.neutral for d in self.decisions}

    def plan(self, params: Mapping[str, Option]) -> Plan:
        """The plan that these parameters mean; absent ones change nothing. PlanError for anything not on offer."""
        chosen = {**self.neutral(), **params}
        for name, value in chosen.items():
            if name not in self.decision or value not in self.decision[name].options:
                raise PlanError(f"{name}={value!r} is not among the options {self.options(name)} of space {self.name}")
        return plan_of({**chosen, **self.fixed})

    def params(self, plan: Plan) -> dict[str, Option]:
        """The parameters that mean this plan. PlanError names the first choice that the space doesn't offer."""
        found = {d.name: self._option(plan, d.name) for d in self.decisions}
        again = self.plan(found)
        if self.identity(again) != self.identity(plan):
            difference = _difference(self.identity(plan), self.identity(again))
            raise PlanError(f"the plan can't be written in space {self.name}: {difference}")
        return found

    def _option(self, plan: Plan, name: str) -> Option:
        decision = self.decision[name]
        kind, target = decision.kind, decision.target
        if kind == "width":
            wanted: Option = plan.width
        elif kind == "drop":
            wanted = target in plan.drop
        elif kind == "bits":
            wanted = plan.layer_bits(target)
        elif kind == "mask":
            wanted = plan.masks.get(target, NO_MASK)
        else:
            wanted = plan.sparsity.get(target, 0.0)
        if wanted in decision.options:
            return next(option for option in decision.options if option == wanted)
        if kind == "sparsity":
            size = self.graph.group[target].size
            for option in decision.options:
                other = replace(plan, sparsity={target: float(option)}, kept={})
                if other.kept_count(target, size) == plan.kept_count(target, size):
                    return option
        raise PlanError(f"{name}={wanted!r} is not among the options {decision.options} of space {self.name}")

    def identity(self, plan: Plan) -> Identity:
        """What the plan comes down to: equal for plans that make the same network, however they say it.

        Removed blocks, kept channels of the groups, bits and masks of the layers that remain. A block inside of a
        removed one, and anything decided about what is gone, doesn't count.
        """
        gone = {layer.name for layer in self.graph.layers if plan.drop.intersection(layer.blocks)}
        drop = {b for b in plan.drop if not any(self._inside(b, other) for other in plan.drop if other != b)}
        kept = {
            g.name: plan.kept_count(g.name, g.size)
            for g in self.graph.groups
            if not gone.issuperset((*g.producers, *g.consumers))
        }
        bits = {layer.name: plan.layer_bits(layer.name) for layer in self.graph.layers if layer.name not in gone}
        masks = {k: v for k, v in plan.masks.items() if k not in gone and v != NO_MASK}
        return (
            tuple(sorted(drop)),
            tuple(sorted(kept.items())),
            tuple(sorted(bits.items())),
            tuple(sorted(masks.items())),
        )

    def _inside(self, block: str, other: str) -> bool:
        inner, outer = set(self.graph.block[block].layers), set(self.graph.block[other].layers)
        return inner < outer

    def plan_key(self, plan: Plan) -> str:
        """A short digest of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(plan)).encode()).hexdigest()[:16]

    def distributions(self) -> dict[str, CategoricalDistribution]:
        """Decision name -> Optuna distribution over its options."""
        from optuna.distributions import CategoricalDistribution

        return {d.name: CategoricalDistribution(d.options) for d in self.decisions}


def plan_of(choices: Mapping[str, Option]) -> Plan:
    """The plan of choices by their names: 'width', 'sparsity.GROUP', 'drop.BLOCK', 'bits.LAYER', 'mask.LAYER'."""
    parts: dict[str, dict[str, Option]] = {"sparsity": {}, "drop": {}, "bits": {}, "mask": {}}
    for name, value in choices.items():
        kind, _, target = name.partition(".")
        if target:
            parts[kind][target] = value
    return Plan(
        width=float(choices.get("width", 1.0)),
        sparsity={k: float(v) for k, v in parts["sparsity"].items() if v},
        drop=frozenset(k for k, v in parts["drop"].items() if v),
        bits={k: int(v) for k, v in parts["bits"].items() if v != FULL_BITS},
        masks={k: str(v) for k, v in parts["mask"].items() if v != NO_MASK},
    )


def resolve(
    space: SpaceFile,
    graph: Graph,
    bit_widths: Mapping[str, tuple[int, ...]],
    held_back: Mapping[str, tuple[int, ...]] | None = None,
) -> SearchSpace:
    """Apply a space's rules to a network on a device for which `bit_widths[kind]` may be offered.

    Sparsities that leave the same number of channels are offered once. Bit-widths that the device doesn't have are not
    offered, nor are those of `held_back[kind]` (see `offered_bits`) unless a rule fixes them; both are noted. Raises
    SpaceError for a rule that matches nothing or contradicts another, and for a fixed bit-width that the device doesn't
    have.
    """
    held = held_back or {}
    targets = targets_of(graph)
    blocks = [target for target in targets if target.kind == "block"]
    chosen: dict[str, tuple[Option, ...]] = {}
    decided_by: dict[str, int] = {}
    left_out: list[LeftOut] = []
    always: set[str] = set()
    gone: set[str] = set()
    for target, what in [(each, what) for each in (*blocks, *targets) for what in _KINDS[each.kind]]:
        name = f"{what}.{target.name}"
        # The first rule that says something about this decides; another may decide about the layer's other choice.
        fits = (i for i, rule in enumerate(space.rules) if what in rule.gives and rule.match.fits(target))
        index = next(fits, None)
        if index is None or name in chosen:
            continue
        found = offer(space.rules[index], what, target, graph, bit_widths, held)
        outer = sorted(always.intersection(target.blocks))
        if outer:
            gone.add(target.name)
            reason = f"block {outer[0]} always goes"
            left_out += [LeftOut(decision=name, option=option, reason=reason) for option in found.options[1:]]
            continue
        always |= {target.name} if found.options == (True,) else set()
        chosen[name], decided_by[name] = found.options, index + 1
        left_out += found.left_out
    check_unused(space, {number - 1 for number in decided_by.values()}, targets, gone)
    _check_alternatives(space, graph, chosen, decided_by)
    widths = tuple(space.widths) if graph.groups else (1.0,)
    # Decisions in the network's order: groups, blocks, layers.
    order = [f"{what}.{target.name}" for target in targets for what in _KINDS[target.kind]]
    chosen = {"width": widths, **{name: chosen[name] for name in order if name in chosen}}
    notes = left_out_notes(left_out, graph)
    if len(space.widths) > 1 and not graph.groups:
        reason = "the network has no channel group that can be narrowed"
        notes.append(f"width: not offered, {reason}")
        left_out += [LeftOut(decision="width", option=width, reason=reason) for width in space.widths[1:]]
    return SearchSpace(
        name=space.name,
        importance=space.importance,
        decisions=tuple(
            Decision(name=name, kind=_kind(name), target=name.partition(".")[2], options=options)
            for name, options in chosen.items()
            if len(options) > 1
        ),
        fixed={name: options[0] for name, options in chosen.items() if len(options) == 1},
        notes=tuple(notes),
        left_out=tuple(left_out),
        decided_by=decided_by,
        graph=graph,
    )


def _check_alternatives(
    space: SpaceFile, graph: Graph, chosen: Mapping[str, tuple[Option, ...]], decided_by: Mapping[str, int]
) -> None:
    """Raise SpaceError where rules narrow the same channels in two ways, of which a plan has one."""
    narrowed = [g.name for g in graph.groups if 0 not in chosen.get(f"sparsity.{g.name}", (0,))]
    for name, other in [(one, two) for one in narrowed for two in narrowed if two in graph.alternatives[one]]:
        rules = [space.named(decided_by[f"sparsity.{group}"] - 1) for group in (name, other)]
        raise SpaceError(
            f"space {space.name}: {rules[0]} and {rules[1]} contradict each other: {name} and {other} narrow the same "
            f"channels in two ways, and a plan takes one; write a list instead of a single sparsity"
        )


def _kind(name: str) -> Kind:
    kind = name.partition(".")[0]
    return "width" if kind == "width" else next(k for kinds in _KINDS.values() for k in kinds if k == kind)


def _difference(wanted: Identity, found: Identity) -> str:
    """The first thing that differs, in words."""
    if wanted[0] != found[0]:
        return f"removed blocks {list(wanted[0])}"
    for what, one, other in (("channels of", wanted[1], found[1]), ("bits of", wanted[2], found[2])):
        for (name, value), (_, offered) in zip(one, other, strict=True):
            if value != offered:
                return f"{value} {what} {name} (the space fixes {offered})"
    if wanted[3] != found[3]:
        return f"masks {dict(wanted[3])} (the space fixes {dict(found[3])})"
    return "unknown difference"
