"""What a profile file may contain: the header, checked by pydantic, and measurement lines. No file is opened here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from automl_compress.core.budget import Provenance
from automl_compress.errors import ProfileError

SCHEMA = "automl-compress/profile"
VERSION = 1
PROVENANCES = ("measured", "interpolated", "estimated")

LayerKind = Literal["conv", "linear"]
Count = Annotated[int, Field(gt=0, strict=True)]


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, found {value!r}")
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Match(_Strict):
    """Which machine the measurements are of. All null in a template, none null in a profile."""

    architecture: str | None
    cpu: str | None
    flags: tuple[str, ...] | None
    cores: Count | None


class Runtime(_Strict):
    name: Literal["onnxruntime"]
    version: str | None
    provider: str
    threads: Count
    optimization: Literal["disabled", "basic", "extended", "all"]


class Operator(_Strict):
    """How a kind of layer runs at one bit-width, and the operators that prove it in the executed graph."""

    execution: Literal["native", "weight-only", "storage"]
    operators: tuple[str, ...] = Field(min_length=1)


class Protocol(_Strict):
    """How things are measured. `discard` is the fraction of each burst that isn't counted."""

    warm_up_runs: Annotated[int, Field(ge=0, strict=True)]
    burst_runs: Count
    burst_seconds: Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
    bursts: Count
    discard: Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1, allow_inf_nan=False)]
    trace_rounds: Count
    trace_runs: Count


class ProfileHeader(_Strict):
    """The part of a profile that people read and write."""

    schema_: Literal["automl-compress/profile"] = Field(alias="schema")
    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str
    match: Match
    runtime: Runtime
    operators: dict[LayerKind, dict[Count, Operator]]
    protocol: Protocol

    @model_validator(mode="after")
    def _filled_or_not(self) -> ProfileHeader:
        values = {**{f"match.{k}": v for k, v in self.match}, "runtime.version": self.runtime.version}
        missing = [name for name, value in values.items() if value is None]
        if missing and len(missing) < len(values):
            raise ValueError(
                f"{', '.join(missing)} is null but other facts of the machine are given: fill in all or none"
            )
        return self

    @property
    def is_template(self) -> bool:
        """Whether the facts of a machine are still to be filled in."""
        return self.match.architecture is None

    def settings(self) -> dict[str, Any]:
        """What the measuring process has to know."""
        chosen = {"threads", "provider", "optimization"}
        return {**self.runtime.model_dump(include=chosen), **self.protocol.model_dump()}


@dataclass(frozen=True, kw_only=True)
class KernelRecord:
    """One executed kernel's time. `bursts_us` are the raw burst means, `spread` is their range over their median."""

    key: str
    mean_us: float
    spread: float
    bursts_us: tuple[float, ...] = ()
    count: int = 1
    provenance: Provenance = "measured"

    def merged(self, other: KernelRecord) -> KernelRecord:
        """Two measurements of the same kernel as one; each weighs as often as the kernel was seen."""
        count = self.count + other.count
        mean = (self.mean_us * self.count + other.mean_us * other.count) / count
        between = abs(self.mean_us - other.mean_us) / mean if mean > 0 else 0.0
        return KernelRecord(
            key=self.key,
            mean_us=mean,
            spread=max(self.spread, other.spread, between),
            bursts_us=(*self.bursts_us, *other.bursts_us),
            count=count,
            provenance=self.provenance if self.provenance == other.provenance else "interpolated",
        )


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A whole model: what its kernels add up to beside what it really takes, for fitting the correction.

    `key` is the digest of its structure, `family` that of the model that it was measured beside (and is a variant of),
    `nodes` counts executed kernels, `memory_bytes` is None if it wasn't measured.
    """

    key: str
    family: str
    kernel_sum_us: float
    nodes: int
    measured_us: float
    spread: float
    size_bytes: int
    activation_bytes: int
    memory_bytes: int | None = None


Record = KernelRecord | ModelRecord
_TAGS: Mapping[str, type[KernelRecord] | type[ModelRecord]] = {"kernel": KernelRecord, "model": ModelRecord}
_TEXT = {"key", "family", "provenance"}
_WHOLE = {"count", "nodes", "size_bytes", "activation_bytes", "memory_bytes"}
_POSITIVE = {"count", "nodes", "measured_us"}
_OPTIONAL = {"bursts_us", "count", "provenance", "memory_bytes"}
_WAY_OUT = "delete the line, it will be measured again"


def read_header(data: Any, where: str) -> ProfileHeader:
    """Check what the YAML header holds. Raises ProfileError with the first thing wrong; `where` names the file."""
    if not isinstance(data, dict):
        raise ProfileError(f"{where}: not a device profile: it holds {_short(data)}, not fields such as 'schema'")
    if data.get("schema") != SCHEMA:
        found = data.get("schema")
        raise ProfileError(f"{where}: schema is {found!r}, a device profile has {SCHEMA!r}; name another file")
    version = data.get("version")
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise ProfileError(f"{where}: version {version} is newer than this program, which reads {VERSION}: upgrade it")
    try:
        return ProfileHeader.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"] if part != "[key]") or "header"
        hints = {"missing": "it is missing", "extra_forbidden": "unknown field"}
        problem = f"{first['msg'].removeprefix('Value error, ')}, found {_short(first['input'])}"
        found = hints.get(first["type"], problem)
        raise ProfileError(f"{where}: {at}: {found}; see hardware_profiles/README.md") from error


def write_record(record: Record) -> str:
    """One measurement as a line of YAML whose value is JSON."""
    tag = "kernel" if isinstance(record, KernelRecord) else "model"
    data = {tag: record.key, **{k: v for k, v in asdict(record).items() if k != "key" and v not in (None, ())}}
    return "- " + json.dumps(data, ensure_ascii=False, allow_nan=False)


def read_record(line: str, where: str) -> Record:
    """The reverse of `write_record`. Raises ProfileError that says what is wrong; `where` names file and line."""
    data = _json_object(line, where)
    tag = next((t for t in _TAGS if t in data), None)
    if tag is None:
        raise ProfileError(
            f"{where}: a measurement needs a field 'kernel' or 'model', found {_short(data)}; {_WAY_OUT}"
        )
    values = {("key" if name == tag else name): value for name, value in data.items()}
    kind = _TAGS[tag]
    known = {f.name for f in fields(kind)}
    for name in values:
        if name not in known or (name == "key" and "key" in data):
            raise ProfileError(f"{where}: unknown field {name!r} in a {tag} line; {_WAY_OUT}")
    for name in sorted(known - _OPTIONAL - values.keys()):
        raise ProfileError(f"{where}: the field {name!r} is missing; {_WAY_OUT}")
    for name, value in values.items():
        problem = _problem(name, value)
        if problem:
            raise ProfileError(
                f"{where}: {tag if name == 'key' else name} {problem}, found {_short(value)}; {_WAY_OUT}"
            )
    if "bursts_us" in values:
        values["bursts_us"] = tuple(float(v) for v in values["bursts_us"])
    return kind(**values)


def _json_object(line: str, where: str) -> dict[str, Any]:
    if not line.startswith("- "):
        raise ProfileError(f"{where}: a measurement line begins with '- {{', found {_short(line)}; {_WAY_OUT}")
    try:
        data = json.loads(line[2:])
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{where}: the line can't be read ({error}); {_WAY_OUT}") from error
    if not isinstance(data, dict):
        raise ProfileError(f"{where}: a measurement is an object, found {_short(data)}; {_WAY_OUT}")
    return data


def _problem(name: str, value: Any) -> str:
    """What is wrong with one field of a measurement; empty if nothing is."""
    if name in _TEXT:
        if not isinstance(value, str) or not value:
            return "must be a text"
        return "" if name != "provenance" or value in PROVENANCES else f"must be one of {', '.join(PROVENANCES)}"
    if name == "bursts_us":
        good = isinstance(value, list) and all(_is_real(v) and v >= 0 for v in value)
        return "" if good else "must be a list of durations of zero or more"
    if not _is_real(value):
        return "must be a finite number"
    if name in _WHOLE and not isinstance(value, int):
        return "must be a whole number"
    if name in _POSITIVE and value <= 0:
        return "must be greater than zero"
    return "must not be negative" if value < 0 else ""


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def lines_of(records: Iterable[Record]) -> str:
    return "".join(write_record(record) + "\n" for record in records)
