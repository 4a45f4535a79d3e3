"""The program that measures, alone in its own process: it needs only Python, numpy and onnxruntime.

One JSON request a line on stdin, one JSON answer a line on stdout (`{"progress": ...}` lines may come before it, so
that the other side can tell slow from dead). It ends when stdin closes, even in the middle of a measurement.

    {"do": "facts"}
    {"do": "compare", "models": {name: path}, "bursts": 15}          -> {"bursts_us": {name: [...]}, "runs": {name: n}}
    {"do": "lower", "model": path, "optimized": path}                -> {"kernels": [...], "inputs": {name: type}}
    {"do": "trace", "model": path, "optimized": path, "rounds": 3}
                                     -> the same, and {"runs": n, "whole_us": [...], "pace_us": [...]}, one a round
    {"do": "memory", "model": path}                                  -> {"peak_bytes": n}, from a fresh process
    {"do": "savings", "model": path, "empty": path, "bursts": 5}
                            -> {"peak_bytes": {way: n}, "empty_bytes": {way: n}, "bursts_us": {way: [...]}, "runs": ...}
    {"do": "optimize", "model": path, "optimized": path}             -> {}
    {"do": "run", "model": path, "inputs": path, "outputs": path}    -> {}
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any

from .bursts import compare, lower, trace
from .conditions import Watch, pin, pinned_cores
from .machine import machine_facts
from .serve import Say, in_one_line, serve
from .serve import turn as device_turn
from .sessions import Settings, open_session
from .weighing import memory, peak_of, savings


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
