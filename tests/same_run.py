"""One small search for a device that isn't here, so that nothing is timed: `python -m tests.same_run FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from automl_compress import api
from tests import tiny
from tests.search.campaigns import RULES


def run(folder: Path) -> None:
    folder.mkdir()
    space = folder / "space.yaml"
    space.write_text(yaml.safe_dump(RULES), encoding="utf-8")
    api.compress(
        tiny.task(),
        latency="60%",
        size="70%",
        profile="cortex-m7-400mhz",
        space=str(space),
        trials=6,
        epochs=0.1,
        seed=3,
        output=folder / "run",
    )


if __name__ == "__main__":
    run(Path(sys.argv[1]))
