"""A device behind a real sshd on the loopback: the same answers as here, and one line for whatever goes wrong."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from automl_compress.deploy.runtime import OnnxModel
from automl_compress.errors import DeviceError
from automl_compress.hardware.device import remote
from automl_compress.hardware.device.channel import ProcessChannel
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.dialogue import Link
from automl_compress.hardware.device.remote import link_to
from automl_compress.hardware.measuring.serve import turn
from automl_compress.hardware.prediction.measure import measure_variants
from automl_compress.hardware.profile.host import host_facts
from automl_compress.hardware.profile.profile import DeviceProfile, load_profile
from automl_compress.progress import SilentProgress
from tests.hardware.device.test_kernels import residual
from tests.hardware.simulated import chain
from tests.sshd import Server


@pytest.fixture
def link(server: Server) -> Link:
    return replace(link_to(server.url()), pause_s=0.0)


@pytest.fixture
def profile(tmp_path: Path) -> DeviceProfile:
    return load_profile("local", home=tmp_path)


class During(SilentProgress):
    """Does something to the device in the middle of it: when so many units of work are done."""

    def __init__(self, after: int, act: Callable[[], None]) -> None:
        super().__init__()
        self._left, self._act = after, act

    def advance(self, n: int = 1, **facts: Any) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()


VARIANTS = [residual(), chain(8, 16, 4), chain(8, 4, 4), chain(8, 24, 4)]


def test_a_device_says_what_it_is(link: Link) -> None:
    facts = link.facts()
    assert facts.providers
    assert replace(facts, providers=()) == host_facts()


def test_everything_is_measured_there_and_nothing_twice(server: Server, link: Link, profile: DeviceProfile) -> None:
    with Device(profile, link=link) as device:
        filled = measure_variants(device, VARIANTS, memories=1)
        assert (filled.models, filled.memories) == (4, 1)
        assert device.conditions["seconds"] > 0
        assert list(server.tmp.iterdir())
    with Device(profile, link=link) as device, device.saved(chain(8, 16, 4)) as path:
        assert measure_variants(device, VARIANTS, memories=1).requests == 0
        device.compare({"a": path, "b": path}, bursts=2)


def test_what_is_executed_there_is_what_is_executed_here(link: Link, profile: DeviceProfile) -> None:
    """On the same machine; the optimized graph, from which weights and fusions are read, comes back whole."""
    with Device(profile, link=link) as there, Device(profile) as here:
        for model in VARIANTS:
            assert there.lowered(model) == here.lowered(model)
            with here.saved(model) as path:
                assert outline(there.optimized(path)) == outline(here.optimized(path))


def outline(graph: onnx.GraphProto) -> list[object]:
    """Operators in order, and the shapes of weights; the runtime's own names differ between processes."""
    return [[node.op_type for node in graph.node], sorted(tuple(weight.dims) for weight in graph.initializer)]


def test_what_is_computed_there_comes_back(link: Link, profile: DeviceProfile) -> None:
    inputs = (np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8),)
    with Device(profile, link=link) as device, device.saved(chain(8, 16, 4)) as path:
        (found,) = device.outputs(path, inputs)
        (expected,) = OnnxModel(path)(inputs)
    np.testing.assert_array_equal(found, expected)


def test_a_lost_connection_is_made_anew(server: Server, link: Link, profile: DeviceProfile) -> None:
    said: list[str] = []
    with Device(profile, link=link, notice=said.append) as device:
        measure_variants(device, VARIANTS, memories=0, progress=During(2, server.drop_connections))
    assert [text for text in said if "connecting again" in text] == said
    assert len(said) == 1
    assert len(profile.models) == len(VARIANTS)


def test_what_was_measured_before_the_device_went_away_is_kept(server: Server, link: Link, tmp_path: Path) -> None:
    with Device(load_profile("local", home=tmp_path / "whole"), link=link) as device:
        measure_variants(device, VARIANTS, memories=0)
        whole = {model.key for model in device.profile.models}
    profile = load_profile("local", home=tmp_path / "broken")
    lost = pytest.raises(DeviceError, match="What was measured is kept")
    with Device(profile, link=link) as device, lost as caught:
        measure_variants(device, VARIANTS, memories=0, progress=During(2, server.stop))
    assert "\n" not in str(caught.value)
    known = len(load_profile("local", home=tmp_path / "broken").kernels)
    known_models = len(load_profile("local", home=tmp_path / "broken").models)
    assert known > 0
    server.start()
    profile = load_profile("local", home=tmp_path / "broken")
    with Device(profile, link=link) as device:
        filled = measure_variants(device, VARIANTS, memories=0)
    assert {model.key for model in profile.models} == whole
    assert known_models + filled.models == len(whole)
    assert known + filled.kernels == len(profile.kernels)
    assert all(kernel.count == 1 for kernel in profile.kernels.values())


def test_a_process_that_is_killed_over_there_is_a_loss_too(server: Server, link: Link, profile: DeviceProfile) -> None:
    """As when a device runs out of memory. It can't remove its files any more; the next one does."""
    with Device(profile, link=link) as device:
        device.facts()
        [remains] = server.tmp.iterdir()
        for process in server.processes():
            process.kill()
        with device.saved(chain(8, 16, 4)) as path:
            assert device.compare({"a": path}, bursts=1)
        assert remains not in list(server.tmp.iterdir())


def test_who_has_to_wait_for_the_device_is_told(server: Server, link: Link, profile: DeviceProfile) -> None:
    waiting, done = threading.Event(), threading.Event()
    with Device(profile, link=link, notice=lambda text: waiting.set()) as device, device.saved(chain(4, 8)) as path:

        def measure() -> None:
            device.compare({"a": path}, bursts=1)
            done.set()

        with turn(lambda message: None, str(server.lock)):
            thread = threading.Thread(target=measure)
            thread.start()
            assert waiting.wait(60)
            assert not done.is_set()
        thread.join(60)
    assert done.is_set()


def test_a_model_that_is_used_again_is_sent_once(
    link: Link, profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    write = ProcessChannel.send

    def counting(self: ProcessChannel, request: dict[str, Any], payload: bytes | None = None) -> None:
        sent.extend(request.keys() & {"put", "remove"})
        write(self, request, payload)

    monkeypatch.setattr(ProcessChannel, "send", counting)
    with Device(profile, link=link) as device, device.saved(chain(8, 16, 4)) as path:
        device.compare({"a": path}, bursts=1)
        device.compare({"a": path, "b": path}, bursts=1)
        assert sent == ["put"]
        # Room for nothing: whatever isn't needed at the moment goes.
        monkeypatch.setattr(remote, "KEPT_BYTES", 0)
        with device.saved(chain(8, 4, 4)) as other:
            device.compare({"a": other}, bursts=1)
            device.compare({"a": path}, bursts=1)
    assert sent == ["put", "remove", "put", "remove", "put"]


def refused(server: Server, url: str | None = None) -> str:
    with pytest.raises(DeviceError) as caught:
        link_to(url or server.url()).facts()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_refused_key(server: Server) -> None:
    server.configure(identity="stranger")
    assert "it refused your key; install it with ssh-copy-id device" in refused(server)


def test_an_unknown_host_key(server: Server) -> None:
    (server.folder / "known_hosts").write_text("")
    assert "not known yet; connect once by hand to check and accept it: ssh device" in refused(server)


def test_another_host_key_than_the_known_one(server: Server) -> None:
    server.trust("stranger")
    assert "may be another machine" in refused(server)


def test_an_unreachable_device(server: Server) -> None:
    assert "no host of that name" in refused(server, "ssh://no-such-host.invalid")
    server.stop()
    assert "nothing answers at its ssh port" in refused(server)


def test_no_python_there(server: Server) -> None:
    assert "there is no /no/python there; name its Python with ?python=PATH" in refused(
        server, server.url("/no/python")
    )


def test_no_runtime_there(server: Server) -> None:
    absent = server.folder / "absent"
    absent.mkdir()
    for module in ("onnxruntime", "numpy"):
        (absent / f"{module}.py").write_text(f"raise ModuleNotFoundError(name={module!r})")
    python = server.script(server.folder / "bare", f'PYTHONPATH={absent} exec {sys.executable} "$@"')
    assert f"onnxruntime is not installed for {sys.executable}: {sys.executable} -m pip install onnxruntime" in refused(
        server, server.url(str(python))
    )


def test_an_old_python_there(server: Server) -> None:
    code = (
        "import sys; sys.version_info = (3, 6, 8); sys.version = '3.6.8 (default)'; code = sys.argv.pop(2); exec(code)"
    )
    python = server.script(server.folder / "old", f'exec {sys.executable} -c "{code}" "$@"')
    assert "Python 3.9 or later is needed, found 3.6.8 as" in refused(server, server.url(str(python)))


def test_a_disk_that_fills_over_there(server: Server, profile: DeviceProfile) -> None:
    """A limit on the size of files stands for the disk: of 50 KB, enough for the program and a small model."""
    python = server.script(server.folder / "tight", "ulimit -f 100", f'exec {sys.executable} "$@"')
    with Device(profile, link=link_to(server.url(str(python)))) as device:
        for small in (chain(4, 8), chain(8, 8)):
            with device.saved(chain(200, 200)) as large, pytest.raises(DeviceError) as caught:
                device.compare({"a": large}, bursts=1)
            assert str(caught.value).startswith("ssh://device: compare failed: the disk is full, ")
            with device.saved(small) as path:
                device.compare({"a": path}, bursts=1)
    python = server.script(server.folder / "full", "ulimit -f 1", f'exec {sys.executable} "$@"')
    assert "ssh://device: its disk is full; free some space there" in refused(server, server.url(str(python)))


def test_a_shell_that_greets_does_no_harm(server: Server) -> None:
    python = server.script(server.folder / "greeting", "echo 'Welcome to device!'", f'exec {sys.executable} "$@"')
    assert link_to(server.url(str(python))).facts().cores == host_facts().cores


def test_a_folder_for_temporary_files_that_is_not_there(server: Server) -> None:
    text = refused(server, f"ssh://device?python={sys.executable}&tmp=/no/folder")
    assert "can't start there (FileNotFoundError" in text
