"""Runs in the peers' own environment: cuts a ResNet-20 with Torch-Pruning or NVIDIA ModelOpt, and nothing else.

    python search_peer_driver.py REQUEST.json

The request names the `route`, the `example` folder with `resnet.py`, the `weights`, the `images` (tensors `images` and
`labels`), the `levels` of the cut and the `output` folder, where each level's cut weights go. Whoever asked tells from
the batch-norms that are left which channels those are.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DIVISOR = 8


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    sys.path.insert(0, request["example"])
    from resnet import ResNet20

    model = ResNet20()
    model.load_state_dict(load_file(request["weights"]))
    data = load_file(request["images"])
    route = {"torch-pruning": global_magnitude, "modelopt": fastnas}[request["route"]]
    output = Path(request["output"])
    failures = 0
    for level in request["levels"]:
        file = output / f"{level['name']}.safetensors"
        if file.exists():
            continue
        try:
            cut = route(copy.deepcopy(model).eval(), data["images"], data["labels"], level, output)
        except Exception as error:  # a level that the route can't reach; the others count all the same
            print(f"{level['name']}: {type(error).__name__}: {error}", flush=True)
            failures += 1
            continue
        save_file({name: value.contiguous() for name, value in cut.state_dict().items()}, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        print(level["name"], flush=True)
    if failures == len(request["levels"]):
        raise SystemExit("no level could be reached")


def global_magnitude(model: Any, images: Tensor, labels: Tensor, level: dict[str, Any], output: Path) -> Any:
    """The L2 norms of all prunable channels compared over the whole network (Torch-Pruning's defaults).

    Only the blocks' inner channels can go: with the zero-padded shortcuts its other groups give a model that doesn't
    run.
    """
    import torch_pruning

    blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        images[:1],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=level["ratio"],
        round_to=level["round_to"],
        ignored_layers=[model.conv1, model.linear, *(block.conv2 for block in blocks)],
    )
    pruner.step()
    model(images[:1])
    return model.eval()


def fastnas(model: Any, images: Tensor, labels: Tensor, level: dict[str, Any], output: Path) -> Any:
    """FastNAS under a limit on operations, scored by accuracy on the images; the statistics are gathered once."""
    import modelopt.torch.prune as mtp

    def score(candidate: nn.Module) -> float:
        with torch.no_grad():
            found = [candidate.eval()(part).argmax(1) for part in torch.split(images, 128)]
        return float((torch.cat(found) == labels).float().mean())

    config = mtp.fastnas.FastNASConfig()
    config["nn.Conv2d"]["*"]["channel_divisor"] = DIVISOR
    config["nn.BatchNorm2d"]["*"]["feature_divisor"] = DIVISOR
    loader = list(zip(torch.split(images, 128), torch.split(labels, 128), strict=True))
    cut, _ = mtp.prune(
        model=model,
        mode=[("fastnas", config)],
        constraints={"flops": f"{level['flops_percent']}%"},
        dummy_input=images[:1],
        config={
            "data_loader": loader,
            "collect_func": lambda batch: batch[0],
            "score_func": score,
            "checkpoint": str(output / "fastnas-statistics.pth"),
            "max_iter_data_loader": len(loader),
        },
    )
    return cut.eval()


if __name__ == "__main__":
    main()
