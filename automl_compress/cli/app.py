"""All commands together. They read options, call `automl_compress.api` or a stage below, and print; no logic here.

A new group of commands is a module with a `commands` of its own, and a line in `GROUPS`: with a name it is called as
`automl-compress NAME COMMAND`, without one its commands stand beside `search`.

Exit codes: 0 met and verified, 1 error, 2 usage or bad input, 3 no feasible model, 4 met by estimate only, 130
interrupted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from automl_compress.cli import devices, profile, rebudget, recover, search, space
from automl_compress.cli.action import Action, guarded
from automl_compress.cli.output import PROG, fail
from automl_compress.errors import InputError

GROUPS: tuple[tuple[str | None, typer.Typer], ...] = (
    (None, search.commands),
    (None, rebudget.commands),
    (None, profile.commands),
    (None, space.commands),
    (None, recover.commands),
    ("devices", devices.commands),
)

_SEVERAL = ("--profile",)

app = typer.Typer(
    name=PROG,
    help="Compress a trained PyTorch network until it meets a budget that is measured on the device.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit codes: 0 met and verified, 1 error, 2 usage or bad input, 3 no feasible model, 4 met by estimate only "
        "(the device is not here), 130 interrupted."
    ),
)
for _name, _group in GROUPS:
    app.add_typer(_group, name=_name)


def _print_version(value: bool) -> None:
    if value:
        from automl_compress import __version__

        typer.echo(f"{PROG} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


_command = typer.main.get_command(app)


def main(argv: Sequence[str] | None = None, *, api: Any = None) -> int:
    """Run one command line and return its exit code. `api` stands in for `automl_compress.api` (tests)."""
    given = Counter(word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv))
    twice = [word for word, n in given.items() if n > 1 and word.startswith("--") and word not in _SEVERAL]
    if twice:
        return fail(f"{twice[0]} is given twice: which of them holds? give it once", InputError.exit_code)
    try:
        action = _command.main(args=None if argv is None else list(argv), prog_name=PROG, standalone_mode=False)
    except typer.TyperException as error:
        return fail(f"{' '.join(error.format_message().split())} (see {PROG} --help)", error.exit_code)
    return guarded(action, api) if isinstance(action, Action) else int(action or 0)
