"""Which profiles there are: those that travel with the program and those that were measured on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from automl_compress import data_files
from automl_compress.errors import CompressError, ProfileError
from automl_compress.hardware.profile.files import decode, read_bytes
from automl_compress.hardware.profile.header import ProfileHeader, read_header
from automl_compress.hardware.profile.host import HostFacts, host_facts
from automl_compress.hardware.profile.profile import DeviceProfile, locate
from automl_compress.hardware.profile.template import MARK, file_name, measured_folder

Origin = Literal["shipped", "measured here", "file"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One profile file. `profile` is None for a template, and for a file that can't be used: `problem` says why."""

    file: Path
    origin: Origin
    header: ProfileHeader | None = None
    profile: DeviceProfile | None = None
    problem: str | None = None

    @property
    def kind(self) -> str:
        """ "measured", "estimated", "template" or "damaged"."""
        if self.header is None or (self.profile is None and not self.header.is_template):
            return "damaged"
        return "template" if self.header.is_template else self.header.provenance

    def to_json(self) -> dict[str, Any]:
        header, profile = self.header, self.profile
        return {
            "name": self.file.stem,
            "file": str(self.file),
            "origin": self.origin,
            "kind": self.kind,
            "description": header.description if header else None,
            "device": header.match.cpu if header else None,
            "architecture": header.match.architecture if header else None,
            "runtime": f"{header.runtime.name} {header.runtime.version or ''}".strip() if header else None,
            "provider": header.runtime.provider if header else None,
            "threads": header.runtime.threads if header else None,
            "kernels": len(profile.kernels) if profile else 0,
            "models": len(profile.models) if profile else 0,
            "matches": not profile.warnings if profile else self.kind == "template",
            "warnings": list(profile.warnings) if profile else [],
            "problem": self.problem,
        }


def entries(*, home: Path | None = None, facts: HostFacts | None = None) -> list[Entry]:
    """All profiles: the shipped ones, then those in `home` (default: where `load_profile` puts them).

    A file that can't be used is listed with its problem.
    """
    facts = facts or host_facts()
    return [entry(path, origin, facts) for path, origin in _files(home)]


def entry(path: Path, origin: Origin = "file", facts: HostFacts | None = None) -> Entry:
    """What a profile file is; a damaged one is an entry with a problem."""
    try:
        header = read_header(decode(read_bytes(path), path).partition("\n" + MARK + "\n")[0], str(path))
    except CompressError as error:
        return Entry(file=path, origin=origin, problem=str(error))
    if header.is_template:
        return Entry(file=path, origin=origin, header=header)
    try:
        return Entry(file=path, origin=origin, header=header, profile=DeviceProfile(path, facts))
    except CompressError as error:
        return Entry(file=path, origin=origin, header=header, problem=str(error))


def path_of(name: str, *, home: Path | None = None) -> Path:
    """The file that a name means: of those measured on this machine, of a shipped profile, or a path.

    Raises ProfileError where there is none.
    """
    path = measured_folder(home) / f"{name}.yaml"
    return path if path.is_file() else locate(name, home)[0]


def find(name: str, *, home: Path | None = None, facts: HostFacts | None = None) -> DeviceProfile:
    """The profile that a name or path means; a template's name means what was measured on this machine for it.

    Nothing is created. Raises ProfileError where there is none.
    """
    facts = facts or host_facts()
    path = path_of(name, home=home)
    found = entry(path, facts=facts)
    if found.header and found.header.is_template:
        path = measured_folder(home) / file_name(found.header, facts, found.header.runtime.threads)
        if not path.is_file():
            raise ProfileError(
                f"{name}: a template; nothing was measured for it on this machine yet, a search does that"
            )
    return found.profile or DeviceProfile(path, facts)


def _files(home: Path | None) -> Iterator[tuple[Path, Origin]]:
    for name in data_files.names("hardware_profiles"):
        path = data_files.find("hardware_profiles", name)
        if path is not None:
            yield path, "shipped"
    folder = measured_folder(home)
    for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else ():
        yield path, "measured here"
