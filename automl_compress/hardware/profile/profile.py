"""The device profile file: a header that people read, and measurements that the program appends, one a line.

The whole file is valid YAML. The header is block YAML with comments; each measurement is a JSON object on its own line,
so a file with ten thousand of them loads at once, diffs line by line, and a kill in the middle of an append costs one
line. Two processes may append at the same time: whole lines are written under a file lock, and each picks up what the
other measured (`refresh`).

A file of an older version is read as it is; the first append rewrites it in today's and keeps the original beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from automl_compress import data_files
from automl_compress.errors import ProfileError
from automl_compress.hardware.profile.files import append, decode, file_lock, read_bytes, replace_file
from automl_compress.hardware.profile.header import Operator, header_version, read_header
from automl_compress.hardware.profile.host import HostFacts, host_facts
from automl_compress.hardware.profile.migrate import VERSION, upgraded
from automl_compress.hardware.profile.schema import (
    CorrectionRecord,
    KernelRecord,
    ModelRecord,
    Record,
    lines_of,
    read_record,
)
from automl_compress.hardware.profile.template import (
    MARK,
    START,
    called,
    create,
    facts_by_name,
    measured_file,
    measured_folder,
)

_FACTS = {
    "architecture": "architecture",
    "cpu": "CPU",
    "flags": "instruction sets",
    "cores": "number of cores",
    "runtime": "onnxruntime",
}


class DeviceProfile:
    """One device's profile file, loaded.

    kernels      key of an executed kernel -> its time; several measurements of one kernel are merged
    models       whole models that were measured, the latest of each structure
    revision     grows whenever anything is added
    corrections  family of models -> the latest fit of what their latency is of the sum of their kernels
    warnings     why the figures may not hold here, e.g. that they were measured on another CPU; empty if they do
    obstacles    those of the warnings for which nothing may be added here
    notes        what was repaired while reading

    Raises ProfileError for a file that can't be read, is damaged, of another format or of a newer version.
    """

    def __init__(self, path: Path, facts: HostFacts | None = None) -> None:
        self.path = path
        self.notes: list[str] = []
        self._facts = facts or host_facts()
        self._load()

    def _load(self) -> None:
        self.revision = getattr(self, "revision", 0) + 1
        self.kernels: dict[str, KernelRecord] = {}
        self.corrections: dict[str, CorrectionRecord] = {}
        self._models: dict[str, ModelRecord] = {}
        data = read_bytes(self.path)
        head, found, tail = decode(data, self.path).partition("\n" + MARK + "\n")
        self.header = read_header(head, str(self.path))
        self.version = header_version(head, str(self.path))
        if self.header.is_template:
            raise ProfileError(f"{self.path}: a template without a machine's facts; use --profile {self.header.name}")
        if not found:
            raise ProfileError(f"{self.path}: cut off, the line {MARK!r} is missing; restore it or delete the file")
        if not tail.startswith(START + "\n"):
            where = f"{self.path}, line {_lines(head) + 2}"
            raise ProfileError(f"{where}: expected {START!r}; restore it or delete the file")
        self._start = (head + found + START + "\n").encode()
        self._offset = len(self._start)
        self._line = _lines(head) + 2
        self._take(tail[len(START) + 1 :])
        self.warnings, self.obstacles = self._differences()

    @property
    def name(self) -> str:
        return self.header.name

    @property
    def threads(self) -> int:
        """How many threads the runtime computes with."""
        return self.header.runtime.threads

    @property
    def provenance(self) -> Literal["measured", "estimated"]:
        """Whether its figures were measured on the device or are worked out from what is published about it."""
        return self.header.provenance

    @property
    def models(self) -> list[ModelRecord]:
        return list(self._models.values())

    def model(self, key: str) -> ModelRecord | None:
        """The record of a structure, or None if it wasn't measured."""
        return self._models.get(key)

    def bit_widths(self, kind: str) -> tuple[int, ...]:
        """The bit-widths that a kind of layer ("conv", "linear") runs natively at, ascending; 32 for other kinds."""
        rules = self._operators(kind)
        return tuple(sorted(bits for bits, rule in rules.items() if rule.execution == "native")) or (32,)

    @property
    def executions(self) -> dict[tuple[str, int], Literal["native", "emulated", "weight-only", "storage"]]:
        """(kind of layer, bits) -> how the device runs it."""
        return {
            (str(kind), bits): rule.execution
            for kind, rules in self.header.operators.items()
            for bits, rule in rules.items()
        }

    def alignment(self, kind: str, bits: int) -> int | None:
        """The multiple of channels that the fast layout wants; None where it isn't known."""
        rules = self._operators(kind)
        return rules[bits].alignment if bits in rules else None

    def add_kernels(self, records: Iterable[KernelRecord]) -> None:
        """Append to the file at once. Raises CompressError if it can't be written or is another machine's."""
        self._append(records)

    def add_models(self, records: Iterable[ModelRecord]) -> None:
        """Append to the file at once. A later record of the same structure replaces the earlier."""
        self._append(records)

    def add_corrections(self, records: Iterable[CorrectionRecord]) -> None:
        """Append to the file at once. A later record of the same family replaces the earlier."""
        self._append(records)

    def require_match(self) -> None:
        """Raise ProfileError if measurements of this machine don't belong into this file."""
        if self.obstacles:
            raise ProfileError(f"{self.obstacles[0]}; nothing can be added to it here: use --profile local")

    def suppose(self, records: Iterable[KernelRecord]) -> None:
        """Take estimated prices of kernels for as long as this object lives; they never get into the file."""
        for record in records:
            self.kernels.setdefault(record.key, record)
        self.revision += 1

    def refresh(self) -> None:
        """Read what other processes have appended since."""
        if self.obstacles or not os.access(self.path.parent, os.W_OK):
            return  # Nobody here appends to it, and a lock file beside it isn't wanted or can't be made.
        with file_lock(self.path):
            self._sync()

    def upgrade(self) -> Path | None:
        """Rewrite a file of an older version in today's, whole or not at all, whatever machine it is of.

        Returns where the original is kept (`NAME.yaml.v1.bak`), None if there was nothing to do. Raises CompressError
        if it can't be written.
        """
        with file_lock(self.path):
            self._sync()
            return self._upgrade()

    def _operators(self, kind: str) -> dict[int, Operator]:
        return {str(k): v for k, v in self.header.operators.items()}.get(kind, {})

    def _append(self, records: Iterable[Record]) -> None:
        text = lines_of(records)
        if not text:
            return
        self.require_match()
        with file_lock(self.path):
            self._sync()
            self._upgrade()
            append(self.path, self._offset, text.encode())
            self._take(text)

    def _sync(self) -> None:
        """Under the lock: take what was appended, or everything anew if the file isn't the one that was read."""
        with open(self.path, "rb") as file:
            same = file.read(len(self._start)) == self._start
            file.seek(self._offset - 1)
            same = same and file.read(1) == b"\n"
        if same:
            self._take(decode(read_bytes(self.path, self._offset), self.path))
        else:
            self._load()

    def _upgrade(self) -> Path | None:
        if self.version == VERSION:
            return None
        data = read_bytes(self.path)
        head, found, tail = decode(data, self.path).partition("\n" + MARK + "\n")
        backup = self.path.with_name(f"{self.path.name}.v{self.version}.bak")
        replace_file(backup, data)
        replace_file(self.path, (upgraded(head, str(self.path)).rstrip() + "\n" + found + tail).encode())
        self._load()
        return backup

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
        self.revision += 1
        if isinstance(record, ModelRecord):
            self._models[record.key] = record
        elif isinstance(record, CorrectionRecord):
            self.corrections[record.key] = record
        elif record.key in self.kernels:
            self.kernels[record.key] = self.kernels[record.key].merged(record)
        else:
            self.kernels[record.key] = record

    def _differences(self) -> tuple[list[str], list[str]]:
        """Why the figures don't hold on this machine, and for which of these reasons nothing may be added."""
        if self.provenance == "estimated":
            doubt = f"profile {self.name}: estimated from published figures; nothing in it was measured on the device"
            return [doubt], [doubt]
        match = self.header.match
        theirs = {
            "architecture": match.architecture,
            "cpu": match.cpu,
            "flags": list(match.flags or ()),
            "cores": match.cores,
            "runtime": self.header.runtime.version,
        }
        ours = facts_by_name(self._facts)
        said = {
            fact: f"profile {self.name}: measured with {what} {_told(value)}, the one at hand has {_told(ours[fact])}"
            for (fact, what), value in zip(_FACTS.items(), theirs.values(), strict=True)
            if value != ours[fact]
        }
        return list(said.values()), [text for fact, text in said.items() if fact in match.must_agree]


def load_profile(
    name_or_path: str,
    *,
    home: Path | None = None,
    threads: int | None = None,
    facts: HostFacts | None = None,
    host: str = "",
) -> DeviceProfile:
    """The profile of that name, or the file of that path.

    A template (such as "local") stands for the machine that is measured: its measured file lies in `home` (default
    $AUTOML_COMPRESS_HOME, else the user's cache folder) and is created on first use. `facts` are that machine's
    (default: this one's), and `host` is what to call its file if it is another one. `threads` replaces the template's
    number of threads. A measured profile that is shipped with the program is copied there where it is this machine's,
    since measurements may be added. Raises ProfileError for an unknown name, a damaged file, or a folder that can't be
    written.
    """
    facts = facts or host_facts()
    source, shipped = locate(name_or_path, home)
    head = decode(read_bytes(source), source).partition("\n" + MARK + "\n")[0]
    header = read_header(head, str(source))
    if header.is_template:
        if host:
            head = called(head, host)
            header = read_header(head, str(source))
        return DeviceProfile(measured_file(head, header, facts, threads, home), facts)
    if threads not in (None, header.runtime.threads):
        found = header.runtime.threads
        raise ProfileError(f"{source} was measured with {found} threads, not {threads}; use --profile local")
    profile = DeviceProfile(source, facts)
    if shipped and not profile.obstacles:
        path = measured_folder(home) / source.name
        create(path, read_bytes(source))
        return DeviceProfile(path, facts)
    return profile


def locate(name_or_path: str, home: Path | None = None) -> tuple[Path, bool]:
    """The file of a name or of a path, and whether it is shipped with the program.

    A name is a shipped profile's, or that of a file that was measured on this machine. Raises ProfileError for neither.
    """
    found = data_files.find("hardware_profiles", name_or_path)
    if found is not None:
        return found, True
    for path in (Path(name_or_path).expanduser(), measured_folder(home) / f"{name_or_path}.yaml"):
        if path.is_file():
            return path, False
    known = ", ".join(data_files.names("hardware_profiles")) or "none (the program's data files are missing)"
    raise ProfileError(
        f"no device profile {name_or_path!r}: name one of {known}, one that 'devices list' shows, or a profile file"
    )


def _told(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _lines(text: str) -> int:
    return text.count("\n") + 1
