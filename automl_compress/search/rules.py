"""Search space files: rules in YAML that say what may be done to which part of a network."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from automl_compress import data_files
from automl_compress.core.graph import Graph
from automl_compress.core.masks import NO_MASK, parse_mask
from automl_compress.errors import PlanError, SpaceError

TargetKind = Literal["channel-group", "block", "layer"]
Operator = Literal["conv", "linear"]
Importance = Literal["l1", "l2", "batch-norm", "taylor", "fisher", "obs", "random"]
_GIVES = {"channel-group": ("sparsity",), "block": ("drop",), "layer": ("bits", "mask")}
_SEXAGESIMAL = 60


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that a rule can match. `channels`: a group's size, a layer's output channels; 0 for a block."""

    kind: TargetKind
    name: str
    channels: int = 0
    operators: tuple[str, ...] = ()

    @property
    def operator(self) -> str:
        return self.operators[0]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Sparsity = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[float, Field(gt=0, le=1)]
Bits = Annotated[int, Field(ge=1, le=32)]


def _mask(value: object) -> object:
    """A mask as text. YAML reads an unquoted 2:4 as a number of minutes."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= _SEXAGESIMAL:
        kept, of = divmod(value, _SEXAGESIMAL)
        raise ValueError(f"write '{kept}:{of}' in quotes: YAML reads it as the number {value}")
    text = f"{value:g}" if isinstance(value, float) else value
    if isinstance(text, str) and text != NO_MASK:
        try:
            parse_mask(text)
        except PlanError as error:
            raise ValueError(str(error)) from error
    return text


MaskText = Annotated[str, BeforeValidator(_mask)]


class Match(_Strict):
    """What a rule applies to: all that is given must hold. `name` is a shell pattern, `regex` fits the whole name."""

    kind: TargetKind
    name: str | None = None
    regex: str | None = None
    operator: Operator | None = None
    min_channels: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Match:
        if self.name is not None and self.regex is not None:
            raise ValueError("give a name or a regex, not both")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(f"regex {self.regex!r} can't be read: {error}") from error
        if self.min_channels is not None and self.kind == "block":
            raise ValueError("a block has no number of channels: remove min_channels")
        return self


class Rule(_Strict):
    """What is offered where. `optional` (presets only) lets a rule match nothing."""

    match: Match
    sparsity: list[Sparsity] | Sparsity | None = None
    drop: bool | Literal["always"] | None = None
    bits: list[Bits] | Bits | None = None
    mask: list[MaskText] | MaskText | None = None
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

    def matches(self, target: Target) -> bool:
        match = self.match
        return (
            target.kind == match.kind
            and (match.name is None or fnmatchcase(target.name, match.name))
            and (match.regex is None or re.fullmatch(match.regex, target.name) is not None)
            and (match.operator is None or target.operators == (match.operator,))
            and (match.min_channels is None or target.channels >= match.min_channels)
        )

    @property
    def text(self) -> str:
        """The rule's conditions in one line."""
        return ", ".join(f"{k}: {v}" for k, v in self.match.model_dump(exclude_none=True).items())


class SpaceFile(_Strict):
    """A search space as written. `width` is a list of student widths, or one number that leaves no choice."""

    name: str
    description: str = ""
    importance: Importance = "l2"
    width: list[Width] | Width = Field(default_factory=lambda: [1.0])
    rules: tuple[Rule, ...] = Field(min_length=1)

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
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpaceError(f"search space {path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise SpaceError(f"search space {path} must be a mapping with 'name' and 'rules', found {type(data).__name__}")
    try:
        space = SpaceFile.model_validate(data)
    except ValidationError as error:
        raise SpaceError(f"search space {path}: {_first_problem(error)}") from error
    if preset is None and any(rule.optional for rule in space.rules):
        raise SpaceError(f"search space {path}: 'optional' is for presets; remove the rules that match nothing")
    return space


def targets_of(graph: Graph) -> tuple[Target, ...]:
    """Everything that a rule can match: channel groups, then blocks, then layers."""
    groups = [
        Target(kind="channel-group", name=g.name, channels=g.size, operators=_operators(graph, g.producers))
        for g in graph.groups
    ]
    blocks = [
        Target(kind="block", name=b.name, operators=_operators(graph, b.layers))
        for b in graph.blocks
        if b.ending == "zeros"
    ]
    layers = [
        Target(kind="layer", name=layer.name, channels=layer.out_channels, operators=(layer.kind,))
        for layer in graph.layers
    ]
    return (*groups, *blocks, *layers)


def _operators(graph: Graph, layers: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({graph.layer[name].kind for name in layers}))


def check_unused(space: SpaceFile, used: set[int], targets: tuple[Target, ...]) -> None:
    """Raise SpaceError for the first rule that decided about nothing. `used` are the indices of those that did."""
    for index, rule in enumerate(space.rules):
        if index in used or rule.optional:
            continue
        shadowed = [t for t in targets if rule.matches(t)]
        if shadowed:
            raise SpaceError(
                f"space {space.name}: rule {index + 1} ({rule.text}) never decides: earlier rules match all of its "
                f"targets ({shadowed[0].name}, ...); put it first or remove it"
            )
        names = [t.name for t in targets if t.kind == rule.match.kind]
        some = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "none"
        raise SpaceError(
            f"space {space.name}: rule {index + 1} ({rule.text}) matches nothing; "
            f"the network's {rule.match.kind}s: {some}"
        )


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    where = ".".join(str(part + 1 if isinstance(part, int) else part) for part in first["loc"]) or "the file"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {first['msg'].removeprefix('Value error, ')}, found {str(first['input'])[:80]!r}{more}"
