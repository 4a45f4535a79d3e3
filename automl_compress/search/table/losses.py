"""What a plan amounts to in terms of the table: the options that are in force, and what they lose together."""

from __future__ import annotations

from collections.abc import Mapping

from automl_compress.core.plan import Plan
from automl_compress.search.space.space import SearchSpace
from automl_compress.search.table.table import AdditiveTable, QualityKey, nearest_option


def options_in_force(space: SearchSpace, plan: Plan) -> tuple[QualityKey, ...]:
    """The options that a plan amounts to: those of removed blocks, of groups that are left, of layers that are left.

    A group's option is the one that keeps the number of channels nearest to the plan's, so plans of any student width
    compare. The width itself counts only where some group has no sparsity that could express it.
    """
    drop, kept, bits, masks = space.identity(plan)
    keys: list[QualityKey] = [(f"drop.{block}", True) for block in drop]
    for group, count in kept:
        options = space.options(f"sparsity.{group}")
        if options:
            keys.append((f"sparsity.{group}", nearest_option(options, space.graph.group[group].size, count)))
    keys += [(f"bits.{layer}", b) for layer, b in bits if space.options(f"bits.{layer}")]
    keys += [(f"mask.{layer}", mask) for layer, mask in masks if space.options(f"mask.{layer}")]
    if plan.width != 1 and not sparsity_everywhere(space):
        keys.append(("width", plan.width))
    return tuple(keys)


def additive_loss(space: SearchSpace, plan: Plan, quality: Mapping[QualityKey, float]) -> float:
    """The sum of the losses of the options in force."""
    return sum(quality.get(key, 0.0) for key in options_in_force(space, plan))


def estimated_loss(space: SearchSpace, table: AdditiveTable, plan: Plan, quality: Mapping[QualityKey, float]) -> float:
    """The same, with what bits lose more or less at the plan's widths: what solvers of the table minimise."""
    return additive_loss(space, plan, quality) + table.joint_loss(space.graph, plan, quality)


def sparsity_everywhere(space: SearchSpace) -> bool:
    """Whether every group's sparsity can be chosen, so that no student width is needed to express a plan."""
    return all(space.options(f"sparsity.{g.name}") for g in space.graph.groups)
