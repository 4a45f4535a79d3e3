from __future__ import annotations

from pathlib import Path

import pytest

from automl_compress.hardware.device.device import Device
from automl_compress.hardware.profile.profile import DeviceProfile, load_profile
from automl_compress.progress import SilentProgress
from automl_compress.search.table.profiling import Profiled, profile_kernels
from tests.hardware.simulated import FACTS, SimulatedRuntime, chain

MODELS = [(f"chain-{width}", chain(16, width, 4)) for width in range(8, 24, 2)]


@pytest.fixture
def profile(tmp_path: Path) -> DeviceProfile:
    return load_profile("local", home=tmp_path, facts=FACTS)


def measured(profile: DeviceProfile) -> Profiled:
    with Device(DeviceProfile(profile.path, FACTS), launch=SimulatedRuntime) as device:
        return profile_kernels(device, MODELS, SilentProgress())


def test_standard_kernels_are_measured_once_and_say_nothing_of_memory(profile: DeviceProfile) -> None:
    first = measured(profile)
    assert first.models == first.requests == len(MODELS)
    assert first.kernels == first.known > 0
    assert any("no model was weighed" in warning for warning in first.warnings)
    assert measured(profile).requests == 0


@pytest.mark.parametrize("tag", ["kernel", "model"])
def test_a_line_that_was_deleted_is_measured_again(profile: DeviceProfile, tag: str) -> None:
    measured(profile)
    before = DeviceProfile(profile.path, FACTS)
    lines = profile.path.read_text().splitlines(keepends=True)
    key = list(before.kernels)[-1] if tag == "kernel" else before.models[-1].key
    kept = [line for line in lines if not line.startswith(f'- {{"{tag}": "{key}"')]
    assert len(kept) < len(lines)
    profile.path.write_text("".join(kept))
    again = measured(profile)
    assert again.models == 1
    after = DeviceProfile(profile.path, FACTS)
    assert (set(after.kernels), {model.key for model in after.models}) == (
        set(before.kernels),
        {model.key for model in before.models},
    )
