"""A mask in a search space becomes zeros in the delivered file, through repair, training and export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from automl_compress.core.plan import Plan
from automl_compress.core.result import Result
from automl_compress.deploy.report import render
from automl_compress.errors import SpaceError
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.learning import learn
from automl_compress.search.delivery.deliver import Verified, verify
from automl_compress.search.evaluation.candidate import Candidate, plan_file, read_plan, rebuild, stored_quantization
from automl_compress.search.ladder.ladder import Recovery
from automl_compress.search.solvers.decode import Decoder, options_in_force
from automl_compress.search.solvers.widths import macs_table
from automl_compress.search.space.rules import SpaceFile
from automl_compress.search.space.space import SearchSpace, resolve
from automl_compress.search.table.sensitivity import single
from automl_compress.techniques.training.settings import Training
from tests.search import campaigns
from tests.search.networks import NATIVE

MASKS = {"block.conv1": "2:4", "block.conv2": "0.75", "down": "0.5 by row"}
PLAN = Plan(masks=MASKS, bits={"down": 8})


def space(rules: list[dict[str, object]]) -> SearchSpace:
    return resolve(SpaceFile.model_validate({"name": "masks", "rules": rules}), campaigns.graph(), NATIVE)


def zeros(model: onnx.ModelProto, layer: str) -> float:
    """The fraction of zeros of a layer's weight in the file, stored in whatever type."""
    found = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.startswith(f"{layer}.weight")]
    return float((max(found, key=lambda value: value.size) == 0).mean())


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with campaigns.campaign(tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("home"), latency="200%") as opened:
        learn(opened)
        yield opened


@pytest.fixture(scope="module")
def trained(learned: Campaign) -> Candidate:
    return Recovery(learned.bench, learned.folder).recover(PLAN, "full", Training(epochs=1.0, learning_rate=0.05))


@pytest.fixture(scope="module")
def verified(learned: Campaign, trained: Candidate) -> Verified:
    return verify(learned, trained, {})


def test_zeros_survive_training_and_are_in_the_exported_file(learned: Campaign, trained: Candidate) -> None:
    assert trained.training
    model, file = trained.model(learned.bench), onnx.load(trained.onnx)
    for name, share in {"block.conv1": 0.5, "block.conv2": 0.75, "down": 0.5}.items():
        weight = model.get_submodule(name).weight.detach().numpy()
        assert (weight == 0).mean() == pytest.approx(share, abs=1 / weight.size)
        assert zeros(file, name) >= share - 1 / weight.size
    groups = np.moveaxis(model.get_submodule("block.conv1").weight.detach().numpy() != 0, 1, -1)
    assert (groups.reshape(-1, 4).sum(axis=1) == 2).all()


def test_a_masked_plan_replays_from_its_file_and_weights(learned: Campaign, trained: Candidate, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_file(trained, learned.bench)))
    plan, ranges, _ = read_plan(path, learned.bench.graph)
    assert dict(plan.masks) == MASKS
    found = stored_quantization(trained.weights, ranges)
    again = learned.bench.export(rebuild(learned.bench, plan, trained.weights), plan, found)
    assert again.SerializeToString() == trained.onnx.read_bytes()


def test_a_student_has_its_masks_whatever_repair_was_kept(learned: Campaign) -> None:
    student = learned.bench.students.make(Plan(masks={"block.conv1": "1:4"}, sparsity={"block.conv1": 0.5}))
    weight = student.model.get_submodule("block.conv1").weight
    assert float((weight == 0).float().mean()) == 0.75


def test_what_masks_save_is_measured_and_said(verified: Verified, learned: Campaign) -> None:
    assert verified.delivered.compressed_bytes is not None
    assert verified.delivered.compressed_bytes < verified.delivered.size_bytes
    (note,) = [note for note in verified.notes if note.startswith("masks:")]
    assert "no faster" in note
    rows = {row["name"]: row for row in verified.layers}
    assert rows["block.conv1"]["mask"] == "2:4"
    assert rows["block.conv1"]["zeros"] == 0.5
    assert "mask 0.75" in rows["block.conv2"]["why"]
    assert "mask" not in rows["head"]


def test_the_file_is_as_large_with_a_mask_as_without(learned: Campaign) -> None:
    plan = Plan(masks={"block.conv2": "0.75"})
    masked = learned.bench.export(*learned.bench.student(plan))
    assert masked.ByteSize() == pytest.approx(learned.bench.original.ByteSize(), abs=64)


def test_the_report_has_a_column_for_masks_where_there_are_any(verified: Verified, learned: Campaign) -> None:
    result = Result(
        status="met",
        budget={"latency": 1e9},
        original=verified.original,
        delivered=verified.delivered,
        layers=verified.layers,
        notes=verified.notes,
    )
    page = render(result, [], plotly_js="")
    assert "<th>mask</th>" in page
    assert "2:4 (50.0% zero)" in page
    plain = render(Result(status="met", budget={}, original=verified.original), [], plotly_js="")
    assert "<th>mask</th>" not in plain


def test_rules_for_bits_and_masks_decide_about_the_same_layer() -> None:
    found = space(
        [
            {"match": {"kind": "layer", "name": "block.*"}, "mask": ["none", 0.5, "2:4"]},
            {"match": {"kind": "layer", "name": "down"}, "mask": "0.75", "bits": 8},
            {"match": {"kind": "layer"}, "bits": [8, 32]},
        ]
    )
    assert found.options("mask.block.conv1") == ("none", "0.5", "2:4")
    assert found.options("bits.block.conv1") == (32, 8)
    assert found.fixed["mask.down"] == "0.75"
    assert found.fixed["bits.down"] == 8
    assert found.options("mask.head") == ()
    plan = found.plan({"mask.block.conv2": "2:4", "bits.block.conv2": 8})
    assert dict(plan.masks) == {"block.conv2": "2:4", "down": "0.75"}
    assert found.params(plan)["mask.block.conv2"] == "2:4"
    assert found.plan(found.params(plan)).key == plan.key
    assert found.plan_key(plan) != found.plan_key(found.plan({"bits.block.conv2": 8}))
    assert ("mask.block.conv2", "2:4") in options_in_force(found, plan)
    assert dict(single(found.decision["mask.block.conv1"], "0.5").masks) == {"block.conv1": "0.5"}


def test_a_pattern_that_a_layer_cant_have_is_noted_or_refused() -> None:
    found = space([{"match": {"kind": "layer"}, "mask": ["2:4", 0.5]}])
    assert found.options("mask.stem") == ("none", "0.5")
    assert any("stem: 2:4 sparsity needs input channels divisible by 4, found 1" in note for note in found.notes)
    with pytest.raises(SpaceError, match=r"stem: 2:4 sparsity .* found 1; use 'none' for it in the search space"):
        space([{"match": {"kind": "layer"}, "mask": "2:4"}])


@pytest.mark.parametrize(
    ("mask", "words"), [(124, "write '2:4' in quotes"), ("most", "is not 'none'"), (1.5, "above 0"), (["4:2"], "N < M")]
)
def test_a_mask_that_cant_be_read_is_named(mask: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SpaceFile.model_validate({"name": "x", "rules": [{"match": {"kind": "layer"}, "mask": mask}]})


def test_a_channel_group_has_no_mask() -> None:
    with pytest.raises(ValueError, match="gives 'sparsity' only"):
        SpaceFile.model_validate({"name": "x", "rules": [{"match": {"kind": "channel-group"}, "mask": "0.5"}]})


def test_the_table_takes_masks_only_where_they_are_fixed() -> None:
    """They save nothing that is counted, so the exact optimum never chooses one."""
    found = space(
        [
            {"match": {"kind": "layer", "name": "down"}, "mask": "0.5"},
            {"match": {"kind": "layer"}, "mask": ["none", "0.5"]},
            {"match": {"kind": "channel-group"}, "sparsity": [0, 0.5]},
        ]
    )
    graph = campaigns.graph()
    decoder = Decoder(found, graph, macs_table(graph, {("mask.block.conv1", "0.5"): 0.1}))
    solution = decoder.solve({}, {"latency": 0.8 * graph.macs})
    assert solution is not None
    assert dict(solution.plan.masks) == {"down": "0.5"}
