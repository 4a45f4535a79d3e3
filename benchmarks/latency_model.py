"""How well is the latency of plans predicted that nobody measured?

For each network the device is profiled from nothing; then random plans over width, blocks and bit-widths, none of which
was seen when anything was fitted, are predicted and measured in alternating bursts. Beside it two references:
layers that are timed alone and added up, and multiply-adds scaled to the mean of what was measured.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import networks
import numpy as np
import onnx
import torch
from onnx import helper
from scipy.stats import spearmanr

from automl_compress.core.plan import Plan
from automl_compress.deploy.sketcher import value_shapes
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.prediction.measure import profile_pace_us
from automl_compress.hardware.profile.profile import load_profile
from automl_compress.model.task import Task, load_task, prepare
from automl_compress.model.trace import trace
from automl_compress.progress import make_progress
from automl_compress.search.space.space import load_space
from automl_compress.search.table.forecast import PROFILE, Forecast
from automl_compress.search.table.pricing import random_plan
from automl_compress.search.table.profiling import forecast_of, profile_network
from automl_compress.techniques.onnx_graph import LAYER_OPERATORS, GraphView, layer_of
from automl_compress.techniques.quantization.calibrate import activation_tensors
from automl_compress.techniques.quantization.rewrite import quantize

SPACES = {"encoder": "transformer"}
_TURN = 7
# Where a session's memory lies, and who else uses the caches in that minute, is worth a percent or more: each plan is
# measured in sessions that are as far apart as measuring all others once.
_SESSIONS = 3
_SESSION_BURSTS = 9
_ISOLATED_TURN = 60
_ISOLATED_BURSTS = 5
_SPEED_PLANS = 1000


def main() -> None:
    options = common.parser(__doc__.split("\n")[0])
    names = list(networks.NETWORKS)
    options.add_argument("--networks", nargs="*", default=names, choices=names, help="of benchmarks/networks.py")
    options.add_argument("--task", nargs="*", default=[], metavar="TASK", help="further ones: path/task.py[:function]")
    options.add_argument("--space", help="search space (default: cnn; transformer for the encoder)")
    options.add_argument("--plans", type=int, default=60, help="that are predicted and measured (default 60)")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--seed", type=int, default=1)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    tasks = {name: random_task(name) for name in arguments.networks}
    tasks |= {Path(text.partition(":")[0]).stem: load_task(text) for text in arguments.task}
    rows = [measured_row(name, task, arguments) for name, task in tasks.items()]
    common.write_rows(arguments.json, "latency_model", rows, quick=arguments.quick)


def random_task(name: str) -> Task:
    """A network of `networks.NETWORKS` with data that means nothing: only its speed is looked at."""
    generator = torch.Generator().manual_seed(0)
    shape = networks.NETWORKS[name][1]
    data = (torch.randn(64, *shape, generator=generator), torch.randint(0, 10, (64,), generator=generator))
    return prepare(Task(model=networks.build(name), train=data, validation=data), weights=None)


def measured_row(name: str, task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    space = load_space(arguments.space or SPACES.get(name, "cnn"))
    count = 14 if arguments.quick else arguments.plans
    effort = replace(PROFILE, pool=48, traced=16, checks=4, memories=6) if arguments.quick else PROFILE
    with tempfile.TemporaryDirectory() as home, make_progress() as progress:
        profile = load_profile("local", home=Path(home), threads=arguments.threads)
        with Device(profile) as device:
            begun = time.perf_counter()
            forecast = forecast_of(task, trace(task.model, task.example_inputs), device, space, measure=False)
            profiled = profile_network(name, forecast, progress, effort=effort)
            seconds = time.perf_counter() - begun
            plans = unseen_plans(forecast, count, arguments.seed)
            progress.stage(f"{name}: predicting {count} plans")
            lowered = [forecast.predict(plan) for plan in plans]
            quick = [forecast.quick(plan) for plan in plans]
            progress.stage(f"{name}: measuring {count} plans")
            truth, wavering = latencies(forecast, plans)
            progress.stage(f"{name}: timing layers alone")
            alone = isolated(forecast, plans)
            row = {
                "network": name,
                **errors([cost.latency_us for cost in lowered], truth),
                "profile_seconds": seconds,
                "measured_again": float(np.median(wavering)),
                "isolated": errors(alone, truth),
                "macs": errors(scaled_macs(forecast, plans, truth), truth),
                "quick": {
                    **errors([cost.latency_us for cost in quick], truth),
                    "plans_per_second": plans_per_second(forecast, arguments.seed),
                },
                "stated_error": profiled.error,
                "within_two_stated": share_within(lowered, truth),
                "size": size_errors(forecast, plans, [cost.size_bytes for cost in quick]),
                "memory": memory_errors(forecast, plans[: 6 if arguments.quick else 20]),
                "kernels": profiled.known,
                "models": profiled.models,
            }
    return row


def unseen_plans(forecast: Forecast, count: int, seed: int) -> list[Plan]:
    """Random plans whose structure was not lowered while learning; one in three with a narrower student."""
    rng = np.random.default_rng(10_000 + seed)
    widths = [float(option) for d in forecast.space.decisions if d.kind == "width" for option in d.options]
    plans: list[Plan] = []
    while len(plans) < count:
        plan = random_plan(forecast.space, rng, drop_share=0.15)
        if widths and len(plans) % 3 == 0:
            plan = replace(plan, width=float(rng.choice(widths)))
        if not forecast.seen(plan):
            plans.append(plan)
    return plans


def latencies(forecast: Forecast, plans: Sequence[Plan]) -> tuple[list[float], list[float]]:
    """(microseconds by plan, by how much its sessions differ), at the clock that the profile's figures refer to.

    Not beside the original: where its values don't fit into near caches, other users of the machine slow it down by a
    tenth for minutes while smaller plans stay as fast, and dividing by it would put that into every plan's time.
    """
    device, bench = forecast.device, forecast.bench
    pace_us = profile_pace_us(device.profile)
    found: dict[int, list[float]] = defaultdict(list)
    for _ in range(_SESSIONS):
        for start in range(0, len(plans), _TURN):
            models = {str(i): bench.structure(plan) for i, plan in enumerate(plans[start : start + _TURN], start)}
            with saved(device, models) as paths:
                timings = device.compare(paths, bursts=_SESSION_BURSTS, pace_us=pace_us)
            for name, timing in timings.items():
                found[int(name)].append(timing.median_us)
    sessions = [found[i] for i in range(len(plans))]
    means = [float(np.mean(medians)) for medians in sessions]
    return means, [float(np.ptp(medians)) / mean for medians, mean in zip(sessions, means, strict=True)]


def isolated(forecast: Forecast, plans: Sequence[Plan]) -> list[float]:
    """The layers of each plan, each timed alone in a model of its own, added up."""
    wanted = [layer_models(forecast, plan) for plan in plans]
    models = {key: model for plan in wanted for key, model in plan}
    times: dict[str, float] = {}
    keys = list(models)
    for start in range(0, len(keys), _ISOLATED_TURN):
        part = {str(i): models[key] for i, key in enumerate(keys[start : start + _ISOLATED_TURN], start)}
        with saved(forecast.device, part) as paths:
            timings = forecast.device.compare(paths, bursts=_ISOLATED_BURSTS)
        times.update({keys[int(name)]: timing.median_us for name, timing in timings.items()})
    return [sum(times[key] for key, _ in plan) for plan in wanted]


def layer_models(forecast: Forecast, plan: Plan) -> list[tuple[str, onnx.ModelProto]]:
    """(shape signature, model) of every layer that remains, alone and at its bit-width."""
    model = forecast.bench.structure(replace(plan, bits={}))
    shapes, view = value_shapes(model), GraphView(model.graph)
    found = []
    for node in view.nodes:
        layer = layer_of(node.name)
        if node.op_type not in LAYER_OPERATORS or layer not in forecast.bench.graph.layer:
            continue
        bits = plan.layer_bits(layer)
        weights = [view.initializers[name] for name in node.input[1:] if name in view.initializers]
        value = helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, shapes[node.input[0]])
        result = helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
        graph = helper.make_graph([node], "layer", [value], [result], weights)
        alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        if bits != 32:
            executions = forecast.bench.executions
            ranges = dict.fromkeys(activation_tensors(alone, {layer: bits}, executions), (-2.0, 2.0))
            alone = quantize(alone, {layer: bits}, ranges, executions=executions)
        groups = helper.get_node_attr_value(node, "group") if node.op_type == "Conv" else 1
        key = f"{node.op_type} {bits} {groups} {shapes[node.input[0]]} {[list(w.dims) for w in weights]}"
        found.append((f"{key} {forecast.bench.graph.layer[layer].stride}", alone))
    return found


def scaled_macs(forecast: Forecast, plans: Sequence[Plan], truth: Sequence[float]) -> list[float]:
    """Multiply-adds, scaled so that their mean is that of what was measured: the best that any one rate can do."""
    graph = forecast.bench.graph
    counts = []
    for plan in plans:
        kept = plan.widths(graph)
        full = {name: graph.layer[name].in_channels * graph.layer[name].out_channels for name in kept}
        counts.append(sum(graph.layer[n].macs * kept[n][0] * kept[n][1] / full[n] for n in kept))
    rate = float(np.mean(truth)) / float(np.mean(counts))
    return [count * rate for count in counts]


def errors(predicted: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    misses = np.abs(np.divide(predicted, truth) - 1.0)
    return {
        "median_error": float(np.median(misses)),
        "p95_error": float(np.percentile(misses, 95)),
        "worst_error": float(misses.max()),
        "within_5": float(np.mean(misses <= 0.05)),
        "within_10": float(np.mean(misses <= 0.10)),
        "spearman": float(spearmanr(predicted, truth).statistic),
    }


def share_within(costs: Sequence[Any], truth: Sequence[float]) -> float:
    """Share of plans that are within two of the standard deviations that were stated with the prediction."""
    inside = [abs(c.latency_us / us - 1) <= 2 * c.latency_error for c, us in zip(costs, truth, strict=True)]
    return float(np.mean(inside))


def plans_per_second(forecast: Forecast, seed: int) -> float:
    """Of plans that were never told before, by `Forecast.quick`."""
    rng = np.random.default_rng(20_000 + seed)
    plans = [random_plan(forecast.space, rng, drop_share=0.1) for _ in range(_SPEED_PLANS)]
    begun = time.perf_counter()
    for plan in plans:
        forecast.quick(plan)
    return len(plans) / (time.perf_counter() - begun)


def size_errors(forecast: Forecast, plans: Sequence[Plan], predicted: Sequence[float]) -> dict[str, float]:
    sizes = [forecast.bench.structure(plan).ByteSize() for plan in plans]
    misses = np.abs(np.divide(predicted, sizes) - 1.0)
    return {"median_error": float(np.median(misses)), "worst_error": float(misses.max())}


def memory_errors(forecast: Forecast, plans: Sequence[Plan]) -> dict[str, Any]:
    """Predicted from the plan alone against the peak of a fresh process; `within` counts 10 % or 1 MB."""
    measured, lowered, quick = [], [], []
    for plan in plans:
        with forecast.device.saved(forecast.bench.structure(plan)) as path:
            measured.append(float(forecast.device.memory_bytes(path)))
        lowered.append(float(forecast.predict(plan).memory_bytes))
        quick.append(float(forecast.quick(plan).memory_bytes))
    return {**_memory_row(lowered, measured), "quick": _memory_row(quick, measured)}


def _memory_row(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    peaks = np.array(measured)
    misses = np.abs(np.array(predicted) - peaks)
    within = (misses <= 0.1 * peaks) | (misses <= 1e6)
    return {
        "median_error": float(np.median(misses / peaks)),
        "worst_error": float((misses / peaks).max()),
        "worst_bytes": float(misses.max()),
        "within": float(np.mean(within)),
    }


@contextmanager
def saved(device: Device, models: Mapping[str, onnx.ModelProto]) -> Iterator[dict[str, Path]]:
    with ExitStack() as files:
        yield {name: files.enter_context(device.saved(model)) for name, model in models.items()}


if __name__ == "__main__":
    main()
