"""Short trainings build on the repair, long ones on the original's own weights."""

from __future__ import annotations

import torch

from automl_compress.core.plan import Plan
from automl_compress.recovery.start import LONG_STEPS, starting_model
from automl_compress.techniques.prune import apply_plan
from tests.search import campaigns

CUT = Plan(sparsity={"block.conv1": 0.5, "down": 0.25})


def test_a_short_training_starts_from_the_repaired_model() -> None:
    bench = campaigns.bench()
    repaired, plan = bench.student(CUT)
    assert starting_model(repaired, bench.teacher, bench.graph, plan, LONG_STEPS - 1) is repaired


def test_a_long_training_starts_from_what_was_cut_out_of_the_original() -> None:
    bench = campaigns.bench()
    repaired, plan = bench.student(CUT)
    start = starting_model(repaired, bench.teacher, bench.graph, plan, LONG_STEPS)
    cut = apply_plan(bench.teacher, bench.graph, plan).state_dict()
    assert not start.training
    assert all(torch.equal(value, cut[name]) for name, value in start.state_dict().items())
    assert not all(torch.equal(value, cut[name]) for name, value in repaired.state_dict().items())


def test_masks_that_were_chosen_in_the_repair_are_kept() -> None:
    bench = campaigns.bench()
    repaired, plan = bench.student(Plan(sparsity={"down": 0.25}, masks={"block.conv1": "0.5"}))
    assert starting_model(repaired, bench.teacher, bench.graph, plan, 10 * LONG_STEPS) is repaired
