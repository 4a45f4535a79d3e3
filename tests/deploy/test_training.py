"""The report tells how the delivered model was trained: a row and curves for each training."""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects

from automl_compress.core.result import Result
from automl_compress.deploy.report import render
from automl_compress.deploy.training import training_chart, training_rows
from automl_compress.techniques.training.log import Curves, TrainingLog
from tests.deploy.test_report import RESULT

FIRST = TrainingLog(
    label="full distillation",
    curves=Curves(
        every=1, steps=(1, 2, 3), losses=(2.0, 1.0, 0.5), learning_rates=(0.1, 0.2, 0.1), metrics=((2, 0.8), (3, 0.9))
    ),
    images=384,
    seconds=2.0,
    rollbacks=1,
    metric=0.9,
    delivered="average",
    computed="cpu, bfloat16",
)
SECOND = replace(FIRST, label="training with rounding", curves=replace(FIRST.curves, metrics=()), metric=None)
TRAINED = replace(RESULT, training=(FIRST.to_json(), SECOND.to_json()))


def test_a_row_says_what_a_training_did() -> None:
    assert training_rows([FIRST.to_json()]) == [
        {
            "label": "full distillation",
            "steps": "3",
            "loss": "2 → 0.5",
            "metric": "0.9000 (average)",
            "pace": "192 images/s",
            "computed": "cpu, bfloat16",
            "rollbacks": "1",
        }
    ]


def test_trainings_follow_each_other_in_the_chart() -> None:
    figure = plotly.graph_objects.Figure(training_chart(TRAINED.training))
    losses = [trace for trace in figure.data if trace.name.startswith("loss")]
    assert [list(trace.x) for trace in losses] == [[1, 2, 3], [4, 5, 6]]
    assert [list(trace.y) for trace in figure.data if trace.name == "metric: full distillation"] == [[0.8, 0.9]]
    assert [shape.x0 for shape in figure.layout.shapes] == [3]
    assert training_chart([]) is None


def test_the_page_shows_it_and_does_without() -> None:
    page = render(TRAINED, [], plotly_js="js();")
    assert "Training of the delivered model" in page
    assert page.count("js();") == 1
    assert 'id="curves"' in page
    assert "Training of the delivered model" not in render(RESULT, [], plotly_js="js();")


def test_it_is_in_the_result_and_comes_back_from_it() -> None:
    data = TRAINED.to_json()
    assert Result.from_json(data).training == TRAINED.training
    del data["training"]  # a result of an earlier version
    assert Result.from_json(data).training == ()
