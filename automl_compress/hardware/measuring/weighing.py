"""Memory of fresh processes, and what lowers it.

A part of the measuring program (see `probe.py`), Python 3.9.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

from .bursts import in_turns
from .serve import Say, run_again
from .sessions import Settings, open_session, runner


def memory(request: dict[str, Any], settings: Settings, say: Say) -> dict[str, Any]:
    """Peak resident memory of a fresh process that loads the model and runs it, with the profile's environment."""
    return run_again(
        ["peak", json.dumps(settings), request["model"]], settings, say, settings.get("memory_environment")
    )


def savings(request: dict[str, Any], settings: Settings, say: Say) -> dict[str, Any]:
    """Peak memory of fresh processes, and latency in turns, for the ways of running a model that may need less memory.

    "default" is as the profile says. "no-prepacking": weights aren't copied into the kernels' layouts. "no-arena":
    memory is given back at once. "malloc-threshold": glibc gives large blocks back (an environment variable, so the
    latency is the default's). "ort-format": a file that the runtime doesn't have to optimize when it loads; left out
    where it can't read what it wrote, as with weights of 4 bits.
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
        }
        if _opens(ready, settings):
            ways["ort-format"] = (ready, settings, {})
        peaks: dict[str, dict[str, int]] = {"peak_bytes": {}, "empty_bytes": {}}
        for way, (path, chosen, environment) in ways.items():
            for name, target in (("peak_bytes", path), ("empty_bytes", empty)):
                variables = {**settings.get("memory_environment", {}), **environment}
                found = [run_again(["peak", json.dumps(chosen), target], settings, say, variables) for _ in "ab"]
                peaks[name][way] = min(int(f["peak_bytes"]) for f in found)
            say({"progress": f"weighed {way}"})
        runners = {way: runner(open_session(path, chosen)) for way, (path, chosen, env) in ways.items() if not env}
        return {**peaks, **in_turns(runners, int(request["bursts"]), settings, say)}


def _opens(path: str, settings: Settings) -> bool:
    try:
        open_session(path, settings)
    except Exception:  # whatever the runtime raises: this way of running the model isn't there
        return False
    return True


def peak_of(settings: Settings, path: str) -> int:
    # What takes 7 MB when it is first used must be there before, or it hides what opening the model took for a moment.
    import numpy as np

    np.random.default_rng(0)
    run = runner(open_session(path, settings))
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
