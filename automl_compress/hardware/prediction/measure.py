"""Filling a profile: kernels in their surroundings, whole models beside each other, memory of fresh processes.

Kernels are timed inside of whole variants of the user's network, since a kernel alone doesn't meet the caches that it
meets there. Only what the profile lacks is measured, and each finding is in the file before the next is made: a killed
run goes on where it stopped, and a second one measures nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from automl_compress.errors import DeviceError
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.device.executed import RawKernel, Trace
from automl_compress.hardware.device.kernels import Kernel, key_of
from automl_compress.hardware.prediction.interpolate import PriceList
from automl_compress.hardware.prediction.kernel_key import (
    integer_nodes,
    reordered_bytes,
    runs_weight_only,
    traffic_bytes,
    working_bytes,
)
from automl_compress.hardware.profile.profile import DeviceProfile
from automl_compress.hardware.profile.schema import KernelRecord, ModelRecord
from automl_compress.hardware.profile.trust import troubles
from automl_compress.progress import Progress, SilentProgress

# A kernel that was seen in so many models is known well enough; more would only make the file longer.
ENOUGH_SIGHTINGS = 8
# A trace whose whole model wavered by more than this is repeated, so often at most; the steadiest counts.
_STEADY_SPREAD = 0.05
_ATTEMPTS = 3
# Working out all prices takes longer than measuring a small model; so many are predicted by the same ones.
_PRICED_ANEW = 8
# After so many models the one that all are variants of is measured again.
_REFERENCE_AGAIN = 12


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What was added to a profile. `requests` is the number of measurements, 0 if everything was known.

    `troubles` are the kinds of disturbance that were seen (`trust.advice` says what to do), each as often as it was.
    """

    kernels: int = 0
    models: int = 0
    memories: int = 0
    requests: int = 0
    troubles: tuple[str, ...] = ()


def measure_variants(
    device: Device,
    variants: Iterable[onnx.ModelProto],
    *,
    progress: Progress | None = None,
    whole_models: int = 14,
    memories: int = 5,
    between: Callable[[], None] = lambda: None,
) -> Filled:
    """Measure every kernel of the variants that the profile lacks, and some variants as a whole.

    The first variant is the one that all are variants of. Variants with kernels that are unknown
    are measured, and `whole_models` in any case, evenly spread over the list, unless the profile has them; `memories`
    of those get their memory measured. Nothing is on a stand-in for a device that isn't here. `between` is called after
    every measurement; what it raises ends the filling.
    Raises DeviceError if measuring fails, ProfileError if the profile is another machine's or can't be written.
    """
    show = progress or SilentProgress()
    profile = device.profile
    profile.refresh()
    distinct: dict[str, onnx.ModelProto] = {}
    for model in variants:
        distinct.setdefault(device.lowered(model).key, model)
    if not device.measures:
        return Filled()
    show.stage("measuring kernels", len(distinct))
    before = len(profile.kernels)
    keys = list(distinct)
    whole = {*keys[:1], *spread_evenly(keys, whole_models)}
    seen: list[str] = []
    timed = 0
    prices: PriceList | None = None
    for key, model in distinct.items():
        unknown = missing_kernels(profile, device.lowered(model).kernels)
        if unknown or (key in whole and profile.model(key) is None):
            if timed % _PRICED_ANEW == 0:
                prices = PriceList(profile.kernels) if profile.kernels else None
            seen += measure_model(device, model, reference=distinct[keys[0]], prices=prices)
            timed += 1
            if timed % _REFERENCE_AGAIN == 0:
                measure_again(device, distinct[keys[0]])
            between()
        show.advance(kernels=len(profile.kernels))
    known = [k for k in keys if profile.model(k) is not None]
    weighed = weigh_models(device, [distinct[key] for key in spread_evenly(known, memories)], between=between)
    return Filled(
        kernels=len(profile.kernels) - before,
        models=timed,
        memories=weighed,
        requests=timed + weighed,
        troubles=tuple(seen),
    )


def measure_model(
    device: Device, model: onnx.ModelProto, *, reference: onnx.ModelProto, prices: PriceList | None = None
) -> tuple[str, ...]:
    """Time a model's kernels and the whole, and store both as they would be at the clock of the profile's first model.
    `reference` is the model that it is a variant of.

    A measurement that wavers is repeated, and the steadiest of three is stored. `prices` say what was known before
    (default: all that the profile knows): the record keeps what they predicted. Returns what disturbed the measurement.
    """
    profile, lowered = device.profile, device.lowered(model)
    profile.require_match()
    first = device.lowered(reference).key
    pace_us = profile_pace_us(profile)
    with device.saved(model) as path:
        attempts: list[tuple[float, Trace, tuple[str, ...]]] = []
        while len(attempts) < _ATTEMPTS and not (attempts and attempts[-1][0] < _STEADY_SPREAD):
            trace = device.trace(path)
            pace_us = pace_us or float(np.median(trace.pace_us))
            attempts.append((trace.whole(pace_us)[1], trace, troubles(device.conditions)))
    _, trace, found = min(attempts, key=lambda attempt: attempt[0])
    whole_us, spread, bursts = trace.whole(pace_us)
    keys = [kernel.key for kernel in lowered.kernels]
    before = (prices or PriceList(profile.kernels)).total(keys) if profile.kernels else None
    raw, note = trace.timed(pace_us), "; ".join(found) or None
    traffic = traffic_bytes(keys)
    profile.add_kernels(kernel_records(raw, profile.kernels, traffic=traffic, conditions=note))
    missing = missing_kernels(profile, lowered.kernels)
    if missing:
        raise DeviceError(
            f"the runtime executed other kernels in a second session, {missing[0]} is gone; please report it"
        )
    record = ModelRecord(
        key=lowered.key,
        family=first,
        kernel_sum_us=round(sum(profile.kernels[kernel.key].mean_us for kernel in lowered.kernels), 3),
        nodes=len(raw),
        measured_us=round(whole_us, 3),
        spread=round(spread, 4),
        size_bytes=model.ByteSize(),
        activation_bytes=lowered.activation_bytes,
        **_memory_facts(keys),
        traffic_bytes=traffic,
        pace_us=round(pace_us, 3) if pace_us else None,
        predicted_us=round(before.us, 3) if before else None,
        foreseen=round(before.measured_share, 4) if before else None,
        bursts_us=tuple(round(us, 3) for us in bursts),
        conditions=note,
    )
    profile.add_models([record])
    return found


def measure_again(device: Device, model: onnx.ModelProto) -> None:
    """Time a model as a whole once more; its latency is then the median of all rounds so far.

    For the model that others are variants of: every ratio has it in it, and how much of the caches is left for it, and
    where a session's memory lies, change by a percent or two within minutes.
    """
    profile = device.profile
    record = profile.model(device.lowered(model).key)
    if record is None or not device.measures:
        return
    profile.require_match()
    with device.saved(model) as path:
        bursts = (*record.bursts_us, *device.trace(path).whole(profile_pace_us(profile))[2])
    us = float(np.median(bursts))
    again = replace(record, measured_us=round(us, 3), bursts_us=tuple(round(burst, 3) for burst in bursts))
    profile.add_models([again])


def profile_pace_us(profile: DeviceProfile) -> float | None:
    """What the fixed computation takes at the clock that the profile's times refer to; None where nothing says so."""
    return next((record.pace_us for record in profile.models if record.pace_us), None)


def missing_kernels(profile: DeviceProfile, kernels: Iterable[Kernel]) -> list[str]:
    """The keys that the profile has no time for, each once."""
    return list(dict.fromkeys(kernel.key for kernel in kernels if kernel.key not in profile.kernels))


def kernel_records(
    raw: Sequence[RawKernel], known: Mapping[str, KernelRecord], *, traffic: int, conditions: str | None = None
) -> list[KernelRecord]:
    """One record per key of a trace, for keys that aren't known well enough; equal kernels are averaged.

    `traffic` is the bytes that the traced model reads and writes in one run.
    """
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
                spread=round(float(np.median([kernel.spread for kernel in group])), 4),
                bursts_us=tuple(round(float(value), 3) for value in bursts),
                traffic_bytes=(traffic,),
                conditions=conditions,
            )
        )
    return records


def spread_evenly(keys: Sequence[str], count: int) -> list[str]:
    """`count` of the keys at equal distances, the first and the last among them; all if there are no more."""
    if count >= len(keys):
        return list(keys)
    places: list[int] = np.linspace(0, len(keys) - 1, count).round().astype(int).tolist()
    return [keys[i] for i in dict.fromkeys(places)]


def weigh_models(
    device: Device,
    models: Iterable[onnx.ModelProto],
    *,
    progress: Progress | None = None,
    between: Callable[[], None] = lambda: None,
) -> int:
    """Measure the memory of models that the profile has, and record them again; returns how many lacked it, or what
    memory is predicted by, as older lines do. `progress` advances by one a model."""
    if not device.measures:
        return 0
    show = progress or SilentProgress()
    weighed = 0
    for model in models:
        show.advance()
        lowered = device.lowered(model)
        record = device.profile.model(lowered.key)
        if record is None or (record.memory_bytes is not None and record.working_bytes is not None):
            continue
        device.profile.require_match()
        keys = [kernel.key for kernel in lowered.kernels]
        with device.saved(model) as path:
            memory_bytes = device.memory_bytes(path)
        device.profile.add_models([replace(record, memory_bytes=memory_bytes, **_memory_facts(keys))])
        weighed += 1
        between()
    return weighed


def _memory_facts(keys: Sequence[str]) -> dict[str, Any]:
    """What a record says of its kernels because memory is predicted by it."""
    return {
        "reordered_bytes": reordered_bytes(keys),
        "integer_nodes": integer_nodes(keys),
        "weight_only": runs_weight_only(keys),
        "working_bytes": working_bytes(keys),
    }
