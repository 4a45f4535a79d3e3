"""The shape of the package: who may import whom, and what no module may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

import automl_compress

PACKAGE = Path(automl_compress.__file__).parent
NAME = PACKAGE.name
# A module imports from its own rank or a lower one.
RANKS = (
    ("errors",),
    ("core", "data_files", "progress"),
    ("hardware",),
    ("model",),
    ("techniques",),
    ("deploy",),
    ("recovery",),
    ("search",),
    ("api",),
    ("cli",),
    ("__init__", "__main__"),
)
# The folders of a stage, in the same way.
FOLDERS = {
    "hardware": ("measuring", "profile", "device", "prediction"),
    "search": ("space", "evaluation", "table", "solvers", "sampling", "campaign", "ladder", "delivery"),
}
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
HEAVY = {"torch", "onnxruntime", "optuna"}
WITHOUT_HEAVY = {"errors", "core", "data_files", "progress", "cli", "__init__", "__main__"}
UNPICKLING = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _stage(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules and names that a file imports, wherever in the file."""
    package = (NAME, *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _keyword(call: ast.Call, name: str) -> object:
    values = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


@pytest.fixture(params=MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def module(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_every_module_belongs_to_a_stage(module: Path) -> None:
    assert _stage(module) in RANK, "give the new stage its place in RANKS"


def test_imports_point_downward(module: Path) -> None:
    own = RANK[_stage(module)]
    for name in _imports(module):
        head, *rest = name.split(".")
        if head == NAME and rest != ["__version__"]:
            assert rest, f"{name}: import from the module that defines it"
            target = rest[0] if rest[0] in RANK else "__init__"
            assert RANK[target] <= own, f"{_stage(module)} imports {name}, which lies above it"


def test_imports_between_folders_point_downward(module: Path) -> None:
    stage, *rest = module.relative_to(PACKAGE).parts
    if stage in FOLDERS and len(rest) > 1:
        for name in _imports(module):
            parts = name.split(".")
            if parts[:2] == [NAME, stage]:
                own, other = (FOLDERS[stage].index(folder) for folder in (rest[0], parts[2]))
                assert other <= own, f"{rest[0]} imports {name}, which lies above it"


def test_light_modules_import_nothing_heavy(module: Path) -> None:
    if _stage(module) in WITHOUT_HEAVY:
        assert not HEAVY.intersection(name.split(".")[0] for name in _imports(module))


def test_nothing_unpickles_or_runs_what_a_file_says(module: Path) -> None:
    assert not UNPICKLING.intersection(name.split(".")[0] for name in _imports(module))
    for function, call in _calls(module):
        where = f"{module.name}:{call.lineno}: {function}"
        assert function not in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}, where
        assert _keyword(call, "allow_pickle") is not True, where
        if function == "torch.load":
            assert _keyword(call, "weights_only") is True, f"{where} without weights_only=True"


def test_importing_the_package_or_the_command_line_loads_nothing_heavy() -> None:
    code = (
        f"import sys, {NAME}.cli; print(sorted({HEAVY | {'pydantic', 'plotly', 'onnx', 'scipy'}!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    assert {name: getattr(automl_compress, name).__name__ for name in automl_compress.__all__} == {
        name: name for name in automl_compress.__all__
    }
    with pytest.raises(AttributeError, match="no_such_name"):
        automl_compress.no_such_name  # noqa: B018


def test_the_package_is_marked_as_typed() -> None:
    assert resources.files(NAME).joinpath("py.typed").is_file()
