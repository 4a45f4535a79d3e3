"""Remembers a teacher's answers by sample, so that the teacher runs once for each.

A sample is known by a digest of its bytes. So shuffled data without augmentation is found again in the next epoch, and
data whose augmentation depends on nothing but a seed in the next training with that seed; what a random augmentation
made is never seen again, and then the cache turns itself off.

What is remembered is what the teacher answered, bit by bit. In another batch it might have answered a little
differently: how a batch is split up for computing decides in which order numbers are added. So training with the cache
gives the same student where batches are composed as they were, and one that differs by rounding where they are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from automl_compress.model.task import Inputs

Tensors = dict[str, Tensor]
LIMIT_BYTES = 256 << 20
_PATIENCE = 1.1  # epochs; in the first one nothing can be found unless an earlier training left it
_OVERHEAD_BYTES = 300  # of an entry: key, list, and the objects of two tensors


@dataclass
class _Shelf:
    """Answers of one kind: which layers were watched, in which precision. `asked` and `hits` are this training's."""

    rows: dict[bytes, Sequence[Tensor]] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    active: bool = True
    hopeless: bool = False
    inherited: bool = False
    asked: int = 0
    hits: int = 0


class AnswerCache:
    """Answers [N, ...] by sample, for one teacher. `limit_bytes` of answers are kept, the first ones; 0 keeps none.

    `begin` starts a training. In one that has found nothing after an epoch and a tenth, nothing is looked up or kept
    any more; where not even what an earlier training left was found, it is dropped, and nothing is kept for good.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes, self.bytes = limit_bytes, 0
        self.hits = self.asked = 0
        self._shelves: dict[str, _Shelf] = {}
        self._epoch: int | None = None

    def begin(self, samples_per_epoch: int | None) -> None:
        """A training starts; None where nobody knows how long its epochs are, and it is never turned off."""
        self._epoch = samples_per_epoch
        for shelf in self._shelves.values():
            shelf.active, shelf.inherited = not shelf.hopeless, bool(shelf.rows)
            shelf.asked = shelf.hits = 0

    @property
    def hit_rate(self) -> float:
        """Of all samples that a teacher was wanted for, those that needed none."""
        return self.hits / max(1, self.asked)

    @property
    def words(self) -> str:
        return f"{self.hit_rate:.0%} of the teacher's {self.asked} answers were known ({self.bytes / 1e6:.0f} MB)"

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
        if not shelf.active or self.limit_bytes <= 0:
            return ask(inputs)
        keys = digests(tuple(part[: count - unique] for part in inputs))
        unknown = [index for index, key in enumerate(keys) if key not in shelf.rows]
        new_keys = [keys[index] for index in unknown]
        if not keys or 2 * (len(keys) - len(unknown)) < len(keys):
            # Putting answers together costs more than asking for a few: features are large.
            answers = ask(inputs)
            self._keep(shelf, new_keys, answers, count, unknown)
            shelf.asked += count
            self._consider(shelf)
            return answers
        unknown += range(len(keys), count)
        self.hits += count - len(unknown)
        shelf.asked, shelf.hits = shelf.asked + count, shelf.hits + count - len(unknown)
        if not unknown:
            return _stacked(shelf, keys, inputs[0].device)
        index = torch.tensor(unknown, device=inputs[0].device)
        fresh = ask(tuple(part.index_select(0, index) for part in inputs))
        answers = _merged(shelf, keys, unknown, fresh, inputs[0].device)
        self._keep(shelf, new_keys, fresh, len(unknown), range(len(new_keys)))
        return answers

    def _keep(self, shelf: _Shelf, keys: Sequence[bytes], answers: Tensors, asked: int, places: Sequence[int]) -> None:
        """Rows of the answers to `asked` samples: a key and a place each, places ascending."""
        if not keys or not all(value.ndim and len(value) == asked for value in answers.values()):
            return
        size = sum(value[0].numel() * value.element_size() for value in answers.values()) + _OVERHEAD_BYTES
        room = min((self.limit_bytes - self.bytes) // size, len(keys))
        if room <= 0:
            return
        shelf.names = tuple(answers)
        # All rows share the memory of one tensor, so one that isn't kept must not be in it.
        columns = [value.detach().cpu() for value in answers.values()]
        if room < asked:
            columns = [column[list(places[:room])] for column in columns]
        for key, *row in zip(keys, *(column.unbind() for column in columns), strict=False):
            self.bytes += 0 if key in shelf.rows else size
            shelf.rows[key] = row

    def _consider(self, shelf: _Shelf) -> None:
        """Stop where an epoch, and the beginning of the next, have shown that nothing comes back."""
        if self._epoch is None or shelf.asked < self._epoch * _PATIENCE or shelf.hits:
            return
        shelf.active = False
        if shelf.inherited:
            row = next(iter(shelf.rows.values()))
            self.bytes -= len(shelf.rows) * (sum(part.numel() * part.element_size() for part in row) + _OVERHEAD_BYTES)
            shelf.rows.clear()
            shelf.hopeless = True


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
