"""`space`: what a search space gives each part of a network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from automl_compress.cli.action import Action
from automl_compress.cli.options import Debug, Json, Quiet, Task, Weights
from automl_compress.cli.output import display, print_result, stdout_to_stderr, table
from automl_compress.core.budget import format_metric
from automl_compress.search.campaign.options import Options

_MANY = 6
_WORDS = ("group", "sparsity", "block", "layer", "bits", "mask")

commands = typer.Typer()


@commands.command("space", help="Show what a search space gives each channel group, block and layer, and why.")
def _space(
    task: Task,
    space: Annotated[str, typer.Option(metavar="NAME", help="Search space: a name or a file.")] = Options.space,
    profile: Annotated[
        str, typer.Option(metavar="NAME", help="Device profile: a name or a file; 'none' drops nothing.")
    ] = Options.profile,
    budgets: Annotated[
        str, typer.Option(metavar="LIST", help="What a search would limit: latency, size, memory.")
    ] = "latency",
    weights: Weights = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> Action:
    def run(api: Any) -> int:
        with stdout_to_stderr(), display(quiet) as progress:
            api = api or import_module("automl_compress.search.campaign.overview")
            found = api.describe_space(
                task,
                space=space,
                profile=None if profile == "none" else profile,
                budgets=[name.strip() for name in budgets.split(",") if name.strip()],
                weights=weights,
                progress=progress,
            ).to_json()
        print_result(json.dumps(found, indent=2) if as_json else overview_text(found))
        return 0

    return Action(run=run, debug=debug)


def overview_text(found: Mapping[str, Any]) -> str:
    """An overview (`Overview.to_json`) to read."""
    parts = [
        [
            f"{found['network']} in space {found['space']}: {found['description']}".rstrip(": "),
            *_size_lines(found),
            *_cost_lines(found),
        ],
        ["rules:", *(_rule_text(rule) for rule in found["rules"])],
        [f"student width: {_options(found['width']['options'])}"],
        _section("channel groups", ("group", "channels", "sparsity", "rule"), map(_group_row, found["groups"])),
        _section("blocks", ("block", "layers", "may go", "rule"), map(_block_row, found["blocks"])),
        _section("layers", ("layer", "shape", "parameters", "bits", "rule", "mask"), map(_layer_row, found["layers"])),
        _lines("not offered:", _left_out(found)),
        _lines("left whole:", _left_whole(found["layers"])),
        _lines("worth knowing:", [note for note in found["notes"] if "not offered" not in note]),
        [f"warning: {warning}" for warning in found["warnings"]],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _size_lines(found: Mapping[str, Any]) -> list[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["decisions"].items())
    if not kinds:
        return ["  nothing to decide: every choice has a single option"]
    return [f"  {sum(found['decisions'].values())} decisions ({kinds}), 10^{found['plans_log10']:.1f} combinations"]


def _cost_lines(found: Mapping[str, Any]) -> list[str]:
    priced, limited = found["priced"], " and ".join(found["budgets"])
    if priced is None:
        return [f"  costs unknown, so that no option was dropped for them: {found['unpriced']}"]
    kernels = ", ".join(f"{count} {how}" for how, count in sorted(priced["kernels"].items(), reverse=True))
    ranges = ", ".join(
        f"{metric} {format_metric(metric, low)} to {format_metric(metric, priced['ceiling'][metric])}"
        for metric, low in priced["floor"].items()
    )
    return [
        f"  options as for a search that limits {limited}, by profile {priced['profile']} (kernels: {kernels})",
        f"  predicted, nothing was measured: {ranges} ({priced['provenance']})",
    ]


def _rule_text(rule: Mapping[str, Any]) -> str:
    decides = f"decides {rule['decides']} times" if rule["decides"] else "matches nothing here"
    return f"  {rule['number']}  {rule['text']}: {', '.join(rule['gives'])}; {decides}"


def _section(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    found = list(rows)
    text = table(headers, found, words=_WORDS) if found else "none"
    return [f"{title}:", *(f"  {line}" for line in text.splitlines())]


def _lines(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)] if lines else []


def _group_row(group: Mapping[str, Any]) -> tuple[object, ...]:
    choice = group["sparsity"]
    other = f" (or {', '.join(group['alternatives'])})" if group["alternatives"] else ""
    return group["name"] + other, group["channels"], _options(choice["options"], "all stay"), _rule(choice)


def _block_row(block: Mapping[str, Any]) -> tuple[object, ...]:
    choice = block["drop"]
    words = {(): "no", (False,): "no", (True,): "always", (False, True): "yes"}
    return block["name"], len(block["layers"]), words[tuple(choice["options"])], _rule(choice)


def _layer_row(layer: Mapping[str, Any]) -> tuple[object, ...]:
    shape = f"{layer['kind']} {layer['in_channels']}>{layer['out_channels']}"
    bits, mask = layer["bits"], layer["mask"]
    masks = f"{_options(mask['options'])} (rule {mask['rule']})" if mask["options"] else "-"
    return layer["name"], shape, layer["parameters"], _options(bits["options"], "32"), _rule(bits), masks


def _rule(choice: Mapping[str, Any]) -> str:
    return str(choice["rule"] or "-")


def _options(options: Sequence[Any], none: str = "-") -> str:
    text = ", ".join(f"{option:g}" if isinstance(option, float) else str(option) for option in options)
    return f"{text} only" if len(options) == 1 else text or none


def _left_out(found: Mapping[str, Any]) -> list[str]:
    """'conv1, conv2: 2 bits: reason' for everything that a rule names and that isn't offered."""
    choices = [("width", "width", found["width"])]
    choices += [(group["name"], "sparsity", group["sparsity"]) for group in found["groups"]]
    choices += [(layer["name"], what, layer[what]) for layer in found["layers"] for what in ("bits", "mask")]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for name, what, choice in choices:
        options: dict[str, list[str]] = {}
        for entry in choice["left_out"]:
            options.setdefault(entry["reason"], []).append(_options([entry["option"]]).removesuffix(" only"))
        for reason, values in options.items():
            reasons.setdefault((what, ", ".join(values), reason), []).append(name)
    lines = [f"{_names(names)}: {what} {values}: {reason}" for (what, values, reason), names in reasons.items()]
    return lines + [f"{block['name']}: {block['why_not']}" for block in found["blocks"] if block["why_not"]]


def _left_whole(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        for reason in layer["left_whole"]:
            reasons.setdefault(reason, []).append(layer["name"])
    return [f"{_names(names)}: {reason}" for reason, names in reasons.items()]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return ", ".join(names[:_MANY]) + more
