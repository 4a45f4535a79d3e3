"""The knapsack over the additive table as an integer program, solved exactly by HiGHS.

Binary variables say how many channels a group keeps, which bits a layer gets and which block goes. For every layer one
of its combinations of (input width, output width, bits) is tied to them, so that its cost is looked up and never
interpolated. What is removed with a block costs nothing and loses nothing but the block's own loss.

A layer whose input (or output) consists of several groups, as after a concatenation, is priced by its total width:
exact where at most 32 totals are possible, else by one of 32 totals at or just above its own. The result is checked
against the table and solved again with a tighter limit should it exceed one.

The student's width is not a variable of the program: a `Decoder` is made for one width, by default the full one, since
sparsity covers the same range group by group. Following the layer-wise knapsacks of SPDY (Frantar and Alistarh, 2022)
and HALP (Shen et al., 2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from automl_compress.core.graph import ChannelGroup, End, Graph, Layer
from automl_compress.core.plan import FULL_BITS, Plan
from automl_compress.errors import CompressError
from automl_compress.search.solvers.rows import Rows, Side, Vector, thinned
from automl_compress.search.space.offers import Option
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.losses import estimated_loss
from automl_compress.search.table.table import (
    ADDITIVE,
    AdditiveTable,
    LayerCost,
    QualityKey,
    Solution,
    kept_options,
    nearest_option,
)

_NAMES = {"kept": "sparsity", "drop": "drop", "bits": "bits"}
_ROUNDS = 6
_INFEASIBLE = 2
# What is found must not depend on how busy the machine is, so effort is counted in nodes and columns; the seconds are
# only there for a solver that hangs.
_NODES = 200
_COLUMNS = 30_000
_HANGING_S = 600.0
Column = tuple[str, str, int]
"""('kept', group, channels), ('drop', block, 1) or ('bits', layer, bits)."""


class Unsolved(CompressError):
    """The program was too large, or its nodes were used up before there was a plan or a proof that there is none."""


class Decoder:
    """The program for one space, table and student width, built once and solved for many losses and limits."""

    def __init__(self, space: SearchSpace, graph: Graph, table: AdditiveTable, *, width: float | None = None) -> None:
        self.space, self.graph, self.table = space, graph, table
        self.width = widest(space) if width is None else width
        self._rows = Rows()
        self._columns: dict[Column, int] = {}
        self._costs: dict[int, LayerCost] = {}
        self._joint: dict[int, tuple[QualityKey, float]] = {}
        self._options: dict[str, dict[int, Option]] = {
            g.name: kept_options(space.options(f"sparsity.{g.name}"), g.size, self.width) for g in graph.groups
        }
        self._droppable = {b.name for b in graph.blocks if True in space.options(f"drop.{b.name}")}
        for name in sorted(self._droppable):
            self._columns["drop", name, 1] = self._rows.column()
        for block in graph.blocks:
            if space.options(f"drop.{block.name}") == (True,):
                around = [b.name for b in graph.blocks if set(block.layers) <= set(b.layers)]
                self._rows.add(self._drops(around), 1.0, np.inf)
        for group in graph.groups:
            self._add_group(group)
        self._add_alternatives()
        for layer in graph.layers:
            self._add_layer(layer)
        self._matrix = self._rows.matrix()
        self._cost = {m: self._rows.vector({i: c.of(m) for i, c in self._costs.items()}) for m in ADDITIVE}
        # What the whole network costs at most, so that cost terms are comparable between metrics.
        self._full = {m: max(float(np.abs(v).sum()), 1e-12) for m, v in self._cost.items()}

    def solve(
        self,
        quality: Mapping[QualityKey, float],
        limits: Mapping[str, float],
        *,
        gap: float = 1e-5,
        exhaustive: bool = False,
    ) -> Solution | None:
        """The plan with the least summed `quality`, the cheaper one among equals, within `limits`; None: infeasible.

        `gap` is the relative distance from the optimum at which to stop; `exhaustive`: not before, however large the
        program is. Else raises Unsolved where that takes too much.
        """
        loss = self._losses(quality)
        scale = max(float(np.abs(loss).sum()), 1e-12)
        tie_break = sum(v / self._full[m] for m, v in self._cost.items())
        return self._minimise(1e3 * loss / scale + 1e-2 * tie_break, quality, limits, gap, exhaustive)

    def excludes(self, limits: Mapping[str, float]) -> bool:
        """Whether no plan meets the limits, since none does even where choices may be taken in part: a proof in
        seconds, however large the program is. False says nothing."""
        constraints = self._constraints(limits)
        if constraints is None:
            return True
        nothing = np.zeros(self._rows.count)
        options = {"time_limit": _HANGING_S}
        result = milp(nothing, constraints=constraints, bounds=Bounds(0.0, 1.0), options=options)
        return bool(result.status == _INFEASIBLE)

    def _minimise(
        self,
        objective: Vector,
        quality: Mapping[QualityKey, float],
        limits: Mapping[str, float],
        gap: float,
        exhaustive: bool,
    ) -> Solution | None:
        wanted = {m: limits[m] for m in ADDITIVE if m in limits}
        aims = dict(wanted)
        for _ in range(_ROUNDS):
            result = self._run(objective, aims, gap, exhaustive)
            if result is None:
                return None
            plan = self._plan(result.x)
            cost = self.table.plan_cost(self.graph, plan)
            over = {m: cost.of(m) / wanted[m] for m in wanted if cost.of(m) > wanted[m]}
            if not over:
                loss = estimated_loss(self.space, self.table, plan, quality)
                return Solution(plan=plan, loss=loss, cost=cost, gap=float(result.mip_gap or 0.0))
            aims.update({m: aims[m] / ratio * (1 - 1e-6) for m, ratio in over.items()})
        return None

    def _run(self, objective: Vector, limits: Mapping[str, float], gap: float, exhaustive: bool) -> Any | None:
        if self._rows.count > _COLUMNS and not exhaustive:
            raise Unsolved(f"{len(self.space.decisions)} decisions are too many to be solved exactly")
        constraints = self._constraints(limits)
        if constraints is None:
            return None
        result = milp(
            objective,
            constraints=constraints,
            integrality=1,
            bounds=Bounds(0.0, 1.0),
            options={"mip_rel_gap": gap} | ({} if exhaustive else {"node_limit": _NODES, "time_limit": _HANGING_S}),
        )
        if result.x is None and result.status != _INFEASIBLE:
            raise Unsolved(
                f"no plan was found in {_NODES} nodes for {len(self.space.decisions)} decisions "
                f"({' '.join(str(result.message).split())}); offer fewer options in the search space"
            )
        return None if result.x is None else result

    def _constraints(self, limits: Mapping[str, float]) -> list[LinearConstraint] | None:
        """None where what is fixed exceeds a limit."""
        room = {m: limits[m] - self.table.fixed.of(m) for m in ADDITIVE if m in limits}
        if any(value < 0 for value in room.values()):
            return None
        constraints = [LinearConstraint(*self._matrix)]
        if room:
            shares = np.array([self._cost[m] / max(room[m], 1e-12) for m in room])
            constraints.append(LinearConstraint(csr_matrix(shares), -np.inf, 1.0))
        return constraints

    def _add_group(self, group: ChannelGroup) -> None:
        for count in self._options[group.name]:
            self._columns["kept", group.name, count] = self._rows.column()
        kept = {self._columns["kept", group.name, count]: 1.0 for count in self._options[group.name]}
        self._rows.add({**kept, **self._drops(self._blocks_of(group))}, 1.0, 1.0)

    def _add_alternatives(self) -> None:
        """Of two ways to narrow the same layer (heads, their width) at most one is taken, so that widths add up."""
        for group in self.graph.groups:
            for other in sorted(self.graph.alternatives[group.name]):
                if group.name < other:
                    pair = (group.name, other)
                    widest = {self._columns["kept", name, max(self._options[name])]: 1.0 for name in pair}
                    self._rows.add({**widest, **self._drops(self._blocks_of(group))}, 1.0, np.inf)

    def _blocks_of(self, group: ChannelGroup) -> tuple[str, ...]:
        """The blocks with which all of the group goes."""
        layers = {*group.producers, *group.consumers}
        return tuple(b.name for b in self.graph.blocks if layers and layers <= set(b.layers))

    def _drops(self, blocks: Iterable[str], factor: float = 1.0) -> dict[int, float]:
        return {self._columns["drop", b, 1]: factor for b in blocks if b in self._droppable}

    def _add_layer(self, layer: Layer) -> None:
        bits = [int(b) for b in self.space.options(f"bits.{layer.name}") or (FULL_BITS,)]
        for b in bits:
            self._columns["bits", layer.name, b] = self._rows.column()
        chosen = {self._columns["bits", layer.name, b]: 1.0 for b in bits}
        self._rows.add({**chosen, **self._drops(layer.blocks)}, 1.0, 1.0)
        sides = self._sides(layer)
        if not any(side.groups for side in sides):
            for b in bits:
                shape = (layer.in_channels, layer.out_channels, b)
                self._costs[self._columns["bits", layer.name, b]] = self.table.cost(layer.name, shape)
            return
        by_bits: dict[int, list[int]] = {b: [] for b in bits}
        by_point: list[dict[int, list[int]]] = [{} for _ in sides]
        for *points, b in product(*(range(len(side.widths)) for side in sides), bits):
            column = self._rows.column()
            inputs, outputs = sides[0].widths[points[0]][0], sides[-1].widths[points[-1]][-1]
            self._costs[column] = self.table.cost(layer.name, (inputs, outputs, b))
            if layer.name in self.table.joint:
                share = float(self.table.share_of_bits(layer, np.array(outputs)))
                self._joint[column] = ((f"bits.{layer.name}", b), share - 1.0)
            by_bits[b].append(column)
            for axis, point in enumerate(points):
                by_point[axis].setdefault(point, []).append(column)
        for b, columns in by_bits.items():
            self._rows.add({**dict.fromkeys(columns, 1.0), self._columns["bits", layer.name, b]: -1.0}, 0.0, 0.0)
        for side, columns_at in zip(sides, by_point, strict=True):
            self._link(layer, side, columns_at)

    def _sides(self, layer: Layer) -> list[Side]:
        """Input and output as axes of choice; one axis where the same groups are on both (depthwise convolutions)."""
        if layer.in_groups and set(layer.in_groups) == set(layer.out_groups):
            return [self._side(layer, layer.in_groups, ("in", "out"))]
        return [self._side(layer, layer.in_groups, ("in",)), self._side(layer, layer.out_groups, ("out",))]

    def _side(self, layer: Layer, groups: tuple[str, ...], ends: tuple[End, ...]) -> Side:
        groups = tuple(dict.fromkeys(groups))
        full = tuple(layer.in_channels if end == "in" else layer.out_channels for end in ends)
        if not groups:
            return Side(groups=(), ends=ends, widths=(full,))
        if len(groups) == 1:
            counts = self._options[groups[0]]
            widths = [tuple(self.graph.width(layer, e, {groups[0]: k}) for e in ends) for k in counts]
            return Side(groups=groups, ends=ends, widths=tuple(widths))
        widest, removed = zip(*(self._removed(layer, groups, end) for end in ends), strict=True)
        totals = {widest}
        for group in groups:
            taken = [tuple(by[group, count] for by in removed) for count in self._options[group]]
            totals = {tuple(w - n for w, n in zip(t, each, strict=True)) for t in totals for each in taken}
        return Side(groups=groups, ends=ends, widths=tuple(thinned(sorted(t for t in totals if min(t) > 0))))

    def _removed(self, layer: Layer, groups: tuple[str, ...], end: End) -> tuple[int, dict[tuple[str, int], int]]:
        """A side's width with its groups as wide as they may be; (group, channels that it keeps) -> what that takes
        from it. They add up, since of two groups whose shares multiply at most one is narrower."""
        widest = {group: max(self._options[group]) for group in groups}
        whole = self.graph.width(layer, end, widest)
        counts = [(group, count) for group in groups for count in self._options[group]]
        return whole, {(g, count): whole - self.graph.width(layer, end, {**widest, g: count}) for g, count in counts}

    def _link(self, layer: Layer, side: Side, columns_at: Mapping[int, list[int]]) -> None:
        """Tie the choice of a side's width to what the groups keep."""
        drops = self._drops(layer.blocks)
        if len(side.groups) == 1:
            group = side.groups[0]
            # They go together, so equality holds; otherwise a layer may be gone while its group stays.
            together = set(self._blocks_of(self.graph.group[group])) == set(layer.blocks)
            for point, count in enumerate(self._options[group]):
                row = {**dict.fromkeys(columns_at[point], 1.0), self._columns["kept", group, count]: -1.0}
                self._rows.add(row, 0.0 if together or not drops else -np.inf, 0.0)
        elif side.groups:
            end = side.ends[0]
            widest, removed = self._removed(layer, side.groups, end)
            row = {c: float(side.widths[p][0]) for p, columns in columns_at.items() for c in columns}
            row |= {self._columns["kept", group, count]: float(n) for (group, count), n in removed.items()}
            gap = max((b[0] - a[0] - 1 for a, b in zip(side.widths, side.widths[1:], strict=False)), default=0)
            self._rows.add({**row, **dict.fromkeys(drops, float(widest))}, float(widest), np.inf)
            self._rows.add({**row, **dict.fromkeys(drops, -float(widest))}, -np.inf, float(widest + max(0, gap)))

    def _losses(self, quality: Mapping[QualityKey, float]) -> Vector:
        values: dict[int, float] = {}
        for (kind, target, value), column in self._columns.items():
            if kind == "drop":
                key: QualityKey = (f"drop.{target}", True)
            elif kind == "bits":
                key = (f"bits.{target}", value)
            else:
                options = self.space.options(f"sparsity.{target}")
                size = self.graph.group[target].size
                key = (f"sparsity.{target}", nearest_option(options, size, value) if options else 0.0)
            values[column] = quality.get(key, 0.0)
        values |= {column: quality.get(key, 0.0) * change for column, (key, change) in self._joint.items()}
        return self._rows.vector(values)

    def _plan(self, x: Vector) -> Plan:
        params = self.space.neutral()
        if "width" in params:
            params["width"] = self.width
        for (kind, target, value), column in self._columns.items():
            name = f"{_NAMES[kind]}.{target}"
            if x[column] > 0.5 and name in params:
                params[name] = self._options[target][value] if kind == "kept" else (kind == "drop" or value)
        return self.space.plan(params)


def widest(space: SearchSpace) -> float:
    """The first of the student widths on offer."""
    return float((space.options("width") or (1.0,))[0])
