"""The state of a training in a file: tensors as safetensors, everything else as JSON in its header. Nothing in it is
ever executed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from automl_compress.errors import StorageError, TrainingError, first_line
from automl_compress.techniques.training.state import Tensors

VERSION = 1
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """The checkpoint is the old or the new one after a kill. Raises StorageError if it can't be written."""
    save_tensors(path, tensors, {"training": json.dumps({"version": VERSION, **facts})})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write beside and rename. Raises StorageError if it can't be written."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, part, header)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise StorageError(_unwritable(path, error)) from error


def load_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """Tensors and facts, None where there is no such file. Raises TrainingError for one that isn't a checkpoint."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        what = f"no checkpoint, or a damaged one ({first_line(error)})"
        raise TrainingError(f"{path}: {what}; delete it to start anew") from error
    if facts.get("version") != VERSION:
        raise TrainingError(f"{path}: a checkpoint of version {facts.get('version')}; delete it to start anew")
    return tensors, facts


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes and values: by which the start of a training is recognised."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(dtype=torch.uint8).numpy().tobytes())
    return found.hexdigest()


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def without(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _unwritable(path: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) in _FULL or "No space left" in str(error) or "File too large" in str(error)
    way = "free some space" if full else "give another folder"
    reason = getattr(error, "strerror", None) or first_line(error)
    return f"checkpoint {path}: can't be written ({reason}); {way} and run the same again, it goes on where it stopped"
