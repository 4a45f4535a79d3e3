"""Sees every call of a layer while a model runs, whichever way its code makes the call, and where the result goes.

A layer's output often reaches a residual addition or a rectifier through operators that are affine per channel
(batch-norm in eval mode, a scale parameter). Up to there it can still be corrected, with the shortcut's value known:
that place is the layer's *site*. `LayerCalls` follows outputs to it. Layers inside of an operator that runs as one
(`nn.MultiheadAttention`) are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from automl_compress.core.graph import Graph, Layer

Reader = Literal["sum", "rectifier", "other"]
_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_ADDITIONS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_PRODUCTS = {"mul", "__mul__", "__rmul__"}
_RECTIFIERS = {"relu", "relu_"}
_UNCHANGED = {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "contiguous"}
_FACTS = {"__get__", "size", "dim", "stride", "numel", "is_floating_point", "is_contiguous", "__len__"}
_LAYER_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of a layer: its input, and how to make the call again with other weights.

    stride, dilation  a number per spatial dimension; empty for a linear layer
    padding           (before, after) per spatial dimension, zeros
    """

    layer: Layer
    source: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def channel_dim(self) -> int:
        """Of its output: 1 for a convolution, -1 for a linear layer."""
        return 1 if self.stride else -1

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Samples and positions of its output, without the channels."""
        if not self.stride:
            return tuple(self.source.shape[:-1])
        sizes = []
        for dim, size in enumerate(self.source.shape[2:]):
            span = self.dilation[dim] * (self.weight.shape[2 + dim] - 1) + 1
            sizes.append((size + sum(self.padding[dim]) - span) // self.stride[dim] + 1)
        return (self.source.shape[0], *sizes)

    def padded(self) -> Tensor:
        """Its input with the zeros around it."""
        sides = [side for pair in reversed(self.padding) for side in pair]
        return functional.pad(self.source, sides) if any(sides) else self.source

    def again(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for the same input with these weights."""
        if not self.stride:
            return functional.linear(self.source, weight, bias)
        convolution = getattr(functional, f"conv{len(self.stride)}d")
        result: Tensor = convolution(self.padded(), weight, bias, self.stride, 0, self.dilation, self.groups)
        return result


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """Where a layer's output, after operators that are affine per channel, is read by something else.

    value  that affine image of the output
    scale  its factor per channel [channels]; None: 1
    mean   running mean of the batch-norm on the way [channels], from which a bias of the layer can be subtracted
    other  what is about to be added to `value`
    added  `value` is the sum already
    """

    call: Call
    value: Tensor
    scale: Tensor | None = None
    mean: Tensor | None = None
    other: Tensor | None = None
    added: bool = False

    def per_channel(self, values: Tensor) -> Tensor:
        """One number a channel in a shape that multiplies `value`."""
        shape = [1] * self.value.ndim
        shape[self.call.channel_dim] = -1
        return values.view(shape)


class LayerCalls(TorchFunctionMode):
    """While active, reports the calls and sites of the graph's layers in `model` to what subclasses define."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__()
        stored = dict(model.named_parameters(remove_duplicate=False))
        self._layers = {id(stored[layer.weight]): layer for layer in graph.layers if layer.weight in stored}
        self._sites: Any = WeakIdKeyDictionary()
        self._order: dict[str, int] = {}

    def called(self, call: Call) -> None:
        """A layer is about to run; its weights may still be changed in place."""

    def returned(self, call: Call, output: Tensor) -> None:
        """A layer has run."""

    def reached(self, site: Site, reader: Reader) -> None:
        """`site.value` is about to be read; it may be changed in place unless `site.added`.

        A value that is read several times is reported each time.
        """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _FACTS:
            return func(*args, **kwargs)
        call = self._call(name, args, kwargs)
        tracked = [value for value in _tensors((*args, *kwargs.values())) if value in self._sites]
        if call is not None:
            self._read(tracked)
            self._order[call.layer.name] = len(self._order)
            self.called(call)
            result = func(*args, **kwargs)
            self.returned(call, result)
            self._sites[result] = Site(call=call, value=result)
            return result
        if not tracked:
            return func(*args, **kwargs)
        if name in _RECTIFIERS:
            self.reached(self._sites[tracked[0]], "rectifier")
            result = func(*args, **kwargs)
            if result is tracked[0]:  # in place: what follows reads something else
                self._sites.pop(result, None)
            return result
        if name in _ADDITIONS and len(args) == 2 and not kwargs and all(_same_shape(a, args[0]) for a in args):
            return self._add(func, args, tracked)
        step = None if self._sites[tracked[0]].added else _affine(name, args, kwargs, self._sites[tracked[0]])
        if step is None:
            self._read(tracked)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self._sites[result] = replace(step, value=result)
        return result

    def _read(self, tracked: Sequence[Tensor]) -> None:
        for value in tracked:
            self.reached(self._sites[value], "other")

    def _add(self, func: Callable[..., Any], args: Any, tracked: list[Tensor]) -> Any:
        """The operand whose layer ran last is the one that can still be corrected for the other."""
        correctable = [value for value in tracked if not self._sites[value].added]
        if not correctable or args[0] is args[1]:
            self._read(tracked)
            return func(*args)
        last = max(correctable, key=lambda value: self._order[self._sites[value].call.layer.name])
        self._read([value for value in tracked if value is not last])
        site = replace(self._sites[last], other=args[1] if last is args[0] else args[0])
        self.reached(site, "sum")
        result = func(*args)
        self._sites.pop(last, None)
        self._sites[result] = replace(site, value=result, other=None, added=True)
        return result

    def _call(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> Call | None:
        if name != "linear" and name not in _CONVOLUTIONS:
            return None
        given = dict(zip(_LAYER_ARGUMENTS, args, strict=False)) | dict(kwargs)
        layer = self._layers.get(id(given["weight"]))
        if layer is None:
            return None
        call = Call(layer=layer, source=given["input"], weight=given["weight"], bias=given.get("bias"))
        if name == "linear":
            return call
        dims = _CONVOLUTIONS[name]
        dilation = _each(given.get("dilation", 1), dims)
        return replace(
            call,
            stride=_each(given.get("stride", 1), dims),
            padding=_padding(given.get("padding", 0), given["weight"].shape[2:], dilation),
            dilation=dilation,
            groups=int(given.get("groups", 1)),
        )


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Those among an operator's arguments, also inside of lists (concatenation)."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [part for part in value if isinstance(part, Tensor)]
    return found


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else (int(value),)
    return values * dims if len(values) == 1 else values


def _padding(value: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _each(value, len(kernel)))


def _same_shape(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape


def _affine(name: str, args: Any, kwargs: Mapping[str, Any], site: Site) -> Site | None:
    """The site behind this operator if that is affine per channel, else None. Its `value` is still the old one."""
    if name in _UNCHANGED:
        return site
    if name == "batch_norm":
        return _normalised(dict(zip(_NORM_ARGUMENTS, args, strict=False)) | dict(kwargs), site)
    if name in _PRODUCTS and len(args) == 2:
        factor = args[1] if args[0] is site.value else args[0]
        channels = site.value.shape[site.call.channel_dim]
        if isinstance(factor, Tensor):
            wanted = [1] * site.value.ndim
            wanted[site.call.channel_dim] = channels
            if [1] * (site.value.ndim - factor.ndim) + list(factor.shape) != wanted:
                return None
            factor = factor.detach().flatten()
        return replace(site, scale=_times(site.scale, factor * site.value.new_ones(channels)))
    return None


def _normalised(given: Mapping[str, Any], site: Site) -> Site | None:
    variance, weight = given.get("running_var"), given.get("weight")
    if given.get("training") or variance is None or (site.call.channel_dim != 1 and site.value.ndim != 2):
        return None
    factor = (variance + given.get("eps", 1e-5)).rsqrt()
    scale = _times(site.scale, factor if weight is None else factor * weight.detach())
    # Only the first batch-norm's mean is in the units of the layer's output.
    return replace(site, scale=scale, mean=given["running_mean"] if site.scale is None else None)


def _times(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one * other
