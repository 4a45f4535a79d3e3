"""All commands together. They read options, call `automl_compress.api` or a stage below, and print; no logic here.

A new group of commands is a module with a `commands` of its own, and a line in `GROUPS`: with a name it is called as
`automl-compress NAME COMMAND`, without one its commands stand beside `search`.

Exit codes: 0 met and verified, 1 error, 2 usage or bad input, 3 no feasible model, 4 met by estimate only, 130
interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import takewhile
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
    twice = _given_twice(sys.argv[1:] if argv is None else argv)
    if twice is not None:
        return fail(f"{twice} is given twice: which of them holds? give it once", InputError.exit_code)
    try:
        action = _command.main(args=None if argv is None else list(argv), prog_name=PROG, standalone_mode=False)
    except typer.TyperException as error:
        return fail(f"{' '.join(error.format_message().split())} (see {PROG} --help)", error.exit_code)
    return guarded(action, api) if isinstance(action, Action) else int(action or 0)


def _given_twice(argv: Sequence[str]) -> str | None:
    """The first option, by its longest spelling, that stands there more than once and takes one value."""
    command: Any = _command
    given: set[str] = set()
    for word in takewhile(lambda word: word != "--", argv):
        command = getattr(command, "commands", {}).get(word, command)
        for option in command.params:
            if word.partition("=")[0] not in option.opts or getattr(option, "multiple", False):
                continue
            if option.name in given:
                return str(max(option.opts, key=len))
            given.add(option.name)
    return None
