"""A device that isn't here: its figures are predicted from its profile, and nothing pretends to be measured.

Two profiles have no device to measure: one that is estimated, and one that was measured on another machine. A model is
lowered by the runtime of the machine at hand, which may fuse differently than the device's; its kernels have the
profile's prices. Those that it lacks are estimated by its roofline, or, where it has none, interpolated between those
that it has. Every figure says that it was estimated (or interpolated).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from automl_compress.core.budget import Cost
from automl_compress.core.result import Timing
from automl_compress.errors import ProfileError
from automl_compress.hardware.device.channel import Launcher
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.dialogue import LOCAL, Link, Notice
from automl_compress.hardware.device.kernels import Lowered
from automl_compress.hardware.prediction.cost import CostModel
from automl_compress.hardware.prediction.roofline import estimate
from automl_compress.hardware.profile.profile import DeviceProfile


class EstimatedDevice(Device):
    """Stands in for a device in a `with` block. The first model that it is asked about counts as the original.

    `compare` and `memory_bytes` predict, whatever the machine at hand is doing; both raise ProfileError where the
    profile has neither kernels nor a roofline.
    """

    measures = False
    _costs: CostModel | None = None

    def lowered(self, model: onnx.ModelProto) -> Lowered:
        """What the runtime at hand executes for a model; a roofline prices the kernels that the profile lacks."""
        lowered = super().lowered(model)
        missing = [kernel.key for kernel in lowered.kernels if kernel.key not in self.profile.kernels]
        roofline = self.profile.header.roofline
        if missing and roofline is not None:
            self.profile.suppose(estimate(missing, roofline))
        elif not self.profile.kernels:
            raise ProfileError(
                f"{self.profile.path}: has neither a measured kernel nor a roofline, so that nothing can be estimated; "
                "measure the device itself, or use --profile local"
            )
        return lowered

    def compare(
        self, models: Mapping[str, Path], *, bursts: int | None = None, pace_us: float | None = None
    ) -> dict[str, Timing]:
        """Predicted latency of one sample for each model: a single value without a spread."""
        costs = {name: self._cost(path) for name, path in models.items()}
        return {
            name: Timing(
                values_us=(cost.latency_us,),
                median_us=cost.latency_us,
                spread=0.0,
                runs=0,
                provenance=cost.provenance,
            )
            for name, cost in costs.items()
        }

    def memory_bytes(self, model: Path) -> int:
        """Predicted memory: of a process, or on a device without processes of weights and live activations."""
        return round(self._cost(model).memory_bytes)

    def _cost(self, path: Path) -> Cost:
        model = onnx.load(path)
        if self._costs is None:
            self._costs = CostModel(self.profile, self, original=model)
        return self._costs.predict(model)


def device_for(
    profile: DeviceProfile, *, link: Link = LOCAL, launch: Launcher | None = None, notice: Notice = lambda text: None
) -> Device:
    """The device of a profile: the machine behind `link` where the profile is its, else a stand-in that estimates.

    `launch` and `notice` are those of `Device`; a stand-in only has models lowered on this machine. Raises ProfileError
    for another machine than this one whose profile it isn't: who names a device wants it measured.
    """
    if not profile.obstacles:
        return Device(profile, link=link, launch=launch, notice=notice)
    if not link.is_local:
        raise ProfileError(f"{profile.obstacles[0]}; to measure {link.name} use --profile local")
    return EstimatedDevice(profile, launch=launch, notice=notice)
