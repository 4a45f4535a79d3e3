"""What a run hands back and leaves behind: the delivered files, result.json, report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from automl_compress.core.result import Figures, Result
from automl_compress.deploy.overview import write_overview
from automl_compress.deploy.report import write_report
from automl_compress.errors import CompressError, InfeasibleError
from automl_compress.search.account import ladder_rows, trial_rows
from automl_compress.search.account import notes as notes_of
from automl_compress.search.campaign import Campaign
from automl_compress.search.deliver import Verified, final_metric
from automl_compress.search.front import Point
from automl_compress.search.ladder import Candidate, plan_file
from automl_compress.search.settings import Settings, reproduce


def delivered(campaign: Campaign, settings: Settings, best: Candidate, verified: Verified) -> Result:
    """Put the model into the run folder, and read the test split for it."""
    folder = campaign.folder
    folder.write_bytes("best.onnx", best.onnx.read_bytes())
    folder.write_bytes("best.safetensors", best.weights.read_bytes())
    folder.write_json("plan.json", plan_file(best, campaign.bench))
    figures = replace(verified.delivered, test_metric=final_metric(campaign, best))
    notes = [*verified.notes, *_beside_baselines(settings, verified, figures)]
    return _result(
        campaign,
        settings,
        status="met" if verified.cost.provenance == "measured" else "estimated",
        original=verified.original,
        delivered=figures,
        baselines=verified.baselines,
        budget=verified.budget.limits,
        layers=verified.layers,
        notes=(*notes, *(f"the time limit left {cut}" for cut in settings.clock.cuts), *notes_of(campaign)),
        seconds={"total": settings.clock.now() - settings.clock.begun, "distillation": best.seconds},
        training=best.training,
    )


def front(campaign: Campaign, settings: Settings, points: Sequence[Point]) -> Result:
    """Put each model of a front into a folder of its own, and read the test split for each."""
    folder, figures = campaign.folder, {}
    for number, point in enumerate(points, 1):
        name = f"front/{number}"
        best = point.candidate
        folder.write_bytes(f"{name}/best.onnx", best.onnx.read_bytes())
        folder.write_bytes(f"{name}/best.safetensors", best.weights.read_bytes())
        folder.write_json(f"{name}/plan.json", plan_file(best, campaign.bench))
        folder.write_json(f"{name}/layers.json", list(point.verified.layers))
        figures[name] = replace(point.verified.delivered, test_metric=final_metric(campaign, best))
    verified = points[0].verified
    baselines = next((p.verified.baselines for p in points if p.verified.baselines), {})
    measured = all(point.verified.cost.provenance == "measured" for point in points)
    notes = dict.fromkeys(note for point in points for note in point.verified.notes)
    return _result(
        campaign,
        settings,
        status="met" if measured else "estimated",
        original=verified.original,
        front=figures,
        baselines=baselines,
        budget=verified.budget.limits,
        notes=(*notes, *(f"the time limit left {cut}" for cut in settings.clock.cuts), *notes_of(campaign)),
        seconds={"total": settings.clock.now() - settings.clock.begun},
    )


def _beside_baselines(settings: Settings, verified: Verified, found: Figures) -> list[str]:
    """Which baselines the search did not beat, in the direction that was asked for."""
    notes = []
    for name, figures in verified.baselines.items():
        cost = replace(
            verified.cost,
            latency_us=figures.latency_us,
            size_bytes=figures.size_bytes,
            memory_bytes=figures.memory_bytes,
        )
        goal = settings.goal
        if figures.plan == found.plan:
            notes.append(f"the delivered model is the baseline {name}: the search found nothing better")
        elif not verified.budget.met(cost):
            continue
        elif goal is None and figures.metric >= found.metric:
            notes.append(
                f"baseline {name} is within the budget and not worse on validation: the search did not beat it"
            )
        elif (
            goal is not None
            and goal.reached(figures.metric, verified.original.metric)
            and cost.of(goal.minimise) <= verified.cost.of(goal.minimise)
        ):
            notes.append(
                f"baseline {name} is good enough and its {goal.minimise} isn't higher: the search did not beat it"
            )
    return notes


def infeasible(campaign: Campaign, settings: Settings, error: InfeasibleError) -> Result:
    return _result(
        campaign,
        settings,
        status="infeasible",
        original=campaign.original_figures(),
        budget=campaign.budget.limits,
        nearest=error.nearest,
        binding=error.binding,
        notes=(str(error), *notes_of(campaign)),
    )


def interrupted(campaign: Campaign, settings: Settings) -> Result:
    known = hasattr(campaign, "budget")
    return _result(
        campaign,
        settings,
        status="interrupted",
        original=campaign.original_figures() if known else None,
        budget=campaign.budget.limits if known else {},
    )


def write(campaign: Campaign, settings: Settings, result: Result) -> Result:
    """result.json and report.html; the JSON last, since its presence says that a run is finished."""
    try:
        write_report(result, trial_rows(campaign), campaign.folder.path, commands=[reproduce(campaign, settings)])
    except OSError as error:
        raise CompressError(
            f"{error.filename}: can't be written ({error.strerror}); free some space and run again"
        ) from error
    campaign.folder.write_json("result.json", result.to_json())
    return result


def write_devices(folder: Path, results: Mapping[str, Result]) -> None:
    """devices.json and report.html over several devices, whose runs are the subfolders of their names."""
    data = {name: result.to_json() for name, result in results.items()}
    try:
        write_overview(folder, data)
    except OSError as error:
        raise CompressError(
            f"{error.filename}: can't be written ({error.strerror}); free some space and run again"
        ) from error


def _result(campaign: Campaign, settings: Settings, *, budget: Mapping[str, float], **fields: Any) -> Result:
    header = campaign.device.profile.header
    shown = {"provenance", "match", "runtime", "device", "memory"}
    shown |= {"protocol"} if campaign.device.measures else {"sources", "roofline"}
    device = {
        "address": campaign.device.link.name,
        "profile": campaign.device.profile.name,
        "file": str(campaign.device.profile.path),
        "threads": campaign.device.profile.threads,
        **header.model_dump(include=shown, mode="json"),
    }
    goal = settings.goal
    if goal is not None:
        asked = goal.least_metric(campaign.original_metric()) if fields.get("original") else goal.bound
        fields["goal"] = {"asked": goal.text, "metric_at_least": asked, "minimise": goal.minimise}
    return Result(
        device=device,
        folder=campaign.folder.path,
        trials=campaign.trial_counts(),
        ladder=ladder_rows(campaign),
        budget={metric: limit for metric, limit in budget.items() if metric in settings.limits},
        **fields,
    )
