"""Several devices at a glance: one model for each, as JSON, as text and as a page that leads to their reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from automl_compress.deploy.pages import fill, write_page
from automl_compress.deploy.report import model_row
from automl_compress.deploy.summary import headline, models, read_result, summarize
from automl_compress.errors import RunFolderError

FILE = "devices.json"
SCHEMA = "automl-compress/devices"


def to_json(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One JSON object of several results, by the name of the device's profile."""
    return {"schema": SCHEMA, "version": 1, "devices": {name: dict(result) for name, result in results.items()}}


def write_overview(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `devices.json`, which names the run folder of each device, and `report.html`."""
    index = {"schema": SCHEMA, "version": 1, "folders": {name: name for name in results}}
    for name, text in (("report.html", render(results)), (FILE, json.dumps(index, indent=1) + "\n")):
        write_page(folder / name, text)


def read_overview(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The results of a folder of several devices by name; None where it isn't one. Raises RunFolderError."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        folders = dict(json.loads(path.read_text(encoding="utf-8"))["folders"])
    except (ValueError, TypeError, KeyError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); start the run again with -o {folder}") from error
    return {name: read_result(folder / str(sub)) for name, sub in folders.items()}


def summarize_devices(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The summaries one below the other."""
    return "\n\n".join(f"{name}\n{summarize(result)}" for name, result in results.items())


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page as text."""
    devices = [
        {
            "name": name,
            "headline": headline(result),
            "status": result["status"],
            "models": [model_row(model, figures) for model, figures in models(result)],
        }
        for name, result in results.items()
    ]
    return fill("devices.html.j2", devices=devices)
