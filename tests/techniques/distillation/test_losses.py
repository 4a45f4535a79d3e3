"""Losses by name: read, written, refused with the way out."""

from __future__ import annotations

from typing import Any

import pytest

from automl_compress.errors import InputError
from automl_compress.techniques.distillation.losses import NAMES, Losses, parse_losses


@pytest.mark.parametrize(
    "text", ["soft", "soft+dist", "dkd=2+task=0.5", "task", "soft+mixed", "soft+mixed=0.25", *NAMES]
)
def test_what_is_read_is_written_again(text: str) -> None:
    assert str(parse_losses(text)) == text
    assert parse_losses(f" {text.replace('+', ' + ')} ") == parse_losses(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sft", r"unknown distillation loss 'sft'; there are: soft, logit, .*mixed; did you mean soft\?"),
        ("quite other", r"unknown distillation loss 'quite other'; there are: soft, .*mixed$"),
        ("", "unknown distillation loss ''"),
        ("soft+", "unknown distillation loss ''"),
        ("soft+soft=2", "soft is there twice"),
        ("soft=much", "soft must have a number.*'much'"),
        ("soft=-1", "weight of distillation loss soft must be 0 or more, found -1"),
        ("soft=nan", "must be 0 or more"),
        ("soft=inf", "must be 0 or more"),
        ("task=0", "all weights are 0"),
        ("soft+mixed=1", "mixed must be at least 0 and below 1, found 1"),
        ("task+mixed", "no labels but the teacher's"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_losses(text)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": 0.0}, "temperature.*above 0, found 0"),
        ({"soft_share": 1.5}, "share.*from 0 to 1, found 1.5"),
        ({"weights": {}}, "at least one loss"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Losses(**options)


@pytest.mark.parametrize(
    ("text", "weight"), [("soft", 0.1), ("task", 1.0), ("soft+task", 0.1), ("soft+task=0.4", 0.4), ("dkd+task=0", 0.0)]
)
def test_the_tasks_own_loss_gets_what_the_teacher_leaves(text: str, weight: float) -> None:
    assert parse_losses(text).task_weight == pytest.approx(weight)
    assert parse_losses(text).needs_teacher is (text != "task")
