"""Losses on features: blind to scale where they should be, to padding, and zero for a student like its teacher."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automl_compress.core.plan import Plan
from automl_compress.errors import TrainingError
from automl_compress.model.task import Task, prepare
from automl_compress.model.trace import trace
from automl_compress.search.evaluation.student import Students
from automl_compress.techniques.distillation.balance import STEPS
from automl_compress.techniques.distillation.features import (
    adapted,
    attention_transfer,
    hint,
    layer_inputs,
    same_channels,
)
from automl_compress.techniques.distillation.losses import parse_losses
from automl_compress.techniques.distillation.objective import Distillation
from automl_compress.techniques.distillation.outputs import sum_of_squares, variance
from automl_compress.techniques.distillation.pairing import Pair, pair_layers
from automl_compress.techniques.prune import apply_plan
from tests import tiny

GENERATOR = torch.Generator().manual_seed(0)
ONE, OTHER = torch.randn(2, 4, 6, 5, 5, generator=GENERATOR)
TOKENS, WANTED = torch.randn(2, 4, 7, 6, generator=GENERATOR)
COUNTED = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 5 + [0] * 2, [1] + [0] * 6])
TASK = prepare(tiny.task())
GRAPH = trace(TASK.model, TASK.example_inputs)
PLAN = Plan(kept={"block.conv1": (1, 2, 5, 11), "down": tuple(range(0, 32, 2))})
BATCH = next(iter(TASK.batches("train")))


def test_hints_have_no_unit_and_leave_out_padding() -> None:
    torch.testing.assert_close(hint(3 * ONE, 3 * OTHER), hint(ONE, OTHER))
    spoilt = torch.where(COUNTED[..., None].bool(), TOKENS, 1e3)
    torch.testing.assert_close(hint(spoilt, WANTED, COUNTED), hint(TOKENS, WANTED, COUNTED))
    assert float(hint(WANTED, WANTED, COUNTED)) == 0


def test_attention_is_blind_to_scale_sign_and_order_of_channels() -> None:
    loss = attention_transfer(ONE, OTHER, 1)
    for same in (2 * ONE, -ONE, ONE[:, torch.randperm(6, generator=GENERATOR)]):
        torch.testing.assert_close(attention_transfer(same, OTHER, 1), loss)
    assert float(attention_transfer(ONE[:, :3], OTHER, 1)) > 0  # of any width
    assert float(attention_transfer(OTHER, OTHER, 1)) == 0


@pytest.mark.parametrize("losses", ["hint", "attention"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_gradients_are_those_of_the_formula(losses: str, channel_dim: int) -> None:
    student, teacher = ONE.double().requires_grad_(), OTHER.double()
    if losses == "hint":
        value, wanted = hint(student, teacher), ((student - teacher) ** 2).mean() / teacher.var()
    else:
        value = attention_transfer(student, teacher, channel_dim)
        maps = [part.square().mean(channel_dim).flatten(1) for part in (student, teacher)]
        unit = [part / part.norm(dim=1, keepdim=True) for part in maps]
        wanted = (unit[0] - unit[1]).square().sum(1).mean()
    torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(part, student)[0] for part in (value, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    if losses == "attention" or channel_dim == 1:
        halved = ONE.bfloat16().requires_grad_()
        low = hint(halved, OTHER.bfloat16()) if losses == "hint" else attention_transfer(halved, OTHER, channel_dim)
        assert low.dtype == torch.float32
        assert torch.autograd.grad(low, halved)[0].dtype == torch.bfloat16
        assert float(low.detach()) == pytest.approx(float(wanted.detach()), rel=0.02)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_sums_are_those_of_float64_in_any_layout(precision: torch.dtype, layout: torch.memory_format) -> None:
    for value in (torch.randn(64, 6, 5, 5, generator=GENERATOR), torch.randn(64, 6, 5, 5, generator=GENERATOR) + 30):
        value = value.to(precision).to(memory_format=layout)
        rel = 1e-5 if precision == torch.float32 else 3e-3
        assert float(variance(value)) == pytest.approx(float(value.double().var()), rel=rel)
        assert float(sum_of_squares(value)) == pytest.approx(float(value.double().square().sum()), rel=rel)
        assert sum_of_squares(value).dtype == torch.float32


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_the_same_channels_are_picked_bit_by_bit_in_any_layout(
    precision: torch.dtype, layout: torch.memory_format
) -> None:
    feature = torch.randn(4, 6, 5, 5, generator=GENERATOR).to(precision).to(memory_format=layout)
    chosen = same_channels(Pair(student="x", teacher="x", channel_dim=1, channels=(1, 4, 5)), feature)
    assert torch.equal(chosen, feature[:, [1, 4, 5]])
    assert chosen.is_contiguous(memory_format=layout)


def test_attention_over_tokens_leaves_out_padding() -> None:
    spoilt = torch.where(COUNTED[..., None].bool(), TOKENS, 1e3)
    torch.testing.assert_close(
        attention_transfer(spoilt, WANTED, -1, COUNTED), attention_transfer(TOKENS, WANTED, -1, COUNTED)
    )


def test_an_adapter_maps_channels_wherever_they_lie() -> None:
    adapter = nn.Linear(6, 3)
    torch.testing.assert_close(adapted(adapter, TOKENS, -1), adapter(TOKENS))
    torch.testing.assert_close(adapted(adapter, ONE, 1)[:, :, 2, 3], adapter(ONE[:, :, 2, 3]))


def objective(losses: str, plan: Plan = PLAN) -> Distillation:
    return Distillation(TASK, TASK.model, parse_losses(losses), pair_layers(GRAPH, plan, TASK.model))


@pytest.mark.parametrize("losses", ["features=1+task=0", "attention=1+task=0"])
def test_a_student_like_its_teacher_has_no_loss(losses: str) -> None:
    loss = objective(losses, Plan())(apply_plan(TASK.model, GRAPH, Plan()).eval(), BATCH)
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(0, abs=1e-6)


def test_outputs_are_learned_from_any_teacher_and_features_from_the_original() -> None:
    pairs, original = pair_layers(GRAPH, PLAN, TASK.model), tiny.teacher()
    student = apply_plan(TASK.model, GRAPH, PLAN).eval()
    for teacher in (tiny.teacher(seed=1), nn.Sequential(nn.Flatten(), nn.Linear(64, tiny.CLASSES))):
        both = Distillation(TASK, teacher, parse_losses("soft+features"), pairs, original=original)(student, BATCH)
        assert both.parts["features"] == objective("features")(student, BATCH).parts["features"]
        alone = Distillation(TASK, teacher, parse_losses("soft"))(student, BATCH)
        assert both.parts["soft"] == alone.parts["soft"]
        assert both.parts["soft"] != objective("soft")(student, BATCH).parts["soft"]


@pytest.mark.parametrize("losses", ["soft+features", "soft+attention", "features+task=0"])
def test_a_cut_student_comes_nearer_to_its_teachers_features(losses: str) -> None:
    student = apply_plan(TASK.model, GRAPH, PLAN).train()
    wanted = objective(losses)
    name = "attention" if "attention" in losses else "features"
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    values = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = wanted(student, BATCH)
        loss.total.backward()
        optimizer.step()
        values.append(float(loss.parts[name]))
    assert values[-1] < 0.7 * values[0]


def test_features_pull_twice_as_hard_as_soft_labels_by_default() -> None:
    student, wanted = apply_plan(TASK.model, GRAPH, PLAN).train(), objective("soft+features")
    for _ in range(STEPS):
        wanted(student, BATCH)
    lengths = {}
    for name, weight in wanted.weights().items():
        alone = objective("task" if name == "task" else f"{name}=1+task=0")(student, BATCH).total
        gradients = torch.autograd.grad(alone, list(student.parameters()), allow_unused=True)
        lengths[name] = weight * float(torch.cat([g.flatten() for g in gradients if g is not None]).norm())
    assert lengths["features"] == pytest.approx(2 * lengths["soft"], rel=1e-3)


def test_repaired_students_are_nearer_than_merely_cut_ones() -> None:
    students = Students(
        TASK.model, GRAPH, lambda: [BATCH], loss=TASK.loss_of, classifies=True, repair_samples=64, judge_samples=32
    )
    repaired = students.make(PLAN)
    distance = objective("features=1+task=0")
    with torch.no_grad():
        cut = float(distance(apply_plan(TASK.model, GRAPH, PLAN).eval(), BATCH).total)
        assert float(distance(repaired.model, BATCH).total) < cut


def test_adapters_are_trained_with_the_student_and_belong_to_the_objective() -> None:
    torch.manual_seed(0)
    student = tiny.Net(6)
    pairs = [Pair(student="down", teacher="down", channel_dim=1, widths=(6, 16))]
    wanted = Distillation(TASK, TASK.model, parse_losses("features=1+task=0"), pairs)
    held = wanted.modules()
    assert held is not None
    before = {key: value.clone() for key, value in held.state_dict().items()}
    optimizer = torch.optim.Adam([*student.parameters(), *held.parameters()], lr=1e-2)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = wanted(student, BATCH).total
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.8 * values[0]
    assert any(not torch.equal(value, before[key]) for key, value in held.state_dict().items())


def test_models_without_a_layer_that_tells_are_refused_with_the_way_out() -> None:
    with pytest.raises(TrainingError, match=r"features has nothing to compare.*such as soft"):
        Distillation(TASK, TASK.model, parse_losses("features"))

    class Aside(nn.Module):
        """Uses a layer's weight without running the layer."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x.flatten(1)[:, :4], self.layer.weight)

    pairs = [Pair(student="layer", teacher="layer", channel_dim=-1)]
    with pytest.raises(TrainingError, match="nothing to compare"):
        Distillation(TASK, Aside(), parse_losses("features"), pairs)(Aside(), BATCH)


def test_attention_needs_a_layer_with_positions() -> None:
    pairs = [Pair(student="head", teacher="head", channel_dim=-1)]
    with pytest.raises(TrainingError, match=r"attention has nothing to compare: no layer .* positions or tokens"):
        Distillation(TASK, TASK.model, parse_losses("attention"), pairs)(tiny.Net(), BATCH)


def test_features_of_other_positions_are_refused_naming_both() -> None:
    class Halved(tiny.Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[:, :, ::2])

    pairs = [Pair(student="down", teacher="down", channel_dim=1)]
    with pytest.raises(TrainingError, match=r"down reads \(128, 16, 8, 8\), down \(128, 16, 4, 8\)"):
        Distillation(TASK, TASK.model, parse_losses("features"), pairs)(Halved(), BATCH)


def test_nothing_is_left_behind_in_the_models() -> None:
    model = tiny.Net()
    with layer_inputs(model, ["down"]) as seen:
        model(BATCH[0][0])
    assert list(seen) == ["down"]
    assert not model.down._forward_pre_hooks


def test_a_mask_of_tokens_is_found_by_its_name() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.hidden, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = torch.tanh(self.hidden(self.embed(ids)))
            return {"logits": self.out(torch.where(attention_mask[..., None].bool(), hidden, hidden * 1e3))}

    torch.manual_seed(1)
    teacher, student = Tokens().eval(), Tokens()
    ids = torch.randint(0, 9, (4, 7), generator=GENERATOR)
    task = Task(
        model=teacher, train=None, validation=None, loss=lambda o, t: o["logits"].sum() * 0, metric=lambda o, t: 0
    )
    pairs = [Pair(student="out", teacher="out", channel_dim=-1)]
    for losses in ("soft=1+task=0", "features=1+task=0"):
        wanted = Distillation(task, teacher, parse_losses(losses), pairs)
        targets = torch.zeros(4, 7, dtype=torch.long)
        masked = wanted(student, ((ids, COUNTED), targets)).total
        keep = COUNTED.bool()
        alone = wanted(student, ((ids[keep][:, None], torch.ones(17, 1)), torch.zeros(17, 1, dtype=torch.long))).total
        torch.testing.assert_close(masked, alone, rtol=1e-4, atol=1e-6)
