from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from automl_compress.errors import ProfileError
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.savings import HOW, Saving, measure_savings, offers
from automl_compress.hardware.measuring.weighing import memory
from automl_compress.hardware.prediction.cost import CostModel
from automl_compress.hardware.profile.profile import DeviceProfile, load_profile
from tests.hardware.simulated import chain


def test_what_needs_less_memory_is_offered_with_its_price_the_best_first() -> None:
    ways = [
        Saving(way="default", memory_bytes=10_000_000, latency_ratio=1.0),
        Saving(way="no-arena", memory_bytes=9_900_000, latency_ratio=1.0),
        Saving(way="malloc-threshold", memory_bytes=8_000_000, latency_ratio=None),
        Saving(way="no-prepacking", memory_bytes=7_000_000, latency_ratio=1.21),
    ]
    assert offers(ways) == [
        f"memory: 7 MB instead of 10 MB with {HOW['no-prepacking']}, at 1.21 of the latency",
        f"memory: 8 MB instead of 10 MB with {HOW['malloc-threshold']}",
    ]
    assert not offers(ways[:2])


def test_every_way_runs_on_the_real_runtime(tmp_path: Path) -> None:
    with Device(load_profile("local", home=tmp_path)) as here, here.saved(chain(64, 256, 256, 10)) as path:
        found = measure_savings(here, path)
    assert [saving.way for saving in found] == ["default", *HOW]
    assert found[0].latency_ratio == 1.0
    assert all(saving.memory_bytes > 0 for saving in found)
    assert [saving.way for saving in found if saving.latency_ratio is None] == ["malloc-threshold"]


def test_a_way_that_the_runtime_itself_refuses_is_left_out(tmp_path: Path) -> None:
    """The runtime's own format doesn't know the 4-bit integers that it writes into it."""
    weights = helper.make_tensor("w", TensorProto.UINT4, [96, 10], [1, 9] * 480)
    zeros = helper.make_tensor("zero", TensorProto.UINT4, [1, 10], [8] * 10)
    scales = numpy_helper.from_array(np.full((1, 10), 0.5, np.float32), "scale")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["wide"], axis=0, block_size=96),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 96])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])]
    graph = helper.make_graph(nodes, "low", inputs, outputs, initializer=[weights, scales, zeros])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with Device(load_profile("local", home=tmp_path)) as here, here.saved(model) as path:
        assert "ort-format" not in {saving.way for saving in measure_savings(here, path)}


def with_environment(tmp_path: Path, environment: str) -> Path:
    path = tmp_path / "measured.yaml"
    plain = load_profile("local", home=tmp_path / "home").path.read_text("utf-8")
    path.write_text(plain.replace("model: process", f"model: process\n  environment: {{{environment}}}"))
    return path


def test_processes_that_are_weighed_have_the_environment_of_the_profile(tmp_path: Path) -> None:
    profile = DeviceProfile(with_environment(tmp_path, "MALLOC_TOP_PAD_: '4096'"))
    program = tmp_path / "program.py"
    program.write_text("import json, os; print(json.dumps({'peak_bytes': int(os.environ.get('MALLOC_TOP_PAD_', 0))}))")
    settings = {**profile.header.settings(), "program": str(program)}
    assert memory({"model": "model.onnx"}, settings, lambda _: None) == {"peak_bytes": 4096}
    with Device(profile) as device:
        assert any("MALLOC_TOP_PAD_=4096" in note for note in CostModel(profile, device).notes(chain(8, 8)))


@pytest.mark.parametrize("variable", ["LD_PRELOAD: '1'", "MALLOC_TRACE: /tmp/x", "MALLOC_ARENA_MAX: 1"])
def test_a_profile_sets_nothing_but_numbers_of_the_allocator(tmp_path: Path, variable: str) -> None:
    with pytest.raises(ProfileError, match=r"memory\.environment"):
        DeviceProfile(with_environment(tmp_path, variable))
