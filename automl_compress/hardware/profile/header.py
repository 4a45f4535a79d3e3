"""The header of a profile file: which device, which runtime, what it executes, how it is measured.

What people write is checked here by pydantic: an unknown or repeated field, a wrong type is refused. No
file is opened. A field that comes later needs a default, or a new version and a step in `migrate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped, unused-ignore]
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from automl_compress.errors import ProfileError
from automl_compress.hardware.profile.migrate import VERSION, upgraded

SCHEMA = "automl-compress/profile"
DOCUMENTED = "see hardware_profiles/README.md"

LayerKind = Literal["conv", "linear"]
Fact = Literal["architecture", "cpu", "flags", "cores", "runtime"]
Count = Annotated[int, Field(gt=0, strict=True)]
AllocatorVariable = Annotated[str, Field(pattern=r"^MALLOC_[A-Z_]+$")]
Digits = Annotated[str, Field(pattern=r"^[0-9]+$")]


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, found {value!r}")
    return value


Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Match(_Strict):
    """Which machine the measurements are of. All null in a template, none null in a measured profile.

    `must_agree` names the facts ("runtime" is the runtime's version) without which nothing may be added to the file;
    where others differ, the program only warns.
    """

    architecture: str | None
    cpu: str | None
    flags: tuple[str, ...] | None
    cores: Count | None
    must_agree: tuple[Fact, ...] = ("architecture", "cpu", "flags", "runtime")


class Runtime(_Strict):
    name: Annotated[str, Field(min_length=1)]
    version: str | None
    provider: str
    provider_options: dict[str, str] = Field(default_factory=dict)
    threads: Count
    optimization: Literal["disabled", "basic", "extended", "all"]


class DeviceLimits(_Strict):
    """What the device has in all; null where it isn't known. `storage_bytes` is what holds the model's file."""

    memory_bytes: Count | None = None
    storage_bytes: Count | None = None


class MemoryModel(_Strict):
    """What "memory" means: the peak of a fresh process above an empty one's, or, where there are no processes, the
    bytes of weights and of activations that are alive at the same time ("tensors").

    `environment`: variables of the C library's allocator that the process has, and has to have where the model runs.
    Others are refused, since some make a process execute what they name.
    """

    model: Literal["process", "tensors"] = "process"
    environment: dict[AllocatorVariable, Digits] = Field(default_factory=dict)


class Operator(_Strict):
    """How a kind of layer runs at one bit-width, and the operators that prove it in the executed graph.

    `alignment` is the multiple of channels that the fast layout wants; None where it isn't known.
    """

    execution: Literal["native", "emulated", "weight-only", "storage"]
    operators: tuple[str, ...] = Field(min_length=1)
    alignment: Count | None = None


class Protocol(_Strict):
    """How things are measured. `discard` is the fraction of each burst that isn't counted."""

    warm_up_runs: Annotated[int, Field(ge=0, strict=True)]
    burst_runs: Count
    burst_seconds: Positive
    bursts: Count
    discard: Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1, allow_inf_nan=False)]
    trace_rounds: Count
    trace_runs: Count


class Roofline(_Strict):
    """What estimates a kernel's time: the longer of computing and moving data, and a fixed overhead (`roofline.py`).

    peak_gops        bit-width -> 10^9 multiplications with additions a second, a pair counting as one operation
    bandwidth_gbps   10^9 bytes a second between the processor and what holds weights and activations
    overhead_us      of each kernel, in microseconds
    efficiency       kind of operator -> share of the peak that it reaches; "other" stands for those not named
    """

    peak_gops: dict[Count, Positive] = Field(min_length=1)
    bandwidth_gbps: Positive
    overhead_us: NotNegative
    efficiency: dict[str, Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)]] = Field(default_factory=dict)


class ProfileHeader(_Strict):
    """The part of a profile that people read and write."""

    schema_: Literal["automl-compress/profile"] = Field(alias="schema")
    version: Literal[2]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str
    provenance: Literal["measured", "estimated"]
    sources: tuple[str, ...] = ()
    match: Match
    runtime: Runtime
    device: DeviceLimits = DeviceLimits()
    memory: MemoryModel = MemoryModel()
    operators: dict[LayerKind, dict[Count, Operator]]
    protocol: Protocol
    roofline: Roofline | None = None

    @model_validator(mode="after")
    def _filled_or_not(self) -> ProfileHeader:
        if self.provenance == "estimated":
            return self._estimated()
        values = {f"match.{k}": getattr(self.match, k) for k in ("architecture", "cpu", "flags", "cores")}
        values["runtime.version"] = self.runtime.version
        missing = [name for name, value in values.items() if value is None]
        if missing and len(missing) < len(values):
            raise ValueError(
                f"{', '.join(missing)} is null but other facts of the machine are given: fill in all or none"
            )
        if self.runtime.name != "onnxruntime":
            raise ValueError(f"runtime.name must be 'onnxruntime' to be measured, found {self.runtime.name!r}")
        return self

    def _estimated(self) -> ProfileHeader:
        if self.roofline is None:
            raise ValueError("roofline is missing: an estimated profile needs it")
        if not self.sources:
            raise ValueError("sources is empty: say where the figures of an estimated profile come from")
        return self

    @property
    def is_template(self) -> bool:
        """Whether the facts of a machine are still to be filled in."""
        return self.provenance == "measured" and self.match.architecture is None

    def settings(self) -> dict[str, Any]:
        """What the measuring process has to know."""
        chosen = {"threads", "provider", "provider_options", "optimization"}
        measuring = {**self.runtime.model_dump(include=chosen), **self.protocol.model_dump()}
        return {**measuring, "memory_environment": dict(self.memory.environment)}


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """Safe YAML that refuses a key that is given twice, of which the last would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # A key that isn't a text is refused by whoever reads the mapping.
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


def parse_yaml(text: str, where: str) -> Any:
    """What a header's text says. Raises ProfileError for what isn't YAML and for a key that is given twice."""
    try:
        return _UniqueKeys(text).get_single_data()
    except RecursionError as error:
        raise ProfileError(
            f"{where}: not YAML that can be read: nested too deeply; mend it or delete the file"
        ) from error
    except (ValueError, TypeError) as error:  # dates, numbers and keys that PyYAML can't make
        raise ProfileError(f"{where}: not YAML that can be read: {error}; mend it or delete the file") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        reason = error.problem or error.context
        raise ProfileError(f"{where}{line}: not YAML that can be read: {reason}; mend it or delete the file") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ProfileError(f"{where}: not YAML that can be read: {reason}; mend it or delete the file") from error


def read_header(text: str, where: str) -> ProfileHeader:
    """Read and check a header of this version, or of an older one as what it is today.

    `where` names the file. Raises ProfileError with the first thing wrong.
    """
    data = parse_yaml(text, where)
    if not isinstance(data, dict):
        raise ProfileError(f"{where}: not a device profile: it holds {short(data)}, not fields such as 'schema'")
    if data.get("schema") != SCHEMA:
        found = data.get("schema")
        raise ProfileError(f"{where}: schema is {found!r}, a device profile has {SCHEMA!r}; name another file")
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ProfileError(f"{where}: version must be a whole number from 1 to {VERSION}, found {short(version)}")
    if version > VERSION:
        raise ProfileError(f"{where}: version {version} is newer than this program, which reads {VERSION}: upgrade it")
    if version < VERSION:
        data = parse_yaml(upgraded(text, where), where)
    try:
        return ProfileHeader.model_validate(data)
    except ValidationError as error:
        raise ProfileError(f"{where}: {_first_problem(error)}; {DOCUMENTED}") from error


def header_version(text: str, where: str) -> int:
    """The version that a header was written in. Call it with a text that `read_header` accepts."""
    return int(parse_yaml(text, where)["version"])


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    at = ".".join(str(part) for part in first["loc"] if part != "[key]") or "header"
    if first["type"] == "missing":
        return f"{at}: it is missing"
    if first["type"] == "extra_forbidden":
        return f"{at}: unknown field, found {short(first['input'])}"
    problem = first["msg"].removeprefix("Value error, ")
    found = "" if isinstance(first["input"], dict | BaseModel) else f", found {short(first['input'])}"
    return f"{at}: {problem}{found}"


def short(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
