"""The whole flow on a tiny task: what is delivered meets the budget and can be made again, and nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from automl_compress import api, cli
from automl_compress.core.result import Result
from automl_compress.errors import InputError, PlanError, RunFolderError
from automl_compress.hardware.prediction.estimated import device_for
from automl_compress.search.campaign import opening
from automl_compress.search.evaluation.evaluate import Workbench
from tests import mortal, tiny
from tests.search.campaigns import RULES
from tests.search.device import TimelessRuntime

ROOT = Path(__file__).resolve().parent.parent
BUDGET = {"latency": "60%", "size": "60%"}
EFFORT: dict[str, Any] = {"trials": 8, "epochs": 1}
MICROCONTROLLER = "cortex-m7-400mhz"
FILES = {
    "best.onnx", "best.safetensors", "config.yaml", "original.onnx", "plan.json", "report.html", "result.json",
    "run.json", "study.journal",
}  # fmt: skip


@pytest.fixture(scope="module")
def asked() -> Counter[str]:
    """What the device was asked, over all runs of this module."""
    return Counter()


@pytest.fixture(scope="module", autouse=True)
def _no_clock(tmp_path_factory: pytest.TempPathFactory, asked: Counter[str]) -> Iterator[None]:
    class Counted(TimelessRuntime):
        pass

    Counted.asked = asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOML_COMPRESS_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(opening, "device_for", partial(device_for, launch=Counted))
        yield


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("space") / "small.yaml"
    path.write_text(yaml.safe_dump(RULES), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory, space: str) -> Result:
    folder = tmp_path_factory.mktemp("runs") / "first"
    return api.compress(tiny.task(), space=space, output=folder, **BUDGET, **EFFORT)


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    found = optuna.load_study(study_name="one-shot", storage=storage).get_trials()
    return [trial for trial in found if "adopted" not in trial.user_attrs]


def evaluated(folder: Path) -> list[str]:
    """The plans of the trials that evaluated one."""
    found = [t for t in trials(folder) if t.state.name == "COMPLETE" and "repeat_of" not in t.user_attrs]
    return [t.user_attrs["plan"] for t in found]


def outputs(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def accuracy(path: Path, seed: int, count: int) -> float:
    images, classes = (part.numpy() for part in tiny.split(count, seed))
    return float((outputs(path, images).argmax(axis=1) == classes).mean())


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def arguments(task: str, folder: Path, space: str, **options: str) -> list[str]:
    words = {"latency": "60%", "trials": "8", "epochs": "0", **options}
    pairs = [word for name, value in words.items() if value for word in (f"--{name}", value)]
    return ["search", task, "--space", space, "-o", str(folder), "-q", *pairs]


def test_the_delivered_model_meets_the_budget(delivered: Result) -> None:
    assert delivered.status == "met"
    figures, original = delivered.delivered, delivered.original
    assert figures is not None
    assert original is not None
    assert figures.latency_us <= delivered.budget["latency"] <= 0.6 * original.latency_us * 1.001
    assert figures.size_bytes <= delivered.budget["size"]
    assert figures.metric > 0.7


def test_the_run_folder_is_complete_and_consistent(delivered: Result) -> None:
    folder = delivered.folder
    assert folder is not None
    assert {child.name for child in folder.iterdir()} >= FILES
    assert not [path for path in folder.rglob("*") if path.name.startswith(".writing")]
    data = result_of(folder)
    assert data == json.loads(json.dumps(delivered.to_json()))
    assert data["delivered"]["plan"]["kept"] == json.loads((folder / "plan.json").read_text())["kept"]
    assert {"original", "delivered", "baselines", "budget", "status"} <= set(data)
    for figures in (data["original"], data["delivered"], *data["baselines"].values()):
        assert {"metric", "latency_us", "size_bytes", "memory_bytes"} <= set(figures)
    assert {"predicted_latency_us", "test_metric", "plan"} <= set(data["delivered"])
    assert set(data["baselines"]) == {"uniform-int8", "milp", "random", "prune-then-quantize"}
    assert {(row["baseline"], row["rung"]) for row in data["standings"]} >= {
        *(("original", "full"), ("milp", "full")),
        *((name, "one-shot") for name in data["baselines"]),
    }
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trials"] == EFFORT["trials"]
    assert config["latency"] == BUDGET["latency"]
    assert "<html" in (folder / "report.html").read_text()


def test_an_estimated_device_delivers_a_model_that_is_not_called_measured(
    space: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a shipped profile of a microcontroller, through the real runtime; nothing of it may be timed."""
    folder = tmp_path / "run"
    result = api.compress(
        tiny.task(),
        space=space,
        output=folder,
        latency="60%",
        memory="70%",
        trials=6,
        epochs=0,
        profile=MICROCONTROLLER,
    )
    assert result.status == "estimated"
    assert result.delivered is not None
    assert result.original is not None
    for figures in (result.original, result.delivered, *result.baselines.values()):
        assert figures.provenance == "estimated"
    assert result.delivered.latency_us <= result.budget["latency"] == pytest.approx(0.6 * result.original.latency_us)
    assert result.delivered.memory_bytes <= result.budget["memory"]
    assert result.device["provenance"] == "estimated"
    assert any("not measured on the device" in note for note in result.notes)
    assert cli.main(["show", str(folder)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("estimated: ")
    assert "met by estimate" in told
    assert "measured 0" not in told
    assert "nothing was measured on the device" in (folder / "report.html").read_text()
    again = api.compress(
        tiny.task(),
        space=space,
        output=folder,
        latency="60%",
        memory="70%",
        trials=6,
        epochs=0,
        profile=MICROCONTROLLER,
    )
    assert again.to_json() == json.loads(json.dumps(result.to_json()))


def test_the_figures_hold_when_measured_with_nothing_but_the_runtime(delivered: Result) -> None:
    folder, figures, original = delivered.folder, delivered.delivered, delivered.original
    assert folder is not None
    assert figures is not None
    assert original is not None
    best = folder / "best.onnx"
    assert best.stat().st_size == figures.size_bytes
    assert (folder / "original.onnx").stat().st_size == original.size_bytes
    assert accuracy(best, seed=2, count=400) == pytest.approx(figures.metric, abs=1e-6)
    assert accuracy(best, seed=3, count=200) == pytest.approx(figures.test_metric, abs=1e-6)
    assert accuracy(folder / "original.onnx", seed=2, count=400) == pytest.approx(original.metric, abs=1e-6)


def test_any_batch_size_gives_the_same_answers(delivered: Result) -> None:
    assert delivered.folder is not None
    images = tiny.split(7, 5)[0].numpy()
    together = outputs(delivered.folder / "best.onnx", images)
    alone = np.concatenate([outputs(delivered.folder / "best.onnx", images[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-3)


def test_the_plan_replays_to_the_same_model(delivered: Result, tmp_path: Path) -> None:
    assert delivered.folder is not None
    again = api.replay(delivered.folder, tiny.task(), output=tmp_path / "again.onnx")
    images = tiny.split(64, 5)[0].numpy()
    np.testing.assert_allclose(
        outputs(again, images), outputs(delivered.folder / "best.onnx", images), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(PlanError, match="no such file"):
        api.replay(tmp_path, tiny.task())
    (tmp_path / "front" / "1").mkdir(parents=True)
    (tmp_path / "front" / "1" / "plan.json").write_text("{}")
    with pytest.raises(PlanError, match=f"name one of its models: {tmp_path}/front/1"):
        api.replay(tmp_path, tiny.task())


def test_every_trial_says_what_it_decided_and_what_that_was_predicted_to_cost(delivered: Result) -> None:
    assert delivered.folder is not None
    finished = [t for t in trials(delivered.folder) if t.state.is_finished()]
    assert len(finished) >= EFFORT["trials"]
    for trial in finished:
        assert set(trial.constraints) == {"latency", "size"}
        assert {name.split(".")[0] for name in trial.params} <= {"width", "sparsity", "drop", "bits"}
        assert (trial.state.name == "COMPLETE") == all(value <= 0 for value in trial.constraints.values())
    plans = evaluated(delivered.folder)
    assert len(plans) == len(set(plans))


def test_another_budget_is_answered_from_what_a_run_knows(
    delivered: Result, space: str, tmp_path: Path, asked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sensitivity is measured, no plan evaluated, no model trained that the run has."""
    assert delivered.folder is not None
    evaluated_before = evaluated(delivered.folder)
    options = {"latency": "75%", "size": "75%"}
    compared, beside = asked["compare"], set(delivered.folder.parent.iterdir())
    foreseen = api.foreseen(delivered.folder, tiny.task(), **options)
    assert foreseen.one_shot is not None
    assert foreseen.cost.latency_us <= foreseen.budget["latency"]
    assert asked["compare"] == compared, "the original's figures are those of the run"
    assert set(delivered.folder.parent.iterdir()) == beside, "an answer leaves nothing that a search would go by"
    repaired: list[str] = []
    one_shot = Workbench.one_shot
    monkeypatch.setattr(Workbench, "one_shot", lambda self, plan: repaired.append(plan.key) or one_shot(self, plan))
    result = api.rebudget(delivered.folder, tiny.task(), trials=2, output=tmp_path / "again", **options)
    assert result.status == "met"
    assert result.delivered is not None
    assert result.delivered.latency_us <= result.budget["latency"]
    assert result.trials["reused"] == len(set(evaluated_before))
    assert not set(evaluated(tmp_path / "again")) & set(evaluated_before)
    # Two trials; random plans and the classic route are evaluated at most as often each.
    assert len(repaired) == len(set(repaired)) <= 2 + 2 * 2
    sensitivities = [(folder / "sensitivity.jsonl").read_text() for folder in (delivered.folder, tmp_path / "again")]
    assert sensitivities[0] == sensitivities[1]
    with pytest.raises(RunFolderError, match="run of another task"):
        api.rebudget(delivered.folder, tiny.other(), latency="75%", output=tmp_path / "other")
    with pytest.raises(InputError, match="rebudget RUN TASK"):
        api.rebudget(delivered.folder, latency="75%")
    with pytest.raises(RunFolderError, match="no such run folder"):
        api.rebudget(tmp_path / "none", tiny.task(), latency="75%")


def test_each_device_gets_its_model_from_one_set_of_sensitivities(
    delivered: Result, space: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiles = [MICROCONTROLLER, "cortex-a76-2.4ghz"]
    effort = {"trials": 2, "epochs": 0}
    results = api.compress_each(tiny.task(), profiles, space=space, latency="70%", output=tmp_path, **effort)
    assert list(results) == profiles
    assert {result.status for result in results.values()} == {"estimated"}
    for name in profiles:
        assert (tmp_path / name / "best.onnx").is_file()
        assert results[name].device["profile"] == name
    first, second = ((tmp_path / name / "sensitivity.jsonl").read_text().splitlines() for name in profiles)
    assert set(first) & set(second)
    assert cli.main(["show", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown["devices"]) == set(profiles)
    assert all(name in (tmp_path / "report.html").read_text() for name in profiles)
    with pytest.raises(InputError, match="twice"):
        api.compress_each(tiny.task(), [MICROCONTROLLER] * 2, latency="70%")


def test_every_trials_plan_is_replayed_to_the_metric_that_it_had(delivered: Result, tmp_path: Path) -> None:
    assert delivered.folder is not None
    done = [t for t in trials(delivered.folder) if t.state.name == "COMPLETE" and "repeat_of" not in t.user_attrs]
    for trial in done[-2:]:
        model = api.replay(delivered.folder, tiny.task(), trial=trial.number, output=tmp_path / f"{trial.number}.onnx")
        assert accuracy(model, seed=2, count=400) == pytest.approx(trial.value, abs=1e-6)
    with pytest.raises(PlanError, match="has no trial '1000'; it has: 0 to"):
        api.replay(delivered.folder, tiny.task(), trial=1000)
    with pytest.raises(RunFolderError, match="another task"):
        api.replay(delivered.folder, tiny.other(), trial=0)


def test_a_time_limit_that_nothing_fits_into_is_refused_with_one_that_would_do(
    delivered: Result, space: str, tmp_path: Path
) -> None:
    """The first measurement of the original is over by then; what was measured stays."""
    with pytest.raises(InputError, match=r"--timeout 0s is too short: .*; give .* or more"):
        api.compress(tiny.task(), space=space, output=tmp_path / "run", timeout=0.001, **BUDGET, **EFFORT)
    assert (tmp_path / "run" / "original.json").exists()
    result = api.compress(tiny.task(), space=space, output=tmp_path / "run", timeout=3600, **BUDGET, **EFFORT)
    assert result.status == "met"
    assert not [note for note in result.notes if "time limit" in note]


def test_a_finished_run_is_not_run_again(delivered: Result, space: str, asked: Counter[str]) -> None:
    assert delivered.folder is not None
    before, was = dict(asked), (delivered.folder / "result.json").read_bytes()
    again = api.compress(tiny.task(), space=space, output=delivered.folder, **BUDGET, **EFFORT)
    assert again.to_json() == delivered.to_json()
    assert dict(asked) == before
    assert (delivered.folder / "result.json").read_bytes() == was


def test_a_second_search_measures_no_kernel_and_finds_the_same(delivered: Result, space: str, tmp_path: Path) -> None:
    profile = Path(delivered.device["file"])
    before = profile.read_bytes()
    again = api.compress(tiny.task(), space=space, output=tmp_path / "second", **BUDGET, **EFFORT)
    assert profile.read_bytes() == before
    assert delivered.folder is not None
    assert evaluated(tmp_path / "second") == evaluated(delivered.folder)
    assert again.delivered is not None
    assert delivered.delivered is not None
    assert again.delivered.plan == delivered.delivered.plan
    assert again.delivered.metric == delivered.delivered.metric
    assert (tmp_path / "second" / "best.onnx").read_bytes() == (delivered.folder / "best.onnx").read_bytes()


def test_another_tasks_or_budgets_folder_is_refused(delivered: Result, space: str) -> None:
    assert delivered.folder is not None
    before = {path: path.read_bytes() for path in delivered.folder.iterdir() if path.is_file()}
    with pytest.raises(RunFolderError, match=r"its model .* is not this one's"):
        api.compress(tiny.other(), space=space, output=delivered.folder, **BUDGET, **EFFORT)
    with pytest.raises(RunFolderError, match="its budget is"):
        api.compress(tiny.task(), space=space, output=delivered.folder, size="30%", **EFFORT)
    spec = f"{ROOT / 'tests' / 'tiny.py'}:other"
    assert cli.main(arguments(spec, delivered.folder, space, **BUDGET)) == 2
    assert {path: path.read_bytes() for path in delivered.folder.iterdir() if path.is_file()} == before


def test_an_unreachable_budget_ends_with_the_nearest_that_is_reachable(
    space: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = str(ROOT / "tests" / "tiny.py")
    assert cli.main([*arguments(spec, tmp_path / "run", space, latency="1%"), "--json"]) == 3
    shown = json.loads(capsys.readouterr().out)
    data = result_of(tmp_path / "run")
    assert shown == data
    assert data["status"] == "infeasible"
    assert data["nearest"]["latency"] > data["budget"]["latency"]
    assert data["binding"]
    assert data["delivered"] is None
    assert data["original"]["latency_us"] > data["nearest"]["latency"]
    assert not (tmp_path / "run" / "best.onnx").exists()


def test_an_interrupted_search_says_so_and_goes_on(space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = arguments(mortal.__file__, tmp_path / "run", space, trials="6")
    monkeypatch.setenv("AC_TEST_CALL", "4")
    monkeypatch.setenv("AC_TEST_SIGNAL", str(int(signal.SIGINT)))
    assert cli.main(command) == 130
    data = result_of(tmp_path / "run")
    assert data["status"] == "interrupted"
    assert data["original"]["size_bytes"] > 0
    before = evaluated(tmp_path / "run")
    assert before
    monkeypatch.setenv("AC_TEST_CALL", "0")
    assert cli.main(command) == 0
    assert result_of(tmp_path / "run")["status"] == "met"
    plans = evaluated(tmp_path / "run")
    assert plans[: len(before)] == before
    assert len(plans) == len(set(plans))


def hasty(path: Path) -> str:
    """The shipped profile of this machine with a protocol that doesn't try to be precise."""
    header = yaml.safe_load((ROOT / "hardware_profiles" / "local.yaml").read_text(encoding="utf-8"))
    header["name"] = "hasty"
    header["protocol"] |= {"bursts": 3, "burst_runs": 5, "warm_up_runs": 1, "trace_rounds": 1, "trace_runs": 9}
    path.write_text(yaml.safe_dump(header), encoding="utf-8")
    return str(path)


def test_a_search_that_was_killed_goes_on_without_evaluating_a_plan_twice(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real device and a real process; the budget is one of size, so no clock decides."""
    folder, profile = tmp_path / "run", hasty(tmp_path / "hasty.yaml")
    task = str(ROOT / "tests" / "mortal.py")
    command = arguments(task, folder, space, latency="", size="50%", trials="6", profile=profile)
    monkeypatch.setenv("AC_TEST_CALL", "4")
    monkeypatch.setenv("AC_TEST_SIGNAL", str(int(signal.SIGKILL)))
    killed = subprocess.run([sys.executable, "-m", "automl_compress", *command], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (folder / "result.json").exists()
    before = evaluated(folder)
    assert before
    monkeypatch.setenv("AC_TEST_CALL", "0")
    monkeypatch.setattr(opening, "device_for", device_for)
    assert cli.main(command) == 0
    data = result_of(folder)
    assert data["status"] == "met"
    assert data["delivered"]["size_bytes"] == (folder / "best.onnx").stat().st_size <= data["budget"]["size"]
    assert accuracy(folder / "best.onnx", seed=2, count=400) == pytest.approx(data["delivered"]["metric"], abs=1e-6)
    plans = evaluated(folder)
    assert set(before) <= set(plans)
    assert len(plans) == len(set(plans)), "a plan was evaluated twice"
    assert not [trial for trial in trials(folder) if trial.state.name == "RUNNING"]
