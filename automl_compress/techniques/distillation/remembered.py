"""Remembered answers in files: safetensors with a few words of JSON in the header. Nothing in them is ever executed.

A file holds what came since the one before it, so that a training that is written every two minutes writes each answer
once. Answers keep their memory format, by which the order of sums goes in what is computed from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from automl_compress.errors import TrainingError, first_line
from automl_compress.techniques.training.checkpoint import save_tensors

Row = Sequence[Tensor]
_KEYS = "keys"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Answers of one kind: digest of a sample -> a tensor for each of `names`."""

    context: str
    names: tuple[str, ...]
    rows: Mapping[bytes, Row]


def write_rows(beside: Path, number: int, found: Rows) -> None:
    """Write the file of this number beside a checkpoint: at least one row, all of one shape. Raises StorageError if
    that fails."""
    columns = list(zip(*found.rows.values(), strict=True))
    last = [_channels_last(column[0]) for column in columns]
    tensors = {
        str(index): torch.stack([row.movedim(0, -1) if last[index] else row for row in column])
        for index, column in enumerate(columns)
    }
    tensors[_KEYS] = torch.from_numpy(np.frombuffer(b"".join(found.rows), np.uint8).reshape(len(found.rows), -1).copy())
    header = {"context": found.context, "names": list(found.names), "channels_last": last}
    save_tensors(_path(beside, number), tensors, {"answers": json.dumps(header)})


def read_rows(beside: Path, number: int) -> Rows:
    """What was written under this number. Raises TrainingError for a file that is missing or damaged."""
    path = _path(beside, number)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["answers"])
            columns = [file.get_tensor(str(index)) for index in range(len(header["names"]))]
            keys = [bytes(key) for key in file.get_tensor(_KEYS).numpy()]
        formed = [
            column.movedim(-1, 1) if last else column
            for column, last in zip(columns, header["channels_last"], strict=True)
        ]
        rows = dict(zip(keys, zip(*(column.unbind() for column in formed), strict=True), strict=True))
        return Rows(context=header["context"], names=tuple(header["names"]), rows=rows)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        what = f"the teacher's remembered answers are missing or damaged ({first_line(error)})"
        raise TrainingError(f"{path}: {what}; delete {beside} to start anew") from error


def _channels_last(row: Tensor) -> bool:
    return row.ndim == 3 and not row.is_contiguous() and row.movedim(0, -1).is_contiguous()


def _path(beside: Path, number: int) -> Path:
    return beside.with_name(f"{beside.name}.answers-{number}")
