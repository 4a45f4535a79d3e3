"""What the documentation points at is there: pages, sections, files of the package, options of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from automl_compress.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for folder in (".", "*s") for path in ROOT.glob(f"{folder}/*.md"))
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As GitHub names headings: lower case, spaces as hyphens, other punctuation left out."""
    headings = _HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, section = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not section or section in anchors(there), target


def test_the_map_of_the_code_names_every_module() -> None:
    package = ROOT / "automl_compress"
    modules = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert mapped((ROOT / "docs" / "code.md").read_text(encoding="utf-8")) - {"automl_compress/__init__.py"} == modules


def mapped(text: str) -> set[str]:
    """Paths of the modules in the map, whose folders are told by indentation."""
    found, folders = set[str](), list[str]()
    for line in text.split("```")[1].strip().splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        folders[len(indent) // 2 :] = [name.rstrip("/")]
        if name.endswith(".py"):
            found.add("/".join(folders))
    return found


def test_options_that_are_explained_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--help"]) == 0
    offered = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    rows = re.findall(r"^\| (`--.*?) \|", (ROOT / "docs" / "budgets.md").read_text(encoding="utf-8"), re.MULTILINE)
    explained = {option for row in rows for option in re.findall(r"--[a-z][a-z-]+", row)}
    assert explained
    assert explained <= offered
