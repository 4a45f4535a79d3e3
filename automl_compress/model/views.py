"""Views of an input: other inputs that mean the same, such as its mirror image. A teacher answers for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from automl_compress.errors import TaskError
from automl_compress.model.outputs import called

View = Callable[..., Any]


def seen(view: View, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A batch as a view shows it. Raises TaskError where that is not the same number of tensors of the same shapes."""
    name = view_name(view)
    with called("view", view, f"inputs {_shapes(inputs)}"):
        result = view(*inputs)
    shown = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    if not all(isinstance(part, Tensor) for part in shown):
        found = ", ".join(type(part).__name__ for part in shown)
        raise TaskError(f"task: view {name} must return a tensor or a tuple of tensors, as it gets them, found {found}")
    if _kinds(shown) != _kinds(inputs):
        raise TaskError(
            f"task: view {name} made {_shapes(shown)} of inputs {_shapes(inputs)}; shapes and types must stay"
        )
    return shown


def view_name(view: View) -> str:
    return str(getattr(view, "__name__", type(view).__name__))


def _kinds(inputs: tuple[Tensor, ...]) -> list[Any]:
    return [(part.shape, part.dtype) for part in inputs]


def _shapes(inputs: tuple[Tensor, ...]) -> str:
    return ", ".join(f"{tuple(part.shape)} {str(part.dtype).removeprefix('torch.')}" for part in inputs)
