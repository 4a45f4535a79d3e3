"""Where the data that travels with the program lies: in the source checkout, or inside the installed package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["hardware_profiles", "search_spaces"]
_PACKAGE = Path(__file__).parent
_SUFFIX = ".yaml"


def folders(kind: Kind) -> tuple[Path, ...]:
    """The folders that exist: the installed package's own, else the source checkout's."""
    places = (_PACKAGE / "data" / kind, _PACKAGE.parent / kind)
    return tuple(place for place in places if place.is_dir())[:1]


def find(kind: Kind, name: str) -> Path | None:
    """The file of a preset called `name` (without its suffix), or None if there is none."""
    if name in names(kind):
        return next(path for folder in folders(kind) if (path := folder / (name + _SUFFIX)).is_file())
    return None


def names(kind: Kind) -> tuple[str, ...]:
    """The names of all presets, sorted; empty if the data folder is missing."""
    return tuple(sorted({path.stem for folder in folders(kind) for path in folder.glob("*" + _SUFFIX)}))
