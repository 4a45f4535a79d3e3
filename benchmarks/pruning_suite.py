"""Cut half the channels of everything that can go out of many architectures, and see whether the result is right.

    python benchmarks/pruning_suite.py --architectures LIST [--json FILE] [--quick]

LIST has an architecture a line (what follows the name is ignored, `#` starts a comment): names of timm, `tv_NAME` for
torchvision's, `cifar_resnet20` for the example's network. Weights are random. Each architecture has a process of its
own, so that one that crashes or takes all memory costs one row.

A row: `architecture`, `runs` (the cut model's forward works), `params_left` (fraction of parameters), `max_deviation`
(from the original in which the removed channels take no part, as a share of the largest output), `onnx_agrees` (export
of the cut model, run in ONNX Runtime, against PyTorch), `seconds` (of analysis) and `refused` (layers that were left
whole, with the reason). Needs the `benchmarks` extra.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("cifar_resnet20", "resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "tv_squeezenet1_1")
COLUMNS = ("architecture", "runs", "params_left", "max_deviation", "onnx_agrees", "seconds", "refused")
TIMEOUT_S = 1200


def build(name: str) -> tuple[Any, tuple[int, ...]]:
    """(model with random weights in eval mode, shape of one input)."""
    import torch

    torch.manual_seed(0)
    if name == "cifar_resnet20":
        source = ROOT / "examples" / "cifar10_resnet20" / "resnet.py"
        return runpy.run_path(str(source))["ResNet20"]().eval(), (3, 32, 32)
    from torchvision_ops import declare

    declare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.startswith("tv_"):
            import torchvision

            return torchvision.models.get_model(name[3:], weights=None).eval(), (3, 224, 224)
        import timm

        model: Any = timm.create_model(name, pretrained=False).eval()
        return model, tuple(model.default_cfg["input_size"])


def half(graph: Any) -> dict[str, list[int]]:
    """Every second channel of every group; where two groups narrow the same layer (heads and their width), of the
    larger one."""
    taken: set[tuple[str, int, int]] = set()
    kept: dict[str, list[int]] = {}
    for group in sorted(graph.groups, key=lambda g: -g.size):
        spots = {(p.tensor, p.dim, i) for p in group.places for where in p.positions for i in where}
        if not spots & taken:
            taken |= spots
            kept[group.name] = list(range(0, group.size - group.size % 2, 2))
    return kept


def assess(name: str) -> dict[str, Any]:
    """One row."""
    import torch

    from automl_compress.deploy.export import export_alone
    from automl_compress.model.checks import deviation
    from automl_compress.model.surgery import cut
    from automl_compress.model.trace import analyse, make_telling

    model, shape = build(name)
    make_telling(model)
    inputs = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),)
    before = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"architecture": name, "runs": False, "onnx_agrees": False}
    started = time.perf_counter()
    analysis = analyse(model, inputs)
    row["seconds"] = round(time.perf_counter() - started, 1)
    row["refused"] = {f.layer: f.reason for f in analysis.graph.frozen if "output" not in f.reason}
    kept = half(analysis.graph)
    small = cut(model, analysis.graph, kept=kept)
    row["params_left"] = round(sum(p.numel() for p in small.parameters()) / before, 4)
    with torch.no_grad():
        outputs = small(*inputs)
    row["runs"] = True
    row["max_deviation"] = deviation(outputs, analysis.masked({g: set(c) for g, c in kept.items()}))
    export_alone(small, inputs)
    row["onnx_agrees"] = True
    return row


def assess_apart(name: str) -> dict[str, Any]:
    """One row, computed by another process; what went wrong there is in `error`."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return _failed(name, f"took more than {TIMEOUT_S} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        row: dict[str, Any] = json.loads(lines[-1])
        return row
    last = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
    return _failed(name, last) | (json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {})


def _failed(name: str, error: str) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS) | {"architecture": name, "runs": False, "onnx_agrees": False, "error": error}


def names_in(path: Path) -> list[str]:
    lines = (line.split("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines())
    return [words[0] for words in lines if words]


def describe(row: Mapping[str, Any]) -> str:
    if row["params_left"] is None:
        return f"{row['architecture']:32} fails: {row.get('error', '')[:120]}"
    return (
        f"{row['architecture']:32} runs {'yes' if row['runs'] else 'NO':3} params left {row['params_left']:.3f} "
        f"deviation {row['max_deviation'] or 0:.1e} onnx {'agrees' if row['onnx_agrees'] else 'DIFFERS'} "
        f"{row['seconds']:.1f} s, {len(row['refused'] or ())} refused {row.get('error', '')[:120]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=Path, help="file with an architecture a line")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(assess(arguments.one)))
        return
    if arguments.architectures is None and not arguments.quick:
        parser.error("name a list with --architectures, or ask for --quick")
    names = list(QUICK) if arguments.architectures is None else names_in(arguments.architectures)
    if arguments.quick and arguments.architectures is not None:
        names = [name for name in names if name in QUICK] or names[: len(QUICK)]
    rows = []
    for number, name in enumerate(names, start=1):
        rows.append(assess_apart(name))
        print(f"{number:3}/{len(names)} {describe(rows[-1])}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    ran = sum(bool(row["runs"]) for row in rows)
    halved = sum(row["params_left"] is not None and row["params_left"] <= 0.5 for row in rows)
    agreed = sum(bool(row["onnx_agrees"]) for row in rows)
    print(
        f"{len(rows)} architectures: {ran} run after the cut, {halved} keep at most half, {agreed} agree in the runtime"
    )


if __name__ == "__main__":
    main()
