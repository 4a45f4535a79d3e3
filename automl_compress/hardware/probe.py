"""The program that measures, alone in its own process: it needs only Python, numpy and onnxruntime.

One JSON request a line on stdin, one JSON answer a line on stdout (`{"progress": ...}` lines may come before it, so
that the other side can tell slow from dead). It ends when stdin closes, even in the middle of a measurement.

    {"do": "facts"}
    {"do": "compare", "models": {name: path}, "bursts": 15}          -> {"bursts_us": {name: [...]}, "runs": {name: n}}
    {"do": "lower", "model": path, "optimized": path}                -> {"kernels": [...], "inputs": {name: type}}
    {"do": "trace", "model": path, "optimized": path, "reference": path, "rounds": 3}
                                     -> the same, and {"runs": n, "whole_us": [...], "reference_us": [...]}, one a round
    {"do": "memory", "model": path}                                  -> {"peak_bytes": n}, from a fresh process
    {"do": "savings", "model": path, "empty": path, "bursts": 5}
                            -> {"peak_bytes": {way: n}, "empty_bytes": {way: n}, "bursts_us": {way: [...]}, "runs": ...}
    {"do": "optimize", "model": path, "optimized": path}             -> {}
    {"do": "run", "model": path, "inputs": path, "outputs": path}    -> {}

A burst is a number of consecutive runs of one model whose first part is discarded; models take turns burst by burst, so
that a drift of the machine hits all of them alike and each runs with the caches of its own burst.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from .conditions import Watch, pin, pinned_cores
from .machine import machine_facts
from .serve import Say, in_one_line, run_again, serve
from .serve import turn as device_turn

SMALLEST_BURST = 3
OPTIMIZATION = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_FLOATS = {"float": "float32", "float16": "float16", "double": "float64"}
_OTHERS = {"bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"}

Settings = dict[str, Any]


def burst_us(
    run: Callable[[], Any], runs: int, discard: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Mean microseconds of one run over a burst whose first part (`discard` of `runs`) isn't counted."""
    skipped = min(int(runs * discard), runs - 1)
    for _ in range(skipped):
        run()
    start = clock()
    for _ in range(runs - skipped):
        run()
    return (clock() - start) * 1e6 / (runs - skipped)


def burst_length(one_run_s: float, settings: Settings) -> int:
    """How many runs a burst has: the protocol's number, fewer for a model so slow that a burst would take too long."""
    affordable = int(settings["burst_seconds"] / max(one_run_s, 1e-9))
    return max(SMALLEST_BURST, min(int(settings["burst_runs"]), affordable))


def open_session(path: str, settings: Settings, *, whole: bool = False, **options: Any) -> Any:
    """An onnxruntime session with the profile's threads and optimizations.

    The settings' "session" and "entries" are further options and configuration entries. With `whole`, an optimized
    model that is written holds its weights.
    """
    import onnxruntime as ort

    if not os.path.exists(path):
        raise FileNotFoundError(f"no such model: {path}")
    so = ort.SessionOptions()
    so.intra_op_num_threads = int(settings["threads"])
    so.inter_op_num_threads = 1
    so.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    so.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMIZATION[settings["optimization"]])
    so.log_severity_level = 4
    options = {**settings.get("session", {}), **options}
    for name, value in options.items():
        setattr(so, name, value)
    for name, value in settings.get("entries", {}).items():
        so.add_session_config_entry(name, value)
    if "optimized_model_filepath" in options and not whole:
        # Weights go to a file of their own, which nobody reads: what is asked for is the graph.
        prefix = "session.optimized_model_external_initializers"
        so.add_session_config_entry(f"{prefix}_file_name", "weights.bin")
        so.add_session_config_entry(f"{prefix}_min_size_in_bytes", "1024")
    chosen = (settings["provider"], dict(settings.get("provider_options") or {}))
    return ort.InferenceSession(path, so, providers=[chosen])


def random_inputs(session: Any) -> dict[str, Any]:
    """One sample for every input: normal floats, zeros for other types; free dimensions are 1."""
    import numpy as np

    generator, inputs = np.random.default_rng(0), {}
    for item in session.get_inputs():
        shape = [d if isinstance(d, int) and d > 0 else 1 for d in item.shape]
        kind = item.type[len("tensor(") : -1]
        if kind in _FLOATS:
            inputs[item.name] = generator.standard_normal(shape).astype(_FLOATS[kind])
        elif kind in _OTHERS:
            inputs[item.name] = np.zeros(shape, dtype=kind)
        else:
            raise TypeError(f"input {item.name!r} has type {item.type}, which can't be filled with data")
    return inputs


def compare(request: dict[str, Any], settings: Settings, say: Say) -> dict[str, Any]:
    """Bursts of several models taking turns. The order rotates, so that no model always follows the same one."""
    runners = {}
    for name, path in request["models"].items():
        runners[name] = _runner(open_session(path, settings))
        say({"progress": f"loaded {name}"})
    return _in_turns(runners, int(request["bursts"]), settings, say)


def _in_turns(runners: dict[str, Callable[[], Any]], bursts: int, settings: Settings, say: Say) -> dict[str, Any]:
    lengths = {}
    for name in runners:
        runners[name]()
        lengths[name] = burst_length(_seconds(runners[name]), settings)
        burst_us(runners[name], min(int(settings["warm_up_runs"]), lengths[name]), 0.0)
        say({"progress": f"warmed up {name}"})
    names = list(runners)
    values: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(bursts):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            values[name].append(burst_us(runners[name], lengths[name], settings["discard"]))
            say({"progress": f"burst {turn + 1} of {name}"})
    return {"bursts_us": values, "runs": lengths}


def lower(request: dict[str, Any], settings: Settings, _: Say) -> dict[str, Any]:
    """What the runtime executes, in order; two runs, whose times aren't worth keeping."""
    with _Profiled(request, settings) as profiled:
        profiled.run()
        profiled.run()
        return profiled.answer()


def trace(request: dict[str, Any], settings: Settings, say: Say) -> dict[str, Any]:
    """Every executed node with its duration in each run, and what the whole model takes without being profiled.

    A round is a burst of the reference, a burst of the model, and a burst of the model while it is profiled: the
    reference shows a drift of the machine, the unprofiled burst what profiling adds to every node.
    """
    plain = _runner(open_session(request["model"], settings))
    reference = (
        plain if request["reference"] == request["model"] else _runner(open_session(request["reference"], settings))
    )
    for run in (plain, reference):
        burst_us(run, max(2, min(int(settings["warm_up_runs"]), _affordable(run, settings))), 0.0)
    lengths = {run: burst_length(_seconds(run), settings) for run in (plain, reference)}
    runs = max(SMALLEST_BURST, min(int(settings["trace_runs"]), lengths[plain]))
    whole, beside = [], []
    with _Profiled(request, settings) as profiled:
        for turn in range(int(request["rounds"])):
            beside.append(burst_us(reference, lengths[reference], settings["discard"]))
            whole.append(burst_us(plain, lengths[plain], settings["discard"]))
            for _ in range(runs):
                profiled.run()
            say({"progress": f"round {turn + 1}"})
        return {**profiled.answer(), "runs": runs, "whole_us": whole, "reference_us": beside}


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


def memory(request: dict[str, Any], settings: Settings, say: Say) -> dict[str, Any]:
    """Peak resident memory of a fresh process that loads the model and runs it."""
    return run_again(["peak", json.dumps(settings), request["model"]], settings, say)


def savings(request: dict[str, Any], settings: Settings, say: Say) -> dict[str, Any]:
    """Peak memory of fresh processes, and latency in turns, for the ways of running a model that may need less memory.

    "default" is as the profile says. "no-prepacking": weights aren't copied into the kernels' layouts. "no-arena":
    memory is given back at once. "malloc-threshold": glibc gives large blocks back (an environment variable, so the
    latency is the default's). "ort-format": a file that the runtime doesn't have to optimize when it loads.
    """
    with tempfile.TemporaryDirectory(prefix="automl-compress-") as folder:
        model, empty = request["model"], request["empty"]
        ready = os.path.join(folder, "model.ort")
        save = {**settings, "entries": {"session.save_model_format": "ORT"}}
        open_session(model, save, optimized_model_filepath=ready, whole=True)
        ways: dict[str, tuple[str, Settings, dict[str, str]]] = {
            "default": (model, settings, {}),
            "no-prepacking": (model, {**settings, "entries": {"session.disable_prepacking": "1"}}, {}),
            "no-arena": (model, {**settings, "session": {"enable_cpu_mem_arena": False}}, {}),
            "malloc-threshold": (model, settings, {"MALLOC_MMAP_THRESHOLD_": "65536"}),
            "ort-format": (ready, settings, {}),
        }
        peaks: dict[str, dict[str, int]] = {"peak_bytes": {}, "empty_bytes": {}}
        for way, (path, chosen, environment) in ways.items():
            for name, target in (("peak_bytes", path), ("empty_bytes", empty)):
                found = [run_again(["peak", json.dumps(chosen), target], settings, say, environment) for _ in "ab"]
                peaks[name][way] = min(int(f["peak_bytes"]) for f in found)
            say({"progress": f"weighed {way}"})
        runners = {way: _runner(open_session(path, chosen)) for way, (path, chosen, env) in ways.items() if not env}
        return {**peaks, **_in_turns(runners, int(request["bursts"]), settings, say)}


def peak_of(settings: Settings, path: str) -> int:
    run = _runner(open_session(path, settings))
    for _ in range(3):
        run()
    return peak_bytes()


def peak_bytes() -> int:
    """Peak resident set of this process."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            # Not getrusage: Linux hands its ru_maxrss down from the process that started this one.
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        return _windows_peak_bytes()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _windows_peak_bytes() -> int:
    import psutil

    return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009 (absent from the types elsewhere)


def facts(_: dict[str, Any], settings: Settings, __: Say) -> dict[str, Any]:
    """What this machine is (`machine.machine_facts`), and what the runtime says of itself."""
    import onnxruntime as ort

    offered = ort.get_available_providers()
    if settings.get("provider", offered[0]) not in offered:
        raise RuntimeError(f"onnxruntime here has no {settings['provider']}; it offers {', '.join(offered)}")
    version = sys.version.split()[0]
    return {
        **machine_facts(),
        "onnxruntime": ort.__version__,
        "providers": offered,
        "python": version,
        "pinned": pinned_cores(),
    }


def optimize(request: dict[str, Any], settings: Settings, _: Say) -> dict[str, Any]:
    """The graph that the runtime makes of a model, written to `optimized`."""
    open_session(request["model"], settings, optimized_model_filepath=request["optimized"])
    return {}


def run(request: dict[str, Any], settings: Settings, _: Say) -> dict[str, Any]:
    """The model's outputs for what is in the file `inputs`, written to the file `outputs`; in the graph's order."""
    import numpy as np

    session = open_session(request["model"], settings)
    with np.load(request["inputs"], allow_pickle=False) as given:
        values = {item.name: given[f"arr_{i}"] for i, item in enumerate(session.get_inputs())}
    np.savez(request["outputs"], *session.run(None, values))
    return {}


def _runner(session: Any) -> Callable[[], Any]:
    inputs = random_inputs(session)
    return lambda: session.run(None, inputs)


def _type_text(shape: dict[str, list[int]]) -> str:
    return ";".join(f"{kind}[{','.join(map(str, dims))}]" for kind, dims in shape.items())


ACTIONS = {
    "facts": facts,
    "compare": compare,
    "lower": lower,
    "trace": trace,
    "memory": memory,
    "savings": savings,
    "optimize": optimize,
    "run": run,
}
MEASURING = {"compare", "trace", "memory", "savings"}


def answer(request: dict[str, Any], settings: Settings, say: Say) -> dict[str, Any]:
    """Do what one request asks; a failure becomes an answer with one line of text.

    A measurement waits for its turn and is answered with its `conditions` (see `conditions.py`); one whose times aren't
    kept (`"exclusive": false`) needs neither.
    """
    measuring = request["do"] in MEASURING and request.get("exclusive", True)
    try:
        with device_turn(say) if measuring else nullcontext():
            watch = Watch(pinned_cores()) if measuring else None
            found = {"ok": True, **ACTIONS[request["do"]](request, settings, say)}
            return {**found, "conditions": watch.report()} if watch else found
    except Exception as error:  # whatever the runtime raises has to reach the other side as an answer
        return {"ok": False, "error": in_one_line(error)}


def answer_pinned(request: dict[str, Any], settings: Settings, say: Say) -> dict[str, Any]:
    """`answer`, on as many cores as the settings have threads."""
    if len(pinned_cores()) > int(settings.get("threads", len(pinned_cores()))):
        pin(int(settings["threads"]))
    return answer(request, settings, say)


def main(arguments: list[str]) -> None:
    if arguments[1] == "peak":
        print(json.dumps({"peak_bytes": peak_of(json.loads(arguments[2]), arguments[3])}))
    else:
        serve(arguments[0], arguments[1], answer_pinned)
