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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.techniques.calls import Call, LayerCalls, Reader, Site
from automl_compress.techniques.least_squares import (
    LayerRepair,
    Problem,
    apply_weight,
    best_change,
    best_masked_change,
)
from automl_compress.techniques.rows import ROWS, input_rows, sample_positions, value_rows
from automl_compress.techniques.sparsify import masks_in_force

_TINY_SCALE = 1e-6


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
        now = apply_weight(rows, call.weight.flatten(1))
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

    def _problem(self, call: Call, target: Target, rows: Tensor, now: Tensor, scale: Tensor | None) -> Problem:
        kept = kept_rows(call.layer.name, self._graph, self._plan)
        wanted = target.values if len(kept) == target.values.shape[1] else target.values[:, kept]
        if scale is None:
            scale = now.new_ones(now.shape[1])
        scale = torch.where(scale.abs() < _TINY_SCALE, _TINY_SCALE, scale)
        return Problem(rows=rows, wanted=wanted, now=now, scale=scale, rectified=target.rectified)

    def _solve(self, call: Call, problem: Problem, *, intercept: bool) -> tuple[Tensor, Tensor]:
        """Changes of weight and bias; zeros where nothing helps on the held-out rows."""
        mask = self._masks.get(call.layer.name)
        if mask is None:
            weight, bias, done = best_change(problem, intercept=intercept)
        else:
            weight, bias, done = best_masked_change(problem, call.weight, mask, intercept=intercept)
        self.done[call.layer.name] = done
        return weight.reshape(call.weight.shape), bias


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
