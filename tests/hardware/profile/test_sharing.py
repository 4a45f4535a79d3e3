"""Two processes that fill one profile at the same time, and a disk that fills meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from automl_compress.hardware.device.device import Device
from automl_compress.hardware.prediction.measure import measure_variants
from automl_compress.hardware.profile.profile import DeviceProfile
from tests.hardware.simulated import FACTS, SimulatedRuntime, chain

VARIANTS = [chain(8, 16, 4), chain(8, 24, 4), chain(8, 32, 4), chain(8, 16, 16, 4)]


def test_two_who_measure_at_once_leave_a_whole_file(profile: DeviceProfile) -> None:
    """Both have seen that everything is missing before either has measured anything."""
    together = threading.Barrier(2)

    class Waiting(SimulatedRuntime):
        def __init__(self, settings: Mapping[str, Any]) -> None:
            super().__init__(settings)
            together.wait(30)

    failures: list[BaseException] = []

    def fill() -> None:
        try:
            with Device(DeviceProfile(profile.path, FACTS), launch=Waiting) as device:
                measure_variants(device, VARIANTS)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=fill) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    after = DeviceProfile(profile.path, FACTS)
    assert after.notes == []
    assert len(after.models) == len(VARIANTS)
    with Device(after, launch=SimulatedRuntime) as device:
        assert measure_variants(device, VARIANTS).requests == 0


FILL = """
import resource, signal, sys
from pathlib import Path
from automl_compress.errors import CompressError
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.prediction.measure import measure_variants
from automl_compress.hardware.profile.profile import DeviceProfile
from tests.hardware.simulated import FACTS, SimulatedRuntime
from tests.hardware.profile.test_sharing import VARIANTS

path, room = Path(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
profile = DeviceProfile(path, FACTS)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, resource.RLIM_INFINITY))
try:
    with Device(profile, launch=SimulatedRuntime) as device:
        measure_variants(device, VARIANTS)
except CompressError as error:
    sys.exit(str(error))
"""


def test_a_disk_that_fills_keeps_what_was_measured(profile: DeviceProfile) -> None:
    """A limit on the size of files stands for the disk."""
    room = 2000
    command = [sys.executable, "-c", FILL, str(profile.path), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1, done.stderr
    assert "free some space" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    kept = DeviceProfile(profile.path, FACTS)
    assert kept.kernels
    assert kept.notes == []
    with Device(kept, launch=SimulatedRuntime) as device:
        measure_variants(device, VARIANTS)
        again = device.requests["trace"]
    assert 0 < again < len(VARIANTS)
