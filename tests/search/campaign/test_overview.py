"""What a space gives a network is told whole: every decision, its rule, and why options are missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from automl_compress.cli.space import overview_text
from automl_compress.core.plan import Plan
from automl_compress.errors import InputError
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.profile.profile import load_profile
from automl_compress.progress import SilentProgress
from automl_compress.search.campaign.overview import Overview, describe_space, priced
from automl_compress.search.space.rules import SpaceFile
from automl_compress.search.table.forecast import Forecast
from tests.hardware.simulated import FACTS
from tests.search.campaigns import RULES, bench, space
from tests.search.device import TimelessRuntime
from tests.tiny import ready


@pytest.fixture
def plain() -> Overview:
    rules = SpaceFile.model_validate(RULES)
    return Overview(network="tiny", rules=rules, space=space(), budgets=("latency",), unpriced="no profile was named")


def test_every_decision_is_told_with_its_options_and_its_rule(plain: Overview) -> None:
    told = plain.to_json()
    decided = {f"sparsity.{g['name']}": g["sparsity"] for g in told["groups"]}
    decided |= {f"drop.{b['name']}": b["drop"] for b in told["blocks"]}
    decided |= {f"bits.{layer['name']}": layer["bits"] for layer in told["layers"]}
    decided |= {"width": told["width"]}
    offered = {d.name: list(d.options) for d in plain.space.decisions}
    assert {name: choice["options"] for name, choice in decided.items() if len(choice["options"]) > 1} == offered
    assert {decided[name]["rule"] for name in offered if name != "width"} == {1, 2, 3}
    assert sum(rule["decides"] for rule in told["rules"]) == len(plain.space.decided_by)
    assert told["plans_log10"] == pytest.approx(math.log10(math.prod(map(len, offered.values()))), abs=0.01)
    json.dumps(told)


def test_without_a_profile_nothing_is_dropped_and_that_is_said(plain: Overview) -> None:
    assert plain.priced is None
    text = overview_text(plain.to_json())
    assert "no option was dropped for them: no profile was named" in text
    for layer in plain.graph.layers:
        assert layer.name in text


def test_what_a_profile_says_is_called_predicted(plain: Overview, tmp_path: Path) -> None:
    profile = load_profile("local", home=tmp_path, facts=FACTS)
    with Device(profile, launch=TimelessRuntime) as device:
        Forecast(bench(), plain.space, device).learn()
        TimelessRuntime.asked.clear()
        found = priced(plain, Forecast(bench(), plain.space, device, measure=False), device, SilentProgress())
        assert set(TimelessRuntime.asked) <= {"lower"}
    assert found.priced is not None
    assert found.priced.ceiling["latency"] > found.priced.floor["latency"] > 0
    assert found.priced.floor["size"] < found.priced.ceiling["size"]
    assert set(found.priced.kernels) == {"measured"}
    dropped = {d.name: set(d.options) for d in plain.space.decisions}
    for entry in found.space.left_out:
        dropped[entry.decision].discard(entry.option)
    assert {name: set(found.space.options(name)) for name in dropped} == dropped
    assert found.space.plan({}).key == Plan().key
    assert "predicted, nothing was measured: latency" in overview_text(found.to_json())


def test_a_task_is_described_without_a_device() -> None:
    found = describe_space(ready(), space="quantize-only", profile=None, budgets=["latency", "size"])
    assert set(found.to_json()["decisions"]) == {"bits"}
    assert found.space.options("bits.stem") == (32, 16, 8, 4, 2)
    assert found.priced is None


def test_budgets_are_named_as_in_a_search() -> None:
    with pytest.raises(InputError, match="found 'speed'; name what a search would limit: latency, size, memory"):
        describe_space(ready(), profile=None, budgets=["speed"])
