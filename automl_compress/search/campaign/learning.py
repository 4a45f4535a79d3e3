"""What a search knows before its first trial: the original's figures, the device's times, what each option costs.

In the order of what it takes to find out, and a budget that nothing can meet is refused in between. All of it is in the
run folder or the device's profile, so that a resumed run finds it there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna

from automl_compress.core.budget import Budget, Cost
from automl_compress.core.goal import Goal
from automl_compress.hardware.profile.trust import advice
from automl_compress.search.campaign.campaign import MEASURED, SENSITIVITY, SPACE, Campaign
from automl_compress.search.campaign.measuring import settle_edge
from automl_compress.search.sampling.storage import open_storage
from automl_compress.search.solvers.feasibility import require_feasible
from automl_compress.search.space.records import recorded_space, space_record
from automl_compress.search.table.dominated import drop_dominated
from automl_compress.search.table.forecast import SEARCH, Forecast
from automl_compress.search.table.pricing import additive_table
from automl_compress.search.table.sensitivity import measure_joint, measure_sensitivity

_LEAST_MEASURED = 3  # models at the end: the original, what is delivered, a plan before it
_PACED = 8  # sensitivities after which the time that the others take is foreseen


def learn(campaign: Campaign, goal: Goal | None = None) -> None:
    """Everything that comes before the first trial. Raises InfeasibleError if no trial could help, InputError where the
    time limit is too short for that. `goal`: how good a model has to stay, where that was asked."""
    measure_original(campaign)
    if goal is not None:
        goal.require_reachable(campaign.original_metric())
    clock = campaign.clock
    clock.require(_LEAST_MEASURED * (clock.typical("measuring") or 0.0), "measuring what is to be delivered")
    learn_device(campaign)
    known = (campaign.aim, campaign.budget, campaign.original, campaign.measured.values())
    require_feasible(campaign.reach, *known, settled=campaign.device.measures)
    settle_edge(campaign)
    learn_quality(campaign)


def measure_original(campaign: Campaign) -> None:
    """Export and measure the original once; a resumed run holds its budgets against the same figures."""
    device, folder = campaign.device, campaign.folder
    campaign.progress.stage("measuring the original" if device.measures else "estimating the original's cost")
    path = folder.path / "original.onnx"
    if not path.exists():
        folder.write_bytes("original.onnx", campaign.bench.original.SerializeToString())
    known = folder.read_json("original.json")
    if known is None:
        with campaign.clock.timing("measuring"):
            timing = device.compare({"original": path})["original"]
            memory_bytes = device.memory_bytes(path)
        known = {
            "latency_us": timing.median_us,
            "size_bytes": path.stat().st_size,
            "memory_bytes": memory_bytes,
            "provenance": timing.provenance,
        }
        folder.write_json("original.json", known)
    campaign.original = Cost(**{"provenance": "measured", **known})
    campaign.budget = Budget.resolve(campaign.limits, campaign.original)
    campaign.measured.load(folder.path / MEASURED)
    campaign.forecast = Forecast(campaign.bench, campaign.space, device, seed=campaign.seed)


def learn_device(campaign: Campaign) -> None:
    """Show the device every shape that the space can reach, and make the additive table."""
    bench, forecast, clock = campaign.bench, campaign.forecast, campaign.clock

    def in_time() -> None:
        if clock.left == 0:
            clock.refuse("it was over while the device was measured", campaign.progress.seconds_left or 0.0)

    filled = forecast.learn(SEARCH, campaign.progress, between=in_time)
    for remedy in advice(filled.troubles):
        campaign.progress.note(f"warning: {remedy}")
    campaign.costs.anchor(bench.original, campaign.original.latency_us)
    forecast.forget()
    plans = forecast.variants
    totals = [campaign.predict(plan).latency_us for plan in plans]
    lowered = [forecast.kernels(plan) for plan in plans]
    offered = {d.target: [int(o) for o in d.options] for d in campaign.space.decisions if d.kind == "bits"}
    campaign.table = additive_table(
        bench.graph, plans, lowered, totals, campaign.original.size_bytes, {}, bench.executions, offered
    )
    _settle_space(campaign)


def learn_quality(campaign: Campaign) -> None:
    """Measure, or read from the run folder, what each option costs in quality."""
    bench, space, clock = campaign.bench, campaign.space, campaign.clock
    options = sum(len(d.options) for d in space.decisions)
    campaign.progress.stage("ranking channels")
    _ = bench.ranking  # computed once, before the pace of what follows is taken
    campaign.progress.stage("measuring sensitivities", options)
    file = campaign.folder.file(SENSITIVITY)
    begun, measured = clock.now(), 0

    def advance() -> None:
        nonlocal measured
        measured += 1
        campaign.progress.advance()
        pace = (clock.now() - begun) / measured
        if measured >= _PACED or clock.left == 0:
            clock.require(pace * (options - measured), "measuring what the options cost in quality")

    quality = measure_sensitivity(bench, space, file, advance)
    joint = measure_joint(bench, space, quality, file)
    campaign.table = replace(campaign.table, quality=quality, joint=joint)


def _settle_space(campaign: Campaign) -> None:
    """Drop dominated options once: a resumed run offers what it offered before, whatever was measured since."""
    known = campaign.folder.read_json(SPACE) or _shared_space(campaign)
    if known is None:
        metrics = tuple(campaign.budget.limits)
        space = drop_dominated(
            campaign.space, campaign.bench.graph, campaign.table, metrics=metrics, predict=campaign.predict
        )
        known = space_record(space, campaign.bench.executions)
    campaign.folder.write_json(SPACE, known)
    campaign.space = recorded_space(campaign.space, known)


def _shared_space(campaign: Campaign) -> Any:
    """What the search that this process joins offers; options measured apart could differ by a dominated one."""
    if not campaign.storage:
        return None
    studies = {s.study_name: s for s in optuna.get_all_study_summaries(open_storage(campaign.storage))}
    name = campaign.study_title
    return studies[name].user_attrs.get("space") if name in studies else None
