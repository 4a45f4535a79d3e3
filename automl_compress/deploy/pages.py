"""Pages from the templates that lie beside this file, written whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def fill(template: str, **values: Any) -> str:
    """A template of this folder as text. Values are escaped, and one that is missing raises."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("automl_compress", "deploy"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write_page(path: Path, text: str) -> Path:
    """Replace a text file as a whole; its path."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
    return path
