"""The device profile file: a header that people read, and measurements that the program appends, one a line.

The whole file is valid YAML. The header is block YAML with comments; each measurement is a JSON object on its own line,
so a file with ten thousand of them loads at once, diffs line by line, and a kill in the middle of an append costs one
line. Two processes may append at the same time: whole lines are written under a file lock, and each picks up what the
other measured (`refresh`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]
from filelock import FileLock, Timeout

from automl_compress import data_files
from automl_compress.errors import DeviceError, ProfileError
from automl_compress.hardware.host import HostFacts, host_facts
from automl_compress.hardware.schema import (
    KernelRecord,
    ModelRecord,
    ProfileHeader,
    Record,
    lines_of,
    read_header,
    read_record,
)

MARK = "# --- measurements, appended by the program ---"
START = "measurements:"
_ELSEWHERE = "set AUTOML_COMPRESS_HOME to a folder of yours"
_APPEND_TIMEOUT_S = 60.0
_DEVICE_TIMEOUT_S = 3600.0


class DeviceProfile:
    """One device's profile file, loaded.

    kernels   key of an executed kernel -> its time; several measurements of one kernel are merged
    models    whole models that were measured, the latest of each structure
    warnings  why the measurements may not hold here, e.g. that they were made on another CPU; empty if they do
    notes     what was repaired while reading

    Raises ProfileError for a file that can't be read, is damaged, of another format or of a newer version.
    """

    def __init__(self, path: Path, facts: HostFacts | None = None) -> None:
        self.path = path
        self.notes: list[str] = []
        self.kernels: dict[str, KernelRecord] = {}
        self._models: dict[str, ModelRecord] = {}
        text = _read(path)
        head, found, tail = text.partition("\n" + MARK + "\n")
        self.header = read_header(_parse_header(head, path), str(path))
        if self.header.is_template:
            raise ProfileError(f"{path}: a template without a machine's facts; use --profile {self.header.name}")
        if not found:
            raise ProfileError(f"{path}: cut off, the line {MARK!r} is missing; restore it or delete the file")
        if not tail.startswith(START + "\n"):
            raise ProfileError(f"{path}, line {_lines(head) + 2}: expected {START!r}; restore it or delete the file")
        self._offset = len((head + found + START + "\n").encode())
        self._line = _lines(head) + 2
        self._take(tail[len(START) + 1 :])
        self.warnings = _differences(self.header, facts or host_facts())

    @property
    def name(self) -> str:
        return self.header.name

    @property
    def threads(self) -> int:
        """How many threads the runtime computes with."""
        return self.header.runtime.threads

    @property
    def models(self) -> list[ModelRecord]:
        return list(self._models.values())

    def model(self, key: str) -> ModelRecord | None:
        """The record of a structure, or None if it wasn't measured."""
        return self._models.get(key)

    def bit_widths(self, kind: str) -> tuple[int, ...]:
        """The bit-widths that a kind of layer ("conv", "linear") runs natively at, ascending; 32 for other kinds."""
        rules = {str(k): v for k, v in self.header.operators.items()}.get(kind, {})
        return tuple(sorted(bits for bits, rule in rules.items() if rule.execution == "native")) or (32,)

    def integer_operator(self, kind: str, bits: int) -> tuple[str, ...]:
        """The executed operators, any of them, that prove a layer runs at that width; empty if it isn't native."""
        rules = {str(k): v for k, v in self.header.operators.items()}.get(kind, {})
        return rules[bits].operators if bits in rules and rules[bits].execution == "native" else ()

    def add_kernels(self, records: Iterable[KernelRecord]) -> None:
        """Append to the file at once. Raises ProfileError if it can't be written or is another machine's."""
        self._append(records)

    def add_models(self, records: Iterable[ModelRecord]) -> None:
        """Append to the file at once. A later record of the same structure replaces the earlier."""
        self._append(records)

    def require_match(self) -> None:
        """Raise ProfileError if measurements of this machine don't belong into this file."""
        if self.warnings:
            raise ProfileError(f"{self.warnings[0]}; nothing can be added to it here: use --profile local")

    def refresh(self) -> None:
        """Read what other processes have appended since."""
        with self._locked():
            self._take(_read(self.path, self._offset))

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold the device: only one process at a time may measure. Raises DeviceError after waiting an hour."""
        path = self.path.with_name("measuring.lock")
        busy = DeviceError(f"another process has been measuring for an hour (it holds {path}); end it")
        with _lock(path, _DEVICE_TIMEOUT_S, busy):
            yield

    def _append(self, records: Iterable[Record]) -> None:
        text = lines_of(records)
        if not text:
            return
        self.require_match()
        with self._locked():
            self._take(_read(self.path, self._offset))
            try:
                with open(self.path, "r+b") as file:
                    file.seek(self._offset)
                    file.truncate()
                    file.write(text.encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise ProfileError(f"{self.path}: can't be written ({error.strerror}); {_ELSEWHERE}") from error
            self._take(text)

    def _take(self, text: str) -> None:
        """Add complete lines. What follows the last line break was cut off by a kill; the next append removes it."""
        complete, _, rest = text.rpartition("\n")
        for line in complete.split("\n") if complete else []:
            self._line += 1
            if line.strip() and not line.lstrip().startswith("#"):
                self._keep(read_record(line, f"{self.path}, line {self._line}"))
        self._offset += len((complete + "\n").encode()) if complete or text.startswith("\n") else 0
        if rest:
            note = f"{self.path}: the last line was cut off and is dropped; it will be measured again"
            self.notes += [note] if note not in self.notes else []

    def _keep(self, record: Record) -> None:
        if isinstance(record, ModelRecord):
            self._models[record.key] = record
        elif record.key in self.kernels:
            self.kernels[record.key] = self.kernels[record.key].merged(record)
        else:
            self.kernels[record.key] = record

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.path.with_name(self.path.name + ".lock")
        busy = ProfileError(f"{self.path}: another process has held {lock} for a minute; end it")
        with _lock(lock, _APPEND_TIMEOUT_S, busy):
            yield


def load_profile(
    name_or_path: str, *, home: Path | None = None, threads: int | None = None, facts: HostFacts | None = None
) -> DeviceProfile:
    """The profile of that name, or the file of that path.

    A template (such as "local") stands for the machine that this runs on: its measured file lies in `home` (default
    $AUTOML_COMPRESS_HOME, else the user's cache folder) and is created on first use. `threads` replaces the template's
    number of threads. Raises ProfileError for an unknown name, a damaged file, or a folder that can't be written.
    """
    facts = facts or host_facts()
    source = _locate(name_or_path)
    head = _read(source).partition("\n" + MARK + "\n")[0]
    header = read_header(_parse_header(head, source), str(source))
    if header.is_template:
        return DeviceProfile(_measured_file(head, header, facts, threads, home or default_home()), facts)
    if threads not in (None, header.runtime.threads):
        found = header.runtime.threads
        raise ProfileError(f"{source} was measured with {found} threads, not {threads}; use --profile local")
    return DeviceProfile(source, facts)


def _measured_file(head: str, header: ProfileHeader, facts: HostFacts, threads: int | None, home: Path) -> Path:
    """This machine's file for a template; created if there is none."""
    if facts.onnxruntime == "none":
        raise DeviceError("onnxruntime is not installed, so this machine can't be measured: pip install onnxruntime")
    threads = threads or header.runtime.threads
    path = home / "hardware_profiles" / file_name(header, facts, threads)
    filled = fill_template(head, facts, threads)
    read_header(_parse_header(filled, path), str(path))
    busy = ProfileError(f"{path}: another process has been creating it for a minute; end it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_name(path.name + ".lock"), _APPEND_TIMEOUT_S, busy):
            if not path.exists():
                part = path.with_suffix(".part")
                part.write_text(f"{filled.rstrip()}\n\n{MARK}\n{START}\n", encoding="utf-8")
                os.replace(part, path)
    except OSError as error:
        raise ProfileError(f"{path}: can't be written ({error.strerror}); {_ELSEWHERE}") from error
    return path


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


def file_name(template: ProfileHeader, facts: HostFacts, threads: int) -> str:
    """A machine's file for a template: another CPU, runtime, thread count or protocol gives another name."""
    rules = template.model_dump(mode="json", exclude={"description", "match"})
    decisive = json.dumps([rules, asdict(replace(facts, system="")), threads], sort_keys=True)
    cpu = re.sub(r"[^a-z0-9]+", "-", facts.cpu.lower()).strip("-")[:40].strip("-")
    digest = hashlib.sha256(decisive.encode()).hexdigest()[:8]
    return f"{template.name}-{cpu}-ort{facts.onnxruntime}-t{threads}-{digest}.yaml"


def fill_template(head: str, facts: HostFacts, threads: int) -> str:
    """Put a machine's facts in the place of a template's nulls; comments stay."""
    values = {
        "architecture": facts.architecture,
        "cpu": facts.cpu,
        "flags": list(facts.flags),
        "cores": facts.cores,
        "version": facts.onnxruntime,
    }
    for field, value in values.items():
        # JSON is YAML; a callable, so that a backslash in a value isn't a group reference.
        filled = json.dumps(value)
        head = re.sub(rf"(?m)^(\s+{field}:) null\b", lambda m, filled=filled: f"{m[1]} {filled}", head)  # type: ignore[misc]
    return re.sub(r"(?m)^(\s+threads:) \d+", rf"\g<1> {threads}", head)


def _locate(name_or_path: str) -> Path:
    found = data_files.find("hardware_profiles", name_or_path)
    if found is not None:
        return found
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    known = ", ".join(data_files.names("hardware_profiles")) or "none (the program's data files are missing)"
    raise ProfileError(f"no device profile {name_or_path!r}: name one of {known}, or the path of a profile file")


def _parse_header(text: str, path: Path) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ProfileError(
            f"{path}{line}: not YAML: {error.problem or error.context}; mend it or delete the file"
        ) from error
    except yaml.YAMLError as error:
        raise ProfileError(f"{path}: not YAML: {' '.join(str(error).split())}; mend it or delete the file") from error


def _read(path: Path, offset: int = 0) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
    except OSError as error:
        raise ProfileError(f"{path}: can't be read ({error.strerror})") from error
    # A cut-off last line may end in the middle of a character.
    complete, newline, rest = data.rpartition(b"\n")
    try:
        return (complete + newline).decode() + rest.decode(errors="replace")
    except UnicodeDecodeError as error:
        line = complete[: error.start].count(b"\n") + 1
        raise ProfileError(f"{path}, line {line}: not a text in UTF-8; restore the file or delete it") from error


def _differences(header: ProfileHeader, facts: HostFacts) -> list[str]:
    """Why measurements made on the header's machine don't hold on this one."""
    pairs = {
        "architecture": (header.match.architecture, facts.architecture),
        "CPU": (header.match.cpu, facts.cpu),
        "instruction sets": (" ".join(header.match.flags or ()), " ".join(facts.flags)),
        "number of cores": (header.match.cores, facts.cores),
        "onnxruntime": (header.runtime.version, facts.onnxruntime),
    }
    return [
        f"profile {header.name}: measured with {what} {theirs}, this machine has {ours}"
        for what, (theirs, ours) in pairs.items()
        if theirs != ours
    ]


@contextmanager
def _lock(path: Path, timeout_s: float, otherwise: Exception) -> Iterator[None]:
    try:
        lock = FileLock(path)
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise otherwise from error
    except OSError as error:
        raise ProfileError(f"{path}: can't be written ({error.strerror}); {_ELSEWHERE}") from error
    try:
        yield
    finally:
        lock.release()


def _lines(text: str) -> int:
    return text.count("\n") + 1
