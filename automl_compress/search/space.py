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

from automl_compress.core.graph import Graph, Layer
from automl_compress.core.masks import NO_MASK, mask_problem
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.errors import PlanError, SpaceError
from automl_compress.search.rules import Importance, Rule, SpaceFile, Target, check_unused, load_space, targets_of
from automl_compress.search.table import Option
from automl_compress.techniques.quantization.formats import BITS, Executions

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
    """

    name: str
    importance: Importance = "l2"
    decisions: tuple[Decision, ...]
    fixed: Mapping[str, Option] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
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
        chosen.update(self.fixed)
        parts: dict[str, dict[str, Option]] = {"sparsity": {}, "drop": {}, "bits": {}, "mask": {}}
        for name, value in chosen.items():
            kind, _, target = name.partition(".")
            if target:
                parts[kind][target] = value
        return Plan(
            width=float(chosen.get("width", 1.0)),
            sparsity={k: float(v) for k, v in parts["sparsity"].items() if v},
            drop=frozenset(k for k, v in parts["drop"].items() if v),
            bits={k: int(v) for k, v in parts["bits"].items() if v != FULL_BITS},
            masks={k: str(v) for k, v in parts["mask"].items() if v != NO_MASK},
        )

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


def offered_bits(
    executions: Executions, *, size_limited: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """(kind of layer -> bit-widths to offer, kind -> those held back), given how a device runs them.

    Bit-widths that make the file smaller and nothing faster (emulated, storage) are held back unless size is limited.
    """
    offered: dict[str, tuple[int, ...]] = {}
    held: dict[str, tuple[int, ...]] = {}
    for kind in ("conv", "linear"):
        known = {b: e for (k, b), e in executions.items() if k == kind and b in BITS and b != FULL_BITS}
        usable = {b for b, e in known.items() if not (kind == "conv" and e == "weight-only")}
        faster = {b for b in usable if size_limited or known[b] in ("native", "weight-only")}
        offered[kind] = tuple(sorted({*faster, FULL_BITS}))
        held[kind] = tuple(sorted(usable - faster))
    return offered, held


def resolve(
    space: SpaceFile,
    graph: Graph,
    bit_widths: Mapping[str, tuple[int, ...]],
    held_back: Mapping[str, tuple[int, ...]] | None = None,
) -> SearchSpace:
    """Apply a space's rules to a network on a device for which `bit_widths[kind]` may be offered.

    Sparsities that leave the same number of channels are offered once. Bit-widths that the device doesn't have are not
    offered, nor are those of `held_back[kind]` (see `offered_bits`) unless a rule fixes them; both are noted. Raises
    SpaceError for a rule that matches nothing, and for a fixed bit-width that the device doesn't have.
    """
    held = held_back or {}
    targets = targets_of(graph)
    chosen: dict[str, tuple[Option, ...]] = {}
    used: set[int] = set()
    missing: dict[tuple[str, int], int] = {}
    unmasked: list[str] = []
    for target, what in [(each, what) for each in targets for what in _KINDS[each.kind]]:
        # The first rule that says something about this decides; another may decide about the layer's other choice.
        fits = (i for i, rule in enumerate(space.rules) if what in rule.gives and rule.matches(target))
        index = next(fits, None)
        if index is None:
            continue
        used.add(index)
        rule = space.rules[index]
        name = f"{what}.{target.name}"
        if what == "sparsity":
            chosen[name] = _sparsities(rule, target.channels)
        elif what == "drop":
            chosen[name] = {"always": (True,), "true": (False, True), "false": (False,)}[str(rule.drop).lower()]
        elif what == "mask":
            chosen[name] = _masks(rule, graph.layer[target.name], unmasked)
        else:
            kind = target.operator
            chosen[name] = _bits(rule, target, bit_widths.get(kind, (FULL_BITS,)), held.get(kind, ()), missing)
    check_unused(space, used, targets)
    widths = tuple(space.widths) if graph.groups else (1.0,)
    chosen = {"width": widths, **chosen}
    notes = [
        f"{count} {kind} layer{'s' if count > 1 else ''}: {bits} bits not offered, "
        + (
            "they make the file smaller but nothing faster here, and size is not limited"
            if bits in held.get(kind, ())
            else f"the device has {', '.join(map(str, bit_widths.get(kind, (FULL_BITS,))))}"
        )
        for (kind, bits), count in sorted(missing.items())
    ]
    notes += unmasked
    if len(space.widths) > 1 and not graph.groups:
        notes.append("width: not offered, the network has no channel group that can be narrowed")
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
        graph=graph,
    )


def _sparsities(rule: Rule, size: int) -> tuple[Option, ...]:
    """Ascending; of those that leave equally many channels the lowest."""
    assert rule.sparsity is not None
    if not isinstance(rule.sparsity, list):
        return (rule.sparsity,)
    kept: dict[int, float] = {}
    for option in sorted({0.0, *rule.sparsity}):
        kept.setdefault(_kept(size, option), option)
    return tuple(kept.values())


def _bits(
    rule: Rule, target: Target, offered: tuple[int, ...], held: tuple[int, ...], missing: dict[tuple[str, int], int]
) -> tuple[Option, ...]:
    assert rule.bits is not None
    if not isinstance(rule.bits, list):
        if rule.bits not in (*offered, *held, FULL_BITS):
            raise SpaceError(
                f"rule {rule.text}: {target.name} can't be fixed to {rule.bits} bits, the device has for "
                f"{target.operator} {', '.join(map(str, sorted({*offered, *held})))}; write a list to offer bits where "
                f"they run"
            )
        return (rule.bits,)
    wanted = sorted({FULL_BITS, *rule.bits}, reverse=True)
    for bits in wanted:
        if bits not in (*offered, FULL_BITS):
            missing[target.operator, bits] = missing.get((target.operator, bits), 0) + 1
    return tuple(bits for bits in wanted if bits in (*offered, FULL_BITS))


def _masks(rule: Rule, layer: Layer, unmasked: list[str]) -> tuple[Option, ...]:
    """'none' first, the others as they were written; one that the layer's shape rules out is noted, a fixed one is an
    error."""
    assert rule.mask is not None
    if not isinstance(rule.mask, list):
        problem = mask_problem(rule.mask, layer)
        if problem is not None:
            raise SpaceError(problem)
        return (rule.mask,)
    wanted = dict.fromkeys((NO_MASK, *rule.mask))
    problems = {text: mask_problem(text, layer) for text in wanted}
    unmasked += [f"mask not offered: {problem.partition(';')[0]}" for problem in problems.values() if problem]
    return tuple(text for text in wanted if problems[text] is None)


def _kept(size: int, sparsity: Option) -> int:
    return Plan(sparsity={"": float(sparsity)}).kept_count("", size)


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
