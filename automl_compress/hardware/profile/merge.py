"""Several profiles of one device as one file; also how a measured profile gets a name to be shipped under."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automl_compress.errors import ProfileError
from automl_compress.hardware.profile.files import decode, read_bytes, replace_file
from automl_compress.hardware.profile.header import ProfileHeader, read_header
from automl_compress.hardware.profile.insight import header_differences
from automl_compress.hardware.profile.migrate import upgraded
from automl_compress.hardware.profile.profile import DeviceProfile
from automl_compress.hardware.profile.schema import KernelRecord, Record, lines_of, read_record
from automl_compress.hardware.profile.template import MARK, START

# What makes two profiles speak of different things. `match.cores` is judged by what the files say must agree.
_IDENTITY = ("provenance", "runtime.", "memory.", "roofline.")
_MATCH = {"match.architecture": "architecture", "match.cpu": "cpu", "match.flags": "flags", "match.cores": "cores"}
_WITHOUT_EFFECT = ("name", "description", "sources", "version", "device.")


def merge(
    profiles: Sequence[DeviceProfile],
    out: Path,
    *,
    name: str | None = None,
    description: str | None = None,
    compact: bool = False,
) -> list[str]:
    """Write `out` with the first profile's header and everybody's measurements; returns what to know about it.

    name, description   take the place of the first profile's
    compact             one line for each kernel, with all raw values, instead of the lines as they were appended

    Lines that are the same in several files count once. Raises ProfileError if the profiles are of different devices,
    runtimes or settings, or `out` exists.
    """
    first, *others = profiles
    if out.exists():
        raise ProfileError(f"{out}: exists already; name another file or delete it")
    notes = [note for other in others for note in _compared(first, other)]
    head, _ = _parts(first)
    head = _renamed(head, first.header, {"name": name, "description": description}, out)
    lines = _union([_lines(profile) for profile in profiles])
    body = "".join(f"{line}\n" for line in (_one_each(lines, out) if compact else lines))
    replace_file(out, f"{head.rstrip()}\n\n{MARK}\n{START}\n{body}".encode())
    return notes


def _union(files: Sequence[Sequence[str]]) -> list[str]:
    """All lines in order; one that several files have counts as often as in the file that has it most often."""
    result: list[str] = []
    taken: Counter[str] = Counter()
    for lines in files:
        seen: Counter[str] = Counter()
        for line in lines:
            seen[line] += 1
            if seen[line] > taken[line]:
                taken[line] += 1
                result.append(line)
    return result


def _compared(first: DeviceProfile, other: DeviceProfile) -> list[str]:
    """What differs without harm. Raises ProfileError with what differs and must not."""
    decisive = {*first.header.match.must_agree, *other.header.match.must_agree}
    notes = []
    for field, (ours, theirs) in header_differences(first, other).items():
        told = f"{field} is {_short(ours)} in {first.path} and {_short(theirs)} in {other.path}"
        identity = field.startswith(_IDENTITY) and (field != "runtime.version" or "runtime" in decisive)
        if identity or _MATCH.get(field) in decisive:
            raise ProfileError(f"{told}: they are not of the same device, and stay separate files")
        if not field.startswith(_WITHOUT_EFFECT):
            notes.append(f"{told}; the first is kept")
    return notes


def _parts(profile: DeviceProfile) -> tuple[str, str]:
    """Header in today's version, and measurement lines, as text."""
    head, _, tail = decode(read_bytes(profile.path), profile.path).partition("\n" + MARK + "\n")
    return upgraded(head, str(profile.path)), tail[len(START) + 1 :]


def _lines(profile: DeviceProfile) -> list[str]:
    complete = _parts(profile)[1].rpartition("\n")[0]
    return [line for line in complete.split("\n") if line.strip() and not line.lstrip().startswith("#")]


def _one_each(lines: Sequence[str], out: Path) -> list[str]:
    """One line for each kernel, model and correction."""
    records: dict[tuple[type[Record], str], Record] = {}
    for line in lines:
        record = read_record(line, str(out))
        place = (type(record), record.key)
        known = records.get(place)
        merged = isinstance(known, KernelRecord) and isinstance(record, KernelRecord)
        records[place] = known.merged(record) if merged else record  # type: ignore[union-attr, arg-type]
    return lines_of(records.values()).splitlines()


def _renamed(head: str, header: ProfileHeader, values: dict[str, str | None], out: Path) -> str:
    for field, value in values.items():
        if value is not None:
            line = f"{field}: {json.dumps(value, ensure_ascii=False)}"
            head, count = re.subn(rf"(?m)^{field}:.*(?:\n[ ]+.*)*$", lambda _, line=line: line, head)  # type: ignore[misc]
            if not count:
                raise ProfileError(
                    f"{out}: no line of the header begins with '{field}:'; write it as a line of its own"
                )
    read_header(head, str(out))
    return head


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
