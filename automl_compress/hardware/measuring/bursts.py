"""Timing models and the nodes that the runtime executes for them.

A part of the measuring program (see `probe.py`), Python 3.9.

A burst is a number of consecutive runs of one model whose first part is discarded; models take turns burst by burst, so
that a drift of the machine hits all of them alike and each runs with the caches of its own burst. A trace takes turns
with a fixed computation that needs no memory to speak of: it tells a slower clock, and nothing else. Another model
would be slowed down by whoever uses the machine's memory or the core meanwhile, which says little about this one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from .conditions import interruptions
from .serve import Say
from .sessions import Settings, open_session, random_inputs, runner

SMALLEST_BURST = 3
# Parts of a burst are no shorter, so that reading the clock doesn't count.
_SHORTEST_PART_S = 1e-4
# What tells the processor's pace: 64 us on a fast one, so often that an interruption or a moment's clock doesn't count.
_FIXED_WORK = bytes(1 << 17)
_FIXED_REPEATS = 15


def burst_us(
    run: Callable[[], Any],
    runs: int,
    discard: float,
    clock: Callable[[], float] = time.perf_counter,
    interrupted: Callable[[], int] = interruptions,
) -> float:
    """Microseconds of one run in a burst whose first part (`discard` of `runs`) isn't counted.

    The rest is timed run by run, short ones several at a time, and the median counts: of those during which this
    process was not interrupted for another, or of all if there are none. Two processes that share a core take turns of
    a few milliseconds, so that a burst's mean may be double.
    """
    skipped = min(int(runs * discard), runs - 1)
    begun = clock()
    for _ in range(skipped):
        run()
    one = (clock() - begun) / max(skipped, 1)
    length = min(runs - skipped, math.ceil(_SHORTEST_PART_S / one)) if one > 0 and skipped else 1
    calm: list[float] = []
    others: list[float] = []
    for _ in range((runs - skipped) // length):
        before, start = interrupted(), clock()
        for _ in range(length):
            run()
        lasted = (clock() - start) / length
        (calm if interrupted() == before else others).append(lasted)
    return median(calm or others) * 1e6


def pace_us(clock: Callable[[], float] = time.perf_counter) -> float:
    """Microseconds that a fixed computation takes at the processor's present clock."""
    fastest = math.inf
    for _ in range(_FIXED_REPEATS):
        start = clock()
        hashlib.sha256(_FIXED_WORK).digest()
        fastest = min(fastest, clock() - start)
    return fastest * 1e6


def burst_length(one_run_s: float, settings: Settings) -> int:
    """How many runs a burst has: the protocol's number, fewer for a model so slow that a burst would take too long."""
    affordable = int(settings["burst_seconds"] / max(one_run_s, 1e-9))
    return max(SMALLEST_BURST, min(int(settings["burst_runs"]), affordable))


def compare(request: dict[str, Any], settings: Settings, say: Say) -> dict[str, Any]:
    """Bursts of several models taking turns. The order rotates, so that no model always follows the same one."""
    runners = {}
    for name, path in request["models"].items():
        runners[name] = runner(open_session(path, settings))
        say({"progress": f"loaded {name}"})
    return in_turns(runners, int(request["bursts"]), settings, say)


def in_turns(runners: dict[str, Callable[[], Any]], bursts: int, settings: Settings, say: Say) -> dict[str, Any]:
    lengths = {}
    for name in runners:
        runners[name]()
        lengths[name] = burst_length(_seconds(runners[name]), settings)
        burst_us(runners[name], min(int(settings["warm_up_runs"]), lengths[name]), 0.0)
        say({"progress": f"warmed up {name}"})
    names = list(runners)
    values: dict[str, list[float]] = {name: [] for name in names}
    pace = []
    for turn in range(bursts):
        pace.append(pace_us())
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            values[name].append(burst_us(runners[name], lengths[name], settings["discard"]))
            say({"progress": f"burst {turn + 1} of {name}"})
    return {"bursts_us": values, "runs": lengths, "pace_us": pace}


def lower(request: dict[str, Any], settings: Settings, _: Say) -> dict[str, Any]:
    """What the runtime executes, in order; two runs, whose times aren't worth keeping."""
    with _Profiled(request, settings) as profiled:
        profiled.run()
        profiled.run()
        return profiled.answer()


def trace(request: dict[str, Any], settings: Settings, say: Say) -> dict[str, Any]:
    """Every executed node with its duration in each run, and what the whole model takes without being profiled.

    A round is the fixed computation (`pace_us`), a burst of the model, and a burst of the model while it is profiled:
    the first shows a drift of the machine, the unprofiled burst what profiling adds to every node.
    """
    plain = runner(open_session(request["model"], settings))
    burst_us(plain, max(2, min(int(settings["warm_up_runs"]), _affordable(plain, settings))), 0.0)
    length = burst_length(_seconds(plain), settings)
    runs = max(SMALLEST_BURST, min(int(settings["trace_runs"]), length))
    whole, pace = [], []
    with _Profiled(request, settings) as profiled:
        for turn in range(int(request["rounds"])):
            pace.append(pace_us())
            whole.append(burst_us(plain, length, settings["discard"]))
            for _ in range(runs):
                profiled.run()
            say({"progress": f"round {turn + 1}"})
        return {**profiled.answer(), "runs": runs, "whole_us": whole, "pace_us": pace}


class _Profiled:
    """A session with the runtime's profiler on, in a `with` block.

    The graph that the runtime made is written to `optimized`: the profiler doesn't say what was fused into a node.
    """

    def __init__(self, request: dict[str, Any], settings: Settings) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="automl-compress-")
        self._session = open_session(
            request["model"],
            settings,
            enable_profiling=True,
            profile_file_prefix=os.path.join(self._folder.name, "events"),
            optimized_model_filepath=request["optimized"],
        )
        self._inputs = random_inputs(self._session)

    def __enter__(self) -> _Profiled:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def run(self) -> None:
        self._session.run(None, self._inputs)

    def answer(self) -> dict[str, Any]:
        with open(self._session.end_profiling(), encoding="utf-8") as file:
            events = json.load(file)
        kinds = {item.name: item.type[len("tensor(") : -1] for item in self._session.get_inputs()}
        inputs = {name: f"{kinds[name]}[{','.join(map(str, value.shape))}]" for name, value in self._inputs.items()}
        return {"kernels": executed_nodes(events), "inputs": inputs}


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _affordable(run: Callable[[], Any], settings: Settings) -> int:
    """How many runs fit into a burst's time, by a first run that is slower than later ones."""
    run()
    return int(settings["burst_seconds"] / max(_seconds(run), 1e-9))


def executed_nodes(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The profiler's events, gathered by node in the order of the first run.

    `us` are durations as the profiler gives them, cut off to whole microseconds; `steps` are the times from a node's
    start to the next node's start in the same run, `None` for the last one. Both ends of a step are cut off alike, so
    that a mean over runs is exact where a mean of durations is not.
    """
    nodes: dict[tuple[str, str, str], dict[str, Any]] = {}
    previous: tuple[dict[str, Any], int, int] | None = None
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        args = event["args"]
        name = event["name"][: -len("_kernel_time")]
        node = nodes.setdefault(
            (args["op_name"], name, args["node_index"]),
            {
                "op": args["op_name"],
                "name": name,
                "inputs": [_type_text(t) for t in args.get("input_type_shape", [])],
                "outputs": [_type_text(t) for t in args.get("output_type_shape", [])],
                "us": [],
                "steps": [],
            },
        )
        node["us"].append(event["dur"])
        run = len(node["us"])
        if previous is not None and previous[2] == run:
            previous[0]["steps"].append(event["ts"] - previous[1])
        elif previous is not None:
            previous[0]["steps"].append(None)
        previous = (node, event["ts"], run)
    if previous is not None:
        previous[0]["steps"].append(None)
    return list(nodes.values())


def _type_text(shape: dict[str, list[int]]) -> str:
    return ";".join(f"{kind}[{','.join(map(str, dims))}]" for kind, dims in shape.items())
