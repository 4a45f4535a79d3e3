"""Under which conditions something was measured: whatever the system tells of a busy, throttled or shared machine.

A part of the measuring program (see `probe.py`): standard library only, Python 3.9. It only reports; what to make of it
is decided where the figures are used.
"""

from __future__ import annotations

import glob
import os
import time
from typing import Any

from .system_files import read_number, read_text

_CPU = "/sys/devices/system/cpu/cpu{}"


class Watch:
    """From its creation to `report`."""

    def __init__(self, cores: list[int]) -> None:
        self._cores = cores
        self._before = snapshot(cores)

    def report(self) -> dict[str, Any]:
        return conditions(self._before, snapshot(self._cores))


def conditions(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What happened between two snapshots; what the system doesn't tell is absent.

    seconds               how long it took
    load_1min, runnable   load average and threads ready to run (this one not counted), when it began
    others_busy           share of all cores' time that other processes took
    pinned_others_busy    the same of the cores that the measuring process keeps to
    steal                 share of those cores' time that the hypervisor gave to others
    involuntary_switches  how often the measuring process was interrupted for another
    khz, max_khz          mean clock of the pinned cores (the lower of before and after), and the highest it can be
    thermal_throttles     how often those cores slowed down because of heat
    throttled_seconds     how long a quota (of a container) made this process wait
    temperature_c         the hottest sensor, when it ended
    """
    found = {
        "seconds": round(after["clock"] - before["clock"], 3),
        "involuntary_switches": after["switches"] - before["switches"],
    }
    for name in ("load_1min", "runnable"):
        if name in before:
            found[name] = before[name]
    used = after["own_seconds"] - before["own_seconds"]
    for name, field in (("others_busy", "all"), ("pinned_others_busy", "pinned")):
        if field in before and field in after:
            spent = {k: after[field][k] - before[field][k] for k in after[field]}
            if spent["total"] > 0:
                found[name] = round(min(1.0, max(0.0, (spent["busy"] - used) / spent["total"])), 4)
                if field == "pinned":
                    found["steal"] = round(spent["steal"] / spent["total"], 4)
    if "khz" in before and "khz" in after:
        found["khz"] = min(before["khz"], after["khz"])
    for name in ("thermal_throttles", "throttled_seconds"):
        if name in before and name in after:
            found[name] = round(after[name] - before[name], 6)
    found.update({k: after[k] for k in ("max_khz", "temperature_c") if k in after})
    return found


def snapshot(cores: list[int]) -> dict[str, Any]:
    """Counters and clocks at this moment, for the machine, `cores` and this process."""
    times = os.times()
    found: dict[str, Any] = {
        "clock": time.perf_counter(),
        "own_seconds": times.user + times.system + times.children_user + times.children_system,
        "switches": interruptions(),
        **parse_loadavg(read_text("/proc/loadavg")),
        **parse_stat(read_text("/proc/stat"), cores),
        **_clocks(cores),
    }
    throttles = [read_number(f"{_CPU.format(core)}/thermal_throttle/core_throttle_count") for core in cores]
    optional = {
        "thermal_throttles": sum(t for t in throttles if t is not None)
        if any(t is not None for t in throttles)
        else None,
        "throttled_seconds": parse_throttled(_cgroup_stat()),
        "temperature_c": max(_temperatures(), default=None),
    }
    found.update({k: v for k, v in optional.items() if v is not None})
    return found


def parse_loadavg(text: str) -> dict[str, Any]:
    """From /proc/loadavg, e.g. '1.24 0.54 0.23 2/100 6369'."""
    parts = text.split()
    if len(parts) < 4 or "/" not in parts[3]:
        return {}
    return {"load_1min": float(parts[0]), "runnable": max(0, int(parts[3].split("/")[0]) - 1)}


def parse_stat(text: str, cores: list[int]) -> dict[str, dict[str, float]]:
    """Seconds from /proc/stat, of all cores and of `cores`: total, busy (stolen time not included), steal."""
    tick = float(os.sysconf("SC_CLK_TCK")) if hasattr(os, "sysconf") else 100.0
    rows = {}
    for line in text.splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and len(values) >= 8:
            user, nice, system, idle, waiting, irq, softirq, steal = (int(v) / tick for v in values[:8])
            busy = user + nice + system + irq + softirq
            rows[name] = {"total": busy + idle + waiting + steal, "busy": busy, "steal": steal}
    found = {"all": rows["cpu"]} if "cpu" in rows else {}
    pinned = [rows[f"cpu{core}"] for core in cores if f"cpu{core}" in rows]
    if pinned:
        found["pinned"] = {field: sum(row[field] for row in pinned) for field in pinned[0]}
    return found


def parse_throttled(text: str) -> float | None:
    """Seconds from a control group's cpu.stat of either version, None if it doesn't say."""
    fields = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) >= 2)
    if "throttled_usec" in fields:
        return int(fields["throttled_usec"]) / 1e6
    return int(fields["throttled_time"]) / 1e9 if "throttled_time" in fields else None


def pinned_cores() -> list[int]:
    """The cores that this process may use; empty where the system can't say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(threads: int) -> None:
    """Keep to as many cores as there are threads: the fastest, and of those the last; the first serves interrupts."""
    cores = sorted(pinned_cores(), key=lambda core: (core_khz(core), core))
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[-threads:])


def core_khz(core: int) -> int:
    """The highest clock of a core, where the system tells; processors with cores of two kinds differ in it."""
    return read_number(f"{_CPU.format(core)}/cpufreq/cpuinfo_max_freq") or 0


def _clocks(cores: list[int]) -> dict[str, int]:
    now = [read_number(f"{_CPU.format(core)}/cpufreq/scaling_cur_freq") for core in cores]
    known = [khz for khz in now if khz]
    found = {"khz": sum(known) // len(known)} if known else {}
    highest = max((core_khz(core) for core in cores), default=0)
    return {**found, "max_khz": highest} if highest else found


def interruptions() -> int:
    """How often this process had to leave a core to another one until now; 0 where the system doesn't tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _cgroup_stat() -> str:
    """The cpu.stat of this process's control group, of either version."""
    for line in read_text("/proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        roots = ["/sys/fs/cgroup"] if number == "0" else ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"]
        if number == "0" or "cpu" in controllers.split(","):
            for root in roots:
                # In a container the group's own path may not be visible; its root then stands for it.
                text = read_text(f"{root}{path.rstrip('/')}/cpu.stat") or read_text(f"{root}/cpu.stat")
                if "throttled" in text:
                    return text
    return ""


def _temperatures() -> list[float]:
    found = [read_number(path) for path in glob.glob("/sys/class/thermal/thermal_zone*/temp")]
    return [value / 1000 for value in found if value and value > 0]
