"""What each option costs in quality, one at a time, from training samples alone: the search's prior.

An option is applied to the otherwise untouched original, and the distance of the outputs is taken (Kullback-Leibler
divergence for classification), on samples that nothing was fitted to. Of a channel group, two sparsities are measured,
and the others lie along the curve that the elimination of its channels has: squared error against channels removed,
which is convex and starts at 0. Where width and bits of one layer cost most, both are applied together, and what the
bits lose more or less than alone is told for every other width. The table is kept in the run folder and reused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.evaluation.lines import append_line, read_lines
from automl_compress.search.evaluation.student import Students
from automl_compress.search.space.offers import Option
from automl_compress.search.space.space import Decision, SearchSpace
from automl_compress.search.table.table import QualityKey

ANCHORS = (0.375, 0.75)
"""The sparsities that are measured, or rather the options nearest to them."""
Sensitivity = dict[QualityKey, float]
Measure = Callable[[Plan], float]
_LEAST = 1e-12
_PAIRS = 3
_FURTHEST = (-1.0, 4.0)
"""Between these a joint effect is believed: it's a difference of distances on few samples."""


def measure_sensitivity(
    bench: Workbench, space: SearchSpace, file: Path | None = None, advance: Callable[[], None] = lambda: None
) -> Sensitivity:
    """Decision and option -> distance from the original; 0 for the option that changes nothing.

    What `file` already holds for this model is not measured again; what is new is appended at once.
    """
    known = _load(file)
    result: Sensitivity = {}
    for decision in space.decisions:
        keys = {option: f"{decision.name}={option}" for option in decision.options}
        if decision.kind == "sparsity" and not set(keys.values()) <= known.keys():
            found = along_curve(bench.students, space, decision, bench.distance_of)
        else:
            found = {}
        for option, key in keys.items():
            if key not in known:
                known[key] = found[option] if found else _one(bench, decision, option)
                if file is not None:
                    append_line(file, {"option": key, "distance": known[key]})
            result[decision.name, option] = known[key]
            advance()
    return result


def along_curve(
    students: Students, space: SearchSpace, decision: Decision, measure: Measure, anchors: Sequence[float] = ANCHORS
) -> dict[Option, float]:
    """Option of a channel group -> loss: measured at the options nearest to `anchors`, the others estimated between and
    beyond them. More channels removed never count as less lost: small differences are noise of few samples."""
    group, size = decision.target, space.graph.group[decision.target].size
    kept = {option: Plan(sparsity={"": float(option)}).kept_count("", size) for option in decision.options}
    curve = {option: _curve(students, group, size, count) for option, count in kept.items()}
    cut = [option for option in decision.options if kept[option] < size]
    points = sorted({min(cut, key=lambda option: abs(float(option) - anchor)) for anchor in anchors}) if cut else []
    ratios = [max(0.0, measure(single(decision, option))) / max(curve[option], _LEAST) for option in points]
    result: dict[Option, float] = {}
    most = 0.0
    for option in decision.options:
        ratio = float(np.interp(float(option), [float(p) for p in points], ratios)) if points else 0.0
        most = max(most, ratio * curve[option])
        result[option] = most
    return result


def measure_joint(
    bench: Workbench, space: SearchSpace, quality: Mapping[QualityKey, float], file: Path | None = None
) -> dict[str, float]:
    """Layer -> by what share of itself the loss by fewer bits would change if all output channels went.

    Measured with the lowest bit-width and a sparsity of the layer's output channels, both from one repaired model on
    the same samples, for the few layers of `joint_options`. The change is taken to be the same share at every
    bit-width, and to grow with the channels removed. Kept in `file` like what the options lose alone.
    """
    known = _load(file)
    result: dict[str, float] = {}
    for name, bits, group, option in joint_options(space, quality):
        key = f"bits.{name}={bits} with sparsity.{group}={option}"
        cut = Plan(sparsity={group: float(option)})
        if key not in known:
            model, plan = bench.student(cut)
            together = bench.distortion(bench.export(model, replace(plan, bits={name: bits})))
            known[key] = together - bench.distortion(bench.export(model, plan))
            if file is not None:
                append_line(file, {"option": key, "distance": known[key]})
        layer = space.graph.layer[name]
        removed = 1.0 - cut.widths(space.graph)[name][1] / layer.out_channels
        alone = quality[f"bits.{name}", bits]
        result[name] = float(np.clip((known[key] / alone - 1.0) / removed, *_FURTHEST))
    return result


def joint_options(space: SearchSpace, quality: Mapping[QualityKey, float]) -> list[tuple[str, int, str, Option]]:
    """(layer, its lowest bit-width, group of its output channels, sparsity): of every group the layer that loses most
    by fewer bits, and of these the pairs with the largest product of what each loses alone."""
    found: list[tuple[float, tuple[str, int, str, Option]]] = []
    for group in space.graph.groups:
        sizes = {
            o: Plan(sparsity={"": float(o)}).kept_count("", group.size) for o in space.options(f"sparsity.{group.name}")
        }
        cut = [option for option, kept in sizes.items() if kept < group.size]
        lowest = {
            layer.name: min(int(b) for b in space.options(f"bits.{layer.name}"))
            for layer in space.graph.layers
            if group.name in layer.out_groups and space.options(f"bits.{layer.name}")
        }
        alone = {x: quality.get((f"bits.{x}", b), 0.0) for x, b in lowest.items() if b < FULL_BITS}
        if not cut or not alone:
            continue
        name = max(alone, key=lambda x: alone[x])
        option = min(cut, key=lambda o: abs(float(o) - ANCHORS[0]))
        product = alone[name] * quality.get((f"sparsity.{group.name}", option), 0.0)
        if product > 0 and name not in {pair[0] for _, pair in found}:
            found.append((product, (name, lowest[name], group.name, option)))
    return [pair for _, pair in sorted(found, key=lambda entry: -entry[0])[:_PAIRS]]


def single(decision: Decision, option: Option) -> Plan:
    """The plan that takes this option and changes nothing else."""
    match decision.kind:
        case "width":
            return Plan(width=float(option))
        case "sparsity":
            return Plan(sparsity={decision.target: float(option)})
        case "drop":
            return Plan(drop=frozenset([decision.target]) if option else frozenset())
        case "bits":
            return Plan(bits={decision.target: int(option)})
        case "mask":
            return Plan(masks={decision.target: str(option)})


def _one(bench: Workbench, decision: Decision, option: Option) -> float:
    plan = single(decision, option)
    return 0.0 if plan.key == Plan().key else max(0.0, bench.distance_of(plan))


def _curve(students: Students, group: str, size: int, kept: int) -> float:
    """The error that elimination has counted when so many channels are left; the square of the fraction removed where
    there is no such count."""
    if kept == size:
        return 0.0
    losses = students.evidence.eliminations.get(group)
    return float(losses.sort().values[size - kept - 1]) if losses is not None else (1 - kept / size) ** 2


def _load(file: Path | None) -> dict[str, float]:
    """A line an option; a line that a kill cut short is measured again."""
    known: dict[str, float] = {}
    for entry in read_lines(file) if file is not None else ():
        with suppress(ValueError, KeyError, TypeError):
            known[str(entry["option"])] = float(entry["distance"])
    return known
