"""What the runtime really executes for a model: the profiler's events, completed from the graph that the runtime made.

The events give time, operator and shapes of each executed node, but neither its weights nor what was fused into it;
the optimized graph gives those, but no times. Both list the nodes in the order of execution.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from automl_compress.hardware.device.timer import burst_means, median_spread
from automl_compress.hardware.profile.migrate import UNSAID

# A kernel can't take less; what profiling adds to a node is known to about this.
SMALLEST_US = 0.05
_LAYOUT_DOMAIN = "com.microsoft.nchwc"
_CONV_ATTRIBUTES = ("kernel_shape", "strides", "pads", "dilations", "group", "auto_pad")
_WITHOUT_EFFECT = {"saturate", "auto_pad", "axis"}


@dataclass(frozen=True, kw_only=True)
class RawKernel:
    """One executed node. Types and shapes read 'float[1,16,32,32]'.

    inputs    of the values it reads, weights not included where the optimized graph tells them apart
    outputs   of the values it writes
    mean_us   the median of `bursts_us`, the trimmed means of its rounds; `samples` runs went into them. NaN untimed
    layout    "nchwc" if it works in the runtime's blocked layout, else ""
    detail    weights, attributes and fused operators as text; part of its key
    reads, writes, constants    names of values and of initializers in the optimized graph; empty where it is unknown
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    mean_us: float = math.nan
    samples: int = 0
    bursts_us: tuple[float, ...] = ()
    spread: float = 0.0
    layout: str = ""
    detail: str = ""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One model as it was measured: its executed nodes in order, and the whole, in microseconds for one sample.

    `whole_us` are the unprofiled bursts of the model, `pace_us` what a fixed computation took just before each;
    `samples` is how many runs of a round were profiled. What profiling added is taken off the kernels: they add up to
    the whole.
    """

    kernels: tuple[RawKernel, ...]
    whole_us: tuple[float, ...]
    pace_us: tuple[float, ...]

    def whole(self, pace_us: float | None) -> tuple[float, float, tuple[float, ...]]:
        """(median, spread, bursts) of the model; drift is divided out if it is known what the fixed computation takes
        where the profile's figures hold."""
        bursts = tuple(us / drift for us, drift in zip(self.whole_us, self.drift(pace_us), strict=True))
        return (*median_spread(bursts), bursts)

    def drift(self, pace_us: float | None) -> tuple[float, ...]:
        """How much slower than in the profile the machine was, round by round.

        A clock that drifts slows every round down as much as the computation before it; one that was low for a moment
        only one of them. So one drift for all rounds counts unless drifts by round make the rounds agree better.
        """
        if not pace_us:
            return (1.0,) * len(self.pace_us)
        by_round = tuple(us / pace_us for us in self.pace_us)
        common = (float(np.median(by_round)),) * len(by_round)

        def disagreement(drift: tuple[float, ...]) -> float:
            return median_spread([us / slower for us, slower in zip(self.whole_us, drift, strict=True)])[1]

        return min(common, by_round, key=disagreement)

    def timed(self, pace_us: float | None) -> list[RawKernel]:
        """The kernels with drift divided out of their times."""
        drift = self.drift(pace_us)
        timed = []
        for kernel in self.kernels:
            bursts = tuple(us / slower for us, slower in zip(kernel.bursts_us, drift, strict=True))
            median, spread = median_spread(bursts)
            timed.append(replace(kernel, mean_us=median, spread=spread, bursts_us=bursts))
        return timed


def read_trace(answer: Mapping[str, Any], optimized: onnx.GraphProto, *, discard: float) -> Trace:
    """What a `trace` request was answered with; `discard` is the part of each round that isn't counted."""
    rounds = len(answer["whole_us"])
    kernels = read_lowering(answer, optimized)
    steps = [_steps(event, rounds, discard) for event in answer["kernels"]]
    # What a round's steps are longer than the unprofiled model, spread over its nodes.
    added = [
        max(0.0, sum(step[turn] for step in steps) - whole) / len(steps)
        for turn, whole in enumerate(answer["whole_us"])
    ]
    timed = []
    for kernel, step in zip(kernels, steps, strict=True):
        bursts = tuple(max(SMALLEST_US, us - extra) for us, extra in zip(step, added, strict=True))
        median, spread = median_spread(bursts)
        samples = int(answer["runs"]) * rounds
        timed.append(replace(kernel, mean_us=median, spread=spread, bursts_us=bursts, samples=samples))
    return Trace(kernels=tuple(timed), whole_us=tuple(answer["whole_us"]), pace_us=tuple(answer["pace_us"]))


def read_lowering(answer: Mapping[str, Any], optimized: onnx.GraphProto) -> list[RawKernel]:
    """The executed nodes in order, without times. `answer` is the measuring process's."""
    events = answer["kernels"]
    constants = {item.name: _tensor_type(item) for item in optimized.initializer}
    types = dict(answer["inputs"])
    raw = []
    for event, node in zip(events, _align(events, optimized.node), strict=True):
        facts = _facts(node, constants, types) if node is not None else {}
        if node is not None:
            types.update(zip([o for o in node.output if o], event["outputs"], strict=False))
        raw.append(
            RawKernel(
                op=event["op"],
                name=event["name"],
                inputs=facts.pop("inputs", tuple(event["inputs"])),
                outputs=tuple(event["outputs"]),
                **facts,
            )
        )
    return raw


def _steps(event: Mapping[str, Any], rounds: int, discard: float) -> tuple[float, ...]:
    """Mean microseconds from a node's start to the next one's, round by round.

    The last node of a run has no next one: its duration, cut off to whole microseconds, counts half of one more.
    """
    values = [us + 0.5 if step is None else float(step) for us, step in zip(event["us"], event["steps"], strict=True)]
    return burst_means(values, rounds, discard)


def _align(events: Sequence[Mapping[str, Any]], nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto | None]:
    """The node of each event: by position where both lists agree, else by names that occur once."""
    if [(e["op"], e["name"]) for e in events] == [(n.op_type, n.name) for n in nodes]:
        return list(nodes)
    names = Counter((n.op_type, n.name) for n in nodes)
    unique = {(n.op_type, n.name): n for n in nodes if names[n.op_type, n.name] == 1}
    return [unique.get((e["op"], e["name"])) for e in events]


def _facts(node: onnx.NodeProto, constants: Mapping[str, str], types: Mapping[str, str]) -> dict[str, Any]:
    reads = tuple(i for i in node.input if i and i not in constants)
    return {
        "inputs": tuple(types.get(i, "?") for i in reads),
        "layout": "nchwc" if node.domain == _LAYOUT_DOMAIN else "",
        "detail": _detail(node, [constants[i] for i in node.input if i in constants], len(reads)),
        "reads": reads,
        "writes": tuple(o for o in node.output if o),
        "constants": tuple(i for i in node.input if i in constants),
    }


def _detail(node: onnx.NodeProto, constants: Sequence[str], reads: int) -> str:
    """Weights, geometry, other attributes, what was fused in: 'w float[16,16,3,3]|k3x3 s1x1 p1 g1|relu'."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type in _PLAIN}
    parts = ["w " + ",".join(c for c in constants if c.count(",") >= 1)] if any("," in c for c in constants) else []
    if "Conv" in node.op_type or "kernel_shape" in attributes:
        weight = next((c for c in constants if "," in c), "")
        attributes.setdefault("kernel_shape", _dimensions(weight)[2:])
        parts.append(_geometry(attributes))
    activation = _text(attributes.pop("activation", b""))
    told = {k: v for k, v in attributes.items() if k not in _CONV_ATTRIBUTES and k not in _WITHOUT_EFFECT}
    rest = [word for k, v in sorted(told.items()) if (word := f"{k}={_text(v)}") not in UNSAID]
    if rest:
        parts.append(" ".join(rest))
    if "Conv" in node.op_type and reads > 1:
        parts.append("+add")
    if activation:
        parts.append(activation.lower())
    return "|".join(parts)


_PLAIN = {
    onnx.AttributeProto.INT,
    onnx.AttributeProto.INTS,
    onnx.AttributeProto.FLOAT,
    onnx.AttributeProto.FLOATS,
    onnx.AttributeProto.STRING,
}


def _geometry(attributes: Mapping[str, Any]) -> str:
    """'k3x3 s1x1 p1 g1', with 'd2x2' where the kernel is dilated and the padding in full where its sides differ."""
    rank = len(attributes["kernel_shape"])
    strides, dilations = attributes.get("strides") or [1] * rank, attributes.get("dilations") or [1] * rank
    pads = attributes.get("pads") or [0] * 2 * rank
    auto = _text(attributes.get("auto_pad", b"NOTSET"))
    padding = "p" + (str(pads[0]) if len(set(pads)) == 1 else ",".join(map(str, pads)))
    parts = [
        "k" + "x".join(map(str, attributes["kernel_shape"])),
        "s" + "x".join(map(str, strides)),
        padding if auto == "NOTSET" else f"p{auto.lower()}",
        f"g{attributes.get('group', 1)}",
    ]
    if any(d != 1 for d in dilations):
        parts.append("d" + "x".join(map(str, dilations)))
    return " ".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int | str):
        return str(value)
    return ",".join(_text(v) for v in value)


def _dimensions(kind: str) -> list[int]:
    """'float[16,3,3,3]' -> [16, 3, 3, 3]."""
    return [int(d) for d in kind.partition("[")[2].rstrip("]").split(",") if d]


def _tensor_type(tensor: onnx.TensorProto) -> str:
    name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    return f"{name}[{','.join(map(str, tensor.dims))}]"
