"""What machine and what runtime this is: the facts that decide whether a measurement still holds.

A part of the measuring program (see `probe.py`), so that every device says for itself what it is: standard library
only, Python 3.9.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

from .system_files import read_text

# fmt: off
# Only what inference kernels are chosen by; the full list differs between kernels of the same machine.
KERNEL_FLAGS = frozenset({
    "sse4_1", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp",
    "i8mm", "bf16", "sve", "sve2", "sme",
})
# fmt: on
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


def machine_facts() -> dict[str, Any]:
    """Architecture, cpu, flags, cores (logical), memory_bytes (None: unknown), system, and onnxruntime's version."""
    cpuinfo = read_text("/proc/cpuinfo")
    return {
        "architecture": platform.machine() or "unknown",
        "cpu": cpu_name(cpuinfo),
        "flags": kernel_flags(cpuinfo),
        "cores": os.cpu_count() or 1,
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "onnxruntime": runtime_version(),
    }


def runtime_version() -> str:
    """The version of the installed onnxruntime, whichever distribution brings it, found without importing it."""
    for name in RUNTIMES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def memory_bytes() -> int | None:
    """The machine's memory, None where the system doesn't say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def cpu_name(cpuinfo: str) -> str:
    """The processor's model as /proc/cpuinfo has it; where there is none, as the system calls it."""
    fields = parse_cpuinfo(cpuinfo)
    if "model name" in fields:
        parts = [fields["model name"]]
        # Clouds hide the model's name ("AMD EPYC"); family and model still tell generations apart.
        if "cpu family" in fields and "model" in fields:
            parts.append(f"family {fields['cpu family']} model {fields['model']}")
        return ", ".join(parts)
    if "CPU part" in fields:
        # Cores of several kinds in one chip are listed one after the other.
        lines = [line.partition(":") for line in cpuinfo.splitlines()]
        kinds = list(dict.fromkeys(value.strip() for key, _, value in lines if key.strip() == "CPU part"))
        return f"implementer {fields.get('CPU implementer', '?')} part {'+'.join(sorted(kinds))}"
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or "unknown"
    return platform.processor() or "unknown"


def kernel_flags(cpuinfo: str) -> list[str]:
    """The instruction sets that kernels are chosen by, sorted."""
    fields = parse_cpuinfo(cpuinfo)
    return sorted(KERNEL_FLAGS.intersection(fields.get("flags", fields.get("Features", "")).split()))


def parse_cpuinfo(text: str) -> dict[str, str]:
    """The first processor's fields of a /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
