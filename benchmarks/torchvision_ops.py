"""Make torchvision, and timm with it, importable beside the CPU build of torch.

torchvision's wheel brings compiled operators for CUDA, which don't load here; importing it then fails, because it
describes operators that don't exist. Declaring their names is enough: no classification model uses them.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

_LIBRARIES: list[torch.library.Library] = []  # a declaration lasts as long as its library object


def declare() -> None:
    """Declare the operators that torchvision registers shapes for, unless its own did load."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise SystemExit("torchvision is not installed: pip install -c constraints.txt -e '.[benchmarks]'")
    if _LIBRARIES or hasattr(torch.ops.torchvision, "nms"):
        return
    source = (Path(found.origin).parent / "_meta_registrations.py").read_text(encoding="utf-8")
    names = re.findall(r'register_(?:meta\("|fake\("torchvision::)(\w+)"', source)
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in dict.fromkeys([*names, "nms"]):
        library.define(f"{name}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    _LIBRARIES.append(library)
