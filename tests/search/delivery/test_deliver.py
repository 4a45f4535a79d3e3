"""What is said about a finished model was measured on it, and the account covers every layer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from automl_compress.core.plan import Plan
from automl_compress.errors import ExportError
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.learning import learn
from automl_compress.search.delivery.deliver import Verified, final_metric, verify
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.ladder.ladder import Recovery
from automl_compress.techniques.training.settings import Training
from tests.search.campaigns import campaign

PLAN = Plan(sparsity={"block.conv1": 0.5}, bits={"down": 8, "block.conv1": 8})
UNTRAINED = Training(epochs=0)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with campaign(tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("home"), latency="80%") as opened:
        learn(opened)
        yield opened


@pytest.fixture(scope="module")
def candidates(learned: Campaign) -> dict[str, Candidate]:
    plans = {"delivered": PLAN, "dropped": Plan(drop=frozenset({"block"})), "whole": Plan()}
    recovery = Recovery(learned.bench, learned.folder)
    return {name: recovery.recover(plan, "full", UNTRAINED) for name, plan in plans.items()}


@pytest.fixture(scope="module")
def verified(learned: Campaign, candidates: dict[str, Candidate]) -> Verified:
    return verify(learned, candidates["delivered"], {"dropped": candidates["dropped"], "whole": candidates["whole"]})


def test_figures_are_those_of_the_files(
    learned: Campaign, candidates: dict[str, Candidate], verified: Verified
) -> None:
    figures = {"delivered": verified.delivered, **verified.baselines}
    assert set(figures) == set(candidates)
    for name, found in figures.items():
        path = candidates[name].onnx
        timing = learned.device.compare({name: path})[name]
        assert found.latency_us == pytest.approx(timing.median_us)
        assert found.latency_ratio == pytest.approx(found.latency_us / verified.original.latency_us)
        assert found.size_bytes == path.stat().st_size
        assert found.memory_bytes == learned.device.memory_bytes(path)
        assert found.metric == candidates[name].metric
        assert found.plan == candidates[name].plan
        assert found.predicted_latency_us == pytest.approx(found.latency_us, rel=0.1)


def test_the_original_is_measured_in_the_same_run(learned: Campaign, verified: Verified) -> None:
    assert verified.original.latency_us == pytest.approx(learned.original.latency_us)
    assert verified.original.metric == learned.original_metric()
    assert verified.original.plan is None


def test_the_budget_is_held_against_this_runs_original(verified: Verified) -> None:
    assert verified.budget.limits == pytest.approx({"latency": 0.8 * verified.original.latency_us})
    assert verified.met == (verified.delivered.latency_us <= verified.budget.limits["latency"])
    slow = replace(verified, delivered=replace(verified.delivered, latency_us=verified.original.latency_us))
    assert not slow.met


def test_the_account_covers_every_layer_and_counts_what_the_file_holds(
    learned: Campaign, candidates: dict[str, Candidate], verified: Verified
) -> None:
    rows = {row["name"]: row for row in verified.layers}
    assert list(rows) == [layer.name for layer in learned.bench.graph.layers]
    weights = {i.name: tuple(i.dims) for i in onnx.load(candidates["delivered"].onnx).graph.initializer}
    for name, row in rows.items():
        if f"{name}.weight" in weights and row["kind"] == "conv":
            assert (row["kept_out"], row["kept_in"]) == weights[f"{name}.weight"][:2]
        assert row["why"]
        assert row["kept_macs"] <= row["macs"]
        assert row["bits"] == PLAN.layer_bits(name)
    assert rows["block.conv1"]["kept_out"] * 2 == rows["block.conv1"]["out_channels"]
    assert {name for name, row in rows.items() if row["runs"] == "QLinearConv"} == {"down", "block.conv1"}


def test_a_removed_block_is_accounted_for(learned: Campaign, candidates: dict[str, Candidate]) -> None:
    rows = {row["name"]: row for row in verify(learned, candidates["dropped"], {}).layers}
    for name in ("block.conv1", "block.conv2"):
        assert rows[name]["removed"]
        assert rows[name]["kept_macs"] == 0
        assert "block" in rows[name]["why"]
    assert not any(row.get("removed") for name, row in rows.items() if not name.startswith("block"))


def test_a_file_whose_weights_are_not_the_models_is_noticed(
    learned: Campaign, candidates: dict[str, Candidate], tmp_path: Path
) -> None:
    model = onnx.load(candidates["delivered"].onnx)
    for initializer in model.graph.initializer:
        if initializer.name == "head.bias":
            initializer.raw_data = b"\x00\x00\xc0\x7f" * (len(initializer.raw_data) // 4)  # not a number
    path = tmp_path / "spoilt.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError):
        verify(learned, replace(candidates["delivered"], onnx=path), {})


def test_the_test_split_is_read_for_the_delivered_file_alone(
    learned: Campaign, candidates: dict[str, Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    task = learned.bench.task
    before = type(task).batches
    monkeypatch.setattr(type(task), "batches", lambda self, split: read.append(split) or before(self, split))
    verify(learned, candidates["delivered"], {})
    assert "test" not in read
    metric = final_metric(learned, candidates["delivered"])
    assert read.count("test") == 1
    assert metric is not None
    assert 0.5 < metric <= 1
    learned.bench.task = replace(task, test=None)
    try:
        assert final_metric(learned, candidates["delivered"]) is None
    finally:
        learned.bench.task = task


def test_no_temporary_models_are_left(learned: Campaign) -> None:
    kinds = {Path(name).suffix for name in os.listdir(learned.folder.path / "candidates")}
    assert kinds == {".json", ".onnx", ".safetensors"}
