"""A user's data, as batches of one form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from automl_compress.errors import CompressError, TaskError, raised

BATCH_SIZE = 128
NO_BATCH = "its loader yields no batch; it must yield them all each time it is read"


def loader(data: Any, split: str, *, shuffle: bool = False) -> Iterable[Any]:
    """Data in whatever form they may be given, as an iterable of batches. Raises TaskError."""
    if data is None:
        raise TaskError(f"task: {split} data is missing")
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, Sized) and len(data.dataset) == 0:
            raise TaskError(f"task: {split} data is empty")
        return data
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        if len(data[0]) != len(data[1]):
            raise TaskError(f"task: {split} has {len(data[0])} inputs but {len(data[1])} targets")
        data = TensorDataset(*data)
    if isinstance(data, Dataset):
        if len(data) == 0:  # type: ignore[arg-type]
            raise TaskError(f"task: {split} data is empty")
        return DataLoader(data, batch_size=BATCH_SIZE, shuffle=shuffle)
    if isinstance(data, Iterator):
        raise TaskError(
            f"task: {split} can be read only once ({type(data).__name__}); give a DataLoader, Dataset or list"
        )
    if isinstance(data, Sized) and len(data) == 0:
        raise TaskError(f"task: {split} data is empty")
    if not isinstance(data, Iterable):
        raise TaskError(
            f"task: {split} must be a DataLoader, Dataset, list of batches or pair of tensors, "
            f"found {type(data).__name__}"
        )
    return data


def reading(data: Iterable[Any], split: str) -> Iterator[Any]:
    """What the user's data yield; what they raise as one line."""
    iterator: Iterator[Any] | None = None
    while True:
        try:
            iterator = iter(data) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except CompressError:
            raise
        except Exception as error:
            raise TaskError(f"task: reading {split} data raised {raised(error)}") from error
        yield batch


def as_inputs(value: Any, what: str) -> tuple[Tensor, ...]:
    """A tensor or several as a tuple. Raises TaskError, which calls them `what`."""
    inputs = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not inputs or not all(isinstance(part, Tensor) for part in inputs):
        found = ", ".join(type(part).__name__ for part in inputs) or "nothing"
        raise TaskError(f"task: {what} must be a tensor or a tuple of tensors, found {found}")
    return inputs


def as_batch(batch: Any, split: str, number: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """(tuple of inputs, targets). Raises TaskError, which names the batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sized) else type(batch).__name__
        raise TaskError(f"task: {split} batch {number} must be a pair (inputs, targets), found {found}")
    inputs, targets = batch
    if not isinstance(targets, Tensor):
        raise TaskError(f"task: {split} batch {number}: targets must be a tensor, found {type(targets).__name__}")
    if len(targets) == 0:
        raise TaskError(f"task: {split} batch {number} is empty")
    return as_inputs(inputs, f"{split} batch {number}: inputs"), targets
