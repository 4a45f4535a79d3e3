"""How many samples fit at a time: found before training, by predicted need on a processor, by trying on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from automl_compress.errors import TrainingError
from automl_compress.model.task import Batch

Step = Callable[[Batch], object]
_CGROUP = Path("/sys/fs/cgroup")
# Beside what backward needs there are gradients of activations and buffers of kernels.
_HEADROOM = 1.5
_USABLE = 0.8
_FEW, _SOME = 2, 8  # samples that the need is told from: between these, an eighth of a batch


def pieces_of(batch: Batch, micro: int | None) -> list[Batch]:
    """A batch in equal pieces of at most `micro` samples; whole where something in it has another batch dimension.

    A piece of one sample is avoided where there is a choice, as batch-norm can't train on it.
    """
    inputs, targets = batch
    count = len(targets)
    alike = all(part.ndim and len(part) == count for part in inputs)
    if micro is None or count <= micro or not alike:
        return [batch]
    parts = -(-count // micro)
    if micro > 1:
        parts = min(parts, max(1, count // 2))
    columns = [torch.tensor_split(part, parts) for part in (*inputs, targets)]
    return [(tuple(row[:-1]), row[-1]) for row in zip(*columns, strict=True)]


def fewest_pieces(samples: int, fits: Callable[[int], bool]) -> int:
    """The smallest number of pieces of which the largest fits: doubling, then bisection. `fits` takes samples.

    Raises TrainingError where not even a single sample fits.
    """
    low, high = 0, 1
    while not fits(-(-samples // high)):
        if high >= samples:
            raise TrainingError(
                "a training step on a single sample doesn't fit in the device's memory; use a smaller model or input, "
                "another device, or state what may be used (resources.memory_bytes)"
            )
        low, high = high, min(2 * high, samples)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(-(-samples // middle)) else (middle, high)
    return high


def fitting(batch: Batch, step: Step, parameters: Iterable[nn.Parameter], states: int, memory_bytes: int) -> int | None:
    """Samples at a time that fit, None for the whole batch.

    step    runs forward and backward on a batch
    states  tensors of a parameter's size that the optimizer keeps
    memory_bytes  what may be used; 0: what is free
    """
    targets = batch[1]
    count = len(targets)
    if targets.device.type == "cuda" and not memory_bytes:
        pieces = fewest_pieces(count, lambda n: _runs(step, head(batch, n), parameters, states))
    else:
        if count < 2 * _FEW:
            return None
        small = min(max(count // 8, _FEW), _SOME)
        size = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
        few, more = (kept_bytes(step, head(batch, n)) for n in (small, 2 * small))
        each = max(0.0, (more - few) / small)
        rest = max(0.0, few - small * each) + (1 + states) * size
        room = memory_bytes or available_bytes() * _USABLE
        pieces = fewest_pieces(count, lambda n: rest + n * each * _HEADROOM <= room)
    return None if pieces == 1 else -(-count // pieces)


def kept_bytes(step: Step, batch: Batch) -> int:
    """Bytes that forward keeps for backward: every tensor counts once."""
    seen: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        step(batch)
    return sum(seen.values())


def available_bytes() -> int:
    """Free memory of this machine, or of the container that this process runs in."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def head(batch: Batch, count: int) -> Batch:
    """The first samples of a batch."""
    return tuple(part[:count] for part in batch[0]), batch[1][:count]


def _runs(step: Step, batch: Batch, parameters: Iterable[nn.Parameter], states: int) -> bool:
    try:
        ballast = [torch.empty_like(p) for p in parameters if p.requires_grad for _ in range(states)]
        step(batch)
    except torch.OutOfMemoryError:
        return False
    else:
        del ballast
        return True
    finally:
        torch.cuda.empty_cache()
