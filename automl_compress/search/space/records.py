"""What a search offers, as the run folder's `space.json` keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from automl_compress.search.space.space import SearchSpace
from automl_compress.techniques.quantization.formats import Executions


def space_record(space: SearchSpace, executions: Executions) -> dict[str, Any]:
    """Everything about the options that a trial's parameters are to be understood by, as plain values."""
    return {
        "options": {d.name: list(d.options) for d in space.decisions},
        "fixed": dict(space.fixed),
        "notes": list(space.notes),
        "importance": space.importance,
        "executions": [[kind, bits, how] for (kind, bits), how in sorted(executions.items())],
    }


def recorded_space(space: SearchSpace, record: Mapping[str, Any]) -> SearchSpace:
    """A space with the options that a record has."""
    options = record["options"]
    kept = (replace(d, options=tuple(options[d.name])) for d in space.decisions if d.name in options)
    return replace(space, decisions=tuple(kept), fixed=record["fixed"], notes=tuple(record["notes"]))
