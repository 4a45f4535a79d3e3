from __future__ import annotations

import json
from typing import Any

import pytest

from automl_compress.cli import main
from automl_compress.errors import SpaceError

TOLD: dict[str, Any] = {
    "network": "net", "space": "mine", "description": "", "importance": "obs", "budgets": ["latency"],
    "rules": [{"number": 1, "text": "kind: layer", "gives": ["bits"], "decides": 2}],
    "width": {"options": [1.0], "rule": None, "left_out": []},
    "groups": [], "blocks": [],
    "layers": [
        {
            "name": name, "kind": "conv", "in_channels": 3, "out_channels": 8, "parameters": 216,
            "bits": {"options": [32], "rule": 1, "left_out": [{"option": 8, "reason": "8 bits are slower here"}]},
            "mask": {"options": [], "rule": None, "left_out": []}, "left_whole": ["it is the model's output"],
        }
        for name in ("conv1", "conv2")
    ],
    "decisions": {}, "plans_log10": 0.0, "unpriced": "",
    "priced": {
        "profile": "local", "file": "local.yaml", "provenance": "interpolated", "kernels": {"measured": 3},
        "floor": {"latency": 100.0, "size": 1000.0}, "ceiling": {"latency": 250.0, "size": 9000.0},
    },
    "notes": ["conv1: 8 bits with 12 channels is slower here (3.0 us) than with 16 (2.0 us; from measured kernels)"],
    "warnings": ["the profile is another machine's"],
}  # fmt: skip


class FakeOverview:
    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def describe_space(self, task: str, **options: Any) -> FakeOverview:
        if options["space"] == "broken":
            raise SpaceError("space broken: rule 1 matches nothing")
        self.asked = {"task": task, **options}
        return self

    def to_json(self) -> dict[str, Any]:
        return TOLD


def test_options_are_passed_on_and_json_is_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeOverview()
    line = "space a.py:make --space mine --profile none --budgets latency,size --weights w.pt --json --quiet"
    assert main(line.split(), api=api) == 0
    assert json.loads(capsys.readouterr().out) == TOLD
    del api.asked["progress"]
    assert {**api.asked, "weights": str(api.asked["weights"])} == {
        "task": "a.py:make", "space": "mine", "profile": None, "budgets": ["latency", "size"], "weights": "w.pt",
    }  # fmt: skip


def test_the_text_says_what_is_offered_what_is_not_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["space", "a.py", "-q"], api=FakeOverview()) == 0
    text = capsys.readouterr().out
    for line in (
        "nothing to decide: every choice has a single option",
        "options as for a search that limits latency, by profile local (kernels: 3 measured)",
        "predicted, nothing was measured: latency 100 us to 250 us, size 1 KB to 9 KB (interpolated)",
        "1  kind: layer: bits; decides 2 times",
        "conv1, conv2: bits 8: 8 bits are slower here",
        "conv1, conv2: it is the model's output",
        "conv1: 8 bits with 12 channels is slower here",
        "warning: the profile is another machine's",
    ):
        assert line in text, line


def test_a_wrong_space_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["space", "a.py", "--space", "broken", "-q"], api=FakeOverview()) == 2
    assert capsys.readouterr().err == "error: space broken: rule 1 matches nothing\n"
