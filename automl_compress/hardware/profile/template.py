"""From a template, which stands for whatever machine this is, to that machine's own profile file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from automl_compress.errors import DeviceError
from automl_compress.hardware.profile.files import file_lock, replace_file, unwritable
from automl_compress.hardware.profile.header import ProfileHeader, read_header
from automl_compress.hardware.profile.host import HostFacts

MARK = "# --- measurements, appended by the program ---"
START = "measurements:"
_FIELD = re.compile(r"^( *)([^\s#:-][^:]*):(.*)$")


def default_home() -> Path:
    """$AUTOML_COMPRESS_HOME, else the user's cache folder."""
    if os.environ.get("AUTOML_COMPRESS_HOME"):
        return Path(os.environ["AUTOML_COMPRESS_HOME"])
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "automl-compress"


def measured_folder(home: Path | None = None) -> Path:
    """Where this machine's measured profiles lie."""
    return (home or default_home()) / "hardware_profiles"


def measured_file(
    head: str, header: ProfileHeader, facts: HostFacts, threads: int | None, home: Path | None = None
) -> Path:
    """This machine's file for a template; created if there is none. Raises CompressError if it can't be written."""
    if facts.onnxruntime == "none":
        raise DeviceError("onnxruntime is not installed, so this machine can't be measured: pip install onnxruntime")
    threads = threads or header.runtime.threads
    path = measured_folder(home) / file_name(header, facts, threads)
    filled = fill_template(head, facts, threads)
    read_header(filled, str(path))
    create(path, f"{filled.rstrip()}\n\n{MARK}\n{START}\n".encode())
    return path


def create(path: Path, data: bytes) -> None:
    """Write a profile file unless another process has by now. Raises CompressError if it can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    with file_lock(path):
        if not path.exists():
            replace_file(path, data)


def facts_by_name(facts: HostFacts) -> dict[str, Any]:
    """A machine's facts as a profile's `match` names them."""
    return {
        "architecture": facts.architecture,
        "cpu": facts.cpu,
        "flags": list(facts.flags),
        "cores": facts.cores,
        "runtime": facts.onnxruntime,
    }


def file_name(template: ProfileHeader, facts: HostFacts, threads: int) -> str:
    """A machine's file for a template.

    Another thread count or protocol gives another name, and so does another of the facts that `must_agree` names.
    """
    rules = template.model_dump(mode="json", include={"name", "runtime", "operators", "protocol"})
    agreed = {fact: facts_by_name(facts)[fact] for fact in template.match.must_agree}
    decisive = json.dumps([rules, agreed, threads], sort_keys=True)
    cpu = re.sub(r"[^a-z0-9]+", "-", facts.cpu.lower()).strip("-")[:40].strip("-")
    digest = hashlib.sha256(decisive.encode()).hexdigest()[:8]
    return f"{template.name}-{cpu}-ort{facts.onnxruntime}-t{threads}-{digest}.yaml"


def fill_template(head: str, facts: HostFacts, threads: int) -> str:
    """Put a machine's facts in the place of a template's nulls; comments stay."""
    values = {
        ("match", "architecture"): facts.architecture,
        ("match", "cpu"): facts.cpu,
        ("match", "flags"): list(facts.flags),
        ("match", "cores"): facts.cores,
        ("runtime", "version"): facts.onnxruntime,
        ("runtime", "threads"): threads,
        ("device", "memory_bytes"): facts.memory_bytes,
        ("operators", "conv", "32", "alignment"): _block_of(facts),
    }
    return "\n".join(_filled(head.split("\n"), values))


def called(head: str, name: str) -> str:
    """A template under another name."""
    return re.sub(r"(?m)^name:.*$", f"name: {json.dumps(name)}", head, count=1)


def _block_of(facts: HostFacts) -> int | None:
    """How many channels onnxruntime's blocked layout of 32-bit convolutions puts together on x86."""
    return 16 if "avx512f" in facts.flags else 8 if {"avx", "avx2"}.intersection(facts.flags) else None


def _filled(lines: list[str], values: Mapping[tuple[str, ...], Any]) -> list[str]:
    """The lines of a block-style header with fields set by their path; JSON is YAML, and what follows a '#' is kept."""
    path: list[tuple[int, str]] = []
    result = []
    for line in lines:
        found = _FIELD.match(line)
        if found:
            indent = len(found[1])
            path = [*(step for step in path if step[0] < indent), (indent, found[2])]
            place = tuple(name for _, name in path)
            if place in values:
                comment = re.search(r"\s+#.*$", found[3])
                line = f"{found[1]}{found[2]}: {json.dumps(values[place])}{comment[0] if comment else ''}"
        result.append(line)
    return result
