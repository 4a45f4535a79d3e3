"""A device at hand: asks the measuring process (`probe.py`) and turns its answers into figures.

The process is started when it is first needed and ends with the `with` block, or when this program dies in any way, as
its stdin closes then.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import onnx
from onnx import helper

from automl_compress.core.result import Timing
from automl_compress.errors import DeviceError
from automl_compress.hardware.device.channel import Launcher, hold
from automl_compress.hardware.device.dialogue import LOCAL, SILENCE_S, Dialogue, Link, Notice
from automl_compress.hardware.device.executed import RawKernel, Trace, read_lowering, read_trace
from automl_compress.hardware.device.kernels import Lowered, kernels_of, live_bytes, structure_digest
from automl_compress.hardware.device.refusal import way_out
from automl_compress.hardware.device.timer import timing
from automl_compress.hardware.profile.host import HostFacts
from automl_compress.hardware.profile.profile import DeviceProfile

_FEW_BURSTS = 7
_REFUSES = "ONNXRuntimeError"  # in every message of a runtime that can't load or run a model


class Device:
    """The device of a profile, to be used in a `with` block.

    link        how it is reached (default: this machine)
    launch      starts the measuring process in the link's stead
    notice      gets what the person who waits should know, e.g. that another process holds the device
    requests    counts what was asked: "compare", "trace", "memory", "lower" (a trace whose times aren't kept),
                "optimize", "run", "facts"
    conditions  under which the latest measurement was made, see `hardware/measuring/conditions.py`

    Every method raises DeviceError, in one line, when the process dies, hangs, lacks the runtime, or the runtime
    refuses a model.

    `measures` is False for a stand-in that estimates (`hardware/prediction/estimated.py`).
    """

    measures = True

    def __init__(
        self,
        profile: DeviceProfile,
        *,
        link: Link = LOCAL,
        launch: Launcher | None = None,
        notice: Notice = lambda text: None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.profile = profile
        self.requests: Counter[str] = Counter()
        self.conditions: Mapping[str, Any] = {}
        self.link = replace(link, launch=launch) if launch else link
        self._dialogue = Dialogue(self.link, profile.header.settings(), notice, silence_s)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._held: IO[str] | None = None
        self._saved = 0
        self._empty_bytes: int | None = None
        self._lowered: dict[str, Lowered] = {}

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the measuring process and remove temporary files. Closing twice is harmless; the next use reopens it."""
        self._dialogue.end()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
            if self._held is not None:
                self._held.close()

    @property
    def folder(self) -> Path:
        """A folder for models to measure, removed by `close`."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="automl-compress-")
            self._held = hold(Path(self._folder.name))
        return Path(self._folder.name)

    @contextmanager
    def saved(self, model: onnx.ModelProto) -> Iterator[Path]:
        """A file of the model that the measuring process can read, for the time of a `with` block."""
        self._saved += 1
        path = self.folder / f"model{self._saved}.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def lowered(self, model: onnx.ModelProto) -> Lowered:
        """What the runtime executes for a model, without times; found once for each structure."""
        key = structure_digest(model)
        if key not in self._lowered:
            with self.saved(model) as path:
                raw = self.lower(path)
            self._lowered[key] = Lowered(
                key=key, kernels=tuple(kernels_of(model, raw)), activation_bytes=live_bytes(raw)
            )
        return self._lowered[key]

    def compare(
        self, models: Mapping[str, Path], *, bursts: int | None = None, pace_us: float | None = None
    ) -> dict[str, Timing]:
        """Latency of one sample for each model, measured in alternating bursts.

        The i-th values of all models were taken in the same turn, so `timer.ratio` cancels a drift. `bursts` per model
        defaults to the profile's protocol. With `pace_us`, times are as they would be at the clock at which the fixed
        computation takes that long (`measure.profile_pace_us`): comparable with a profile's.
        """
        if not models:
            return {}
        paths = {name: str(Path(path).absolute()) for name, path in models.items()}
        request = {"do": "compare", "models": paths, "bursts": bursts or self.profile.header.protocol.bursts}
        answer = self._ask("compare", request, "bursts_us", "runs", *(["pace_us"] if pace_us else []))
        slower = float(np.median(answer["pace_us"])) / pace_us if pace_us else 1.0
        bursts_us = {name: [us / slower for us in answer["bursts_us"][name]] for name in models}
        return {name: timing(bursts_us[name], answer["runs"][name]) for name in models}

    def trace(self, model: Path) -> Trace:
        """A model's kernels and the whole, timed in the protocol's rounds, in turns with a fixed computation."""
        request = {"do": "trace", "rounds": self.profile.header.protocol.trace_rounds}
        answer, graph = self._executed(request, model, "runs", "whole_us", "pace_us")
        return read_trace(answer, graph, discard=self.profile.header.protocol.discard)

    def lower(self, model: Path) -> list[RawKernel]:
        """The executed nodes in order, without times: two runs, which needn't wait for the device."""
        return read_lowering(*self._executed({"do": "lower"}, model))

    def memory_bytes(self, model: Path) -> int:
        """Peak resident memory of a fresh process that runs the model, above one that runs an empty model."""
        if self._empty_bytes is None:
            with self.saved(empty_model()) as path:
                self._empty_bytes = min(self._peak(path) for _ in range(3))
        return max(0, min(self._peak(model) for _ in range(2)) - self._empty_bytes)

    def savings(self, model: Path) -> tuple[dict[str, int], dict[str, Timing]]:
        """Way of running a model (see `weighing.savings`) -> peak memory in bytes, and latency where it has its own."""
        with self.saved(empty_model()) as empty:
            paths = {"model": str(Path(model).absolute()), "empty": str(empty)}
            fields = ("peak_bytes", "empty_bytes", "bursts_us", "runs")
            answer = self._ask("savings", {"do": "savings", **paths, "bursts": _FEW_BURSTS}, *fields)
        peaks = {way: max(0, peak - answer["empty_bytes"][way]) for way, peak in answer["peak_bytes"].items()}
        return peaks, {way: timing(bursts, answer["runs"][way]) for way, bursts in answer["bursts_us"].items()}

    def facts(self) -> HostFacts:
        """The machine with the runtime as the measuring process has it."""
        return HostFacts.from_answer(self._ask("facts", {"do": "facts"}, *HostFacts.REQUIRED))

    def _executed(
        self, request: Mapping[str, Any], model: Path, *fields: str
    ) -> tuple[dict[str, Any], onnx.GraphProto]:
        """The answer to a request about executed nodes, and the graph that the runtime made."""
        optimized = self.folder / "optimized.onnx"
        optimized.unlink(missing_ok=True)
        request = {**request, "model": str(Path(model).absolute()), "optimized": str(optimized)}
        answer = self._ask(request["do"], request, "kernels", "inputs", *fields)
        try:
            return answer, onnx.load(optimized, load_external_data=False).graph
        except Exception as error:  # onnx raises whatever its parser raises
            raise DeviceError(f"{model}: the runtime's optimized graph can't be read ({error})") from error

    def _peak(self, model: Path) -> int:
        answer = self._ask("memory", {"do": "memory", "model": str(Path(model).absolute())}, "peak_bytes")
        return int(answer["peak_bytes"])

    def optimized(self, model: Path) -> onnx.GraphProto:
        """The graph that the device's runtime makes of a model; large weights with their shapes, not their values."""
        path = self.folder / "optimized.onnx"
        self._ask("optimize", {"do": "optimize", "model": str(Path(model).absolute()), "optimized": str(path)})
        return onnx.load(path, load_external_data=False).graph

    def outputs(self, model: Path, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """What the device's runtime computes for `inputs`, in the graph's order, batch first."""
        given, found = self.folder / "inputs.npz", self.folder / "outputs.npz"
        np.savez(given, *inputs)
        paths = {"model": str(Path(model).absolute()), "inputs": str(given), "outputs": str(found)}
        self._ask("run", {"do": "run", **paths})
        with np.load(found, allow_pickle=False) as arrays:
            return tuple(arrays[f"arr_{i}"] for i in range(len(arrays.files)))

    def _ask(self, what: str, request: Mapping[str, Any], *fields: str) -> dict[str, Any]:
        self.requests[what] += 1
        try:
            answer = self._dialogue.ask(what, request, *fields)
        except DeviceError as error:
            models = [*request.get("models", {}).values(), *filter(None, [request.get("model")])]
            advice = way_out(map(Path, models)) if _REFUSES in str(error) else ""
            if not advice:
                raise
            raise DeviceError(f"{error} (the device's runtime refuses the model; {advice})") from error
        self.conditions = answer.get("conditions", self.conditions)
        return answer


def empty_model() -> onnx.ModelProto:
    """One Identity of one number: what the runtime takes without a model."""
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "empty", value[:1], value[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
