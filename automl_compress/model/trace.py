"""From a module to a `Graph`: export, follow the channels, count, and try every kind of cut before offering it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from automl_compress.core.graph import Block, ChannelGroup, Frozen, Graph, Layer
from automl_compress.errors import TaskError
from automl_compress.model.coupling import LayerUse, Walk, channel_groups, residual_blocks
from automl_compress.model.surgery import copy_model, cut, silence_channels

_TRACE_BATCH = 2
_TOLERANCE = 1e-3


@contextmanager
def quiet() -> Iterator[None]:
    """Keep third parties' warnings and log lines from the user; they speak of their own internals."""
    loggers = [logging.getLogger(name) for name in ("fvcore", "torch.export", "torch.onnx", "torch._export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(model: nn.Module, example_inputs: Sequence[Tensor]) -> Graph:
    """Trace `model` (not modified) with one batch of inputs, batch dimension first.

    Every group and block of the result was cut once on a copy and compared with the original in which nothing read the
    removed channels; what did not agree is listed in `frozen`. Raises TaskError if the model can't be exported.
    """
    model = copy_model(model).cpu().float().eval()
    inputs = sample(example_inputs, _TRACE_BATCH)
    program = _export(model, inputs)
    walk = Walk(program).run()
    groups, frozen = channel_groups(walk)
    blocks = residual_blocks(walk)
    macs, skipped = count_macs(model, sample(example_inputs, 1))
    stored = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    graph = Graph(
        layers=tuple(_layer(walk, use, stored, macs) for use in _first_uses(walk)),
        groups=groups,
        blocks=blocks,
        frozen=frozen,
        skipped={**skipped, **{f"{name} (channels)": count for name, count in walk.unknown.items()}},
        sizes={name: tuple(value.shape) for name, value in stored.items()},
        input_shapes=tuple((1, *part.shape[1:]) for part in inputs),
    )
    return _link(_keep_what_works(model, inputs, program, graph))


def sample(inputs: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
    """The first `batch` rows of each input as float32 / integers on the CPU, repeated if there are fewer."""
    result = []
    for part in inputs:
        rows = part.detach().cpu()
        rows = rows.float() if rows.is_floating_point() else rows
        repeats = -(-batch // max(1, rows.shape[0]))
        result.append(torch.cat([rows] * repeats)[:batch] if repeats > 1 else rows[:batch])
    return tuple(result)


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(model, inputs)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TaskError(
            f"the model can't be exported ({first[:200]}); control flow that depends on values must be written with "
            "torch.where or torch.cond, or moved out of forward"
        ) from error


def count_macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Multiply-adds by module path for one sample, and the operators that fvcore's count skips with their number."""
    from fvcore.nn import FlopCountAnalysis

    with quiet(), torch.no_grad():
        try:
            model(*inputs)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise TaskError(
                f"the model's forward fails for a single sample ({first[:200]}); it must take any batch"
            ) from error
        analysis = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        by_module = {name: int(count) for name, count in analysis.by_module().items()}
        return by_module, {name: int(count) for name, count in analysis.unsupported_ops().items()}


def _first_uses(walk: Walk) -> list[LayerUse]:
    return list({use.name: use for use in reversed(walk.layers)}.values())[::-1]


def _layer(walk: Walk, use: LayerUse, stored: dict[str, Tensor], macs: dict[str, int]) -> Layer:
    source, output = walk.shape(use.node.args[0]), walk.shape(use.node)  # type: ignore[arg-type]
    weight = stored[use.weight]
    params = weight.numel() + (stored[use.bias].numel() if use.bias else 0)
    positions = output[2:] if use.kind == "conv" else output[1:-1]
    product = weight.numel()
    for size in positions:
        product *= size
    return Layer(
        name=use.name,
        kind=use.kind,
        weight=use.weight,
        bias=use.bias,
        in_channels=source[1] if use.kind == "conv" else source[-1],
        out_channels=output[1] if use.kind == "conv" else output[-1],
        kernel=tuple(weight.shape[2:]),
        stride=_stride(use, weight.ndim - 2),
        groups=use.groups,
        in_axis=use.in_axis,
        out_axis=use.out_axis,
        input_shape=(1, *source[1:]),
        output_shape=(1, *output[1:]),
        params=params,
        macs=macs.get(use.name, product),
    )


def _stride(use: LayerUse, dims: int) -> tuple[int, ...]:
    """A convolution's stride along each spatial dimension; the exported graph leaves a stride of 1 out."""
    if use.kind == "linear":
        return ()
    found: Any = use.node.args[3] if len(use.node.args) > 3 else 1
    return tuple(int(v) for v in found) if isinstance(found, (list, tuple)) else (int(found),) * dims


def _link(graph: Graph) -> Graph:
    """Fill in which blocks and groups each layer belongs to."""

    def blocks_of(layers: Sequence[str]) -> tuple[str, ...]:
        return tuple(block.name for block in graph.blocks if layers and set(layers) <= set(block.layers))

    groups = tuple(replace(group, blocks=blocks_of(group.producers)) for group in graph.groups)
    layers = []
    for layer in graph.layers:
        axes: dict[int, list[str]] = {}
        for group in groups:
            for place in group.places:
                if place.tensor == layer.weight:
                    axes.setdefault(place.dim, []).append(group.name)
        layers.append(
            replace(
                layer,
                blocks=blocks_of([layer.name]),
                in_groups=tuple(axes.get(layer.in_axis, ())),
                out_groups=tuple(axes.get(layer.out_axis, ())),
            )
        )
    return replace(graph, groups=groups, layers=tuple(layers))


def _keep_what_works(model: nn.Module, inputs: tuple[Tensor, ...], program: ExportedProgram, graph: Graph) -> Graph:
    """Try the cuts. All groups at once first: on most models nothing fails and one trial is enough."""
    graph = _name_blocks_apart(graph)
    refused: list[Frozen] = []
    if not _groups_agree(model, inputs, graph, graph.groups):
        good = []
        for group in graph.groups:
            if _groups_agree(model, inputs, graph, (group,)):
                good.append(group)
            else:
                refused.append(Frozen(layer=group.name, reason="the model's code fixes its number of channels"))
        graph = replace(graph, groups=tuple(good))
    kept = []
    for block in graph.blocks:
        if _block_agrees(model, inputs, program, graph, block):
            kept.append(block)
        else:
            refused.append(
                Frozen(layer=block.layers[0], reason=f"block {block.name} can't be taken out of the model's code")
            )
    return replace(graph, blocks=tuple(kept), frozen=(*graph.frozen, *refused))


def _name_blocks_apart(graph: Graph) -> Graph:
    """Two branches in one module (attention and MLP of a transformer layer) are told apart by their first layer."""
    names = [block.name for block in graph.blocks]
    blocks = [replace(b, name=b.layers[0]) if names.count(b.name) > 1 else b for b in graph.blocks]
    return replace(graph, blocks=tuple(blocks))


def _groups_agree(model: nn.Module, inputs: tuple[Tensor, ...], graph: Graph, groups: Sequence[ChannelGroup]) -> bool:
    """Whether the model with every second channel of these groups cut out equals the one that doesn't read them."""
    kept = {group.name: range(0, group.size, 2) for group in groups}
    gone = {group.name: range(1, group.size, 2) for group in groups}
    try:
        with torch.no_grad():
            return _close(cut(model, graph, kept=kept)(*inputs), silence_channels(model, graph, gone)(*inputs))
    except Exception:  # whatever the user's forward raises on a smaller tensor means the same: not this cut
        return False


def _block_agrees(
    model: nn.Module, inputs: tuple[Tensor, ...], program: ExportedProgram, graph: Graph, block: Block
) -> bool:
    """Whether the model without the block equals the traced graph in which the addition passes its other side on."""
    reference = program.module(check_guards=False)
    nodes = {node.name: node for node in reference.graph.nodes}
    addition = nodes.get(block.addition)
    if addition is None or block.output not in nodes:
        return False
    other = [arg for arg in addition.all_input_nodes if arg.name != block.output]
    if len(other) != 1:
        return False
    addition.replace_all_uses_with(other[0])
    reference.graph.eliminate_dead_code()
    reference.recompile()
    try:
        with torch.no_grad():
            return _close(cut(model, graph, kept={}, drop=[block.name])(*inputs), reference(*inputs))
    except Exception:  # as above
        return False


def _close(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape:
            return False
        scale = max(float(other.abs().max()), 1e-6)
        return bool(torch.isfinite(one).all()) and float((one - other).abs().max()) <= _TOLERANCE * scale
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(_close(a, b) for a, b in zip(one, other, strict=True))
    return False
