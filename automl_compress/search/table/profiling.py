"""Learning a device apart from any search: what networks cost on it, as thoroughly as a few minutes allow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from automl_compress.core.graph import Graph
from automl_compress.errors import ExportError
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.prediction.measure import measure_model, missing_kernels
from automl_compress.hardware.profile.insight import warnings
from automl_compress.hardware.profile.trust import advice
from automl_compress.model.task import Task
from automl_compress.progress import Progress
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.space.rules import SpaceFile
from automl_compress.search.space.space import offered_bits, resolve
from automl_compress.search.table.forecast import PROFILE, Effort, Forecast


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """What profiling one network, or the standard kernels, added to a profile, and how well plans are predicted now.

    file            the profile
    kernels, models, memories    how many were added; `known`: how many kernels the profile has
    requests        measurements that were made, 0 where the profile knew everything
    error, worst_error    |predicted - measured| / measured of plans not measured before: median, largest
    checked         of how many plans; with too few, the errors are None
    quick_error     median error of plans told without lowering them, held against lowered ones that were left out
    memory_error    median error of the memory of weighed models that were left out
    warnings        why figures may not be trusted, and what to do
    """

    network: str
    file: str
    kernels: int
    models: int
    memories: int
    known: int
    requests: int
    seconds: float
    error: float | None = None
    worst_error: float | None = None
    checked: int = 0
    quick_error: float | None = None
    memory_error: float | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast_of(
    task: Task, graph: Graph, device: Device, space: SpaceFile, *, seed: int = 0, measure: bool = True
) -> Forecast:
    """A forecast of a traced task's plans that has learned nothing yet.

    Bit-widths that are only stored, and run in 32 bits, are left to searches that limit the size.
    """
    executions = device.profile.executions
    offered, held_back = offered_bits(executions, size_limited=False)
    resolved = resolve(space, graph, offered, held_back)
    bench = Workbench(task, graph, seed=seed, executions=executions)
    return Forecast(bench, resolved, device, seed=seed, measure=measure)


def profile_network(name: str, forecast: Forecast, progress: Progress, *, effort: Effort = PROFILE) -> Profiled:
    """Measure what a network's space needs and the device's profile lacks."""
    begun = time.monotonic()
    filled = forecast.learn(effort, progress)
    profile = forecast.device.profile
    latency, memory = forecast.fits()
    try:
        quick = forecast.surroundings.error
    except ExportError as error:
        quick = None
        progress.note(str(error))
    return Profiled(
        network=name,
        file=str(profile.path),
        kernels=filled.kernels,
        models=filled.models,
        memories=filled.memories,
        known=len(profile.kernels),
        requests=filled.requests,
        seconds=round(time.monotonic() - begun, 1),
        error=latency.error,
        worst_error=latency.worst_error,
        checked=latency.checked,
        quick_error=quick,
        memory_error=memory.error,
        warnings=(*warnings(profile), *advice(filled.troubles)),
    )


def profile_kernels(device: Device, models: Sequence[tuple[str, onnx.ModelProto]], progress: Progress) -> Profiled:
    """Measure models that show a device many kernels, for networks to come; the first is the others' reference.

    None is weighed: models of a dozen nodes mislead about what a whole network's process takes.
    """
    begun, profile, troubles, measured = time.monotonic(), device.profile, list[str](), 0
    profile.refresh()
    known = len(profile.kernels)
    progress.stage("measuring standard kernels", len(models))
    for _, model in models:
        lowered = device.lowered(model)
        if profile.model(lowered.key) is None or missing_kernels(profile, lowered.kernels):
            troubles += measure_model(device, model, reference=models[0][1])
            measured += 1
        progress.advance(1, kernels=len(profile.kernels))
    return Profiled(
        network="standard kernels",
        file=str(profile.path),
        kernels=len(profile.kernels) - known,
        models=measured,
        memories=0,
        known=len(profile.kernels),
        requests=measured,
        seconds=round(time.monotonic() - begun, 1),
        warnings=(*warnings(profile), *advice(troubles)),
    )
