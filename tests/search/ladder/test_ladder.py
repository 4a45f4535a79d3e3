"""What was recovered is kept whole, is never trained twice, and is never worse than the repair without training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from automl_compress.core.plan import Plan
from automl_compress.deploy.run_folder import RunFolder
from automl_compress.errors import PlanError, RunFolderError, TrainingError
from automl_compress.model.task import accuracy
from automl_compress.search.evaluation.candidate import Candidate, read_plan, rebuild, stored_quantization
from automl_compress.search.ladder import ladder
from automl_compress.search.ladder.ladder import Recovery
from automl_compress.techniques.distillation.features import layer_inputs
from automl_compress.techniques.distillation.losses import DEFAULT, parse_losses
from automl_compress.techniques.distillation.pairing import pair_layers
from automl_compress.techniques.training.log import StepReport
from automl_compress.techniques.training.settings import Resources, Training
from tests.search import campaigns

PLAN = Plan(sparsity={"block.conv1": 0.5, "down": 0.5}, bits={"down": 8})
SCHEDULE = Training(epochs=1, learning_rate=0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run", {}) as opened:
        yield opened


def recover(
    folder: RunFolder, plan: Plan = PLAN, schedule: Training = SCHEDULE, losses: str = "soft"
) -> tuple[Candidate, int]:
    """The candidate, and how many steps were trained for it."""
    steps: list[int] = []
    recovery = Recovery(campaigns.bench(), folder, parse_losses(losses))
    return recovery.recover(plan, "full", schedule, lambda report: steps.append(report.step)), len(steps)


def measured(path: Path) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs, targets = [], []
    for images, classes in campaigns.ready().validation:
        outputs.append(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]))
        targets.append(classes)
    return accuracy(torch.cat(outputs), torch.cat(targets))


def test_a_rounded_student_shows_the_features_that_a_float_one_has(folder: RunFolder) -> None:
    """What is compared when training with rounding is what was compared before, to within a step of the integers."""
    bench = campaigns.bench()
    model, full = bench.student(PLAN)
    rounded = bench.trainable(model, full, bench.quantization(model, full))
    layers = [pair.student for pair in pair_layers(bench.graph, full, bench.teacher)]
    images = bench.samples[0][0]
    with torch.no_grad(), layer_inputs(model, layers) as wanted, layer_inputs(rounded, layers) as seen:
        model(images)
        rounded(images)
    assert set(seen) == set(wanted) == set(layers)
    for layer, value in wanted.items():
        assert float((seen[layer] - value).abs().mean()) < 0.02 * float(value.abs().max())
    assert recover(folder, losses="soft+features")[1] >= 4


def test_without_features_the_default_goes_on_and_what_was_asked_for_by_name_does_not(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "pair_layers", lambda *_: ())
    with pytest.raises(TrainingError, match="features has nothing to compare"):
        recover(folder, losses="soft+features=1")
    with pytest.raises(TrainingError, match="features has nothing to compare"):
        Recovery(campaigns.bench(), folder, parse_losses("features")).rehearse()
    assert recover(folder, losses=DEFAULT)[1] >= 4


def test_a_candidates_metric_is_that_of_its_file(folder: RunFolder) -> None:
    candidate, steps = recover(folder)
    assert steps >= 4  # and those with rounding, where rounding costs quality
    assert candidate.metric == pytest.approx(measured(candidate.onnx), abs=1e-6)
    assert candidate.plan.kept
    assert candidate.plan.key == PLAN.key


def test_nothing_is_trained_twice_even_by_another_process(folder: RunFolder) -> None:
    first, _ = recover(folder)
    again, steps = recover(folder)
    assert steps == 0
    assert again == first


def test_another_schedule_plan_or_loss_is_trained(folder: RunFolder) -> None:
    recover(folder)
    assert recover(folder, schedule=Training(epochs=0.5))[1] >= 2  # and those with rounding, as above
    assert recover(folder, Plan(drop=frozenset({"block"})))[1] >= 4
    assert recover(folder, losses="task")[1] >= 4
    assert recover(folder, schedule=Training(epochs=1, clip=1.0))[1] >= 4


def test_a_kill_in_the_middle_of_training_costs_at_most_a_part_of_it(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "Resources", partial(Resources, checkpoint_seconds=0.0))
    monkeypatch.setattr(ladder, "PRECISE", Resources(device="cpu", precision="float32", checkpoint_seconds=0.0))
    plan, schedule = Plan(bits=dict.fromkeys(campaigns.graph().layer, 4)), Training(epochs=2)
    whole, steps = recover(folder, plan, schedule)
    for file in folder.path.glob("candidates/*"):
        file.unlink()
    made = []
    for stop in (3, 6, 9, steps + 1):  # in the distillation, and in the training with rounding

        def on_step(report: StepReport, stop: int = stop) -> None:
            made.append(report.label)
            if len(made) == stop:
                raise KeyboardInterrupt

        recovery = Recovery(campaigns.bench(), folder)
        try:
            again = recovery.recover(plan, "full", schedule, on_step)
        except KeyboardInterrupt:
            assert list(folder.path.glob("candidates/*.training"))
    assert len(made) == steps
    assert len(set(made)) == 2
    assert torch.equal(load_file(again.weights)["head.weight"], load_file(whole.weights)["head.weight"])
    assert again.onnx.read_bytes() == whole.onnx.read_bytes()
    assert sorted(path.suffix for path in folder.path.glob("candidates/*")) == [".json", ".onnx", ".safetensors"]


@pytest.mark.parametrize("gone", ["json", "cut short"])
def test_what_a_kill_left_behind_is_made_again(folder: RunFolder, gone: str) -> None:
    """The record is written last, so without it the other files count for nothing."""
    first, _ = recover(folder)
    record = next(folder.path.glob("candidates/*.json"))
    record.unlink()
    if gone == "cut short":
        first.weights.write_bytes(first.weights.read_bytes()[:100])
        first.onnx.write_bytes(b"")
    again, steps = recover(folder)
    assert steps >= 4
    assert again.metric == first.metric
    assert rebuild(campaigns.bench(), again.plan, again.weights) is not None


def test_without_epochs_the_repaired_model_is_delivered(folder: RunFolder) -> None:
    candidate, steps = recover(folder, schedule=Training(epochs=0))
    assert (steps, candidate.training) == (0, ())
    assert candidate.metric == pytest.approx(measured(candidate.onnx), abs=1e-6)


def test_training_that_makes_it_worse_is_undone(folder: RunFolder) -> None:
    before, _ = recover(folder, schedule=Training(epochs=0))
    spoilt, steps = recover(folder, schedule=Training(epochs=1, learning_rate=30.0))
    assert steps == 4
    assert spoilt.metric == before.metric
    assert "on validation: the repaired model" in spoilt.notes[-1]
    kept, repaired = load_file(spoilt.weights), load_file(before.weights)
    assert all(torch.equal(kept[name], repaired[name]) for name in repaired)


def test_the_model_is_rebuilt_from_plan_and_weights(folder: RunFolder) -> None:
    bench = campaigns.bench()
    candidate, _ = recover(folder)
    found = stored_quantization(candidate.weights, candidate.ranges)
    again = bench.export(rebuild(bench, candidate.plan, candidate.weights), candidate.plan, found)
    assert again.SerializeToString() == onnx.load(candidate.onnx).SerializeToString()


def test_weights_of_another_plan_are_refused(folder: RunFolder, tmp_path: Path) -> None:
    candidate, _ = recover(folder, schedule=Training(epochs=0))
    with pytest.raises(PlanError, match="doesn't fit the plan"):
        rebuild(campaigns.bench(), Plan(), candidate.weights)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"none")
    with pytest.raises(PlanError, match=r"broken.safetensors"):
        rebuild(campaigns.bench(), candidate.plan, broken)


@pytest.mark.parametrize("content", ["", "[", '{"schema": "other"}'])
def test_a_plan_file_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError):
        read_plan(path, campaigns.bench().graph)
    with pytest.raises(PlanError, match="can't be read"):
        read_plan(tmp_path / "missing.json", campaigns.bench().graph)


def test_a_damaged_record_is_named(folder: RunFolder) -> None:
    recover(folder)
    record = next(folder.path.glob("candidates/*.json"))
    data = json.loads(record.read_text())
    record.write_text(json.dumps({**data, "metric": None}))
    with pytest.raises(RunFolderError, match=r"damaged.*delete it"):
        recover(folder)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_delivered_file_is_made_again_from_what_is_stored(folder: RunFolder, bits: int) -> None:
    plan = Plan(sparsity={"block.conv1": 0.5}, bits=dict.fromkeys(campaigns.graph().layer, bits))
    candidate, _ = recover(folder, plan)
    bench = campaigns.bench()
    found = stored_quantization(candidate.weights, candidate.ranges)
    again = bench.export(rebuild(bench, candidate.plan, candidate.weights), candidate.plan, found)
    assert again.SerializeToString(deterministic=True) == onnx.load(candidate.onnx).SerializeToString(
        deterministic=True
    )
