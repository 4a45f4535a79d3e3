"""From a module to a `Graph`: export, follow the channels, count, and try every kind of cut before offering it."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from automl_compress.core.graph import Cells, Frozen, Graph, Layer, Numbers
from automl_compress.errors import TaskError, first_line
from automl_compress.model.attributes import candidates
from automl_compress.model.checks import Trial
from automl_compress.model.coupling import couple, unique_layers
from automl_compress.model.depth import blocks_that_work, removable_blocks
from automl_compress.model.labels import Ids
from automl_compress.model.reference import Reference
from automl_compress.model.surgery import copy_model, stored_tensors
from automl_compress.model.walk import LayerUse, Walk

TRACE_BATCH = 2
_TELLING_SPREAD = 1e-2


_LOUD = ("fvcore", "torch.export", "torch.onnx", "torch._export", "torch.fx")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep third parties' warnings and log lines from the user, and what torch prints of a graph that it gave up; they
    speak of their own internals."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A traced model: its graph, and a reference that says what a cut model must compute."""

    graph: Graph
    reference: Reference
    atoms: Mapping[str, Sequence[int]]
    inputs: tuple[Tensor, ...]

    def masked(self, kept: Mapping[str, Collection[int]]) -> Any:
        """The outputs for the example inputs when the channels that are not `kept` take no part."""
        removed = [
            atom
            for group, stay in kept.items()
            for channel, atom in enumerate(self.atoms[group])
            if channel not in stay
        ]
        return self.reference.run(self.inputs, removed)


def trace(model: nn.Module, example_inputs: Sequence[Tensor]) -> Graph:
    """Trace `model` (not modified) with one batch of inputs, batch dimension first.

    Every group and block of the result was cut once on a copy and compared with the original in which the removed
    channels took no part; what did not agree is listed in `frozen`. Raises TaskError if the model can't be exported.
    """
    return analyse(model, example_inputs).graph


def analyse(model: nn.Module, example_inputs: Sequence[Tensor]) -> Analysis:
    """`trace`, with what its checks compare against."""
    model = copy_model(model).cpu().float().eval()
    make_telling(model)
    inputs = sample(example_inputs, TRACE_BATCH)
    program = exported(model, inputs)
    equal: set[type] = set()
    alike: set[type] = set()
    while True:
        walk = Walk(program, first_names(model), _paths(model, equal), _paths(model, alike)).run()
        coupling = couple(walk)
        reference = Reference(walk)
        graph = Graph(
            groups=coupling.groups,
            layers=(),
            blocks=(),
            sizes={n: tuple(v.shape) for n, v in stored_tensors(model).items()},
        )
        trial = Trial(
            model=model,
            inputs=inputs,
            reference=reference,
            graph=graph,
            atoms=coupling.atoms,
            attributes=candidates(model, walk, coupling.atoms),
        )
        failure = trial.first_failure()
        kind = trial.kind(failure.module) if failure is not None and failure.module is not None else None
        if kind is None or kind in alike:
            break
        (alike if kind in equal else equal).add(kind)
    settled = trial.settled(known_good=failure is None)
    refused = [
        Frozen(layer=name, reason=f"the model's code fixes its number of channels ({reason})")
        for name, reason in trial.refused.items()
    ]
    macs, skipped = count_macs(model, sample(example_inputs, 1))
    stored = stored_tensors(model)
    graph = replace(
        settled,
        layers=tuple(_layer(walk, use, stored, macs) for use in unique_layers(walk)),
        blocks=removable_blocks(model, walk, coupling.atoms),
        frozen=(*coupling.frozen, *refused, *_unused(model, walk)),
        skipped={**skipped, **{f"{name} (channels)": count for name, count in walk.unknown.items()}},
        input_shapes=tuple((1, *part.shape[1:]) for part in inputs),
    )
    graph = replace(graph, numbers=numbers_of(walk, coupling.atoms, graph.group))
    blocks, stuck = blocks_that_work(model, inputs, reference, graph)
    refused = [
        Frozen(layer=block.layers[0], reason=f"block {block.name} can't be taken out of the model's code")
        for block in stuck
    ]
    graph = _link(replace(graph, blocks=blocks, frozen=(*graph.frozen, *refused)))
    return Analysis(graph=graph, reference=reference, atoms=coupling.atoms, inputs=inputs)


def make_telling(model: nn.Module) -> None:
    """Give parameters that are constant or next to nothing random values, in place, so that outputs depend on all of
    them: a layer scale of 1e-6 or a head of zeros would hide what a cut changes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not value.is_floating_point() or value.numel() < 2:
                continue
            if float(value.std()) < _TELLING_SPREAD * max(float(value.abs().max()), _TELLING_SPREAD):
                noise = torch.rand(value.shape, generator=generator)
                # Scales stay positive and near 1, everything else is small and of either sign.
                value.copy_(0.5 + noise if value.ndim == 1 and "bias" not in name else 0.2 * (noise - 0.5))


def _unused(model: nn.Module, walk: Walk) -> Iterator[Frozen]:
    """Modules with parameters that the traced graph doesn't use, such as auxiliary classifiers for training."""
    used = set(walk.stored)
    for path, module in model.named_modules():
        names = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
        if names and not used.intersection(names):
            yield Frozen(layer=path, reason="evaluation doesn't use it")


def numbers_of(walk: Walk, atoms: Mapping[str, Sequence[int]], groups: Collection[str]) -> tuple[Numbers, ...]:
    """The numbers in the traced operators that change with the groups, one entry a call, in the order of the calls."""
    owner = {atom: group for group in groups for atom in atoms[group]}

    def cells(ids: Ids | None) -> Cells:
        if ids is None:
            return ()
        held = Counter(tuple(owner[a] for a in members if a in owner) for members in walk.channels.sets(ids))
        return tuple((count, names) for names, count in held.items()) if any(held) else ()

    found: list[Numbers] = []
    for module, kind, values, labels in walk.numbers:
        counted = tuple(cells(ids) for ids in labels)
        if any(counted):
            found.append(Numbers(module=module, kind=kind, values=values, cells=counted))
    return tuple(found)


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a tensor that has several -> the first one."""
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(value), name) for name, value in stored_tensors(model).items()}


def _paths(model: nn.Module, kinds: set[type]) -> frozenset[str]:
    return frozenset(path for path, module in model.named_modules(remove_duplicate=False) if type(module) in kinds)


def sample(inputs: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
    """The first `batch` rows of each input as float32 / integers on the CPU, repeated if there are fewer."""
    result = []
    for part in inputs:
        rows = part.detach().cpu()
        rows = rows.float() if rows.is_floating_point() else rows
        repeats = -(-batch // max(1, rows.shape[0]))
        result.append(torch.cat([rows] * repeats)[:batch] if repeats > 1 else rows[:batch])
    return tuple(result)


def exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """The model as a graph of operators. Raises TaskError where torch can't make one of it."""
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(model, inputs)
    except Exception as error:
        raise TaskError(
            f"the model can't be exported{_users_line(error)} ({first_line(error)[:200]}); control flow that depends "
            "on values has to be written with torch.where or torch.cond, or moved out of forward"
        ) from error


def _users_line(error: BaseException) -> str:
    """', at file.py:12 in forward': the innermost line outside torch and this program that led to an error, if any."""
    own = Path(torch.__file__).parent, Path(__file__).parent
    lines = [
        f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith("/") and not any(root in Path(frame.filename).parents for root in own)
    ]
    return f", at {lines[-1]}" if lines else ""


def count_macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Multiply-adds by module path for one sample, and the operators that fvcore's count skips with their number."""
    from fvcore.nn import FlopCountAnalysis

    with quiet(), torch.no_grad():
        try:
            model(*inputs)
        except Exception as error:
            raise TaskError(
                f"the model's forward fails for a single sample ({first_line(error)[:200]}); it must take any batch"
            ) from error
        try:
            analysis = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False)
            analysis.uncalled_modules_warnings(False).tracer_warnings("none")
            by_module = {name: int(count) for name, count in analysis.by_module().items()}
        except Exception:  # it traces with torch.jit, which some models don't survive
            return {}, {"every operator that is not a layer (fvcore can't trace the model)": 1}
        return by_module, {name: int(count) for name, count in analysis.unsupported_ops().items()}


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
    layers = [
        replace(
            layer,
            blocks=blocks_of([layer.name]),
            in_groups=graph.groups_of(layer, "in"),
            out_groups=graph.groups_of(layer, "out"),
        )
        for layer in graph.layers
    ]
    return replace(graph, groups=groups, layers=tuple(layers))
