"""A campaign over the tiny task on a device without a clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from automl_compress.core.budget import parse_budget
from automl_compress.deploy.run_folder import RunFolder
from automl_compress.hardware.device.device import Device
from automl_compress.hardware.profile.profile import load_profile
from automl_compress.progress import SilentProgress
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.evaluation.evaluate import Workbench
from automl_compress.search.space.rules import SpaceFile
from automl_compress.search.space.space import SearchSpace, resolve
from tests.hardware.simulated import FACTS
from tests.search.device import TimelessRuntime
from tests.search.networks import NATIVE
from tests.tiny import graph, ready

RULES = {
    "name": "small",
    "width": [1.0, 0.5],
    "rules": [
        {"match": {"kind": "channel-group"}, "sparsity": [0.0, 0.5]},
        {"match": {"kind": "block"}, "drop": True},
        {"match": {"kind": "layer"}, "bits": [8, 32]},
    ],
}


@cache
def bench() -> Workbench:
    """Shared by tests that only read; exporting takes a second."""
    return Workbench(ready(), graph(), importance="l2")


def space(**changes: object) -> SearchSpace:
    return resolve(SpaceFile.model_validate({**RULES, **changes}), graph(), NATIVE)


@contextmanager
def campaign(folder: Path, home: Path, *, identity: str = "same", **limits: str) -> Iterator[Campaign]:
    """`home` keeps the device profile, so that campaigns that share it share measurements."""
    profile = load_profile("local", home=home, facts=FACTS)
    with RunFolder(folder, {"run": identity}) as run_folder, Device(profile, launch=TimelessRuntime) as device:
        yield Campaign(
            bench=bench(),
            space=space(),
            device=device,
            limits=parse_budget(**limits),
            folder=run_folder,
            progress=SilentProgress(),
            identity={"run": identity},
        )
