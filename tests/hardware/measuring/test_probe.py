"""The real measuring process on tiny models: what it answers, and that it never outlives its purpose.

No times are judged.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from automl_compress.errors import DeviceError
from automl_compress.hardware.device.channel import BOOTSTRAP, LOADER, ProcessChannel, hold, program
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.measuring.bursts import executed_nodes
from automl_compress.hardware.prediction.cost import CostModel
from automl_compress.hardware.prediction.measure import measure_variants
from automl_compress.hardware.profile.host import host_facts
from automl_compress.hardware.profile.profile import load_profile
from tests.hardware.device.test_kernels import residual
from tests.hardware.simulated import chain


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Device]:
    """This machine."""
    with Device(load_profile("local", home=tmp_path)) as device:
        yield device


def test_real_models_are_traced_compared_weighed_and_predicted(here: Device) -> None:
    variants = [residual(), chain(8, 16, 4), chain(8, 4, 4)]
    filled = measure_variants(here, variants, memories=1)
    assert filled.models == 3
    assert filled.memories == 1
    assert not here.profile.warnings
    assert measure_variants(here, variants, memories=1).requests == 0
    kernels = here.lowered(variants[0]).kernels
    assert [k.layer for k in kernels if k.role == "layer"] == ["block.conv1", "block.conv2"]
    assert all("w float[" in k.key and "k3x3" in k.key for k in kernels if k.role == "layer")
    cost = CostModel(here.profile, here).predict(variants[1])
    assert cost.latency_us > 0
    assert cost.memory_bytes > 0
    assert cost.size_bytes == variants[1].ByteSize()
    with here.saved(variants[0]) as path:
        assert {len(t.values_us) for t in here.compare({"a": path, "b": path}, bursts=2).values()} == {2}
    assert here.facts().onnxruntime == here.profile.header.runtime.version


def test_what_the_runtime_refuses_is_one_line_and_the_process_goes_on(here: Device, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for path, expected in ((tmp_path / "bad.onnx", "PROTOBUF|Protobuf"), (tmp_path / "none.onnx", "no such model")):
        for ask in (lambda p: here.compare({"a": p}), here.lower):
            with pytest.raises(DeviceError, match=expected) as caught:
                ask(path)
            assert "\n" not in str(caught.value)
    assert here.facts()


def test_a_process_that_dies_is_reported_with_its_last_words(here: Device) -> None:
    dying = [sys.executable, "-c", "import sys; sys.stdin.buffer.readline(); sys.exit('out of luck')"]
    device = Device(here.profile, launch=lambda settings: ProcessChannel(settings, command=lambda _: dying))
    with pytest.raises(DeviceError, match=r"ended during 'facts': out of luck"):
        device.facts()


def test_a_process_that_hangs_is_ended(here: Device) -> None:
    hanging = [sys.executable, "-c", "import time; time.sleep(600)"]
    channels = []

    def launch(settings: object) -> ProcessChannel:
        channels.append(ProcessChannel({}, command=lambda _: hanging))
        return channels[0]

    with pytest.raises(DeviceError, match="hung"):
        Device(here.profile, launch=launch, silence_s=0.1).facts()
    assert channels[0]._process.poll() is not None


def test_without_the_runtime_the_answer_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ModuleNotFoundError(name='onnxruntime')")
    channel = ProcessChannel(
        {}, command=lambda arguments: ["env", f"PYTHONPATH={tmp_path}", sys.executable, *arguments]
    )
    channel.send({"do": "facts"})
    answer = channel.receive(60)
    channel.close()
    assert answer is not None
    assert f"{sys.executable} -m pip install onnxruntime" in answer["error"]


def test_the_process_says_what_the_machine_is(here: Device) -> None:
    facts = here.facts()
    assert facts.providers
    assert replace(facts, providers=()) == host_facts()


def start_and_end(folder: Path) -> dict[str, object]:
    """Run the program without a request, with this folder for temporary files; returns its greeting."""
    code = program()
    command = [sys.executable, "-c", BOOTSTRAP, str(len(LOADER)), str(len(code)), str(folder)]
    done = subprocess.run(command, input=LOADER.encode() + code, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_process_ends_when_its_input_does_and_leaves_no_file(tmp_path: Path) -> None:
    assert str(start_and_end(tmp_path)["folder"]).startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_program_left_lying_is_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / "automl-compress-left"
    left.mkdir()
    held = hold(left)
    assert held is not None
    start_and_end(tmp_path)
    assert left.is_dir(), "it is still in use"
    held.close()
    start_and_end(tmp_path)
    assert not left.exists()


def test_a_measurement_comes_with_its_conditions(here: Device) -> None:
    with here.saved(chain(4, 8)) as path:
        here.lower(path)
        assert not here.conditions
        here.compare({"a": path}, bursts=1)
    assert here.conditions["seconds"] > 0
    assert here.conditions["involuntary_switches"] >= 0


MEASURER = """
import sys, threading
from pathlib import Path
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.profile.profile import load_profile

with Device(load_profile("local", home=Path(sys.argv[1]))) as device:
    device.facts()
    print(device._dialogue._channel.pid, flush=True)
    device.compare({"a": Path(sys.argv[2])}, bursts=10_000_000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_however_the_program_ends_in_the_middle_of_a_measurement_the_process_ends_too(
    tmp_path: Path, sent: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(chain(8, 16, 4).SerializeToString())
    command = [sys.executable, "-c", MEASURER, str(tmp_path), str(tmp_path / "model.onnx")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
        assert program.stdout is not None
        measuring = int(program.stdout.readline())
        program.send_signal(getattr(signal, sent))
        try:
            assert program.wait(timeout=30) != 0
        finally:
            program.kill()
    deadline = time.monotonic() + 30
    while _alive(measuring) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(measuring)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_closing_leaves_no_process_behind(here: Device) -> None:
    here.facts()
    channel = here._dialogue._channel
    assert isinstance(channel, ProcessChannel)
    assert channel._process.poll() is None
    here.close()
    assert channel._process.poll() is not None


def test_events_of_one_node_are_gathered_in_order_of_execution() -> None:
    def event(name: str, us: int, index: str) -> dict[str, object]:
        args = {
            "op_name": "Conv",
            "node_index": index,
            "input_type_shape": [{"float": [1, 3]}],
            "output_type_shape": [],
        }
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "ts": 10 * len(events), "args": args}

    events: list[dict[str, object]] = []
    for name, us, index in (("b", 1, "7"), ("a", 2, "3"), ("b", 3, "7"), ("a", 4, "3")):
        events += [event(name, us, index), {"cat": "Session", "name": "x"}]
    nodes = executed_nodes(events)
    assert [(n["name"], n["us"], n["inputs"]) for n in nodes] == [
        ("b", [1, 3], ["float[1,3]"]),
        ("a", [2, 4], ["float[1,3]"]),
    ]
    assert [n["steps"] for n in nodes] == [[20, 20], [None, None]], "a step doesn't reach into the next run"
