"""The prior: nothing for what does nothing, a distance for the rest, and never measured twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from automl_compress.core.plan import Plan
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.table.sensitivity import ANCHORS, measure_sensitivity, single
from tests.search import campaigns

SPACE = campaigns.space()
OPTIONS = [(d.name, o) for d in SPACE.decisions for o in d.options]


class Counting(Workbench):
    """Counts the plans whose distance was measured."""

    made = 0

    def distance_of(self, plan: Plan) -> float:
        self.made += 1
        return super().distance_of(plan)


@pytest.fixture
def bench() -> Counting:
    fresh = Counting(campaigns.ready(), campaigns.graph(), importance="l2")
    fresh.__dict__.update(
        {k: v for k, v in campaigns.bench().__dict__.items() if k in ("template", "_train", "students")}
    )
    return fresh


def test_every_option_has_a_distance_and_neutral_ones_have_none(bench: Counting, tmp_path: Path) -> None:
    found = measure_sensitivity(bench, SPACE, tmp_path / "file.jsonl")
    assert list(found) == OPTIONS
    neutral = {(d.name, d.neutral) for d in SPACE.decisions}
    for key, distance in found.items():
        assert distance == 0 if key in neutral else distance > 0
    assert bench.made == len(OPTIONS) - len(neutral)


def test_of_many_sparsities_two_are_measured_and_the_others_lie_between(bench: Counting, tmp_path: Path) -> None:
    rules = [{"match": {"kind": "channel-group"}, "sparsity": [i / 8 for i in range(8)]}]
    space = campaigns.space(rules=rules, width=1.0)
    file = tmp_path / "file.jsonl"
    found = measure_sensitivity(bench, space, file)
    assert bench.made == 2 * len(space.decisions)
    for decision in space.decisions:
        losses = [found[decision.name, option] for option in decision.options]
        assert losses == sorted(losses)
        assert losses[0] == 0 < losses[1]
        for anchor in ANCHORS:
            assert found[decision.name, anchor] >= bench.distance_of(single(decision, anchor)) * 0.999
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]))
    assert measure_sensitivity(bench, space, file) == pytest.approx(found), "a killed run goes on to the same table"


def test_what_the_file_holds_is_not_measured_again(bench: Counting, tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    first = measure_sensitivity(bench, SPACE, file)
    made, written = bench.made, file.read_bytes()
    assert measure_sensitivity(bench, SPACE, file) == first
    assert (bench.made, file.read_bytes()) == (made, written)


def test_a_run_that_was_killed_goes_on_after_the_line_that_was_cut_short(bench: Counting, tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    first = measure_sensitivity(bench, SPACE, file)
    lines, made = file.read_text().splitlines(keepends=True), bench.made
    kept = next(i for i, line in enumerate(lines) if '"bits.' in line)
    file.write_text("".join(lines[:kept]) + lines[kept][:12] + "\n")
    again = measure_sensitivity(bench, SPACE, file)
    assert again == pytest.approx(first)
    assert 0 < bench.made - made < made


def test_progress_is_told_of_every_option(bench: Counting, tmp_path: Path) -> None:
    ticks: list[int] = []
    measure_sensitivity(bench, SPACE, tmp_path / "file.jsonl", lambda: ticks.append(1))
    assert len(ticks) == len(OPTIONS)


def test_a_single_option_changes_nothing_else() -> None:
    for decision in SPACE.decisions:
        for option in decision.options:
            plan = single(decision, option)
            assert SPACE.identity(plan) == SPACE.identity(SPACE.plan({**SPACE.neutral(), decision.name: option}))
