"""The refit of one layer: the change of its weights with the least squared error on rows that are held out.

    min over W of  sum over rows of  (scale * W x + rest - z)^2 + ridge * |W - W_before|^2

`repair` says what x and z are. Behind a rectifier only what passes it counts, by a few majorise-minimise steps with one
factorisation. More columns than rows: the same solution from the rows' kernel matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from automl_compress.techniques.sparsify import compensated, mask_of

DAMPING = (1e-3, 1e-1)
HELD_OUT = 1 / 8
_STEPS = 4  # majorise-minimise, where a rectifier follows
_NOISE = 1e-10  # of a squared error: rounding
Outcome = Literal["refit", "bias", "kept", "masked"]


@dataclass(frozen=True, kw_only=True)
class LayerRepair:
    """What was done to one layer, and the squared error on held-out rows before and after (a mask may add to it)."""

    outcome: Outcome
    before: float
    after: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
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


def best_change(problem: Problem, *, intercept: bool) -> tuple[Tensor, Tensor, LayerRepair]:
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
    problem: Problem, weight: Tensor, mask: str, *, intercept: bool
) -> tuple[Tensor, Tensor, LayerRepair]:
    """The change after which `weight` [channels, inputs, *kernel] is masked, with the least held-out error: the mask
    alone, or the refitted weights masked and made up for by those that stay; each with the bias corrected."""
    refit, shift, done = best_change(problem, intercept=intercept)
    ridge = _Ridge(problem, intercept=intercept)
    plain, dense = weight.flatten(1), weight.flatten(1) + refit
    tries = [plain * mask_of(weight, mask).flatten(1), ridge.masked(dense, mask_of(dense.view_as(weight), mask))]
    found: list[tuple[float, Tensor, Tensor]] = []
    for change, bias in ((tries[0] - plain, torch.zeros_like(shift)), (tries[1] - plain, shift)):
        now = problem.now + (apply_weight(problem.rows, change) + bias) * problem.scale
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

    def __init__(self, problem: Problem, *, intercept: bool) -> None:
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
        now = now + apply_weight(self._rows, change) * problem.scale
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


def apply_weight(rows: Tensor, weight: Tensor) -> Tensor:
    """Outputs [rows, channels] of weight [channels, columns] for rows [rows, groups, columns]."""
    groups = rows.shape[1]
    by_group = weight.view(groups, -1, weight.shape[1])
    return (rows.transpose(0, 1) @ by_group.transpose(1, 2)).transpose(0, 1).flatten(1)
