"""A plan: one complete choice of what to do to a model. Plain data that can be stored, compared and replayed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from automl_compress.core.graph import Graph
from automl_compress.core.masks import NO_MASK, mask_problem, parse_mask
from automl_compress.errors import PlanError

SCHEMA = "automl-compress/plan"
VERSION = 1
FULL_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Student width, sparsity per channel group, removed blocks, bit-width and mask per layer.

    width     fraction of every prunable group's channels that the student keeps (1 keeps all)
    sparsity  group name -> fraction of the student's channels removed on top; absent means 0
    drop      names of removed blocks
    bits      layer name -> bit-width; absent means 32 (floating point)
    masks     layer name -> mask, as in `core.masks`; absent means none. Which weights it took is in the weights' file
    kept      group name -> indices of the original's channels that stay, ascending; empty until channels were selected.
              A plan with `kept` replays to the same structure without looking at weights.
    """

    width: float = 1.0
    sparsity: Mapping[str, float] = field(default_factory=dict)
    drop: frozenset[str] = frozenset()
    bits: Mapping[str, int] = field(default_factory=dict)
    masks: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise PlanError(f"plan: width must be in (0, 1], found {self.width}")
        for name, value in self.sparsity.items():
            if not 0 <= value < 1:
                raise PlanError(f"plan: sparsity of {name} must be in [0, 1), found {value}")
        for text in self.masks.values():
            if text != NO_MASK:
                parse_mask(text)

    def kept_count(self, group: str, size: int) -> int:
        """How many of a group's `size` channels stay; at least one."""
        if group in self.kept:
            return len(self.kept[group])
        return max(1, round(size * self.width * (1.0 - self.sparsity.get(group, 0.0))))

    def kept_counts(self, graph: Graph) -> dict[str, int]:
        """Group name -> how many of its channels stay, for every group."""
        return {group.name: self.kept_count(group.name, group.size) for group in graph.groups}

    def layer_bits(self, layer: str) -> int:
        return self.bits.get(layer, FULL_BITS)

    def widths(self, graph: Graph) -> dict[str, tuple[int, int]]:
        """Layer name -> (input, output) channels that remain; layers of removed blocks are absent."""
        result = {}
        for layer in graph.layers:
            if self.drop.intersection(layer.blocks):
                continue
            kept = {
                g: self.kept_count(g, graph.group[g].size)
                for g in dict.fromkeys((*graph.groups_of(layer, "in"), *graph.groups_of(layer, "out")))
            }
            result[layer.name] = (graph.width(layer, "in", kept), graph.width(layer, "out", kept))
        return result

    @cached_property
    def key(self) -> str:
        """A short digest that is equal for equal choices (which channels were selected doesn't count)."""
        return hashlib.sha256(json.dumps(self._choices(), sort_keys=True).encode()).hexdigest()[:16]

    def _choices(self) -> dict[str, Any]:
        masks = {k: v for k, v in sorted(self.masks.items()) if v != NO_MASK}
        choices = {
            "width": self.width,
            "sparsity": {k: v for k, v in sorted(self.sparsity.items()) if v},
            "drop": sorted(self.drop),
            "bits": {k: v for k, v in sorted(self.bits.items()) if v != FULL_BITS},
        }
        return {**choices, "masks": masks} if masks else choices

    def to_json(self, graph: Graph | None = None) -> dict[str, Any]:
        """A JSON object with a schema and version; with `graph`, the structure that it belongs to."""
        data: dict[str, Any] = {"schema": SCHEMA, "version": VERSION, **self._choices()}
        data["kept"] = {k: list(v) for k, v in sorted(self.kept.items())}
        if graph is not None:
            data["graph"] = graph.fingerprint
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], graph: Graph | None = None) -> Plan:
        """Read what `to_json` wrote. Raises PlanError for another format or, with `graph`, another model's plan."""
        if data.get("schema") != SCHEMA:
            raise PlanError(f"not a plan: schema is {data.get('schema')!r}, expected {SCHEMA!r}")
        if data.get("version") != VERSION:
            raise PlanError(
                f"plan version {data.get('version')!r} is not supported; this program reads version {VERSION}"
            )
        if graph is not None and data.get("graph") not in (None, graph.fingerprint):
            raise PlanError(
                f"the plan was made for another model (graph {data['graph']}, this one is {graph.fingerprint})"
            )
        try:
            plan = cls(
                width=float(data["width"]),
                sparsity={str(k): float(v) for k, v in data["sparsity"].items()},
                drop=frozenset(str(b) for b in data["drop"]),
                bits={str(k): int(v) for k, v in data["bits"].items()},
                masks={str(k): str(v) for k, v in data.get("masks", {}).items()},
                kept={str(k): tuple(int(i) for i in v) for k, v in data["kept"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"plan: a field is missing or has the wrong type ({error})") from error
        if graph is not None:
            plan.check(graph)
        return plan

    def check(self, graph: Graph) -> None:
        """Raise PlanError where the plan names something that the graph lacks or would remove a whole group."""
        for names, known, what in (
            ({*self.sparsity, *self.kept}, graph.group, "channel group"),
            (self.drop, graph.block, "block"),
            (self.bits, graph.layer, "layer"),
            (self.masks, graph.layer, "layer"),
        ):
            for name in names:
                if name not in known:
                    raise PlanError(f"plan: the model has no {what} {name!r}")
        for name, text in self.masks.items():
            problem = mask_problem(text, graph.layer[name])
            if problem is not None:
                raise PlanError(f"plan: {problem}")
        for name, kept in self.kept.items():
            size = graph.group[name].size
            if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= size:
                raise PlanError(
                    f"plan: kept channels of {name} must be 1 to {size} ascending indices below {size}, "
                    f"found {list(kept)}"
                )
