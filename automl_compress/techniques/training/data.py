"""Training batches one after the other, pass after pass, and the place in them at which training stands."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from automl_compress.errors import TaskError
from automl_compress.model.batches import NO_BATCH
from automl_compress.model.task import Batch, Task
from automl_compress.techniques.training import randomness


class Batches:
    """Endless batches of a task's training data.

    A batch of a single sample is left out where others are larger: it is the remainder of a pass, and batch-norm can't
    train on it. The place in the data is the random state at the start of the pass and the number of batches read
    since: `resume` reads (and drops) as many again.
    """

    def __init__(self, task: Task, generators: randomness.Generators) -> None:
        self._task, self._generators = task, generators
        self.length = batches_in(task)
        self.notes: list[str] = []
        self._iterator: Iterator[Batch] | None = None
        self._start: randomness.State = []
        self._read = self._used = self._digest = self._largest = 0

    def next(self) -> Batch:
        """The next batch. Raises TaskError for data that yields nothing, or where reading it fails."""
        while True:
            if self._iterator is None:
                self._begin()
            batch = self._draw()
            if batch is None:
                self._end()
                continue
            self._largest = max(self._largest, len(batch[1]))
            if len(batch[1]) == 1 < self._largest:
                continue
            self._used += 1
            return batch

    def place(self) -> dict[str, Any]:
        """Where training stands, as plain values."""
        return {
            "start": self._start,
            "read": self._read,
            "used": self._used,
            "digest": self._digest,
            "largest": self._largest,
            "notes": list(self.notes),
        }

    def resume(self, place: dict[str, Any]) -> None:
        """Go to where another process stood; the random states are then those of the pass's reading alone, so the
        caller sets its own afterwards."""
        self.notes = list(place["notes"])
        if not place["read"]:
            return
        randomness.restore(place["start"], self._generators)
        self._begin()
        for _ in range(place["read"]):
            if self._draw() is None:
                break
        if (self._read, self._digest) != (place["read"], place["digest"]):
            self._note("the data came in another order after the interruption: resuming was not exact")
        self._read, self._used, self._largest = place["read"], place["used"], place["largest"]

    def _begin(self) -> None:
        self._start = randomness.capture(self._generators)
        self._iterator = self._task.batches("train")
        self._read = self._used = self._digest = 0

    def _draw(self) -> Batch | None:
        assert self._iterator is not None
        try:
            batch = next(self._iterator)
        except StopIteration:
            return None
        self._read += 1
        self._digest = zlib.crc32(_bytes(batch[1]), self._digest)
        return batch

    def _end(self) -> None:
        self._iterator = None
        if not self._used:
            raise TaskError(f"task: train data is empty: {NO_BATCH}")
        if self._read < self.length:
            self._note(f"a pass over the train data ended after {self._read} of {self.length} batches")
        self._read = 0

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _bytes(targets: Tensor) -> bytes:
    return targets.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def batches_in(task: Task) -> int:
    """Batches of a pass: what the loader says, or counted where it can't say."""
    try:
        return len(task.train)
    except TypeError:
        return sum(1 for _ in task.batches("train"))
