"""What the workbench says about a plan is true of the ONNX model that would be delivered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from automl_compress.core.plan import Plan
from automl_compress.errors import TaskError
from automl_compress.hardware.device.kernels import structure_digest
from automl_compress.model.task import accuracy
from automl_compress.search.evaluation.evaluate import Workbench, head
from automl_compress.techniques.prune import apply_plan, select_channels
from tests.search import campaigns

PLANS = {
    "original": Plan(),
    "cut": Plan(sparsity={"block.conv1": 0.5, "down": 0.25}),
    "narrow": Plan(width=0.5),
    "dropped": Plan(drop=frozenset({"block"})),
    "int8": Plan(bits={"block.conv1": 8, "down": 8, "head": 8}),
    "everything": Plan(
        width=0.75, sparsity={"down": 0.5}, drop=frozenset({"block"}), bits={"stem": 8, "down": 8, "head": 8}
    ),
}
LAYERS = ("stem", "block.conv1", "block.conv2", "down", "head")


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return campaigns.bench()


def run(model: onnx.ModelProto, inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]


def test_the_original_answers_like_the_users_model(bench: Workbench) -> None:
    images, classes = next(iter(campaigns.ready().validation))
    with torch.no_grad():
        outputs = bench.task.model(images)
    np.testing.assert_allclose(run(bench.original, images), outputs.numpy(), rtol=1e-3, atol=1e-4)
    assert bench.metric(bench.original, [((images,), classes)]) == pytest.approx(accuracy(outputs, classes))


@pytest.mark.parametrize("name", PLANS)
def test_a_plans_structure_costs_what_the_finished_model_costs(bench: Workbench, name: str) -> None:
    """The prediction is made before any training: kernels and bytes must already be those of the result."""
    model, full = bench.student(PLANS[name])
    finished, structure = bench.export(model, full), bench.structure(PLANS[name])
    assert structure_digest(finished) == structure_digest(structure)
    assert finished.ByteSize() == pytest.approx(structure.ByteSize(), abs=64)


@pytest.mark.parametrize("name", ["cut", "narrow", "dropped"])
def test_the_onnx_model_is_the_pytorch_model(bench: Workbench, name: str) -> None:
    model, full = bench.student(PLANS[name])
    images = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        np.testing.assert_allclose(run(bench.export(model, full), images), model(images).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PLANS)
def test_a_trials_metric_is_that_of_the_onnx_model(bench: Workbench, name: str) -> None:
    model, full = bench.student(PLANS[name])
    images = torch.cat([inputs[0] for inputs, _ in bench.validation])
    classes = torch.cat([targets for _, targets in bench.validation])
    wanted = accuracy(torch.from_numpy(run(bench.export(model, full), images)), classes)
    assert bench.one_shot(PLANS[name]) == pytest.approx(wanted, abs=1e-6)
    assert full.key == PLANS[name].key


def test_distortion_is_nothing_for_the_original_and_grows_with_the_cut(bench: Workbench) -> None:
    def distortion(plan: Plan) -> float:
        model, full = bench.student(plan)
        return bench.distortion(bench.export(model, full))

    assert bench.distortion(bench.original) == pytest.approx(0, abs=1e-7)
    eighth, half, most = (distortion(Plan(sparsity={"block.conv1": s})) for s in (0.125, 0.5, 0.9375))
    assert 0 < eighth < half < most


def test_repair_never_leaves_a_model_farther_from_the_original_than_recalibrating_nothing(bench: Workbench) -> None:
    for plan in (PLANS["cut"], PLANS["narrow"], PLANS["dropped"]):
        model, full = bench.student(plan)
        plain = apply_plan(bench.teacher, bench.graph, full).eval()
        assert bench.distortion(bench.export(model, full)) <= bench.distortion(bench.export(plain, full)) + 1e-6


def test_a_student_of_a_quantized_plan_has_the_teachers_weights(bench: Workbench) -> None:
    model, full = bench.student(PLANS["int8"])
    assert full.kept == {}
    for key, value in model.state_dict().items():
        assert torch.equal(value, bench.teacher.state_dict()[key])


def test_two_workbenches_agree(bench: Workbench) -> None:
    other = Workbench(campaigns.ready(), campaigns.graph(), importance="l2")
    for one, two in zip(bench.samples, other.samples, strict=True):
        assert torch.equal(one[0], two[0])
    plan = PLANS["everything"]
    assert bench.structure(plan).SerializeToString() == other.structure(plan).SerializeToString()
    assert bench.one_shot(plan) == other.one_shot(plan)


def test_neither_the_users_model_nor_the_teacher_is_modified() -> None:
    task = campaigns.ready()
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    fresh = Workbench(task, campaigns.graph())
    model, _ = fresh.student(PLANS["cut"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for key, value in before.items():
        assert torch.equal(task.model.state_dict()[key], value)
        assert torch.equal(fresh.teacher.state_dict()[key], value)


def test_second_order_importance_chooses_other_channels_than_magnitude(bench: Workbench) -> None:
    by_loss = Workbench(campaigns.ready(), campaigns.graph(), importance="obs")
    plan = Plan(sparsity={group.name: 0.5 for group in campaigns.graph().groups})
    one, other = (select_channels(b.graph, plan, b.ranking).kept for b in (bench, by_loss))
    assert one.keys() == other.keys()
    assert one != other
    assert {name: len(kept) for name, kept in one.items()} == {name: len(kept) for name, kept in other.items()}


def test_labels_that_turn_out_wrong_are_named(bench: Workbench) -> None:
    ((images,), classes), *_ = bench.validation
    with pytest.raises(TaskError, match="0 to 3"):
        bench.metric(bench.original, [((images,), classes + 2)])


def test_head_takes_exactly_so_many_rows() -> None:
    batches = [(torch.arange(5),), (torch.arange(5, 10),), (torch.arange(10, 15),)]
    for samples in (0, 3, 5, 7, 15, 99):
        rows = [row for (part,) in head(batches, samples) for row in part.tolist()]
        assert rows == list(range(min(samples, 15)))


def test_training_samples_that_the_model_cannot_run_on_are_named_before_anything_is_made_of_them() -> None:
    (images,), classes = next(campaigns.ready().batches("train"))
    strange = images.repeat(1, 3, 1, 1)
    train = [(images, classes), (strange, classes)]
    bench = Workbench(replace(campaigns.ready(), train=train), campaigns.graph())
    with pytest.raises(TaskError, match=r"forward fails on a train input \(1, 3, 8, 8\): RuntimeError"):
        _ = bench.samples


def test_training_data_that_fail_while_they_are_read_are_named() -> None:
    (images,), classes = next(campaigns.ready().batches("train"))

    class Failing:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield images[:8], classes[:8]
            raise OSError("gone")

    bench = Workbench(replace(campaigns.ready(), train=Failing()), campaigns.graph())
    with pytest.raises(TaskError, match="reading train data raised OSError: gone"):
        _ = bench.samples


def test_samples_that_are_no_numbers_are_named() -> None:
    (images,), classes = next(campaigns.ready().batches("train"))
    train = [(images, classes), (images * float("nan"), classes)]
    bench = Workbench(replace(campaigns.ready(), train=train), campaigns.graph())
    with pytest.raises(TaskError, match="train batch 1 has NaN among its inputs"):
        _ = bench.samples


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_thorough_calibration_comes_nearer_to_the_same_model_in_32_bits(bench: Workbench, sparsity: float) -> None:
    model, plan = bench.student(Plan(sparsity={"block.conv1": sparsity}, bits=dict.fromkeys(LAYERS, 8)))
    images = torch.cat([inputs[0] for inputs in bench.samples])[-256:]
    wanted = run(bench.export(model, replace(plan, bits={})), images)

    def divergence(*, thorough: bool) -> float:
        found = bench.export(model, plan, bench.quantization(model, plan, thorough=thorough))
        p, q = (torch.from_numpy(outputs).log_softmax(1) for outputs in (wanted, run(found, images)))
        return float((p.exp() * (p - q)).sum(1).mean())

    assert divergence(thorough=True) < 0.9 * divergence(thorough=False)
