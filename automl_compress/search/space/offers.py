"""What a rule offers one target on a device, and what of it is left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from automl_compress.core.graph import Graph, Layer
from automl_compress.core.masks import NO_MASK, mask_problem
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.errors import SpaceError
from automl_compress.search.space.rules import Rule
from automl_compress.search.space.targets import Target
from automl_compress.techniques.quantization.formats import BITS, Executions

Option = float | int | bool | str
"""What can be chosen: a sparsity, a width, a bit-width, whether a block goes, a mask."""
Widths = Mapping[str, tuple[int, ...]]
"""Kind of layer ("conv", "transposed conv", "linear") -> bit-widths."""

_TRANSPOSED = "transposed conv"
# Kind of layer -> which of a profile's operators speak of it, and which executions it has a form for.
_EXECUTABLE: Mapping[str, tuple[str, frozenset[str]]] = {
    "conv": ("conv", frozenset({"native", "emulated", "storage"})),
    _TRANSPOSED: ("conv", frozenset({"storage"})),
    "linear": ("linear", frozenset({"native", "emulated", "weight-only", "storage"})),
}


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An option that a rule names and that isn't offered. `decision`: as in `SearchSpace`."""

    decision: str
    option: Option
    reason: str


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The options for one decision, what changes least first, and those that a rule names beside them."""

    options: tuple[Option, ...]
    left_out: tuple[LeftOut, ...] = ()


def offered_bits(
    executions: Executions, *, size_limited: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """(kind of layer -> bit-widths to offer, kind -> those held back), given how a device runs them.

    Bit-widths that make the file smaller and nothing faster (emulated, storage) are held back unless size is limited.
    Transposed convolutions have no integer kernels: what isn't only stored stays in 32 bits.
    """
    offered: dict[str, tuple[int, ...]] = {}
    held: dict[str, tuple[int, ...]] = {}
    for kind, (operators, executable) in _EXECUTABLE.items():
        known = {b: e for (k, b), e in executions.items() if k == operators and b in BITS and b != FULL_BITS}
        usable = {b for b, e in known.items() if e in executable}
        faster = {b for b in usable if size_limited or known[b] in ("native", "weight-only")}
        offered[kind] = tuple(sorted({*faster, FULL_BITS}))
        held[kind] = tuple(sorted(usable - faster))
    return offered, held


def offer(rule: Rule, what: str, target: Target, graph: Graph, bit_widths: Widths, held: Widths) -> Offer:
    """What `rule` gives `target` for `what`: 'sparsity', 'drop', 'bits' or 'mask'.

    Raises SpaceError for a single bit-width or mask that the layer can't have.
    """
    name = f"{what}.{target.name}"
    if what == "sparsity":
        return _sparsities(rule, name, target.channels)
    if what == "drop":
        return Offer(options={"always": (True,), "true": (False, True), "false": (False,)}[str(rule.drop).lower()])
    if what == "mask":
        return _masks(rule, name, graph.layer[target.name])
    layer = graph.layer[target.name]
    kind = _TRANSPOSED if layer.transposed else layer.kind
    return _bits(rule, name, kind, bit_widths.get(kind, (FULL_BITS,)), held.get(kind, ()))


def _sparsities(rule: Rule, name: str, size: int) -> Offer:
    """Ascending; of those that leave equally many channels the lowest."""
    assert rule.sparsity is not None
    if not isinstance(rule.sparsity, list):
        return Offer(options=(rule.sparsity,))
    kept: dict[int, float] = {}
    left_out = []
    for option in sorted({0.0, *rule.sparsity}):
        count = Plan(sparsity={"": float(option)}).kept_count("", size)
        if kept.setdefault(count, option) != option:
            reason = f"leaves {count} of {size} channels, as {kept[count]:g} does"
            left_out.append(LeftOut(decision=name, option=option, reason=reason))
    return Offer(options=tuple(kept.values()), left_out=tuple(left_out))


def _bits(rule: Rule, name: str, kind: str, offered: Sequence[int], held: Sequence[int]) -> Offer:
    assert rule.bits is not None
    if not isinstance(rule.bits, list):
        if rule.bits not in (*offered, *held, FULL_BITS):
            raise SpaceError(
                f"rule {rule.text}: {name.partition('.')[2]} can't be fixed to {rule.bits} bits, the device has for "
                f"{kind} {', '.join(map(str, sorted({*offered, *held})))}; write a list to offer bits where they run"
            )
        return Offer(options=(rule.bits,))
    wanted = sorted({FULL_BITS, *rule.bits}, reverse=True)
    usable = {*offered, FULL_BITS}
    has = f"the device has {', '.join(map(str, offered))} for {kind}"
    storage = "they make the file smaller but nothing faster here, and size is not limited"
    return Offer(
        options=tuple(bits for bits in wanted if bits in usable),
        left_out=tuple(
            LeftOut(decision=name, option=bits, reason=storage if bits in held else has)
            for bits in wanted
            if bits not in usable
        ),
    )


def _masks(rule: Rule, name: str, layer: Layer) -> Offer:
    """'none' first, the others as they were written; a fixed one that the layer's shape rules out is an error."""
    assert rule.mask is not None
    if not isinstance(rule.mask, list):
        problem = mask_problem(rule.mask, layer)
        if problem is not None:
            raise SpaceError(problem)
        return Offer(options=(rule.mask,))
    wanted = dict.fromkeys((NO_MASK, *rule.mask))
    problems = {text: mask_problem(text, layer) for text in wanted}
    return Offer(
        options=tuple(text for text in wanted if problems[text] is None),
        left_out=tuple(
            LeftOut(decision=name, option=text, reason=problem.partition(";")[0].partition(": ")[2])
            for text, problem in problems.items()
            if problem is not None
        ),
    )


def left_out_notes(left_out: Iterable[LeftOut], graph: Graph) -> list[str]:
    """What isn't offered, in lines for the report: bit-widths by kind of layer, masks one by one. Sparsities that come
    to the same number of channels are no loss and left to `automl-compress space`."""
    bits: Counter[tuple[str, int, str]] = Counter()
    masks = []
    for entry in left_out:
        what, _, target = entry.decision.partition(".")
        if what == "bits":
            bits[graph.layer[target].kind, int(entry.option), entry.reason] += 1
        elif what == "mask":
            masks.append(f"mask not offered: {target}: {entry.reason}")
    return [
        f"{count} {kind} layer{'s' if count > 1 else ''}: {width} bits not offered, {reason}"
        for (kind, width, reason), count in sorted(bits.items())
    ] + masks
