"""A device that isn't here: its figures are predicted, say so, and leave no trace in any file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from automl_compress import data_files
from automl_compress.errors import ProfileError
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.kernels import weight_bytes
from automl_compress.hardware.device.remote import link_to
from automl_compress.hardware.prediction.cost import CostModel
from automl_compress.hardware.prediction.estimated import EstimatedDevice, device_for
from automl_compress.hardware.prediction.measure import Filled, measure_variants
from automl_compress.hardware.prediction.roofline import time_us, work_of
from automl_compress.hardware.profile.catalog import find
from automl_compress.hardware.profile.profile import DeviceProfile
from tests.hardware.simulated import FACTS, SimulatedRuntime, chain

ESTIMATED = ("cortex-a76-2.4ghz", "cortex-m7-400mhz")


@pytest.fixture(params=ESTIMATED)
def phone(request: pytest.FixtureRequest) -> Iterator[Device]:
    with device_for(find(request.param), launch=SimulatedRuntime) as device:
        yield device


def saved(device: Device, folder: Path, **models: onnx.ModelProto) -> dict[str, Path]:
    paths = {name: folder / f"{name}.onnx" for name in models}
    for name, path in paths.items():
        onnx.save(models[name], path)
    return paths


@pytest.mark.parametrize("name", ESTIMATED)
def test_a_shipped_estimated_profile_is_complete(name: str) -> None:
    profile = find(name)
    header = profile.header
    assert profile.provenance == "estimated"
    assert header.name == name
    assert header.roofline is not None
    assert header.sources
    assert "estimated" in header.description
    assert "nothing in it was measured" in profile.warnings[0]
    assert {8, 32} <= set(profile.bit_widths("conv"))
    with pytest.raises(ProfileError, match="nothing can be added"):
        profile.require_match()


def test_every_figure_is_the_rooflines_and_says_that_it_is_estimated(phone: Device, tmp_path: Path) -> None:
    roofline = phone.profile.header.roofline
    assert roofline is not None
    wide, narrow = chain(64, 256, 8), chain(64, 32, 8)
    timings = phone.compare(saved(phone, tmp_path, wide=wide, narrow=narrow))
    for name, model in (("wide", wide), ("narrow", narrow)):
        expected = sum(time_us(work_of(kernel.key), roofline) for kernel in phone.lowered(model).kernels)
        assert timings[name].median_us == pytest.approx(expected)
        assert timings[name].provenance == "estimated"
        costs = CostModel(phone.profile, phone, original=model)
        cost = costs.predict(model)
        assert cost.provenance == "estimated"
        assert cost.latency_us == pytest.approx(expected)
        assert {kernel.provenance for kernel in costs.lower(model)} == {"estimated"}
    assert timings["narrow"].median_us < timings["wide"].median_us


def test_without_processes_memory_is_weights_and_live_activations(tmp_path: Path) -> None:
    model = chain(64, 256, 8)
    with device_for(find("cortex-m7-400mhz"), launch=SimulatedRuntime) as device:
        [path] = saved(device, tmp_path, model=model).values()
        assert weight_bytes(model) == 4 * (64 * 256 + 256 * 8)
        assert device.memory_bytes(path) == weight_bytes(model) + device.lowered(model).activation_bytes


def test_nothing_is_measured_and_no_file_is_touched(phone: Device) -> None:
    folder = phone.profile.path.parent
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    filled = measure_variants(phone, [chain(8, 16, 4), chain(8, 4, 4)])
    assert filled.requests == filled.models == filled.memories == 0
    assert set(phone.requests) == {"lower"}
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert DeviceProfile(phone.profile.path).kernels == {}


def test_a_profile_of_another_machine_is_used_without_measuring(device: Device, tmp_path: Path) -> None:
    models = [chain(8, width, 4) for width in (4, 8, 16)]
    measure_variants(device, models, memories=0)
    assert {kernel.provenance for kernel in CostModel(device.profile, device).lower(models[0])} == {"measured"}
    text = device.profile.path.read_bytes()
    foreign = DeviceProfile(device.profile.path, replace(FACTS, cpu="Other"))
    with device_for(foreign, launch=SimulatedRuntime) as elsewhere:
        assert isinstance(elsewhere, EstimatedDevice)
        assert measure_variants(elsewhere, [*models, chain(8, 7, 5, 4)]) == Filled()
        paths = saved(elsewhere, tmp_path, original=models[0], wide=models[2])
        timings = elsewhere.compare(paths)
        assert timings["original"].provenance != "measured"
        costs = CostModel(foreign, elsewhere, original=models[0])
        assert timings["wide"].median_us == pytest.approx(costs.predict(models[2]).latency_us)
        assert set(elsewhere.requests) == {"lower"}
        unseen = costs.predict(chain(8, 6, 4))
        assert unseen.provenance != "measured"
        assert costs.predict(models[0]).latency_us <= unseen.latency_us <= costs.predict(models[2]).latency_us
    assert device.profile.path.read_bytes() == text


def test_an_empty_profile_of_another_machine_says_nothing(profile: DeviceProfile) -> None:
    foreign = DeviceProfile(profile.path, replace(FACTS, cpu="Other"))
    with (
        device_for(foreign, launch=SimulatedRuntime) as elsewhere,
        pytest.raises(ProfileError, match="neither a measured kernel nor a roofline"),
    ):
        elsewhere.lowered(chain(8, 5, 4))


def test_this_machines_profile_is_measured(profile: DeviceProfile) -> None:
    assert type(device_for(profile)) is Device


def test_who_names_a_device_gets_no_estimate_of_it() -> None:
    link = link_to("ssh://board")
    with pytest.raises(ProfileError, match=r"to measure ssh://board use --profile local$"):
        device_for(find("cortex-a76-2.4ghz"), link=link)


def test_the_shipped_profiles_pass_their_own_check() -> None:
    assert set(ESTIMATED) <= set(data_files.names("hardware_profiles"))
