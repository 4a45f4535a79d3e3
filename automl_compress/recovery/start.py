"""What a training starts from: the repaired model, or the cut one as it is.

A refit by least squares wins back most of what a cut costs before anything is trained, and a short training builds on
that. It fits a few hundred samples, though, and a training that is long enough to win the same back from the original's
own weights ends higher: ResNet-20 with half of the multiply-adds by 0.2 % after 588 steps (`benchmarks/RESULTS.md`).
The repaired model is made for both: it is what a training has to beat, and what is delivered where it doesn't.
"""

from __future__ import annotations

from torch import nn

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.techniques.prune import apply_plan
from automl_compress.techniques.sparsify import masks_in_force

LONG_STEPS = 500


def starting_model(repaired: nn.Module, teacher: nn.Module, graph: Graph, plan: Plan, steps: float) -> nn.Module:
    """The model that is trained for so many steps, in eval mode: `repaired` itself, or one cut anew from `teacher`.

    plan  with its channels selected. Where it has masks they were chosen in the repair, which is then kept.
    """
    if steps < LONG_STEPS or masks_in_force(graph, plan):
        return repaired
    return apply_plan(teacher, graph, plan).eval()
