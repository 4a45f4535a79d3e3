"""What a run hands back and leaves behind: the delivered files, result.json, report.html."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from automl_compress.core.result import Result
from automl_compress.deploy.overview import write_overview
from automl_compress.deploy.report import write_report
from automl_compress.errors import InfeasibleError, StorageError
from automl_compress.search.campaign.account import ladder_rows, trial_rows
from automl_compress.search.campaign.account import notes as notes_of
from automl_compress.search.campaign.baselines import Baselines
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.settings import Settings, reproduce
from automl_compress.search.delivery.deliver import Verified, final_metric
from automl_compress.search.delivery.front import Point
from automl_compress.search.delivery.standings import front_standings, full_standings, one_shot_standings
from automl_compress.search.evaluation.candidate import Candidate, plan_file


def delivered(campaign: Campaign, settings: Settings, best: Candidate, verified: Verified, beaten: Baselines) -> Result:
    """Put the model into the run folder, and read the test split for it."""
    folder = campaign.folder
    folder.write_bytes("best.onnx", best.onnx.read_bytes())
    folder.write_bytes("best.safetensors", best.weights.read_bytes())
    folder.write_json("plan.json", plan_file(best, campaign.bench))
    figures = replace(verified.delivered, test_metric=final_metric(campaign, best))
    return _result(
        campaign,
        settings,
        status="met" if verified.cost.provenance == "measured" else "estimated",
        original=verified.original,
        delivered=figures,
        baselines={
            name: found if name in beaten.distilled else replace(found, note="not trained")
            for name, found in verified.baselines.items()
        },
        standings=tuple(
            standing.to_json()
            for standing in (*one_shot_standings(beaten), *full_standings(beaten, verified, settings.goal))
        ),
        budget=verified.budget.limits,
        layers=verified.layers,
        notes=(*verified.notes, *(f"the time limit left {cut}" for cut in settings.clock.cuts), *notes_of(campaign)),
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
    noted = {name: point.verified.notes for name, point in zip(figures, points, strict=True)}
    common = [note for note in points[0].verified.notes if all(note in others for others in noted.values())]
    own = [f"{name}: {note}" for name, some in noted.items() for note in some if note not in common]
    assert settings.front is not None
    beside = {name: (point.beaten, point.verified) for name, point in zip(figures, points, strict=True)}
    standings = front_standings(beside, settings.front.minimise)
    return _result(
        campaign,
        settings,
        status="met" if measured else "estimated",
        original=verified.original,
        front=figures,
        baselines=baselines,
        standings=tuple(standing.to_json() for standing in standings),
        budget=verified.budget.limits,
        notes=(*common, *own, *(f"the time limit left {cut}" for cut in settings.clock.cuts), *notes_of(campaign)),
        seconds={"total": settings.clock.now() - settings.clock.begun},
    )


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
    with _writing():
        write_report(result, trial_rows(campaign), campaign.folder.path, commands=[reproduce(campaign, settings)])
    campaign.folder.write_json("result.json", result.to_json())
    return result


def write_devices(folder: Path, results: Mapping[str, Result]) -> None:
    """devices.json and report.html over several devices, whose runs are the subfolders of their names."""
    data = {name: result.to_json() for name, result in results.items()}
    with _writing():
        write_overview(folder, data)


@contextmanager
def _writing() -> Iterator[None]:
    """Raises StorageError where a page can't be written."""
    try:
        yield
    except OSError as error:
        raise StorageError(
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
