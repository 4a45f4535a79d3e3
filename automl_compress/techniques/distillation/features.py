"""Losses on what layers read. Features are tensors [N, C, ...] of convolutions or [N, ..., C] of linear layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.techniques.distillation.outputs import squared_error
from automl_compress.techniques.distillation.pairing import Pair

Watch = Callable[[str, Tensor], None]
_WIDEST_PRODUCT = 512


@runtime_checkable
class Watched(Protocol):
    """A model that runs its layers itself, and tells what they read: `watcher(layer, input)` is called for each."""

    watcher: Watch | None


@contextmanager
def layer_inputs(model: nn.Module, layers: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """While active, fills a dictionary with what layers of `model` read; `layers` are the paths of their modules."""
    seen: dict[str, Tensor] = {}
    if isinstance(model, Watched):

        def watcher(name: str, value: Tensor) -> None:
            if name in layers:
                seen[name] = value

        model.watcher = watcher
        try:
            yield seen
        finally:
            model.watcher = None
        return
    with ExitStack() as hooks:
        for name in layers:
            handle = model.get_submodule(name).register_forward_pre_hook(_keeper(name, seen), with_kwargs=True)
            hooks.callback(handle.remove)
        yield seen


def _keeper(name: str, seen: dict[str, Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[name] = args[0] if args else kwargs["input"]

    return keep


def same_channels(pair: Pair, teacher: Tensor) -> Tensor:
    """The teacher's feature with the channels that the student's has."""
    if pair.channels is None:
        return teacher
    index = torch.tensor(pair.channels, device=teacher.device)
    if pair.channel_dim == -1:
        return teacher[..., index]
    if teacher.ndim != 4 or not teacher.is_contiguous(memory_format=torch.channels_last):
        return teacher[:, index]
    if teacher.dtype != torch.bfloat16 or teacher.shape[1] > _WIDEST_PRODUCT:
        return teacher[:, index].contiguous(memory_format=torch.channels_last)
    # Picking numbers of two bytes one by one takes longer than a product with ones and zeros, which is exact, too.
    ones = functional.one_hot(index, teacher.shape[1]).to(teacher.dtype)
    return (teacher.movedim(1, -1) @ ones.T).movedim(-1, 1)


def hint(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """Squared error of features with the same channels, over the teacher's variance; scalar.

    counted  which tokens [N, T] of features [N, T, C] aren't padding

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", eq. 3.
    """
    if counted is not None and student.ndim == 3 and student.shape[:2] == counted.shape:
        keep = counted.bool()
        student, teacher = student[keep], teacher[keep]
    return squared_error(student, teacher)


def attention_transfer(student: Tensor, teacher: Tensor, channel_dim: int, counted: Tensor | None = None) -> Tensor:
    """Squared distance of where features are large: mean over channels of their squares, normalised over positions.

    Features have positions [N, C, ...] or tokens [N, ..., C]; widths may differ. Scalar.

    Source: Zagoruyko, Komodakis 2017, "Paying More Attention to Attention", eq. 2 (p = 2).
    """
    maps: list[Tensor] = [_MeanPower.apply(part, channel_dim) for part in (student, teacher)]  # type: ignore[no-untyped-call]
    if counted is not None and maps[0].shape == counted.shape:
        maps = [part * counted.to(part.dtype) for part in maps]
    unit = [functional.normalize(part.flatten(1), dim=1) for part in maps]
    return (unit[0] - unit[1]).square().sum(1).mean()


class _MeanPower(torch.autograd.Function):
    """Mean of squares along a dimension in float32, without a copy in another precision: features are large."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(feature)
        ctx.dim = dim
        precision = torch.promote_types(feature.dtype, torch.float32)
        length: Tensor = torch.linalg.vector_norm(feature, dim=dim, dtype=precision)
        return length.square() / feature.shape[dim]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (feature,) = ctx.saved_tensors
        factor = (gradient * (2 / feature.shape[ctx.dim])).to(feature.dtype)
        return feature * factor.unsqueeze(ctx.dim), None


def adapted(adapter: nn.Module, feature: Tensor, channel_dim: int) -> Tensor:
    """A feature with its channels mapped linearly, position by position: the regressor of FitNets, section 2.2."""
    mapped: Tensor = adapter(feature.movedim(channel_dim, -1))
    return mapped.movedim(-1, channel_dim)
