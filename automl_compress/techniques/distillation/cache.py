"""Remembers a teacher's answers by sample, so that the teacher runs once for each.

A sample is known by a digest of its bytes. So shuffled data without augmentation is found again in the next epoch; what
a random augmentation made is never seen again, and then nothing is looked up any more.

What is remembered is what the teacher answered, bit by bit. In another batch it might have answered a little
differently: how a batch is split up for computing decides in which order numbers are added. So which samples a teacher
is asked about, and in which batches, follows from the training under way alone. What an earlier training asked is used
where the very same batch is asked about again, as it is by the next candidate, which has the same seed: that saves the
teacher and changes no bit. And what a training remembers is written beside its checkpoints (`remembered`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from automl_compress.model.task import Inputs
from automl_compress.techniques.distillation.remembered import Row, Rows, read_rows, write_rows

Tensors = dict[str, Tensor]
LIMIT_BYTES = 256 << 20
_PATIENCE = 1.1  # epochs; in the first one nothing can be found
_STRANGE = 16  # batches in a row that no earlier training asked about: it had other data, or another seed
_OVERHEAD_BYTES = 300  # of an entry: key, list, and the objects of two tensors


@dataclass
class _Shelf:
    """What the training under way remembers of one kind: which layers were watched, in which precision."""

    rows: dict[bytes, Row] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    bytes: int = 0
    active: bool = True
    asked: int = 0
    hits: int = 0
    written: int = 0  # rows that lie in files


@dataclass
class _Asked:
    """The answers to one batch. Those on a shelf share its memory; the others wait for a batch that is the same."""

    answers: Tensors
    bytes: int
    shelf: str | None
    used: bool = True


class AnswerCache:
    """Answers [N, ...] by sample, for one teacher. `limit_bytes` of answers are kept, the first ones; 0 keeps none.

    `begin` starts a training. In one that has found nothing again after an epoch and a tenth, nothing is looked up or
    kept any more, except what an earlier training asked.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.hits = self.asked = 0
        self._shelves: dict[str, _Shelf] = {}
        self._batches: dict[bytes, _Asked] = {}
        self._epoch: int | None = None
        self._strange = self._files = 0

    def begin(self, samples_per_epoch: int | None) -> None:
        """A training starts; None where nobody knows how long its epochs are, and it is never turned off."""
        self._epoch, self._strange = samples_per_epoch, 0
        self._batches = {key: batch for key, batch in self._batches.items() if batch.used}
        for batch in self._batches.values():
            batch.used = False
        self.forget()

    def forget(self) -> None:
        """The training under way has asked nothing yet."""
        self._shelves, self._files = {}, 0
        for batch in self._batches.values():
            batch.shelf = None

    @property
    def size_bytes(self) -> int:
        """Of all that is remembered."""
        waiting = sum(batch.bytes for batch in self._batches.values() if batch.shelf is None)
        return waiting + sum(shelf.bytes for shelf in self._shelves.values())

    @property
    def hit_rate(self) -> float:
        """Of all samples that a teacher was wanted for, those that needed none."""
        return self.hits / max(1, self.asked)

    @property
    def words(self) -> str:
        return f"{self.hit_rate:.0%} of the teacher's {self.asked} answers were known ({self.size_bytes / 1e6:.0f} MB)"

    def answers(self, context: str, inputs: Inputs, ask: Callable[[Inputs], Tensors], *, unique: int = 0) -> Tensors:
        """What `ask(inputs)` returns, from memory for samples that are known.

        context  what answers depend on besides a sample's bytes
        unique   how many of the last samples are never asked about again: they are not looked up, and not kept

        Where at least half of those that are looked up are known, only the others are asked about, else all. Answers
        that don't have a row a sample are never kept.
        """
        shelf = self._shelves.setdefault(context, _Shelf())
        count = len(inputs[0])
        self.asked += count
        if self.limit_bytes <= 0 or not (shelf.active or self._waiting):
            return ask(inputs)
        keys = digests(tuple(part[: count - unique] for part in inputs))
        unknown = [index for index, key in enumerate(keys) if key not in shelf.rows]
        shelf.asked += count
        if not keys or 2 * (len(keys) - len(unknown)) < len(keys):
            # Putting answers together costs more than asking for a few: features are large.
            answers, batch = self._ask(context, keys if not unique else [], inputs, ask)
            self._keep(context, [keys[index] for index in unknown], answers, count, unknown, batch)
            self._consider(context)
            return answers
        new_keys = [keys[index] for index in unknown]
        unknown += range(len(keys), count)
        self.hits += count - len(unknown)
        shelf.hits += count - len(unknown)
        if not unknown:
            return _stacked(shelf, keys, inputs[0].device)
        index = torch.tensor(unknown, device=inputs[0].device)
        rest = tuple(part.index_select(0, index) for part in inputs)
        fresh, batch = self._ask(context, new_keys if not unique else [], rest, ask)
        answers = _merged(shelf, keys, unknown, fresh, inputs[0].device)
        self._keep(context, new_keys, fresh, len(unknown), range(len(new_keys)), batch)
        return answers

    def write(self, beside: Path) -> dict[str, Any]:
        """Write what came since the last time to a file beside a checkpoint; returns what `read` needs to know."""
        for context, shelf in self._shelves.items():
            keys = list(shelf.rows)[shelf.written :]
            for rows in _alike({key: shelf.rows[key] for key in keys}):
                self._files += 1
                write_rows(beside, self._files, Rows(context=context, names=shelf.names, rows=rows))
            shelf.written = len(shelf.rows)
        shelves = {name: [shelf.active, shelf.asked, shelf.hits] for name, shelf in self._shelves.items()}
        return {"files": self._files, "shelves": shelves}

    def read(self, beside: Path, facts: dict[str, Any]) -> None:
        """Remember what was written when `write` returned these facts. Raises TrainingError for a damaged file."""
        self.forget()
        for number in range(1, facts["files"] + 1):
            found = read_rows(beside, number)
            shelf = self._shelves.setdefault(found.context, _Shelf())
            shelf.names = found.names
            shelf.rows |= found.rows
            shelf.bytes += sum(_size(row) for row in found.rows.values())
            shelf.written = len(shelf.rows)
        self._files = facts["files"]
        for context, (active, asked, hits) in facts["shelves"].items():
            shelf = self._shelves.setdefault(context, _Shelf())
            shelf.active, shelf.asked, shelf.hits = active, asked, hits
            if not active:
                self._give_up(context)

    def _ask(
        self, context: str, keys: Sequence[bytes], inputs: Inputs, ask: Callable[[Inputs], Tensors]
    ) -> tuple[Tensors, bytes | None]:
        """The answers to a batch of these samples, and by what the batch is known again: by nothing without keys."""
        if not keys:
            return ask(inputs), None
        name = hashlib.blake2b(context.encode() + b"".join(keys), digest_size=16).digest()
        known = self._batches.get(name)
        if known is None:
            self._strange += 1
            if self._strange >= _STRANGE:
                self._batches = {key: batch for key, batch in self._batches.items() if batch.used}
            return ask(inputs), name
        self.hits += len(inputs[0])
        self._strange, known.used = 0, True
        return {key: value.to(inputs[0].device) for key, value in known.answers.items()}, name

    def _keep(
        self,
        context: str,
        keys: Sequence[bytes],
        answers: Tensors,
        asked: int,
        places: Sequence[int],
        batch: bytes | None,
    ) -> None:
        """Rows of the answers to `asked` samples: a key and a place each, places ascending."""
        shelf = self._shelves[context]
        if not (keys and shelf.active and all(value.ndim and len(value) == asked for value in answers.values())):
            return
        size = _size([value[0] for value in answers.values()])
        room = min((self.limit_bytes - sum(each.bytes for each in self._shelves.values())) // size, len(keys))
        if room <= 0:
            return
        shelf.names = tuple(answers)
        # All rows share the memory of one tensor, so one that isn't kept must not be in it.
        columns = [value.detach().cpu() for value in answers.values()]
        chosen = list(places[:room])
        if room == asked and batch is not None:
            self._batches[batch] = _Asked(dict(zip(answers, columns, strict=True)), asked * size, context)
        elif len(chosen) < asked:
            columns = [column[chosen] for column in columns]
        for key, *row in zip(keys, *(column.unbind() for column in columns), strict=False):
            shelf.bytes += 0 if key in shelf.rows else size
            shelf.rows[key] = row
        self._make_room()

    def _make_room(self) -> None:
        """What the training under way remembers comes before batches that wait to be asked about."""
        over = self.size_bytes - self.limit_bytes
        waiting = [name for name, batch in self._batches.items() if batch.shelf is None]
        while over > 0 and waiting:
            over -= self._batches.pop(waiting.pop()).bytes

    def _consider(self, context: str) -> None:
        """Stop where an epoch, and the beginning of the next, have shown that nothing comes back."""
        shelf = self._shelves[context]
        if shelf.active and self._epoch is not None and shelf.asked >= self._epoch * _PATIENCE and not shelf.hits:
            self._give_up(context)

    def _give_up(self, context: str) -> None:
        shelf = self._shelves[context]
        shelf.active, shelf.bytes, shelf.written = False, 0, 0
        shelf.rows.clear()
        for batch in self._batches.values():
            batch.shelf = None if batch.shelf == context else batch.shelf

    @property
    def _waiting(self) -> bool:
        return any(not batch.used for batch in self._batches.values())


def _alike(rows: Mapping[bytes, Row]) -> list[dict[bytes, Row]]:
    """Rows of one shape together: batches may differ in it, such as sentences that are padded by the batch."""
    groups: dict[Any, dict[bytes, Row]] = {}
    for key, row in rows.items():
        groups.setdefault(tuple((part.shape, part.dtype, part.stride()) for part in row), {})[key] = row
    return list(groups.values())


def _size(row: Row) -> int:
    return sum(part.numel() * part.element_size() for part in row) + _OVERHEAD_BYTES


def _stacked(shelf: _Shelf, keys: Sequence[bytes], device: torch.device) -> Tensors:
    columns = zip(*(shelf.rows[key] for key in keys), strict=True)
    return {name: _stack(column).to(device) for name, column in zip(shelf.names, columns, strict=True)}


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Rows side by side, in the memory format that they were computed in."""
    last = rows[0].movedim(0, -1) if rows[0].ndim == 3 else rows[0]
    if last is not rows[0] and last.is_contiguous() and not rows[0].is_contiguous():
        return torch.stack([row.movedim(0, -1) for row in rows]).movedim(-1, 1)
    return torch.stack(list(rows))


def _merged(
    shelf: _Shelf, keys: Sequence[bytes], unknown: Sequence[int], fresh: Tensors, device: torch.device
) -> Tensors:
    known = [index for index, key in enumerate(keys) if key in shelf.rows]
    old = _stacked(shelf, [keys[index] for index in known], device)
    back = torch.argsort(torch.tensor([*known, *unknown])).to(device)
    return {name: torch.cat([old[name], value]).index_select(0, back) for name, value in fresh.items()}


def digests(inputs: Inputs) -> list[bytes]:
    """A digest of each sample's bytes, in whatever memory format they lie."""
    shapes = [(part.dtype, tuple(part.shape[1:])) for part in inputs]
    start = hashlib.blake2b(str(shapes).encode(), digest_size=16)
    rows = [part.detach().cpu().contiguous().reshape(len(part), -1).view(torch.uint8).numpy() for part in inputs]
    found = []
    for index in range(len(inputs[0])):
        digest = start.copy()
        for part in rows:
            digest.update(part[index])
        found.append(digest.digest())
    return found
