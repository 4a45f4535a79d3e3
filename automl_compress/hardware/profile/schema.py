"""What stands below a profile's header: measurements, a JSON object a line, each of a type that is checked strictly.

A field of a record is a field of its line; a new field needs a default, or lines that were written earlier are refused.
Units are part of the names. No file is opened here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean, median
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from automl_compress.core.budget import Provenance
from automl_compress.errors import ProfileError
from automl_compress.hardware.profile.header import short
from automl_compress.hardware.profile.migrate import upgraded_key

Text = Annotated[str, Field(strict=True, min_length=1)]
Count = Annotated[int, Field(strict=True, gt=0, le=10**9)]
Whole = Annotated[int, Field(strict=True, ge=0, le=10**18)]
Real = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NotNegative = Annotated[float, Field(strict=True, ge=0)]
Bursts = tuple[NotNegative, ...]

# Not strict as a whole, or a record could not be made of what JSON has; so the types of its fields are.
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_WAY_OUT = "delete the line, it will be measured again"


@dataclass(frozen=True, kw_only=True)
class KernelRecord:
    """One executed kernel's time. `bursts_us` are what the rounds said, `spread` is their range over their median.

    `traffic_bytes`: what each model that it was seen in reads and writes in one run, kernel by kernel; empty where that
    isn't known. `conditions` says in a few words what was special when it was measured.
    """

    __pydantic_config__ = _STRICT

    key: Text
    mean_us: NotNegative
    spread: NotNegative
    bursts_us: Bursts = ()
    traffic_bytes: tuple[Whole, ...] = ()
    count: Count = 1
    provenance: Provenance = "measured"
    conditions: str | None = None

    @property
    def sightings(self) -> list[tuple[tuple[float, ...], int]]:
        """(rounds, traffic of the model) of each model that it was seen in; empty where the two can't be told apart."""
        models = len(self.traffic_bytes)
        if models != self.count or len(self.bursts_us) % self.count:
            return []
        rounds = len(self.bursts_us) // models
        cut = [self.bursts_us[i * rounds : (i + 1) * rounds] or (self.mean_us,) for i in range(models)]
        return list(zip(cut, self.traffic_bytes, strict=True))

    def without(self, traffic: Collection[int]) -> KernelRecord | None:
        """As it would be had it not been seen in models of that traffic; None where nothing is left."""
        seen = self.sightings
        kept = [(rounds, moved) for rounds, moved in seen if moved not in traffic]
        if len(kept) == len(seen):
            return self
        if not kept:
            return None
        means = [median(rounds) for rounds, _ in kept]
        mean = fmean(means)
        widest = max(*(max(rounds) - min(rounds) for rounds, _ in kept), max(means) - min(means))
        return replace(
            self,
            mean_us=mean,
            spread=widest / mean if mean > 0 else 0.0,
            bursts_us=tuple(us for rounds, _ in kept for us in rounds),
            traffic_bytes=tuple(moved for _, moved in kept),
            count=len(kept),
        )

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
            traffic_bytes=(*self.traffic_bytes, *other.traffic_bytes),
            count=count,
            provenance=self.provenance if self.provenance == other.provenance else "interpolated",
            conditions=_joined(self.conditions, other.conditions),
        )


def _joined(first: str | None, second: str | None) -> str | None:
    """What was special in either, each once."""
    if first == second or not second:
        return first
    return "; ".join(dict.fromkeys([*(first.split("; ") if first else ()), *second.split("; ")]))


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A whole model: what its kernels add up to beside what it really takes, for fitting and checking predictions.

    `key` is the digest of its structure, `family` that of the model that it is a variant of, `nodes` counts executed
    kernels, `integer_nodes` those that compute in integers, `weight_only` tells whether one unpacks weights,
    `working_bytes` is what one of these needs at most besides what it reads and writes,
    `reordered_bytes` are the weights that the runtime puts into its blocked layout, `traffic_bytes` what all kernels
    read and write in one run, `pace_us` what a fixed computation takes at the clock that the times refer to
    (all six None in older files), `memory_bytes` is None if it wasn't measured. `predicted_us` is what the profile
    predicts from other models' kernels, or predicted before this model was measured, with the share `foreseen` of it
    from kernels that it had measured.
    """

    __pydantic_config__ = _STRICT

    key: Text
    family: Text
    kernel_sum_us: NotNegative
    nodes: Count
    measured_us: Positive
    spread: NotNegative
    size_bytes: Whole
    activation_bytes: Whole
    reordered_bytes: Whole | None = None
    integer_nodes: Whole | None = None
    weight_only: Flag | None = None
    working_bytes: Whole | None = None
    traffic_bytes: Whole | None = None
    pace_us: Positive | None = None
    memory_bytes: Whole | None = None
    predicted_us: NotNegative | None = None
    foreseen: NotNegative | None = None
    bursts_us: Bursts = ()
    conditions: str | None = None


@dataclass(frozen=True, kw_only=True)
class CorrectionRecord:
    """What turns the sum of kernels into a whole model's latency, fitted on measured models.

    key            the family of models that it holds for, "any" if it holds for all
    coefficients   name of a term (such as "kernel_sum_us") -> its factor
    records        how many models it was fitted on
    error, worst_error, p95_error    |predicted - measured| / measured of models left out one by one: median, largest,
                   95th percentile; None where there were too few
    date           of the fit, as 2026-11-24
    """

    __pydantic_config__ = _STRICT

    key: Text
    coefficients: Mapping[Text, Real] = field(default_factory=dict)
    records: Whole
    error: NotNegative | None = None
    worst_error: NotNegative | None = None
    p95_error: NotNegative | None = None
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}")] | None = None


Record = KernelRecord | ModelRecord | CorrectionRecord
# What a line begins with; the value there is the record's key.
_KINDS: Mapping[str, type[Record]] = {"kernel": KernelRecord, "model": ModelRecord, "correction": CorrectionRecord}
_TAGS = {kind: tag for tag, kind in _KINDS.items()}
_ADAPTERS: Mapping[str, TypeAdapter[Record]] = {tag: TypeAdapter(kind) for tag, kind in _KINDS.items()}


def write_record(record: Record) -> str:
    """One measurement as a line of YAML whose value is JSON."""
    values = {k: v for k, v in asdict(record).items() if k != "key" and v is not None and v != ()}
    return "- " + json.dumps({_TAGS[type(record)]: record.key, **values}, ensure_ascii=False, allow_nan=False)


def lines_of(records: Iterable[Record]) -> str:
    return "".join(write_record(record) + "\n" for record in records)


def read_record(line: str, where: str) -> Record:
    """The reverse of `write_record`. Raises ProfileError that says what is wrong; `where` names file and line."""
    data = _json_object(line, where)
    tag = next((t for t in _KINDS if t in data), None)
    if tag is None:
        wanted = ", ".join(f"'{t}'" for t in _KINDS)
        raise ProfileError(f"{where}: a measurement needs a field of {wanted}, found {short(data)}; {_WAY_OUT}")
    if "key" in data:
        raise ProfileError(f"{where}: unknown field 'key' in a {tag} line, found {short(data['key'])}; {_WAY_OUT}")
    if tag == "kernel" and isinstance(data[tag], str):
        data[tag] = upgraded_key(data[tag])
    try:
        return _ADAPTERS[tag].validate_python({("key" if name == tag else name): v for name, v in data.items()})
    except ValidationError as error:
        raise ProfileError(f"{where}: {_problem(error, tag)}; {_WAY_OUT}") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    if not line.startswith("- "):
        raise ProfileError(f"{where}: a measurement line begins with '- {{', found {short(line)}; {_WAY_OUT}")
    try:
        data = _DECODER.decode(line[2:])
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{where}: the line can't be read ({error}); {_WAY_OUT}") from error
    if not isinstance(data, dict):
        raise ProfileError(f"{where}: a measurement is an object, found {short(data)}; {_WAY_OUT}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is given twice")
    return data


# One for all lines: `json.loads` with a hook makes a new one each time, which takes as long as reading the line.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique)

_WANTED = {
    "finite_number": "must be a finite number",
    "float_type": "must be a finite number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "greater_than": "must be greater than zero",
    "greater_than_equal": "must not be negative",
    "string_type": "must be a text",
    "string_too_short": "must be a text",
    "tuple_type": "must be a list of durations",
}


def _problem(error: ValidationError, tag: str) -> str:
    """The first thing wrong with a line, the value found included."""
    # An unknown field first: its name may be a known one's without the unit, which then counts as missing.
    first = min(error.errors(), key=lambda found: found["type"] != "unexpected_keyword_argument")
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"the field {tag if name == 'key' else name!r} is missing"
    if first["type"] == "unexpected_keyword_argument":
        known = [f.name for f in fields(_KINDS[tag]) if f.name.rpartition("_")[0] == name]
        way = f": its unit is missing, write {known[0]!r}" if known else ""
        return f"unknown field {name!r} in a {tag} line{way}, found {short(first['input'])}"
    wanted = _WANTED.get(first["type"], first["msg"])
    return f"{tag if name == 'key' else name} {wanted}, found {short(first['input'])}"
