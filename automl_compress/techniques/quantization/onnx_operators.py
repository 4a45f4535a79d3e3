"""ONNX operators in PyTorch: name -> function of a node and its inputs, differentiable where the operator is."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.nn import functional

from automl_compress.techniques.onnx_graph import attribute

Operator = Callable[[onnx.NodeProto, list[Any]], Any]
_FAR = 2**31  # what stands for "to the end"
_TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.BOOL: torch.bool,
}


def _padded(node: onnx.NodeProto, x: Tensor, value: float = 0.0) -> Tensor:
    """`x` with a window's padding, which may differ on two sides of an axis."""
    pads = list(attribute(node, "pads", [])) or [0] * 2 * (x.ndim - 2)
    if not any(pads):
        return x
    half = len(pads) // 2
    flat = [side for axis in reversed(range(half)) for side in (pads[axis], pads[half + axis])]
    return functional.pad(x, flat, value=value)


def _conv(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    x, weight, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    rank = weight.ndim - 2
    run = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    strides = tuple(attribute(node, "strides", [1] * rank))
    dilations = tuple(attribute(node, "dilations", [1] * rank))
    result: Tensor = run(_padded(node, x), weight, bias, strides, 0, dilations, attribute(node, "group", 1))
    return result


def _gemm(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    a = inputs[0].T if attribute(node, "transA", 0) else inputs[0]
    b = inputs[1].T if attribute(node, "transB", 0) else inputs[1]
    result: Tensor = attribute(node, "alpha", 1.0) * (a @ b)
    return result + attribute(node, "beta", 1.0) * inputs[2] if len(inputs) > 2 and inputs[2] is not None else result


def _clip(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    low, high = (inputs[i] if len(inputs) > i else None for i in (1, 2))
    result: Tensor = inputs[0] if low is None and high is None else torch.clamp(inputs[0], low, high)
    return result


def _layer_norm(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    axis = attribute(node, "axis", -1) % inputs[0].ndim
    bias = inputs[2] if len(inputs) > 2 else None
    return functional.layer_norm(inputs[0], inputs[0].shape[axis:], inputs[1], bias, attribute(node, "epsilon", 1e-5))


def _batch_norm(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    x, scale, shift, mean, variance = inputs
    return functional.batch_norm(x, mean, variance, scale, shift, False, 0.0, attribute(node, "epsilon", 1e-5))


def _max_pool(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    kernel = tuple(attribute(node, "kernel_shape"))
    run = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    strides = tuple(attribute(node, "strides", [1] * len(kernel)))
    dilations = tuple(attribute(node, "dilations", [1] * len(kernel)))
    ceil = bool(attribute(node, "ceil_mode", 0))
    result: Tensor = run(_padded(node, inputs[0], -torch.inf), kernel, strides, 0, dilations, ceil_mode=ceil)
    return result


def _average_pool(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    kernel = tuple(attribute(node, "kernel_shape"))
    strides = tuple(attribute(node, "strides", [1] * len(kernel)))
    run = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    mean: Tensor = run(_padded(node, inputs[0]), kernel, strides)
    if attribute(node, "count_include_pad", 0) or not any(attribute(node, "pads", [])):
        return mean
    inside: Tensor = run(_padded(node, torch.ones_like(inputs[0][:1, :1])), kernel, strides)
    return mean / inside


def _axes(node: onnx.NodeProto, inputs: list[Any]) -> list[int] | None:
    if len(inputs) > 1 and inputs[1] is not None:
        return [int(axis) for axis in inputs[1].reshape(-1)]
    given = attribute(node, "axes")
    return None if given is None else list(given)


def _reduce(run: Callable[..., Tensor]) -> Operator:
    def reduced(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
        axes = _axes(node, inputs) or list(range(inputs[0].ndim))
        return run(inputs[0], dim=axes, keepdim=bool(attribute(node, "keepdims", 1)))

    return reduced


def _reshape(_: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    sizes = [int(size) for size in inputs[1]]
    result: Tensor = inputs[0].reshape([inputs[0].shape[i] if size == 0 else size for i, size in enumerate(sizes)])
    return result


def _flatten(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    axis = attribute(node, "axis", 1)
    rows = 1
    for size in inputs[0].shape[:axis]:
        rows *= size
    result: Tensor = inputs[0].reshape(rows, -1)
    return result


def _squeeze(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    axes = _axes(node, inputs)
    result: Tensor = inputs[0].squeeze() if axes is None else inputs[0].squeeze(tuple(axes))
    return result


def _unsqueeze(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    axes = _axes(node, inputs) or []
    result: Tensor = inputs[0]
    for axis in sorted(axis % (inputs[0].ndim + len(axes)) for axis in axes):
        result = result.unsqueeze(axis)
    return result


def _slice(_: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    x = inputs[0]
    starts, ends = ([max(-_FAR, min(int(v), _FAR)) for v in part] for part in inputs[1:3])
    axes = [int(v) for v in inputs[3]] if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = [int(v) for v in inputs[4]] if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            positions = list(range(x.shape[axis]))[slice(start, None if end < -x.shape[axis] else end, step)]
            x = x.index_select(axis, torch.tensor(positions, device=x.device))
        else:
            x = x[tuple([slice(None)] * (axis % x.ndim) + [slice(start, end, step)])]
    result: Tensor = x
    return result


def _split(node: onnx.NodeProto, inputs: list[Any]) -> tuple[Tensor, ...]:
    axis = attribute(node, "axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        return tuple(inputs[0].split([int(size) for size in inputs[1]], dim=axis))
    size = -(-inputs[0].shape[axis] // len(node.output))
    return tuple(inputs[0].split(size, dim=axis))


def _pad(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    x, pads = inputs[0], [int(p) for p in inputs[1]]
    value = float(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else 0.0
    axes = [int(a) % x.ndim for a in inputs[3]] if len(inputs) > 3 and inputs[3] is not None else list(range(x.ndim))
    sides = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
    flat = [side for axis in reversed(range(x.ndim)) for side in sides.get(axis, (0, 0))]
    mode = {b"constant": "constant", b"reflect": "reflect", b"edge": "replicate"}[attribute(node, "mode", b"constant")]
    if mode == "constant":
        return functional.pad(x, flat, value=value)
    while len(flat) > 2 * (x.ndim - 2) and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return functional.pad(x, flat, mode=mode)


def _gather(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    x, index, axis = inputs[0], inputs[1].long(), attribute(node, "axis", 0) % inputs[0].ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    taken = x.index_select(axis, index.reshape(-1))
    result: Tensor = taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    return result


def _depth_to_space(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    size = attribute(node, "blocksize")
    if attribute(node, "mode", b"DCR") == b"CRD":
        return functional.pixel_shuffle(inputs[0], size)
    n, c, h, w = inputs[0].shape
    parts = inputs[0].reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    result: Tensor = parts.reshape(n, c // size**2, h * size, w * size)
    return result


def _space_to_depth(node: onnx.NodeProto, inputs: list[Any]) -> Tensor:
    size = attribute(node, "blocksize")
    n, c, h, w = inputs[0].shape
    parts = inputs[0].reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    result: Tensor = parts.reshape(n, c * size**2, h // size, w // size)
    return result


def _each(run: Callable[..., Any]) -> Operator:
    return lambda _, inputs: run(*inputs)


OPERATORS: dict[str, Operator] = {
    "Add": _each(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda node, inputs: inputs[0].to(_TYPES[attribute(node, "to")]),
    "Clip": _clip,
    "Concat": lambda node, inputs: torch.cat(inputs, dim=attribute(node, "axis")),
    "Conv": _conv,
    "DepthToSpace": _depth_to_space,
    "Div": _each(lambda a, b: a / b if a.is_floating_point() else a // b),
    "Elu": lambda node, inputs: functional.elu(inputs[0], attribute(node, "alpha", 1.0)),
    "Equal": _each(torch.eq),
    "Erf": _each(torch.erf),
    "Exp": _each(torch.exp),
    "Expand": lambda _, inputs: inputs[0] * torch.ones(inputs[1].tolist(), dtype=inputs[0].dtype),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": lambda node, inputs: functional.gelu(
        inputs[0], approximate=attribute(node, "approximate", b"none").decode()
    ),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda _, inputs: inputs[0].mean(dim=tuple(range(2, inputs[0].ndim)), keepdim=True),
    "HardSigmoid": lambda node, inputs: torch.clamp(
        attribute(node, "alpha", 0.2) * inputs[0] + attribute(node, "beta", 0.5), 0, 1
    ),
    "HardSwish": _each(functional.hardswish),
    "Identity": _each(lambda x: x),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node, inputs: functional.leaky_relu(inputs[0], attribute(node, "alpha", 0.01)),
    "MatMul": _each(torch.matmul),
    "Max": lambda _, inputs: reduce(torch.maximum, inputs),
    "MaxPool": _max_pool,
    "Min": lambda _, inputs: reduce(torch.minimum, inputs),
    "Mul": _each(torch.mul),
    "Neg": _each(torch.neg),
    "Pad": _pad,
    "Pow": _each(torch.pow),
    "Reciprocal": _each(torch.reciprocal),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _each(functional.relu),
    "Reshape": _reshape,
    "Shape": lambda node, inputs: torch.tensor(
        inputs[0].shape[attribute(node, "start", 0) : attribute(node, "end", None)]
    ),
    "Sigmoid": _each(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda node, inputs: torch.softmax(inputs[0], dim=attribute(node, "axis", -1)),
    "Softplus": _each(functional.softplus),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _each(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _each(torch.sub),
    "Sum": lambda _, inputs: reduce(torch.add, inputs),
    "Tanh": _each(torch.tanh),
    "Transpose": lambda node, inputs: inputs[0].permute(*attribute(node, "perm", list(range(inputs[0].ndim))[::-1])),
    "Unsqueeze": _unsqueeze,
    "Where": _each(torch.where),
}
