"""Filling the template: every plan's ONNX model equals its PyTorch model, at any batch size, in one file."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from automl_compress.core.graph import ChannelGroup, Graph
from automl_compress.core.plan import Plan
from automl_compress.deploy import export
from automl_compress.deploy.export import Template
from automl_compress.deploy.runtime import OnnxModel
from automl_compress.deploy.verify import FLOAT_TOLERANCE, agreement, check_quantized, executed_operators, torch_outputs
from automl_compress.errors import ExportError
from automl_compress.model.trace import trace
from automl_compress.techniques.evidence import Evidence
from automl_compress.techniques.importance import l1
from automl_compress.techniques.prune import Ranking, apply_plan, select_channels
from automl_compress.techniques.quantization.calibrate import activation_tensors, calibrate
from automl_compress.techniques.quantization.rewrite import quantize


class Unit(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out, affine=False)
        self.stride, self.more = stride, out - into

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return functional.relu(y + x)


class Residual(nn.Module):
    """Option-A shortcuts, pooling twice, a batch-norm that can't be folded, a flattening of 2x2 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.one, self.two, self.three = Unit(8, 8, 1), Unit(8, 16, 2), Unit(16, 16, 1)
        self.late, self.wide = nn.BatchNorm2d(16), nn.Conv2d(16, 12, 1)
        self.hidden, self.linear = nn.Linear(12 * 4, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.norm(self.stem(x))))
        x = self.late(self.three(self.two(self.one(x))))
        x = functional.adaptive_avg_pool2d(functional.relu6(self.wide(x)), 2).flatten(1)
        return self.linear(functional.relu(self.hidden(x)))


class Tokens(nn.Module):
    """Linear layers on three dimensions (their weights are stored transposed), equal parameters, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.norm, self.scale = nn.LayerNorm(16), nn.Parameter(torch.ones(16))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.scale * self.down(functional.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1)), x


class Counting(nn.Module):
    """Divides by its channel count and reads a constant made from it: what the template can't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.linear = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.a(x))
        x = functional.relu(self.b(x / x.shape[1]))
        return self.linear(x.mean((2, 3)))


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(1, 12))


def settled(model: nn.Module) -> nn.Module:
    """The model as if it had been trained: statistics and parameters without ones and zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point() and value.ndim == 1 and name != "scale" and not name.startswith("norm.w"):
                value.uniform_(0.2, 1.0)
    return model.eval()


class Case:
    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        self.model = settled(model)
        self.examples = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),)
        self.graph: Graph = trace(self.model, self.examples)
        self.ranking = Ranking(Evidence(self.model, self.graph), l1)
        self.template = Template(self.model, self.examples, self.graph)

    def pruned(self, plan: Plan) -> tuple[nn.Module, Plan]:
        plan = select_channels(self.graph, plan, self.ranking)
        return apply_plan(self.model, self.graph, plan), plan

    def inputs(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.examples[0].shape[1:], generator=torch.Generator().manual_seed(batch))

    def assert_equal(self, filled: onnx.ModelProto, model: nn.Module) -> None:
        onnx.checker.check_model(filled)
        session = OnnxModel(filled, threads=1)
        for batch in (1, 2, 7):
            x = self.inputs(batch)
            assert agreement(session((x.numpy(),)), torch_outputs(model, (x,))) <= FLOAT_TOLERANCE


@pytest.fixture(scope="module")
def residual() -> Case:
    torch.manual_seed(0)  # one in six has a dead end, on which any cut looks right
    return Case(Residual(), (3, 16, 16))


@pytest.fixture(scope="module")
def tokens() -> Case:
    return Case(Tokens(), (3, 16, 16))


def layer_names(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]


def test_the_original_is_filled_with_its_own_weights(residual: Case) -> None:
    assert residual.template.usable
    assert residual.template.dynamic_batch
    assert residual.template.notes == []
    filled = residual.template.fill(residual.model, Plan())
    residual.assert_equal(filled, residual.model)
    assert layer_names(filled) == [layer.name for layer in residual.graph.layers]
    for node in filled.graph.node:
        if node.name in residual.graph.layer:
            assert list(node.input[1:3]) == [f"{node.name}.weight", f"{node.name}.bias"]


def test_the_file_holds_nothing_but_the_model(residual: Case, tmp_path: Path) -> None:
    filled = residual.template.fill(residual.model, Plan())
    onnx.save(filled, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert not any(tensor.external_data for tensor in filled.graph.initializer)
    assert not any(node.metadata_props or node.doc_string for node in filled.graph.node)
    weights = sum(4 * value.numel() for value in residual.model.parameters())
    assert (tmp_path / "model.onnx").stat().st_size < weights + 6000
    assert filled.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert filled.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_folded_batch_norms_and_double_slices_leave_no_nodes(residual: Case) -> None:
    operators = [node.op_type for node in residual.template.fill(residual.model, Plan()).graph.node]
    assert operators.count("BatchNormalization") == 1
    assert operators.count("Slice") == 1


@pytest.mark.parametrize("seed", range(4))
def test_filled_models_equal_pruned_models_with_any_weights(residual: Case, seed: int) -> None:
    random = np.random.default_rng(seed)
    sparsity = {group.name: float(random.choice([0, 0.3, 0.6])) for group in residual.graph.groups}
    drop = frozenset(block.name for block in residual.graph.blocks if random.random() < 0.4)
    model, plan = residual.pruned(Plan(sparsity=sparsity, drop=drop))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    residual.assert_equal(residual.template.fill(model, plan), model)
    assert residual.template.notes == []


def test_every_removed_block_leaves_the_graph(residual: Case) -> None:
    assert residual.graph.blocks
    for block in residual.graph.blocks:
        model, plan = residual.pruned(Plan(drop=frozenset({block.name})))
        filled = residual.template.fill(model, plan)
        residual.assert_equal(filled, model)
        assert not set(block.layers) & set(layer_names(filled))
        assert not [tensor.name for tensor in filled.graph.initializer if tensor.name.startswith(block.layers)]
    assert residual.template.notes == []


def test_all_blocks_can_be_removed_at_once(residual: Case) -> None:
    model, plan = residual.pruned(Plan(width=0.5, drop=frozenset(residual.graph.block)))
    filled = residual.template.fill(model, plan)
    residual.assert_equal(filled, model)
    operators = [node.op_type for node in filled.graph.node]
    assert "Add" not in operators
    assert operators.count("Relu") == 2  # of the stem and of the hidden layer


def test_filling_one_plan_does_not_change_another(residual: Case) -> None:
    before = residual.template.fill(residual.model, Plan()).SerializeToString()
    model, plan = residual.pruned(Plan(width=0.5, drop=frozenset(list(residual.graph.block)[:1])))
    residual.template.fill(model, plan)
    assert residual.template.fill(residual.model, Plan()).SerializeToString() == before


def test_transposed_and_equal_parameters_are_filled_separately(tokens: Case) -> None:
    assert tokens.template.usable, tokens.template.notes
    model = Tokens()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    filled = tokens.template.fill(model.eval(), Plan())
    tokens.assert_equal(filled, model)
    assert {"up", "down", "head", "patch"} == set(layer_names(filled))
    assert "up.weight" in {tensor.name for tensor in filled.graph.initializer}
    tokens.assert_equal(tokens.template.fill(tokens.model, Plan()), tokens.model)


def test_pruned_linear_layers_are_filled(tokens: Case) -> None:
    model, plan = tokens.pruned(Plan(width=0.5))
    tokens.assert_equal(tokens.template.fill(model, plan), model)


def test_a_template_that_does_not_fit_a_plan_is_noticed() -> None:
    case = Case(Counting(), (3, 8, 8))
    group = ChannelGroup(name="a", size=8, places=(), producers=("a",), consumers=("b",))
    template = Template(case.model, case.examples, replace(case.graph, groups=(group,)))
    model = Counting()
    model.a, model.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)
    filled = template.fill(settled(model), Plan(kept={"a": (0, 1, 2, 3)}))
    case.assert_equal(filled, model)
    assert set(layer_names(filled)) == {"a", "b", "linear"}
    assert len(template.notes) == 1
    assert "exported by itself" in template.notes[0]
    case.assert_equal(template.fill(case.model, Plan()), case.model)


def test_a_model_that_fixes_its_batch_is_exported_with_batch_one() -> None:
    model = settled(FixedBatch())
    example = (torch.randn(1, 3, 2, 2),)
    with pytest.raises(ExportError, match="can't be exported"):
        Template(model, (torch.randn(1, 3),), Graph(layers=(), groups=(), blocks=()))
    template = Template(model, example, Graph(layers=(), groups=(), blocks=()))
    assert not template.dynamic_batch
    found = OnnxModel(template.fill(model, Plan()))((example[0].numpy(),))
    assert agreement(found, torch_outputs(model, example)) <= FLOAT_TOLERANCE


def test_export_says_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model = settled(FixedBatch())
    with caplog.at_level(logging.WARNING):
        Template(model, (torch.randn(1, 3, 2, 2),), Graph(layers=(), groups=(), blocks=()))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_models_that_no_exporter_takes_are_refused_in_one_line(residual: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(export.torch.onnx, "export", refuse)
    with pytest.raises(ExportError) as caught:
        Template(residual.model, residual.examples, residual.graph)
    assert "\n" not in str(caught.value)
    assert "first line" in str(caught.value)


@pytest.mark.parametrize("plan", [Plan(), Plan(width=0.6)])
def test_quantized_models_run_as_asked_and_stay_close(residual: Case, plan: Plan) -> None:
    model, plan = residual.pruned(plan)
    filled = residual.template.fill(model, plan)
    layers = [layer.name for layer in residual.graph.layers]
    x = residual.inputs(32).numpy()
    reference = OnnxModel(filled)((x,))
    for low in (layers, layers[::2], layers[1::2], layers[:3], layers[-1:]):
        bits = {layer: 8 if layer in low else 32 for layer in layers}
        ranges = calibrate(filled, [{"x": x}], activation_tensors(filled, bits), percentile=100)
        small = quantize(filled, bits, ranges)
        assert [layer for layer in executed_operators(small, layers, bits) if not layer.ok] == []
        assert check_quantized(small, (x,)) < 0.05
        assert agreement(OnnxModel(small)((x,)), reference) < 0.1
        assert OnnxModel(small)((x[:1],))[0].shape == (1, 5)
        if low == layers:
            assert len(small.SerializeToString()) < len(filled.SerializeToString())
