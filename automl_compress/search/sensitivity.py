"""What each option costs in quality, one at a time, from calibration samples alone: the search's prior.

Each option of each decision is applied to the otherwise untouched original and the distance of the outputs is measured
(Kullback-Leibler divergence for classification). The table is kept in the run folder and reused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from automl_compress.core.plan import Plan
from automl_compress.search.evaluate import Workbench
from automl_compress.search.space import Decision, SearchSpace
from automl_compress.search.table import Option, QualityKey

Sensitivity = dict[QualityKey, float]


def measure_sensitivity(
    bench: Workbench, space: SearchSpace, file: Path | None = None, advance: Callable[[], None] = lambda: None
) -> Sensitivity:
    """Decision and option -> distance from the original; 0 for the option that changes nothing.

    What `file` already holds for this model is not measured again; what is new is appended at once.
    """
    known = _load(file)
    result: Sensitivity = {}
    for decision in space.decisions:
        for option in decision.options:
            key = f"{decision.name}={option}"
            if key not in known:
                known[key] = 0.0 if _does_nothing(decision, option) else _one(bench, decision, option)
                _append(file, key, known[key])
            result[decision.name, option] = known[key]
            advance()
    return result


def single(decision: Decision, option: Option) -> Plan:
    """The plan that takes this option and changes nothing else."""
    match decision.kind:
        case "width":
            return Plan(width=float(option))
        case "sparsity":
            return Plan(sparsity={decision.target: float(option)})
        case "drop":
            return Plan(drop=frozenset([decision.target]) if option else frozenset())
        case "bits":
            return Plan(bits={decision.target: int(option)})
        case "mask":
            return Plan(masks={decision.target: str(option)})


def _does_nothing(decision: Decision, option: Option) -> bool:
    return single(decision, option).key == Plan().key


def _one(bench: Workbench, decision: Decision, option: Option) -> float:
    model, plan = bench.student(single(decision, option))
    return max(0.0, bench.distortion(bench.export(model, plan)))


def _load(file: Path | None) -> dict[str, float]:
    """A line an option; a line that a kill cut short is measured again."""
    known: dict[str, float] = {}
    if file is None or not file.exists():
        return known
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            known[str(entry["option"])] = float(entry["distance"])
        except (ValueError, KeyError, TypeError):
            continue
    return known


def _append(file: Path | None, key: str, value: float) -> None:
    if file is not None:
        torn = file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size > 0
        with file.open("a", encoding="utf-8") as stream:
            stream.write("\n" * torn + json.dumps({"option": key, "distance": value}) + "\n")
