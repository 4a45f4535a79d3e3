"""The repair that is kept is the best on samples that it was not fitted to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from automl_compress.core.plan import Plan
from automl_compress.search.evaluation.student import Students, bytes_per_sample, distances, uniform_rows
from automl_compress.techniques.importance import CRITERIA
from tests.search import campaigns

PLAN = Plan(sparsity={"block.conv1": 0.5, "down": 0.25})


def students(importance: str = "l2", **settings: int) -> Students:
    task = campaigns.ready()
    batches = list(task.batches("train"))
    return Students(
        task.model.eval(),
        campaigns.graph(),
        lambda: batches,
        loss=task.loss_of,
        classifies=True,
        importance=importance,
        **settings,
    )


def test_fitting_and_judging_samples_are_different_ones() -> None:
    made = students(repair_samples=40, judge_samples=30)
    rows = uniform_rows([inputs for inputs, _ in made.evidence.data])[0]
    assert torch.equal(made.targets.inputs[0], rows[:40])
    assert torch.equal(made.judge[0], rows[40:70])


def test_something_is_left_to_judge_by_when_samples_are_few() -> None:
    made = students(repair_samples=10**6)
    total = len(uniform_rows([inputs for inputs, _ in made.evidence.data])[0])
    assert len(made.targets.inputs[0]) == total * 3 // 4
    assert len(made.judge[0]) > 0


def test_what_is_kept_is_the_best_that_was_judged() -> None:
    made = students()
    student = made.make(PLAN)
    assert student.repair in ("none", "refit", "refit and batch-norm")
    least = float(made.distances(student.model).mean())
    assert least <= float(made.estimate(PLAN).mean()) + 1e-9
    assert {name for name, one in student.layers.items() if one.outcome == "refit"}


def test_a_repair_that_harms_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: nn.Module, *_: object) -> dict[str, object]:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return {}

    monkeypatch.setattr("automl_compress.search.evaluation.student.repair", spoil)
    student = students().make(PLAN)
    assert student.repair == "none"
    assert any(bool(parameter.any()) for parameter in student.model.parameters())


@pytest.mark.parametrize("importance", CRITERIA)
def test_every_criterion_makes_a_student_of_the_same_size(importance: str) -> None:
    student = students(importance).make(PLAN)
    graph = campaigns.graph()
    assert student.plan.widths(graph) == PLAN.widths(graph)
    assert set(student.plan.kept) == {"block.conv1", "down"}


def test_distances_are_divergences_or_relative_errors_of_each_sample() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(6, 4)).astype(np.float32), generator.normal(size=(9, 4)).astype(np.float32)
    p, q = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (other[:6].astype(float), one.astype(float)))
    np.testing.assert_allclose(distances([(one,)], [(other,)], True), (p * np.log(p / q)).sum(1), rtol=1e-5)
    wanted = ((one - other[:6]) ** 2).mean(1) / other[:6].var()
    np.testing.assert_allclose(distances([(one[:2],), (one[2:],)], [(other,)], False), wanted, rtol=1e-5)


def test_the_widest_layer_says_how_much_memory_a_sample_takes() -> None:
    graph = campaigns.graph()
    widest = max(np.prod(layer.input_shape) + np.prod(layer.output_shape) for layer in graph.layers)
    assert bytes_per_sample(graph) == 12 * widest


def test_samples_of_another_shape_are_left_out() -> None:
    batches = [(torch.zeros(2, 3),), (torch.ones(4, 5),), (torch.ones(1, 3),)]
    assert uniform_rows(batches)[0].shape == (3, 3)
