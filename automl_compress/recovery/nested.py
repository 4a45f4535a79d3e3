"""A smaller model inside of the whole one: its weights are written back to where they were cut from."""

from __future__ import annotations

import torch
from torch import nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.model.surgery import kept_indices


@torch.no_grad()
def write_back(whole: nn.Module, part: nn.Module, graph: Graph, plan: Plan) -> None:
    """Set those numbers of `whole` that `part` has, which follows `plan`; the others stay as they are."""
    places = kept_indices(graph, kept=plan.kept, drop=plan.drop)
    values = part.state_dict()
    for name, target in whole.state_dict().items():
        value = values.get(name)
        if value is None:
            continue  # inside of a removed block
        indices = [
            torch.tensor(places.get((name, dim), range(size)), dtype=torch.long)
            for dim, size in enumerate(target.shape)
        ]
        if not indices:
            target.copy_(value)
            continue
        target[torch.meshgrid(*indices, indexing="ij")] = value.to(target.dtype)
