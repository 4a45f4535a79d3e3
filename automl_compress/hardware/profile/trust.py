"""When figures are not to be trusted, and what to do about it: the conditions of a measurement, put into words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# A range of rounds of a tenth is what pyperf, too, calls unstable.
UNTRUSTED_SPREAD = 0.10
_BUSY = 0.10
# Systems count processor time in hundredths of a second: in a short measurement a few of them look like a share.
_SHORTEST_BUSY_S = 0.05
_SHARED = 0.02
_SLOW_CLOCK = 0.85
_SWITCHES_A_SECOND = 100.0


def troubles(conditions: Mapping[str, Any]) -> tuple[str, ...]:
    """What disturbed a measurement, by what `conditions.conditions` reports of it; empty if nothing did."""
    found = []
    seconds = max(float(conditions.get("seconds", 1.0)), 0.1)
    busy = conditions.get("pinned_others_busy", conditions.get("others_busy", 0.0))
    if busy > _BUSY and busy * seconds > _SHORTEST_BUSY_S:
        found.append("busy machine")
    if conditions.get("steal", 0.0) > _SHARED:
        found.append("stolen time")
    if conditions.get("thermal_throttles", 0) > 0:
        found.append("heat")
    if conditions.get("throttled_seconds", 0.0) > 0:
        found.append("quota")
    if 0 < conditions.get("khz", 0) < _SLOW_CLOCK * conditions.get("max_khz", 0):
        found.append("low clock")
    if conditions.get("involuntary_switches", 0) / seconds > _SWITCHES_A_SECOND:
        found.append("interruptions")
    return tuple(found)


REMEDIES = {
    "busy machine": "other processes used the measured cores: end them, or measure when the machine is idle",
    "stolen time": "the hypervisor gave the time to others: repeat at another hour, or use a machine of its own",
    "heat": "the processor slowed down because of heat: let it cool down, or measure fewer things at a time",
    "quota": "a quota held the process up: raise the container's CPU limit to whole cores",
    "low clock": "the clock was below its maximum: set the frequency governor to 'performance', plug the charger in",
    "interruptions": "the process was interrupted often: keep other work off its cores",
}


def advice(found: Iterable[str]) -> list[str]:
    """A sentence for each kind of trouble, in a fixed order."""
    kinds = set(found)
    return [remedy for kind, remedy in REMEDIES.items() if kind in kinds]
