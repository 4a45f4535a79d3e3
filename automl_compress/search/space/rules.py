"""Search space files: rules in YAML that say what may be done to which part of a network."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from automl_compress import data_files
from automl_compress.core.masks import NO_MASK, parse_mask
from automl_compress.errors import PlanError, SpaceError
from automl_compress.search.space.space_yaml import Document, complaint, read_document
from automl_compress.search.space.targets import Comparison, Operator, Target, TargetKind, known
from automl_compress.techniques.quantization.formats import BITS

Importance = Literal["l1", "l2", "batch-norm", "taylor", "fisher", "obs", "random"]
_GIVES = {"channel-group": ("sparsity",), "block": ("drop",), "layer": ("bits", "mask")}
_SIZES = ("channels", "parameters", "macs")
_SEXAGESIMAL = 60
_KERNEL = re.compile(r"\d+(?:x\d+){0,2}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _options(check: Callable[[Any], Any], what: str) -> BeforeValidator:
    """One value, or a list of at least one, each of which `check` accepts; it raises ValueError for any other."""

    def options(given: Any) -> Any:
        if isinstance(given, list) and not given:
            raise ValueError(f"{what}: the list is empty and offers nothing; give options, or remove the line")
        if isinstance(given, dict | list) and any(isinstance(v, dict | list) for v in given):
            raise ValueError(f"{what} must be a value or a list of values, found {str(given)[:80]!r}")
        return [check(value) for value in given] if isinstance(given, list) else check(given)

    return BeforeValidator(options)


def _number(what: str, good: Callable[[float], bool], wanted: str) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
            raise ValueError(f"{what} must be {wanted}, found {value!r}")
        return float(value)

    return check


def _bits(value: Any) -> int:
    if isinstance(value, bool) or value not in BITS:
        raise ValueError(f"bits must be of {', '.join(map(str, BITS))}, found {value!r}")
    return int(value)


def _mask(value: Any) -> str:
    """A mask as text. YAML reads an unquoted 2:4 as a number of minutes."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= _SEXAGESIMAL:
        kept, of = divmod(value, _SEXAGESIMAL)
        raise ValueError(f"write '{kept}:{of}' in quotes: YAML reads it as the number {value}")
    text = f"{value:g}" if isinstance(value, float) else value
    if not isinstance(text, str):
        raise ValueError(f"mask must be text such as none, 0.5 or '2:4', found {value!r}")
    if text != NO_MASK:
        try:
            parse_mask(text)
        except PlanError as error:
            raise ValueError(str(error)) from error
    return text


def _drop(value: Any) -> Any:
    if not isinstance(value, bool) and value != "always":
        raise ValueError(f"drop must be true (may go), false (stays) or always, found {value!r}")
    return value


def _comparison(value: Any) -> str:
    Comparison.parse(value)
    return str(value)


def _kernel(value: Any) -> str:
    """'3x3', or one number for all dimensions."""
    if isinstance(value, bool) or not _KERNEL.fullmatch(str(value)):
        raise ValueError(f"kernel must be a number or such as 3x3, found {value!r}")
    return str(value)


Sparsities = Annotated[
    list[float] | float,
    _options(_number("sparsity", lambda v: 0 <= v < 1, "a fraction from 0 to below 1"), "sparsity"),
]
StudentWidths = Annotated[
    list[float] | float, _options(_number("width", lambda v: 0 < v <= 1, "a fraction above 0, at most 1"), "width")
]
BitWidths = Annotated[list[int] | int, _options(_bits, "bits")]
Masks = Annotated[list[str] | str, _options(_mask, "mask")]
Size = Annotated[str, BeforeValidator(_comparison)]


class Match(_Strict):
    """What a rule applies to: all that is given must hold. `name` is a shell pattern, `regex` fits the whole name;
    `channels`, `parameters` and `macs` are comparisons such as '>=64'."""

    kind: TargetKind
    name: str | None = None
    regex: str | None = None
    operator: Operator | None = None
    kernel: Annotated[str, BeforeValidator(_kernel)] | None = None
    channels: Size | None = None
    parameters: Size | None = None
    macs: Size | None = None

    @model_validator(mode="after")
    def _check(self) -> Match:
        if self.name is not None and self.regex is not None:
            raise ValueError("give a name or a regex, not both")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(f"regex {self.regex!r} can't be read: {error}") from error
        if self.channels is not None and self.kind == "block":
            raise ValueError("a block has no number of channels: remove channels, or use parameters")
        if self.kernel is not None and self.operator == "linear":
            raise ValueError("a linear layer has no kernel: remove kernel or operator, nothing could match both")
        return self

    def fits(self, target: Target) -> bool:
        """Whether everything that is given holds for the target."""
        sizes = {what: getattr(self, what) for what in _SIZES}
        return (
            target.kind == self.kind
            and (self.name is None or fnmatchcase(target.name, self.name))
            and (self.regex is None or re.fullmatch(self.regex, target.name) is not None)
            and (self.operator is None or target.runs(self.operator))
            and (self.kernel is None or target.has_kernel([int(side) for side in self.kernel.split("x")]))
            and all(Comparison.parse(text)(target.figure(what)) for what, text in sizes.items() if text is not None)
        )


class Rule(_Strict):
    """What is offered where. `optional` (presets only) lets a rule match nothing."""

    match: Match
    sparsity: Sparsities | None = None
    drop: Annotated[bool | Literal["always"], BeforeValidator(_drop)] | None = None
    bits: BitWidths | None = None
    mask: Masks | None = None
    optional: bool = False

    @model_validator(mode="after")
    def _check(self) -> Rule:
        gives = _GIVES[self.match.kind]
        found = [name for names in _GIVES.values() for name in names if getattr(self, name) is not None]
        if not found or not set(found) <= set(gives):
            wanted = " or ".join(repr(name) for name in gives)
            raise ValueError(f"a rule for a {self.match.kind} gives {wanted} only, found {found or 'nothing'}")
        return self

    @property
    def gives(self) -> tuple[str, ...]:
        """What the rule decides about: 'sparsity', 'drop', 'bits', 'mask'."""
        return tuple(name for name in _GIVES[self.match.kind] if getattr(self, name) is not None)

    @property
    def text(self) -> str:
        """The rule's conditions in one line."""
        return ", ".join(f"{k}: {v}" for k, v in self.match.model_dump(exclude_none=True).items())


def _rules(given: Any) -> Any:
    if isinstance(given, list | tuple) and not given:
        raise ValueError("rules: the list is empty, so that nothing could be decided; add a rule, or use a preset")
    return given


class SpaceFile(_Strict):
    """A search space as written. `width` is a list of student widths, or one number that leaves no choice."""

    name: str
    description: str = ""
    importance: Importance = "l2"
    width: StudentWidths = Field(default_factory=lambda: [1.0])
    rules: Annotated[tuple[Rule, ...], BeforeValidator(_rules)]
    _lines: tuple[int, ...] = PrivateAttr(default=())

    def set_lines(self, document: Document) -> None:
        """Remember where each rule stands."""
        self._lines = tuple(document.lines["rules", index] for index in range(len(self.rules)))

    def named(self, index: int) -> str:
        """A rule as errors call it: its number, its line where it was read from a file, its conditions."""
        line = f"line {self._lines[index]}; " if index < len(self._lines) else ""
        return f"rule {index + 1} ({line}{self.rules[index].text})"

    @property
    def widths(self) -> tuple[float, ...]:
        """Descending; all of the network (1.0) is always among them unless one number was given."""
        if not isinstance(self.width, list):
            return (self.width,)
        return tuple(sorted({1.0, *self.width}, reverse=True))


def load_space(name_or_path: str | Path) -> SpaceFile:
    """Read a preset by its name, or a file. Raises SpaceError that names the field that is wrong.

    Only the shipped presets may hold rules that are `optional`: they have to suit networks that lack what is matched.
    """
    preset = data_files.find("search_spaces", str(name_or_path))
    path = preset or Path(name_or_path)
    if not path.is_file():
        known = ", ".join(data_files.names("search_spaces")) or "none"
        raise SpaceError(f"no search space {str(name_or_path)!r}: give a file or one of the presets ({known})")
    document = read_document(path)
    data = document.data
    if not isinstance(data, dict):
        raise SpaceError(f"search space {path} must be a mapping with 'name' and 'rules', found {type(data).__name__}")
    try:
        space = SpaceFile.model_validate(data)
    except ValidationError as error:
        raise SpaceError(complaint(document, error, _FIELDS)) from error
    space.set_lines(document)
    optional = next((i for i, rule in enumerate(space.rules) if rule.optional), None)
    if preset is None and optional is not None:
        where = document.where(("rules", optional, "optional"))
        raise SpaceError(f"{where}: 'optional' is for presets; remove it, and the rules that match nothing")
    return space


_FIELDS = {"space": tuple(SpaceFile.model_fields), "rule": tuple(Rule.model_fields), "match": tuple(Match.model_fields)}


def check_unused(space: SpaceFile, used: set[int], targets: tuple[Target, ...], gone: set[str]) -> None:
    """Raise SpaceError for the first rule that decided about nothing. `used` are the indices of those that did, `gone`
    the names of what is always removed."""
    for index, rule in enumerate(space.rules):
        if index in used or rule.optional:
            continue
        said = f"space {space.name}: {space.named(index)}"
        matched = [target for target in targets if rule.match.fits(target)]
        if not matched:
            names = known(targets, rule.match.kind, rule.match.name)
            raise SpaceError(f"{said} matches nothing; {names}")
        left = [target for target in matched if target.name not in gone]
        if not left:
            raise SpaceError(
                f"{said} contradicts another rule: {matched[0].name} is in a block that always goes; remove one of them"
            )
        raise SpaceError(
            f"{said} never decides: earlier rules match all of its targets ({left[0].name}, ...); put it first or "
            f"remove it"
        )
