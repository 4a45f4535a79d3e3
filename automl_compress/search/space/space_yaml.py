"""Reading a search space file so that whatever is wrong with it can be said with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from automl_compress.errors import SpaceError

Place = tuple[str | int, ...]
_MOST_NODES = 100_000
_QUOTES = "; comparisons need quotes: parameters: '>10000'"


@dataclass(frozen=True, kw_only=True)
class Document:
    """A YAML file's plain data, and the line (from 1) of each value and key by its path, as in ('rules', 0, 'bits')."""

    path: Path
    data: Any
    lines: Mapping[Place, int] = field(default_factory=dict)

    def where(self, place: Sequence[str | int]) -> str:
        """'FILE, line 7' for the place, or for the nearest one around it that was written."""
        found = tuple(place)
        while found not in self.lines and found:
            found = found[:-1]
        return f"search space {self.path}, line {self.lines.get(found, 1)}"


def read_document(path: Path) -> Document:
    """Safe YAML only. Raises SpaceError, with the line, for what isn't YAML and for a key that is written twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpaceError(f"search space {path} can't be read: {' '.join(str(error).split())}") from error
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines: dict[Place, int] = {}
        if node is not None:
            _walk(node, (), lines, path, [])
        data = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join((error.problem or str(error)).split())
        hint = _QUOTES if re.search(r"chomping|indentation indicator", problem) else ""
        raise SpaceError(f"search space {path}{line} can't be read: {problem}{hint}") from error
    except yaml.YAMLError as error:
        raise SpaceError(f"search space {path} can't be read: {' '.join(str(error).split())}") from error
    except (RecursionError, ValueError) as error:
        raise SpaceError(
            f"search space {path} can't be read: it is nested too deeply, or a value is no value"
        ) from error
    return Document(path=path, data=data, lines=lines)


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path, around: list[yaml.Node]) -> None:
    """Note the line of every value; refuse what refers to itself, and keys that stand twice."""
    lines.setdefault(place, node.start_mark.line + 1)
    if any(node is outer for outer in around) or len(lines) > _MOST_NODES:
        raise SpaceError(f"search space {path}, line {node.start_mark.line + 1}: an alias refers to what contains it")
    around = [*around, node]
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _walk(child, (*place, index), lines, path, around)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            inside, line = (*place, str(key.value)), key.start_mark.line + 1
            if inside in lines:
                twice = f"{inside[-1]!r} is given twice, first in line {lines[inside]}; keep one"
                raise SpaceError(f"search space {path}, line {line}: {twice}")
            lines[inside] = line
            _walk(child, inside, lines, path, around)


def complaint(document: Document, error: ValidationError, fields: Mapping[str, Sequence[str]]) -> str:
    """The first problem in one line: where, what is wrong, what was found, and the way out.

    fields  'space', 'rule', 'match' -> the names that may be written there
    """
    problems = error.errors(include_url=False)
    # An unknown name explains the missing ones: it goes first.
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    place = tuple(part for part in first["loc"] if (isinstance(part, int) or part.isidentifier()))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{document.where(place)}: {_said(first, place, fields)}{more}"


def _said(problem: Mapping[str, Any], place: Place, fields: Mapping[str, Sequence[str]]) -> str:
    name = next((str(part) for part in reversed(place) if isinstance(part, str)), "the file")
    rule = f"rule {int(place[1]) + 1}: " if len(place) > 1 and place[0] == "rules" else ""
    inside = "match" if "match" in place[:-1] else "rule" if rule else "space"
    found = str(problem["input"])[:80]
    match problem["type"]:
        case "extra_forbidden":
            return f"{rule}unknown field {name!r}; {_nearest(name, inside, fields)}"
        case "missing":
            return f"{rule}{name!r} is missing; a {inside} has {', '.join(fields[inside])}"
        case "literal_error":
            expected = str(problem["ctx"]["expected"])
            near = get_close_matches(found, re.findall(r"'([^']*)'", expected), n=1)
            return f"{rule}{name} must be {expected}, found {found!r}" + (
                f"; did you mean {near[0]!r}?" if near else ""
            )
        case "value_error":
            return rule + str(problem["msg"]).removeprefix("Value error, ")
        case _:
            return f"{rule}{name}: {problem['msg']}, found {found!r}"


def _nearest(name: str, inside: str, fields: Mapping[str, Sequence[str]]) -> str:
    """Where a field with that name, or one much like it, is to be found."""
    for place in (inside, *(other for other in fields if other != inside)):
        near = get_close_matches(name, fields[place], n=1, cutoff=0.6)
        if near and place == inside:
            return f"did you mean {near[0]!r}?"
        if near:
            return f"{near[0]!r} belongs to the {place}"
    return f"a {inside} has {', '.join(fields[inside])}"
