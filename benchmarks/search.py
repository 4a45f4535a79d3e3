"""How good are the models that a search finds, by evaluations, against optima that are known, and when delivered?

Parts: a quality by evaluations, b regret, c delivered models, d own costs, e budgets kept, f the cached evaluations
against the product's. Whatever is finished is kept below --cache, a line an item: the same command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import search_budgets
import search_costs
import search_delivered
import search_evaluations
import search_regret
import torch
from search_evaluator import Lines
from search_laboratory import CACHE, Laboratory, open_laboratory

from automl_compress.progress import Progress, make_progress

Rows = list[dict[str, Any]]
PARTS = {"a": "by_evaluations", "b": "regret", "c": "delivered", "d": "own_costs", "e": "budgets", "f": "evaluator"}


def main() -> None:
    options = common.parser(__doc__.split("\n")[0], data=True, weights=True)
    options.add_argument("--parts", default=",".join(PARTS), help=f"to run, of {','.join(PARTS)} (default: all)")
    options.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help=f"what is kept (default: {CACHE})")
    options.add_argument("--profile", default="local", help="device profile (default: local)")
    options.add_argument("--methods", nargs="*", default=list(search_evaluations.METHODS), help="of part a")
    options.add_argument("--budgets", nargs="*", type=float, default=list(search_evaluations.SHARES), metavar="SHARE")
    options.add_argument(
        "--evaluations", nargs="*", type=int, default=list(search_evaluations.COUNTS), help="of part a"
    )
    options.add_argument("--minutes", type=float, help="after which parts a and c begin no further search or model")
    options.add_argument("--seeds", type=int, help="of part a (default 5; 1 with --quick)")
    options.add_argument("--epochs", nargs="*", type=float, default=[3, 10], help="of part c (default: 3 10)")
    options.add_argument(
        "--ladder",
        type=float,
        metavar="EPOCHS",
        help="of part c: for how long a training plans are chosen (default: its own)",
    )
    options.add_argument("--routes", nargs="*", default=list(search_delivered.ALL_ROUTES), help="of part c")
    options.add_argument(
        "--steps",
        nargs="*",
        choices=search_delivered.STEPS,
        default=list(search_delivered.STEPS),
        help="of part c: models trains, the others measure and want an idle core (default: all)",
    )
    options.add_argument("--runs", type=int, help="of part e (default 20; 2 with --quick)")
    given = options.parse_args()
    parts = [part for part in given.parts.split(",") if part]
    if unknown := sorted(set(parts) - set(PARTS)):
        options.error(f"unknown parts {', '.join(unknown)}: use {','.join(PARTS)}")
    torch.set_num_threads(1)
    figures: dict[str, Rows] = {}
    with make_progress(sys.stderr) as progress:
        if {"a", "c", "f"} & set(parts):
            with open_laboratory(
                given.data, given.weights, cache=given.cache, profile=given.profile, progress=progress
            ) as laboratory:
                figures |= with_laboratory(laboratory, given, parts, progress)
        if "b" in parts:
            figures["regret"] = regret(given, progress)
        if "d" in parts:
            figures["own_costs"] = own_costs(given, progress)
        if "e" in parts:
            runs = given.runs or (2 if given.quick else search_budgets.RUNS)
            figures["budgets"] = search_budgets.run(given.cache, runs=runs, profile=given.profile, progress=progress)
    write(given.json, figures, quick=given.quick)


def with_laboratory(
    laboratory: Laboratory, given: argparse.Namespace, parts: Sequence[str], progress: Progress
) -> dict[str, Rows]:
    """The parts about ResNet-20."""
    figures: dict[str, Rows] = {}
    shares = given.budgets[: 1 if given.quick else None]
    counts = given.evaluations[: 1 if given.quick else None]
    deadline = time.monotonic() + 60 * given.minutes if given.minutes else None
    seeds = given.seeds or (1 if given.quick else 5)
    if "a" in parts:
        figures["by_evaluations"] = search_evaluations.run(
            laboratory,
            given.cache,
            methods=given.methods,
            shares=shares,
            counts=counts,
            seeds=seeds,
            deadline=deadline,
            progress=progress,
        )
    if "f" in parts:
        figures["evaluator"] = search_evaluations.fidelity(laboratory, given.cache, progress=progress)
    if "c" in parts:
        figures["delivered"] = search_delivered.run(
            laboratory,
            given.cache,
            shares=shares,
            epochs=[0.5] if given.quick else given.epochs,
            routes=given.routes,
            ladder=given.ladder,
            seeds=seeds,
            steps=given.steps,
            deadline=deadline,
            progress=progress,
        )
    return figures


def regret(given: argparse.Namespace, progress: Progress) -> Rows:
    """Part b, a size at a time."""
    sizes, seeds = search_regret.SIZES[: 2 if given.quick else None], 1 if given.quick else 3
    progress.stage("regret where the optimum is known", len(sizes))
    done, rows = Lines(given.cache / "regret.jsonl"), []
    for size in sizes:
        key = f"{size} decisions, {seeds} seeds {search_evaluations.code_version()}"
        if key not in done.known:
            done.add(key, search_regret.run(sizes=[size], seeds=seeds))
        rows += done.known[key]
        progress.advance()
    return rows


def own_costs(given: argparse.Namespace, progress: Progress) -> Rows:
    """Part d: proposals of each size, then the share of a run."""
    os.environ |= {"AC_DATA_DIR": str(given.data), "AC_WEIGHTS_DIR": str(given.weights)}
    trials, done = 10 if given.quick else 100, Lines(given.cache / "costs.jsonl")
    items: dict[str, Callable[[], Rows]] = {
        f"{size} decisions": partial(search_costs.proposals, sizes=[size]) for size in search_costs.SIZES
    }
    items[f"share of {trials} trials"] = lambda: [search_costs.share(trials=trials, epochs=1.0)]
    progress.stage("what the search itself costs", len(items))
    for name, measure in items.items():
        key = f"{name} {search_evaluations.code_version()}"
        if key not in done.known:
            done.add(key, measure())
        progress.advance()
    return [row for name in items for row in done.known[f"{name} {search_evaluations.code_version()}"]]


def write(path: Path | None, figures: Mapping[str, Rows], *, quick: bool) -> None:
    """Print every part's rows; with a path, write them there with the facts of the machine as well."""
    for part, rows in figures.items():
        print(f"\n{part}")
        for row in rows:
            print("  ".join(f"{k} {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in row.items()))
    if path is not None:
        facts = {"benchmark": "search", "quick": quick, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        path.write_text(json.dumps({**facts, "machine": common.machine(), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
