"""One-shot repair: layer after layer, a cut model is fitted to what the original computes, in closed form.

While the cut model runs on all calibration samples at once, every layer is refitted by least squares when its turn
comes, on the inputs that the already repaired layers before it produce (asymmetric reconstruction; He et al. 2017,
Frantar & Alistarh 2022), so later layers repair earlier errors:

    min over W of  sum over rows of  (scale * W x + rest - z)^2 + ridge * |W - W_before|^2

x are the layer's inputs, z what the original has where the layer's output is read: behind the batch-norm, and behind
the residual addition, so that the last layer of a branch also repairs what was lost on the shortcut. Where a ReLU
follows, only what it lets through counts (Zhang et al. 2015), by a few majorise-minimise steps with one factorisation.

Familiar cases: nothing was lost before the layer and nothing follows it: the plain refit of the consumer of removed
channels. W may only change by a constant: bias correction. Grouped and depthwise layers are solved group by group. More
columns than rows: the same solution from the rows' kernel matrix, so no matrix is larger than either needs.

Each layer's last samples are held out: what doesn't help there is not applied. No gradients, one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.techniques.calls import Call, LayerCalls, Reader, Site
from automl_compress.techniques.rows import ROWS, input_rows, sample_positions, value_rows
from automl_compress.techniques.sparsify import compensated, mask_of, masks_in_force

DAMPING = (1e-3, 1e-1)
HELD_OUT = 1 / 8
_STEPS = 4  # majorise-minimise, where a rectifier follows
_TINY_SCALE = 1e-6
_NOISE = 1e-10  # of a squared error: rounding
Outcome = Literal["refit", "bias", "kept", "masked"]


@dataclass(eq=False)
class Target:
    """What the original has at one layer's site. `values` [rows, channels] at flat `positions` of `shape`; `reader`
    None: the layer's output is the model's. `clipped`: a rectifier reads it, `whole`: something else does."""

    shape: tuple[int, ...]
    positions: Tensor
    values: Tensor
    reader: Reader | None = None
    clipped: bool = False
    whole: bool = False

    @property
    def rectified(self) -> bool:
        """Whether only what is positive counts."""
        return self.clipped and not self.whole


@dataclass(frozen=True, kw_only=True)
class LayerRepair:
    """What was done to one layer, and the squared error on held-out rows before and after (a mask may add to it)."""

    outcome: Outcome
    before: float
    after: float


@dataclass(eq=False)
class Targets:
    """The original's values by layer, from one pass over `inputs`; for any number of repairs."""

    inputs: tuple[Tensor, ...]
    of: Mapping[str, Target]


def record_targets(model: nn.Module, graph: Graph, inputs: tuple[Tensor, ...], rows: int = ROWS) -> Targets:
    """Run the original (eval mode) on one batch of calibration samples and keep at most `rows` positions of each layer.

    Layers that the model calls more than once, or inside of an operator that runs as one, have no target.
    """
    recorder = _Recorder(model, graph, rows)
    with torch.no_grad(), recorder:
        model(*inputs)
    return Targets(inputs=inputs, of={k: v for k, v in recorder.targets.items() if k not in recorder.shared})


def repair(model: nn.Module, graph: Graph, plan: Plan, targets: Targets) -> dict[str, LayerRepair]:
    """Refit the layers of the cut `model` (eval mode) in place; `plan` is what was cut, with its channels selected.

    Layers whose input is still the original's are left alone unless they lost channels. Returns layer name -> what was
    done, for those that were looked at.
    """
    refitter = _Refitter(model, graph, plan, targets.of)
    with torch.no_grad(), refitter:
        model(*targets.inputs)
    return refitter.done


class _Recorder(LayerCalls):
    def __init__(self, model: nn.Module, graph: Graph, rows: int) -> None:
        super().__init__(model, graph)
        self.targets: dict[str, Target] = {}
        self.shared: set[str] = set()
        self._rows = rows

    def returned(self, call: Call, output: Tensor) -> None:
        if call.layer.name in self.targets:
            self.shared.add(call.layer.name)
            return
        positions = sample_positions(call, self._rows)
        self.targets[call.layer.name] = Target(call.output_shape, positions, value_rows(output, call, positions))

    def reached(self, site: Site, reader: Reader) -> None:
        target = self.targets[site.call.layer.name]
        if target.reader is None:
            value = site.value if site.other is None else site.value + site.other
            target.values, target.reader = value_rows(value, site.call, target.positions), reader
        if reader == "rectifier":
            target.clipped = True
        elif reader == "other" or target.reader != "sum" or site.added:
            target.whole = True


class _Refitter(LayerCalls):
    def __init__(self, model: nn.Module, graph: Graph, plan: Plan, targets: Mapping[str, Target]) -> None:
        super().__init__(model, graph)
        self._targets, self._graph, self._plan = targets, graph, plan
        # Until the first layer that was cut, everything is as in the original; a removed branch leaves no such mark.
        self._changed = bool(plan.drop)
        self._masks = masks_in_force(graph, plan)
        self.done: dict[str, LayerRepair] = {}

    def called(self, call: Call) -> None:
        target = self._target(call)
        if target is None or target.reader is not None:
            return
        rows = input_rows(call, target.positions)
        now = _apply(rows, call.weight.flatten(1))
        problem = self._problem(call, target, rows, now if call.bias is None else now + call.bias, None)
        weight, bias = self._solve(call, problem, intercept=call.bias is not None)
        call.weight.add_(weight)
        if call.bias is not None:
            call.bias.add_(bias)

    def reached(self, site: Site, reader: Reader) -> None:
        call, target = site.call, self._target(site.call)
        if target is None or site.added or target.reader != reader:
            return
        value = site.value if site.other is None else site.value + site.other
        rows = input_rows(call, target.positions)
        problem = self._problem(call, target, rows, value_rows(value, call, target.positions), site.scale)
        weight, bias = self._solve(call, problem, intercept=call.bias is not None or site.mean is not None)
        if self.done[call.layer.name].outcome == "kept":
            return
        call.weight.add_(weight)
        if call.bias is not None:
            call.bias.add_(bias)
        elif site.mean is not None:
            site.mean.sub_(bias)
        change = call.again(weight, bias)
        site.value.add_(change if site.scale is None else change * site.per_channel(site.scale))

    def _target(self, call: Call) -> Target | None:
        layer = call.layer
        cut = any(name in self._plan.kept for name in (*layer.in_groups, *layer.out_groups))
        self._changed = self._changed or cut or layer.name in self._masks
        target = self._targets.get(layer.name)
        if target is None or not self._changed or layer.name in self.done:
            return None
        # Where channels are what a layer takes for positions (token mixers), a cut leaves none to compare.
        return target if target.shape == call.output_shape else None

    def _problem(self, call: Call, target: Target, rows: Tensor, now: Tensor, scale: Tensor | None) -> _Problem:
        kept = kept_rows(call.layer.name, self._graph, self._plan)
        wanted = target.values if len(kept) == target.values.shape[1] else target.values[:, kept]
        if scale is None:
            scale = now.new_ones(now.shape[1])
        scale = torch.where(scale.abs() < _TINY_SCALE, _TINY_SCALE, scale)
        return _Problem(rows=rows, wanted=wanted, now=now, scale=scale, rectified=target.rectified)

    def _solve(self, call: Call, problem: _Problem, *, intercept: bool) -> tuple[Tensor, Tensor]:
        """Changes of weight and bias; zeros where nothing helps on the held-out rows."""
        mask = self._masks.get(call.layer.name)
        if mask is None:
            weight, bias, done = best_change(problem, intercept=intercept)
        else:
            weight, bias, done = best_masked_change(problem, call.weight, mask, intercept=intercept)
        self.done[call.layer.name] = done
        return weight.reshape(call.weight.shape), bias


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """rows [rows, groups, columns]; wanted, now [rows, channels]; scale [channels]: what a change of the layer's output
    is multiplied by before it reaches `now`."""

    rows: Tensor
    wanted: Tensor
    now: Tensor
    scale: Tensor
    rectified: bool = False
    held_out: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "held_out", int(len(self.rows) * HELD_OUT))

    @property
    def fit(self) -> slice:
        """The rows that are not held out."""
        return slice(0, len(self.rows) - self.held_out)

    def missing(self, now: Tensor, part: slice) -> Tensor:
        """What is still to be added. Behind a rectifier, nothing where both are negative."""
        wanted, now = self.wanted[part], now[part]
        if not self.rectified:
            return wanted - now
        return torch.where(wanted > 0, wanted - now, -now.clamp_min(0))

    def error(self, now: Tensor) -> float:
        """Squared error of held-out rows (all rows where there are too few)."""
        part = slice(len(now) - self.held_out, None) if self.held_out else slice(None)
        return float(self.missing(now, part).double().square().sum())


def best_change(problem: _Problem, *, intercept: bool) -> tuple[Tensor, Tensor, LayerRepair]:
    """The change of weight [channels, columns] and bias [channels] with the least held-out error; zeros if that is
    doing nothing."""
    before = problem.error(problem.now)
    channels, columns = problem.now.shape[1], problem.rows.shape[2]
    nothing = problem.now.new_zeros(channels, columns), problem.now.new_zeros(channels)
    if before <= _NOISE * float(problem.wanted.double().square().sum()):
        return *nothing, LayerRepair(outcome="kept", before=before, after=before)
    ridge = _Ridge(problem, intercept=intercept)
    tries = [ridge.step(damping) for damping in DAMPING]
    best = min(tries, key=lambda one: one.error)
    for _ in range(_STEPS - 1 if problem.rectified else 0):
        again = ridge.step(best.damping, best)
        if not again.error < best.error:
            break
        best = again
    if best.error < before:
        return *ridge.parts(best), LayerRepair(outcome="refit", before=before, after=best.error)
    if intercept:
        shift = problem.missing(problem.now, problem.fit).mean(0)
        error = problem.error(problem.now + shift)
        if error < before:
            return nothing[0], shift / problem.scale, LayerRepair(outcome="bias", before=before, after=error)
    return *nothing, LayerRepair(outcome="kept", before=before, after=before)


def best_masked_change(
    problem: _Problem, weight: Tensor, mask: str, *, intercept: bool
) -> tuple[Tensor, Tensor, LayerRepair]:
    """The change after which `weight` [channels, inputs, *kernel] is masked, with the least held-out error: the mask
    alone, or the refitted weights masked and made up for by those that stay; each with the bias corrected."""
    refit, shift, done = best_change(problem, intercept=intercept)
    ridge = _Ridge(problem, intercept=intercept)
    plain, dense = weight.flatten(1), weight.flatten(1) + refit
    tries = [plain * mask_of(weight, mask).flatten(1), ridge.masked(dense, mask_of(dense.view_as(weight), mask))]
    found: list[tuple[float, Tensor, Tensor]] = []
    for change, bias in ((tries[0] - plain, torch.zeros_like(shift)), (tries[1] - plain, shift)):
        now = problem.now + (_apply(problem.rows, change) + bias) * problem.scale
        if intercept:
            more = problem.missing(now, problem.fit).mean(0)
            now, bias = now + more, bias + more / problem.scale
        found.append((problem.error(now), change, bias))
    error, change, bias = min(found, key=lambda one: one[0])
    return change, bias, LayerRepair(outcome="masked", before=done.before, after=error)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Try:
    """A change of all weights [channels, columns] so far, what `now` becomes with it, and its held-out error."""

    change: Tensor
    now: Tensor
    error: float
    damping: float


class _Ridge:
    """Ridge regression of what is missing on the rows. The ridge is `damping` times the mean diagonal of the Gram
    matrix. Solved in float64: Gram matrices of features are close to singular."""

    def __init__(self, problem: _Problem, *, intercept: bool) -> None:
        rows = problem.rows
        self._intercept = intercept
        self._rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2) if intercept else rows
        self._fit = self._rows[problem.fit].transpose(0, 1)  # [groups, rows, columns]
        self._problem = problem
        _, count, columns = self._fit.shape
        self._dual = count < columns
        transposed = self._fit.transpose(1, 2)
        self._gram = (self._fit @ transposed if self._dual else transposed @ self._fit).double()
        diagonal = self._gram.diagonal(dim1=1, dim2=2).sum(dim=1) / columns
        self._unit = diagonal.clamp_min(1e-12).view(-1, 1, 1) * torch.eye(self._gram.shape[1], dtype=torch.float64)
        self._factors: dict[float, Tensor] = {}

    def step(self, damping: float, before: _Try | None = None) -> _Try:
        """One solution; behind a rectifier, one majorise-minimise step from `before`."""
        problem = self._problem
        now = problem.now if before is None else before.now
        missing = problem.missing(now, problem.fit) / problem.scale
        by_group = missing.view(len(missing), self._fit.shape[0], -1).transpose(0, 1)
        change = self._solve(by_group, damping).flatten(0, 1)
        now = now + _apply(self._rows, change) * problem.scale
        total = change if before is None else before.change + change
        return _Try(change=total, now=now, error=problem.error(now), damping=damping)

    def parts(self, found: _Try) -> tuple[Tensor, Tensor]:
        """Weight [channels, columns] and bias [channels]."""
        if self._intercept:
            return found.change[:, :-1], found.change[:, -1].contiguous()
        return found.change, found.change.new_zeros(len(found.change))

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The weights [channels, columns] masked; what stays makes up for what goes where there are enough rows."""
        flat = mask.flatten(1)
        if self._dual:
            return weight * flat
        columns, groups = weight.shape[1], self._fit.shape[0]
        gram = (self._gram + DAMPING[0] * self._unit)[:, :columns, :columns]
        found = compensated(weight.view(groups, -1, columns), flat.view(groups, -1, columns), gram)
        return found.flatten(0, 1).float()

    def _solve(self, targets: Tensor, damping: float) -> Tensor:
        """Targets [groups, rows, outputs] -> solutions [groups, outputs, columns]."""
        if damping not in self._factors:
            self._factors[damping] = torch.linalg.cholesky(self._gram + damping * self._unit)
        factor = self._factors[damping]
        if self._dual:
            return torch.cholesky_solve(targets.double(), factor).float().transpose(1, 2) @ self._fit
        cross = (self._fit.transpose(1, 2) @ targets).double()
        return torch.cholesky_solve(cross, factor).float().transpose(1, 2)


def _apply(rows: Tensor, weight: Tensor) -> Tensor:
    """Outputs [rows, channels] of weight [channels, columns] for rows [rows, groups, columns]."""
    groups = rows.shape[1]
    by_group = weight.view(groups, -1, weight.shape[1])
    return (rows.transpose(0, 1) @ by_group.transpose(1, 2)).transpose(0, 1).flatten(1)


def kept_rows(name: str, graph: Graph, plan: Plan) -> list[int]:
    """The original's output channels that a layer of the cut model still has."""
    layer, gone = graph.layer[name], set[int]()
    for group in layer.out_groups:
        if group in plan.kept:
            stay = set(plan.kept[group])
            for place in graph.group[group].places:
                if place.tensor == layer.weight and place.dim == layer.out_axis:
                    gone |= {row for c, rows in enumerate(place.positions) if c not in stay for row in rows}
    return [row for row in range(layer.out_channels) if row not in gone]
