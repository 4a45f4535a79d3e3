"""`devices`: listing, showing, checking, comparing and merging device profiles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from automl_compress.cli.action import Action
from automl_compress.cli.options import Debug, Json
from automl_compress.cli.output import fail, print_result, table
from automl_compress.errors import CompressError, InputError

Profile = Annotated[str, typer.Argument(metavar="NAME", help="A profile: a name that `list` shows, or a file.")]
_BAD_INPUT = 2
_FEW = 10

commands = typer.Typer(help="Device profiles: list, show, check, compare, merge.")


@commands.command("list", help="List the profiles there are.")
def _list(as_json: Json = False, debug: Debug = False) -> Action:
    def run(_api: Any) -> int:
        from automl_compress.hardware.profile.catalog import entries

        found = [entry.to_json() for entry in entries()]
        if as_json:
            print_result(json.dumps(found, indent=2))
            return 0
        columns = ("name", "device", "runtime", "threads", "kernels", "models", "kind", "origin")
        rows = [[_cell(row[c]) for c in columns] + ["yes" if row["matches"] else "no"] for row in found]
        print_result(table([*columns, "this machine"], rows))
        for row in found:
            if row["problem"]:
                fail(row["problem"], _BAD_INPUT)
        return 0

    return Action(run=run, debug=debug)


@commands.command("show", help="Show a profile and how far to trust it.")
def _show(profile: Profile, as_json: Json = False, debug: Debug = False) -> Action:
    def run(_api: Any) -> int:
        from automl_compress.hardware.profile.catalog import find
        from automl_compress.hardware.profile.insight import overview

        found = overview(find(profile))
        print_result(json.dumps(found, indent=2) if as_json else _overview_text(found))
        return 0

    return Action(run=run, debug=debug)


@commands.command("check", help="Check files; exit code 2 if one is bad.")
def _check(
    files: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names that `list` shows, or files.")],
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="Rewrite files of an older version; the original is kept beside.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Action:
    def run(_api: Any) -> int:
        found = [_checked(name, upgrade) for name in files]
        if as_json:
            print_result(json.dumps(found, indent=2))
        for one in found if not as_json else ():
            lines = [f"{one['error'] or one['file'] + ': good'}", *(f"  warning: {line}" for line in one["warnings"])]
            lines += [f"  brought up to date; the original is {one['upgraded']}"] if one["upgraded"] else []
            print_result("\n".join(lines))
        return _BAD_INPUT if any(one["error"] for one in found) else 0

    return Action(run=run, debug=debug)


@commands.command("diff", help="Compare two profiles.")
def _diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A profile's name or file.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    as_json: Json = False,
    debug: Debug = False,
) -> Action:
    def run(_api: Any) -> int:
        from automl_compress.hardware.profile.catalog import find
        from automl_compress.hardware.profile.insight import difference

        found = difference(find(first), find(second))
        print_result(json.dumps(found, indent=2) if as_json else _difference_text(found))
        return 0

    return Action(run=run, debug=debug)


@commands.command("merge", help="Put profiles of one device into one file.")
def _merge(
    files: Annotated[list[str], typer.Argument(metavar="A [B...]", help="Profiles' names or files.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The file to write.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The name in its header, instead of A's.")] = None,
    description: Annotated[str | None, typer.Option(metavar="TEXT", help="One sentence, instead of A's.")] = None,
    compact: Annotated[bool, typer.Option("--compact", help="One line for each kernel; raw values are kept.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Action:
    def run(_api: Any) -> int:
        from automl_compress.hardware.profile.catalog import find
        from automl_compress.hardware.profile.merge import merge
        from automl_compress.hardware.profile.profile import DeviceProfile

        sources = [find(file) for file in files]
        notes = merge(sources, output, name=name, description=description, compact=compact)
        merged = DeviceProfile(output)
        found = {
            "file": str(output),
            "from": [str(source.path) for source in sources],
            "kernels": len(merged.kernels),
            "models": len(merged.models),
            "notes": notes,
        }
        text = f"{output}: {found['kernels']} kernels, {found['models']} whole models"
        print_result(json.dumps(found, indent=2) if as_json else "\n".join([text, *(f"  {note}" for note in notes)]))
        return 0

    return Action(run=run, debug=debug)


def _checked(name: str, upgrade: bool) -> dict[str, Any]:
    """What `check` says of one file."""
    from automl_compress.hardware.profile.catalog import entry, path_of
    from automl_compress.hardware.profile.insight import warnings

    result: dict[str, Any] = {
        "file": name,
        "good": False,
        "kind": None,
        "warnings": [],
        "error": None,
        "upgraded": None,
    }
    try:
        found = entry(path_of(name))
        result |= {"file": str(found.file), "kind": found.kind}
        if found.problem:
            raise InputError(found.problem)
        if found.profile and upgrade:
            original = found.profile.upgrade()
            result["upgraded"] = str(original) if original else None
        return result | {"good": True, "warnings": warnings(found.profile) if found.profile else []}
    except CompressError as error:
        return result | {"error": str(error)}


def _overview_text(found: Mapping[str, Any]) -> str:
    header = found["header"]
    match, runtime = header["match"], header["runtime"]
    lines = [
        f"{header['name']}: {header['description']}",
        f"  file        {found['file']} (version {found['version']})",
        f"  figures     {header['provenance']}",
        f"  device      {match['cpu']}, {match['architecture']}, {match['cores']} cores",
        f"  runtime     {runtime['name']} {runtime['version']}, {runtime['provider']}, {runtime['threads']} threads",
        f"  measured    {found['kernels']} kernels, {found['models']} whole models, {found['weighed']} of them weighed",
    ]
    for kind, rules in header["operators"].items():
        told = ", ".join(_operator_text(bits, rule) for bits, rule in rules.items())
        lines.append(f"  {kind:<11} {told}")
    lines += _roofline_lines(header["roofline"]) if header["roofline"] else []
    lines += [f"  source      {source}" for source in header["sources"]]
    lines += [_correction_text(fit) for fit in found["corrections"]]
    for title, kernels in (("slowest", found["slowest"]), ("not to be trusted", found["untrusted"])):
        if kernels:
            some = f", the first {_FEW} of {len(kernels)}" if len(kernels) > _FEW else ""
            rows = [[f"{k['mean_us']:.1f}", f"{k['spread']:.1%}", k["count"], k["kernel"]] for k in kernels[:_FEW]]
            lines += ["", f"{title}{some}:", table(["us", "spread", "seen", "kernel"], rows)]
    lines += ["", *(f"warning: {line}" for line in found["warnings"])] if found["warnings"] else []
    return "\n".join(lines)


def _roofline_lines(roofline: Mapping[str, Any]) -> list[str]:
    peaks = ", ".join(f"{bits} bits {gops:g} Gop/s" for bits, gops in roofline["peak_gops"].items())
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in roofline["efficiency"].items())
    return [
        f"  roofline    {peaks}; {roofline['bandwidth_gbps']:g} GB/s; {roofline['overhead_us']:g} us a kernel",
        f"  efficiency  {shares or 'all of the peak'}",
    ]


def _operator_text(bits: str | int, rule: Mapping[str, Any]) -> str:
    aligned = f", channels by {rule['alignment']}" if rule["alignment"] else ""
    return f"{bits} bits {rule['execution']}{aligned}"


def _correction_text(fit: Mapping[str, Any]) -> str:
    terms = ", ".join(f"{name} {value:.4g}" for name, value in fit["coefficients"].items())
    errors = [f"{told} {fit[f'{name}error']:.1%}" for told, name in _ERRORS.items() if fit[f"{name}error"] is not None]
    checked = f"error on models left out: {', '.join(errors)}" if errors else "not checked on models left out"
    return f"  correction  {fit['family']}: {terms}; {fit['records']} models; {checked}"


_ERRORS = {"median": "", "95 %": "p95_", "worst": "worst_"}


def _difference_text(found: Mapping[str, Any]) -> str:
    lines = [f"{a} against {b}" for a, b in [found["files"]]]
    lines += [f"  {name}: {_cell(a)} / {_cell(b)}" for name, (a, b) in found["header"].items()]
    for what in ("kernels", "models"):
        part = found[what]
        lines.append(
            f"{what}: {part['common']} in both, {part['only_first']} only in the first, "
            f"{part['only_second']} only in the second"
        )
        if part["ratio"]:
            ratio = part["ratio"]
            lines.append(
                f"  second / first: {ratio['median']:.3f} (median), 5 to 95 %: {ratio['p5']:.3f} to {ratio['p95']:.3f}"
            )
        lines += _outlier_lines(part["outliers"])
    return "\n".join(lines)


def _outlier_lines(outliers: Sequence[Mapping[str, Any]]) -> list[str]:
    if not outliers:
        return []
    rows = [[f"{o['first_us']:.1f}", f"{o['second_us']:.1f}", o["key"]] for o in outliers[:_FEW]]
    return [
        f"  {len(outliers)} are a tenth or more away from the median:",
        table(["first us", "second us", "key"], rows),
    ]


def _cell(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
