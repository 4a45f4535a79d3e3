"""Filling a profile: kernels in their surroundings, whole models beside each other, memory of fresh processes.

Kernels are timed inside of whole variants of the user's network, since a kernel alone doesn't meet the caches that it
meets there. Only what the profile lacks is measured, and each finding is in the file before the next is made: a killed
run goes on where it stopped, and a second one measures nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import onnx

from automl_compress.errors import DeviceError
from automl_compress.hardware.device import Device
from automl_compress.hardware.executed import RawKernel
from automl_compress.hardware.kernels import Kernel, key_of
from automl_compress.hardware.profile import DeviceProfile
from automl_compress.hardware.schema import KernelRecord, ModelRecord
from automl_compress.hardware.timer import ratio
from automl_compress.progress import Progress, SilentProgress

# A kernel that was seen in so many models is known well enough; more would only make the file longer.
ENOUGH_SIGHTINGS = 8
# Models that take turns at once, the reference included. More would have to be held in memory together.
TURN_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What was added to a profile. `requests` is the number of measurements, 0 if everything was known."""

    kernels: int = 0
    models: int = 0
    memories: int = 0
    requests: int = 0


def measure_variants(
    device: Device,
    variants: Iterable[onnx.ModelProto],
    *,
    progress: Progress | None = None,
    whole_models: int = 14,
    memories: int = 5,
) -> Filled:
    """Measure every kernel of the variants that the profile lacks, and some variants as a whole.

    The first variant is the reference that whole models are measured beside. `whole_models` and `memories` variants,
    evenly spread over the list, get their latency and memory measured, unless the profile has them.
    Raises DeviceError if measuring fails, ProfileError if the profile is another machine's or can't be written.
    """
    show = progress or SilentProgress()
    profile = device.profile
    if not device.measures:
        whole_models = memories = 0
    profile.refresh()
    distinct: dict[str, onnx.ModelProto] = {}
    for model in variants:
        distinct.setdefault(device.lowered(model).key, model)
    show.stage("measuring kernels", len(distinct))
    before = len(profile.kernels)
    requests = 0
    for model in distinct.values():
        requests += _trace_missing(device, model)
        show.advance(kernels=len(profile.kernels))
    keys = list(distinct)
    timed = {k: distinct[k] for k in spread_evenly(keys, whole_models) if profile.model(k) is None}
    if timed:
        show.stage("measuring whole models", len(timed))
        requests += _time_whole(device, next(iter(distinct.values())), timed, show)
    known = [k for k in keys if profile.model(k) is not None]
    unweighed = [k for k in spread_evenly(known, memories) if not _has_memory(profile, k)]
    for key in unweighed:
        _weigh(device, distinct[key])
    requests += len(unweighed)
    return Filled(kernels=len(profile.kernels) - before, models=len(timed), memories=len(unweighed), requests=requests)


def missing_kernels(profile: DeviceProfile, kernels: Iterable[Kernel]) -> list[str]:
    """The keys that the profile has no time for, each once."""
    return list(dict.fromkeys(kernel.key for kernel in kernels if kernel.key not in profile.kernels))


def kernel_sum_us(profile: DeviceProfile, kernels: Iterable[Kernel]) -> float:
    """What the kernels take one after the other, by the profile. Raises KeyError for one that it lacks."""
    return sum(profile.kernels[kernel.key].mean_us for kernel in kernels)


def kernel_records(raw: Sequence[RawKernel], known: Mapping[str, KernelRecord]) -> list[KernelRecord]:
    """One record per key of a trace, for keys that aren't known well enough; equal kernels are averaged."""
    groups: dict[str, list[RawKernel]] = defaultdict(list)
    for kernel in raw:
        groups[key_of(kernel)].append(kernel)
    records = []
    for key, group in groups.items():
        if key in known and known[key].count >= ENOUGH_SIGHTINGS:
            continue
        bursts = np.mean([kernel.bursts_us for kernel in group], axis=0)
        records.append(
            KernelRecord(
                key=key,
                mean_us=round(float(np.mean([kernel.mean_us for kernel in group])), 3),
                spread=round(float(max(kernel.spread for kernel in group)), 4),
                bursts_us=tuple(round(float(value), 3) for value in bursts),
            )
        )
    return records


def spread_evenly(keys: Sequence[str], count: int) -> list[str]:
    """`count` of the keys at equal distances, the first and the last among them; all if there are no more."""
    if count >= len(keys):
        return list(keys)
    places: list[int] = np.linspace(0, len(keys) - 1, count).round().astype(int).tolist()
    return [keys[i] for i in dict.fromkeys(places)]


def _trace_missing(device: Device, model: onnx.ModelProto) -> int:
    """Trace a variant if one of its kernels is unknown; returns the number of measurements, 0 or 1."""
    profile, lowered = device.profile, device.lowered(model)
    if not missing_kernels(profile, lowered.kernels):
        return 0
    profile.require_match()
    protocol = profile.header.protocol
    with device.saved(model) as path:
        raw = device.trace_kernels(path, runs=protocol.trace_rounds * protocol.trace_runs)
    profile.add_kernels(kernel_records(raw, profile.kernels))
    missing = missing_kernels(profile, lowered.kernels)
    if missing:
        raise DeviceError(
            f"the runtime executed other kernels in a second session, {missing[0]} is gone; please report it"
        )
    return 1


def _time_whole(
    device: Device, reference: onnx.ModelProto, models: Mapping[str, onnx.ModelProto], show: Progress
) -> int:
    """Whole models in turns with the reference; the machine's drift from one turn to the next is divided out by it."""
    profile = device.profile
    profile.require_match()
    first = device.lowered(reference).key
    known = profile.model(first)
    reference_us = known.measured_us if known else None
    others = [key for key in models if key != first]
    step = TURN_SIZE - 1
    chunks = [others[i : i + step] for i in range(0, len(others), step)] or [[]]
    for chunk in chunks:
        with ExitStack() as files:
            named = {first: reference, **{key: models[key] for key in chunk}}
            paths = {key: files.enter_context(device.saved(model)) for key, model in named.items()}
            timings = device.compare(paths)
        reference_us = reference_us or timings[first].median_us
        fresh = [key for key in paths if key in models and (key != first or profile.model(first) is None)]
        profile.add_models(
            _model_record(device, named[key], first, reference_us * ratio(timings, key, first), timings[key].spread)
            for key in fresh
        )
        show.advance(len(fresh))
    return len(chunks)


def _model_record(
    device: Device, model: onnx.ModelProto, family: str, measured_us: float, spread: float
) -> ModelRecord:
    lowered = device.lowered(model)
    return ModelRecord(
        key=lowered.key,
        family=family,
        kernel_sum_us=round(kernel_sum_us(device.profile, lowered.kernels), 3),
        nodes=len(lowered.kernels),
        measured_us=round(measured_us, 3),
        spread=round(spread, 4),
        size_bytes=model.ByteSize(),
        activation_bytes=lowered.activation_bytes,
    )


def _has_memory(profile: DeviceProfile, key: str) -> bool:
    record = profile.model(key)
    return record is not None and record.memory_bytes is not None


def _weigh(device: Device, model: onnx.ModelProto) -> None:
    """Measure a recorded model's memory and record it again with that."""
    device.profile.require_match()
    record = device.profile.model(device.lowered(model).key)
    assert record is not None
    with device.saved(model) as path:
        device.profile.add_models([replace(record, memory_bytes=device.memory_bytes(path))])
