from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from automl_compress.core.plan import Plan
from automl_compress.deploy.sketcher import value_shapes
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.prediction.liveness import live_bytes
from automl_compress.hardware.profile.profile import load_profile
from automl_compress.progress import SilentProgress
from automl_compress.search.table.forecast import Effort, Forecast
from automl_compress.search.table.pricing import random_plan
from automl_compress.search.table.profiling import profile_network
from automl_compress.techniques.onnx_graph import GraphView
from tests.hardware.simulated import FACTS
from tests.search.campaigns import bench, space
from tests.search.device import TimelessRuntime

EFFORT = Effort(pool=48, traced=32, target=0.01, checks=6, memories=3)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def learned(home: Path) -> Iterator[Forecast]:
    with Device(load_profile("local", home=home, facts=FACTS), launch=TimelessRuntime) as device:
        forecast = Forecast(bench(), space(), device, measure=False)
        forecast.learn(EFFORT)
        yield forecast


def unseen(forecast: Forecast, count: int) -> list[Plan]:
    rng = np.random.default_rng(99)
    plans = []
    while len(plans) < count:
        plan = replace(random_plan(forecast.space, rng, drop_share=0.2), width=float(rng.choice([1.0, 0.5])))
        if not forecast.seen(plan):
            plans.append(plan)
    return plans


def test_plans_that_were_not_seen_are_predicted_without_a_measurement(learned: Forecast, tmp_path: Path) -> None:
    plans = unseen(learned, 8)
    before = learned.device.requests["trace"]
    costs = [learned.predict(plan) for plan in plans]
    assert learned.device.requests["trace"] == before
    original = learned.device.profile.model(learned.device.lowered(bench().original).key)
    assert original is not None
    misses = []
    for plan, cost in zip(plans, costs, strict=True):
        path = tmp_path / "plan.onnx"
        path.write_bytes(bench().structure(plan).SerializeToString())
        measured = learned.device.compare({"plan": path})["plan"].median_us
        assert cost.latency_error is not None
        # A kernel of a family that was hardly seen is a fifth of such a small model.
        assert cost.latency_us == pytest.approx(measured, rel=max(0.15, 3 * cost.latency_error))
        misses.append(abs(cost.latency_us / measured - 1))
        assert cost.size_bytes == path.stat().st_size
    assert np.median(misses) < 0.03


def test_telling_a_plan_in_outline_comes_to_the_same(learned: Forecast) -> None:
    misses = []
    for plan in unseen(learned, 12):
        lowered, told = learned.predict(plan), learned.quick(plan)
        misses.append(abs(told.latency_us / lowered.latency_us - 1))
        assert told.size_bytes == pytest.approx(lowered.size_bytes, rel=0.02, abs=300)
        assert told.memory_bytes == pytest.approx(lowered.memory_bytes, rel=0.1)
    # In models of a dozen kernels of which each takes as long as the next, one helper more or less is a tenth.
    assert np.median(misses) < 0.06
    assert max(misses) < 0.25


def test_learning_again_measures_nothing(learned: Forecast, home: Path) -> None:
    with Device(load_profile("local", home=home, facts=FACTS), launch=TimelessRuntime) as device:
        again = Forecast(bench(), space(), device, measure=False)
        filled = profile_network("tiny", again, SilentProgress(), effort=EFFORT)
        assert (filled.kernels, filled.models, filled.requests) == (0, 0, 0)
        assert filled.known == len(learned.device.profile.kernels)
        assert set(device.requests) == {"lower"}
        plan = unseen(learned, 1)[0]
        assert again.predict(plan).latency_us == pytest.approx(learned.predict(plan).latency_us, rel=1e-3)


def test_the_correction_and_its_error_are_in_the_profile(learned: Forecast) -> None:
    (record,) = learned.device.profile.corrections.values()
    assert record.key == learned.costs.family
    assert record.records == len(learned.device.profile.models)
    assert record.error is not None
    assert record.p95_error is not None
    assert record.worst_error is not None
    assert record.error <= record.p95_error <= record.worst_error


def test_a_sketch_has_the_sizes_and_nodes_of_the_plans_model(learned: Forecast) -> None:
    for plan in unseen(learned, 6):
        plain = replace(plan, bits={})
        model, sketch = bench().structure(plain), learned.sketcher(plain)
        view, shapes = GraphView(model.graph), value_shapes(model)
        assert list(sketch.skeleton.sites) == [node.output[0] for node in view.nodes]
        for site, channels, numbers in zip(sketch.skeleton.sites, sketch.written, sketch.written_numbers, strict=True):
            assert numbers == np.prod(shapes[site])
            assert channels == (shapes[site][1] if len(shapes[site]) == 4 else shapes[site][-1])


def test_a_sketch_marks_what_runs_in_integers(learned: Forecast) -> None:
    layers = {layer.name for layer in bench().graph.layers}
    full, small = learned.sketcher(Plan()), learned.sketcher(Plan(bits=dict.fromkeys(layers, 8)))
    assert not any(full.integer)
    assert not any(full.quantized)
    marked = {layer for layer, integer in zip(small.skeleton.layers, small.integer, strict=True) if layer and integer}
    assert marked == layers
    assert live_bytes(small) < live_bytes(full)
    assert small.size_terms[0] < full.size_terms[0]
