from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from automl_compress.hardware.device.device import Device
from automl_compress.hardware.profile.profile import DeviceProfile, load_profile
from tests.hardware.simulated import FACTS, SimulatedRuntime


@pytest.fixture
def profile(tmp_path: Path) -> DeviceProfile:
    """The profile of an imaginary machine, empty."""
    return load_profile("local", home=tmp_path, facts=FACTS)


@pytest.fixture
def device(profile: DeviceProfile) -> Iterator[Device]:
    """A device that answers without a clock."""
    with Device(profile, launch=SimulatedRuntime) as device:
        yield device
