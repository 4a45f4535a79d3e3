"""Routes that a search has to beat, as ladders of cuts from mild to severe: one knob each.

Torch-Pruning and NVIDIA ModelOpt run in an environment of their own, which is made below the cache at the versions
that are named here; weights come and go as safetensors, everything else as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from search_laboratory import EXAMPLE, Laboratory
from torch import Tensor

from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.progress import Progress
from automl_compress.search.sampling.seeds import simple_plans
from automl_compress.techniques.evidence import Evidence
from automl_compress.techniques.importance import CRITERIA
from automl_compress.techniques.prune import Ranking, select_channels

REQUIREMENTS = (
    # Named exactly, torch is the build for the CPU where the index has it.
    "torch==2.13.0",
    "torch-pruning==1.6.1",
    "nvidia-modelopt==0.47.0",
    "huggingface_hub==2.4.0",
    "pulp==3.3.2",
    "requests",
    "safetensors",
    "torchprofile==0.0.4",
)
ROUTES = ("dropped-blocks", "torch-pruning", "modelopt", "uniform-width")
UNTOUCHED = "nothing-removed"
_DRIVER = Path(__file__).resolve().parent / "search_peer_driver.py"
_SCORING_BATCHES = 4
_LEVELS: dict[str, list[dict[str, Any]]] = {
    "torch-pruning": [
        {"name": f"torch-pruning-{percent}-{step or 1}", "ratio": percent / 100, "round_to": step}
        for percent in range(5, 100, 5)
        for step in (None, 8)
    ],
    "modelopt": [{"name": f"modelopt-{percent}", "flops_percent": percent} for percent in range(95, 10, -5)],
}


def cuts(
    laboratory: Laboratory, cache: Path, progress: Progress, routes: Collection[str] = ROUTES
) -> dict[str, dict[str, Plan]]:
    """Route -> name of the cut -> plan with its channels selected, all layers in 8 bits. Nothing in it is repaired."""
    graph, bits = laboratory.bench.graph, eight_bits(laboratory)
    found: dict[str, dict[str, Plan]] = {UNTOUCHED: {UNTOUCHED: Plan(bits=bits)}}
    original = laboratory.bench.teacher.state_dict()
    for route, levels in _LEVELS.items():
        if route not in routes:
            continue  # nothing is installed for it
        folder = _run_peer(laboratory, cache, route, levels, progress)
        kept = {
            level["name"]: kept_channels(graph, original, load_file(folder / f"{level['name']}.safetensors"))
            for level in levels
            if (folder / f"{level['name']}.safetensors").exists()
        }
        found[route] = {name: Plan(bits=bits, kept=channels) for name, channels in kept.items()}
    found["uniform-width"] = _uniform(laboratory, bits)
    order = sorted(graph.blocks, key=lambda block: laboratory.table.quality[f"drop.{block.name}", True])
    names = [block.name for block in order]
    found["dropped-blocks"] = {
        f"dropped-blocks-{count}": Plan(bits=bits, drop=frozenset(names[:count])) for count in range(1, len(names))
    }
    return found


def eight_bits(laboratory: Laboratory) -> dict[str, int]:
    """What the product calls uniform quantization."""
    return dict(simple_plans(laboratory.space)["uniform-int8"].bits)


def kept_channels(
    graph: Graph, original: Mapping[str, Tensor], cut: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Which channels of the blocks' inner groups are left, told by the batch-norms behind them.

    Raises ValueError where a cut reaches other layers: no plan says that.
    """
    kept = {}
    for name, value in cut.items():
        if not name.endswith("bn1.weight") or name == "bn1.weight":
            if name.endswith(("bn1.weight", "bn2.weight")) and value.shape != original[name].shape:
                raise ValueError(
                    f"{name}: {len(value)} of {len(original[name])} channels; only inner ones are expected"
                )
            continue
        layer = name.removesuffix(".weight")
        whole = list(zip(original[name].tolist(), original[f"{layer}.bias"].tolist(), strict=True))
        left = list(zip(value.tolist(), cut[f"{layer}.bias"].tolist(), strict=True))
        group = layer.replace("bn1", "conv1")
        if len(left) < graph.group[group].size:
            kept[group] = tuple(sorted(whole.index(pair) for pair in left))
    return kept


def _uniform(laboratory: Laboratory, bits: Mapping[str, int]) -> dict[str, Plan]:
    """Every group at the same share of its channels, those of the largest L2 norm."""
    bench = laboratory.bench
    evidence = Evidence(bench.teacher, bench.graph, batches=lambda: [], loss=bench.task.loss_of, seed=0)
    ranking = Ranking(evidence, CRITERIA["l2"])
    plans = {f"uniform-width-{k}": Plan(bits=bits, width=k / 16) for k in range(15, 2, -1)}
    selected = {name: select_channels(bench.graph, plan, ranking) for name, plan in plans.items()}
    return {name: replace(plan, width=1.0) for name, plan in selected.items()}


def _run_peer(
    laboratory: Laboratory, cache: Path, route: str, levels: list[dict[str, Any]], progress: Progress
) -> Path:
    folder = cache / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [level for level in levels if not (folder / f"{level['name']}.safetensors").exists()]
    if missing and not (folder / f"{route}.done").exists():
        python = _environment(cache / "peers-environment", progress)
        progress.stage(f"cutting with {route}", None)
        save_file(dict(laboratory.bench.teacher.state_dict()), folder / "original.safetensors")
        batches = laboratory.bench.task.batches("train")
        torch.manual_seed(0)
        picked = [batch for batch, _ in zip(batches, range(_SCORING_BATCHES), strict=False)]
        images = torch.cat([inputs[0] for inputs, _ in picked]).contiguous()
        save_file(
            {"images": images, "labels": torch.cat([labels for _, labels in picked])}, folder / "images.safetensors"
        )
        request = {
            "route": route,
            "example": str(EXAMPLE.parent),
            "weights": str(folder / "original.safetensors"),
            "images": str(folder / "images.safetensors"),
            "levels": missing,
            "output": str(folder),
        }
        (folder / f"{route}.json").write_text(json.dumps(request), encoding="utf-8")
        with (folder / f"{route}.log").open("w", encoding="utf-8") as log:
            done = subprocess.run([str(python), str(_DRIVER), str(folder / f"{route}.json")], stdout=log, stderr=log)
        if done.returncode:
            raise SystemExit(f"{route} failed; see {folder / route}.log")
        (folder / f"{route}.done").touch()
    return folder


def _environment(folder: Path, progress: Progress) -> Path:
    """The peers' Python, installed at the first call."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        progress.stage("installing the peers", None)
        venv.create(folder, with_pip=True, clear=True)
        installed = subprocess.run(
            [str(python), "-m", "pip", "install", "-q", *REQUIREMENTS], stdout=sys.stderr, stderr=sys.stderr
        )
        if installed.returncode:
            raise SystemExit(f"installing the peers into {folder} failed")
        (folder / "installed").touch()
    return python
