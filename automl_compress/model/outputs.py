"""What a model returns, in a tensor, a tuple, a dictionary or a dataclass, and what is checked of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from automl_compress.errors import CompressError, TaskError, raised


def arranged(tensors: Sequence[Tensor], like: Any) -> Any:
    """The tensors that an exported model returns, in the container in which the model itself returns them.

    like  what the model has returned; where it holds another number of tensors that torch knows how to find, a tuple
          (a tensor, if there is one alone) is returned
    """
    leaves, structure = tree_flatten(like)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(places) != len(tensors):
        return tensors[0] if len(tensors) == 1 else tuple(tensors)
    for place, tensor in zip(places, tensors, strict=True):
        leaves[place] = tensor
    return tree_unflatten(leaves, structure)


def joined(outputs: Sequence[Any]) -> Any:
    """Outputs of batches as those of one, on the processor, in the container that the model uses for them; a tuple for
    a list."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat([part.cpu() for part in outputs])
    if isinstance(first, dict):
        return type(first)({key: joined([part[key] for part in outputs]) for key in first})
    if isinstance(first, (tuple, list)):
        return tuple(joined(column) for column in zip(*outputs, strict=True))
    return first


@contextmanager
def called(what: str, function: Any, on: str) -> Iterator[None]:
    """What a user's function raises, as one line that names it and says what it was called on."""
    try:
        yield
    except (CompressError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise TaskError(f"the task's {what} {name} on {on} raised {raised(error)}") from error


def require_loss(loss: Any) -> Tensor:
    """The loss itself. Raises TaskError where it is no scalar tensor."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TaskError(f"the task's loss must return a scalar tensor, found {found}")
    return loss


def checked_forward(model: nn.Module, inputs: tuple[Tensor, ...], what: str, *, who: str = "the model") -> Any:
    """The model's outputs in eval mode. Raises TaskError, which says what the inputs are, where it fails on them or
    its answers aren't finite."""
    training, shapes = model.training, ", ".join(str(tuple(part.shape)) for part in inputs)
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(*inputs)
    except Exception as error:
        raise TaskError(f"task: {who}'s forward fails on {what} {shapes}: {raised(error)}") from error
    finally:
        model.train(training)
    if not all(bool(part.isfinite().all()) for part in tree_leaves(outputs) if isinstance(part, Tensor)):
        raise TaskError(
            f"task: {who} answers {what} {shapes} with NaN or infinity; check its weights and the data (a mask takes a "
            "large finite number, such as -1e4)"
        )
    return outputs


def check_labels(targets: Tensor, classes: int, split: str) -> None:
    """Raise TaskError unless targets are integers from 0 to classes - 1."""
    if targets.dtype.is_floating_point or targets.ndim != 1:
        raise TaskError(
            f"task: {split} targets must be class numbers [batch] (integers), found {targets.dtype} "
            f"{tuple(targets.shape)}; give a loss and a metric for anything else"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise TaskError(
            f"task: {split} labels must be 0 to {classes - 1} (the model has {classes} outputs), "
            f"found {low if low < 0 else high}"
        )
