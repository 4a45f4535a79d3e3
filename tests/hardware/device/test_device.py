from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from automl_compress.errors import DeviceError
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.profile.profile import DeviceProfile
from tests.hardware.simulated import FACTS, SimulatedRuntime, chain


class Scripted(SimulatedRuntime):
    """Answers from a list; an exception in it is raised."""

    def __init__(self, *answers: Any) -> None:
        super().__init__({})
        self.answers = list(answers)

    def send(self, request: Mapping[str, Any]) -> None:
        pass

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[no-any-return]


def asking(profile: DeviceProfile, *answers: Any) -> tuple[Device, Scripted]:
    channel = Scripted(*answers)
    return Device(profile, launch=lambda settings: channel), channel


FAILURES = {
    "died": (None, "ended during 'facts': closed"),
    "hung": (TimeoutError(), "hung"),
    "refused": ({"ok": False, "error": "onnxruntime is not installed"}, "onnxruntime is not installed"),
    "garbage": (ValueError("no JSON"), "unreadable answer"),
    "incomplete": ({"ok": True}, "without 'architecture'"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_whatever_goes_wrong_in_the_process_is_one_line(profile: DeviceProfile, name: str) -> None:
    answer, expected = FAILURES[name]
    device, channel = asking(profile, answer)
    with pytest.raises(DeviceError, match=expected) as caught:
        device.facts()
    assert "\n" not in str(caught.value)
    assert channel.closed == (name != "refused")


def test_an_interrupted_request_ends_the_process_so_that_no_late_answer_is_taken_for_another(
    profile: DeviceProfile,
) -> None:
    device, channel = asking(profile, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        device.facts()
    assert channel.closed


def test_signs_of_life_are_not_answers(profile: DeviceProfile) -> None:
    device, _ = asking(profile, {"progress": "1"}, {"notice": "waiting"}, {"ok": True, **vars(FACTS)})
    assert device.facts() == FACTS


def test_what_the_person_should_know_is_passed_on(profile: DeviceProfile) -> None:
    said: list[str] = []
    channel = Scripted({"notice": "another process is measuring"}, {"ok": True, **vars(FACTS)})
    Device(profile, launch=lambda settings: channel, notice=said.append).facts()
    assert said == ["another process is measuring"]


def test_the_conditions_of_the_latest_measurement_are_kept(profile: DeviceProfile) -> None:
    measured = {"ok": True, "bursts_us": {"a": [1.0]}, "runs": {"a": 3}, "conditions": {"steal": 0.25}}
    device, _ = asking(profile, measured, {"ok": True, **vars(FACTS)})
    device.compare({"a": Path("a.onnx")})
    device.facts()
    assert device.conditions == {"steal": 0.25}


def test_compared_models_are_told_at_the_clock_that_is_asked_for(profile: DeviceProfile) -> None:
    measured = {"ok": True, "bursts_us": {"a": [8.0, 12.0]}, "runs": {"a": 3}, "pace_us": [50.0, 60.0, 900.0]}
    device, _ = asking(profile, measured, measured)
    assert device.compare({"a": Path("a.onnx")})["a"].values_us == (8.0, 12.0)
    assert device.compare({"a": Path("a.onnx")}, pace_us=30.0)["a"].values_us == (4.0, 6.0)


def test_the_process_knows_the_profile_and_starts_when_it_is_needed(profile: DeviceProfile) -> None:
    launched: list[Mapping[str, Any]] = []

    def launch(settings: Mapping[str, Any]) -> SimulatedRuntime:
        launched.append(settings)
        return SimulatedRuntime(settings)

    with Device(profile, launch=launch) as device:
        assert not launched
        device.facts()
        device.facts()
    assert len(launched) == 1
    assert launched[0]["threads"] == profile.threads
    assert launched[0]["burst_runs"] == 30


def test_what_the_runtime_refuses_is_named_with_the_bits_that_it_may_lack(profile: DeviceProfile) -> None:
    refused = {"ok": False, "error": "NotImplemented: [ONNXRuntimeError] : 9 : no DequantizeLinear(25)"}
    model = chain(4, 8)
    for kind in (onnx.TensorProto.UINT2, onnx.TensorProto.INT8):
        model.graph.initializer.append(onnx.TensorProto(name=str(kind), data_type=kind))
    device, _ = asking(profile, refused, refused, refused, {"ok": False, "error": "the disk is full"})
    with device, device.saved(model) as path, device.saved(chain(4, 8)) as plain:
        with pytest.raises(DeviceError, match=r"^lower failed.*if it lacks 2 or 8 bits, leave them out of the search"):
            device.lower(path)
        with pytest.raises(DeviceError, match="if it lacks 2 or 8 bits"):
            device.compare({"plain": plain, "low": path})
        for text in ("25\\)$", "full$"):
            with pytest.raises(DeviceError, match=text):
                device.lower(plain if text[0] == "2" else path)


def test_compared_models_have_aligned_bursts(device: Device) -> None:
    with device.saved(chain(4, 8)) as small, device.saved(chain(4, 80)) as large:
        timings = device.compare({"small": small, "large": large}, bursts=4)
    assert [len(t.values_us) for t in timings.values()] == [4, 4]
    assert timings["small"].median_us < timings["large"].median_us
    assert device.compare({}) == {}


def test_memory_is_above_that_of_an_empty_model_which_is_measured_once(device: Device) -> None:
    model = chain(64, 64)
    with device.saved(model) as path:
        assert device.memory_bytes(path) == 1_000_000 + 3 * model.ByteSize()
        asked = device.requests["memory"]
        device.memory_bytes(path)
    assert device.requests["memory"] < 2 * asked


def test_temporary_files_are_gone_after_use(device: Device) -> None:
    with device.saved(chain(4, 8)) as path:
        folder = path.parent
        assert path.is_file()
    assert not path.exists()
    device.close()
    assert not folder.exists()
