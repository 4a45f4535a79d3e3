"""What machine and what runtime this is: the facts that decide whether a measurement still holds."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

# fmt: off
# Only what inference kernels are chosen by; the full list differs between kernels of the same machine.
KERNEL_FLAGS = frozenset({
    "sse4_1", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp",
    "i8mm", "bf16", "sve", "sve2", "sme",
})
# fmt: on


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """One machine with its runtime. `flags` are instruction sets that kernels are chosen by; `cores` are logical.

    `memory_bytes` is all that it has, None where that isn't known.
    """

    architecture: str
    cpu: str
    flags: tuple[str, ...]
    cores: int
    system: str
    onnxruntime: str
    memory_bytes: int | None = None


def host_facts() -> HostFacts:
    """The facts of this machine. `onnxruntime` is its installed version, or "none"."""
    cpuinfo = _cpuinfo()
    return HostFacts(
        architecture=platform.machine() or "unknown",
        cpu=_cpu_name(cpuinfo),
        flags=_kernel_flags(cpuinfo),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.release()}",
        onnxruntime=runtime_version(),
        memory_bytes=psutil.virtual_memory().total,
    )


def runtime_version() -> str:
    """The version of the installed onnxruntime, whichever distribution brings it, found without importing it."""
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def parse_cpuinfo(text: str) -> dict[str, str]:
    """The first processor's fields of a /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _cpuinfo() -> dict[str, str]:
    try:
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def _cpu_name(cpuinfo: dict[str, str]) -> str:
    if "model name" in cpuinfo:
        parts = [cpuinfo["model name"]]
        # Clouds hide the model's name ("AMD EPYC"); family and model still tell generations apart.
        if "cpu family" in cpuinfo and "model" in cpuinfo:
            parts.append(f"family {cpuinfo['cpu family']} model {cpuinfo['model']}")
        return ", ".join(parts)
    if "CPU part" in cpuinfo:
        return f"implementer {cpuinfo.get('CPU implementer', '?')} part {cpuinfo['CPU part']}"
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or "unknown"
    return platform.processor() or "unknown"


def _kernel_flags(cpuinfo: dict[str, str]) -> tuple[str, ...]:
    found = set(cpuinfo.get("flags", cpuinfo.get("Features", "")).split())
    return tuple(sorted(found & KERNEL_FLAGS))


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
