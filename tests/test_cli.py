from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from automl_compress.cli import main
from automl_compress.cli.options import parse_seconds
from automl_compress.core.budget import Cost
from automl_compress.core.plan import Plan
from automl_compress.core.result import Figures, Result
from automl_compress.errors import InfeasibleError, InputError, TaskError, TrainingError
from automl_compress.progress import Progress, SilentProgress
from automl_compress.search.campaign.foresight import Foreseen
from automl_compress.search.table.profiling import Profiled

ORIGINAL = Figures(metric=0.92, latency_us=750.0, size_bytes=1_100_000, memory_bytes=5_200_000)
DELIVERED = Figures(metric=0.91, latency_us=290.0, size_bytes=300_000, memory_bytes=3_000_000, latency_ratio=0.387)
MET = Result(status="met", budget={"latency": 300.0}, original=ORIGINAL, delivered=DELIVERED)
INFEASIBLE = Result(
    status="infeasible",
    budget={"latency": 30.0},
    original=ORIGINAL,
    nearest={"latency": 120.0},
    binding=("conv1", "fc"),
)
SEARCH = ["search", "task.py", "--latency", "40%"]


class FakeApi:
    """Stands in for `automl_compress.api`: keeps what it was called with, then does what the test says."""

    def __init__(self, outcome: Any = MET) -> None:
        self.outcome = outcome
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def _answer(self, name: str, *args: Any, **options: Any) -> Any:
        self.calls.append((name, args, options))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome() if callable(self.outcome) else self.outcome

    def compress(self, task: str, **options: Any) -> Any:
        return self._answer("compress", task, **options)

    def work(self, task: str, **options: Any) -> Any:
        return self._answer("work", task, **options)

    def profile(self, tasks: list[str], **options: Any) -> Any:
        return self._answer("profile", tasks, **options)

    def recover(self, task: str, plan: Path, **options: Any) -> Any:
        return self._answer("recover", task, plan, **options)

    def replay(self, run: Path, task: str, **options: Any) -> Any:
        return self._answer("replay", run, task, **options)

    def compress_each(self, task: str, profiles: list[str], **options: Any) -> Any:
        return self._answer("compress_each", task, profiles, **options)

    def rebudget(self, run: Path, task: str | None, **options: Any) -> Any:
        return self._answer("rebudget", run, task, **options)

    def foreseen(self, run: Path, task: str | None, **options: Any) -> Any:
        return self._answer("foreseen", run, task, **options)


def test_recover_passes_every_option_on_and_tells_what_came_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = SimpleNamespace(
        metric=0.91,
        onnx=Path("out/r.onnx"),
        weights=Path("out/r.safetensors"),
        seconds=2.0,
        training=(),
        notes=("slow",),
    )
    api = FakeApi(found)
    line = (
        "recover a/task.py p.json --mode gradual --epochs 2 --distillation soft+dist --training clip=1 --seed 3 -o out"
    )
    assert main([*line.split(), "-q"], api=api) == 0
    [(name, args, options)] = api.calls
    assert (name, args) == ("recover", ("a/task.py", Path("p.json")))
    assert isinstance(options.pop("progress"), SilentProgress)
    assert options == {
        "mode": "gradual",
        "epochs": 2.0,
        "training": "clip=1",
        "distillation": "soft+dist",
        "seed": 3,
        "weights": None,
        "output": Path("out"),
    }
    assert capsys.readouterr().out == "out/r.onnx: 0.9100 on validation data\nslow\n"
    assert main([*line.split(), "-q", "--json"], api=api) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == 0.91


def test_recover_refuses_an_unknown_mode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recover", "a/task.py", "p.json", "--mode", "slow"], api=FakeApi()) == 2
    assert "'slow' is unknown; choose one of fine-tune" in capsys.readouterr().err


def test_search_passes_every_option_on() -> None:
    api = FakeApi()
    line = (
        "search a/task.py:make --latency 40% --size 300KB --memory 2MB -o out --profile p --space s --trials 7 "
        "--device ssh://pi@board:2222 "
        "--epochs 2 --timeout 30m --seed 3 --sampler TPESampler --distillation soft+dist=2 --baselines full "
        "--recovery gradual --training optimizer=sgd --students scratch+own --weights w.pt "
        "--storage sqlite:///x.db --quiet"
    )
    assert main(line.split(), api=api) == 0
    [(name, args, options)] = api.calls
    assert (name, args) == ("compress", ("a/task.py:make",))
    assert isinstance(options.pop("progress"), SilentProgress)
    assert options == {
        "latency": "40%",
        "size": "300KB",
        "memory": "2MB",
        "output": Path("out"),
        "profile": "p",
        "device": "ssh://pi@board:2222",
        "space": "s",
        "trials": 7,
        "epochs": 2,
        "timeout": 1800.0,
        "seed": 3,
        "sampler": "TPESampler",
        "distillation": "soft+dist=2",
        "baselines": "full",
        "recovery": "gradual",
        "training": "optimizer=sgd",
        "students": "scratch+own",
        "weights": Path("w.pt"),
        "storage": "sqlite:///x.db",
        "max_failed": 0.5,
    }


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("--max-drop 1%", {"max_drop": "1%"}),
        ("--min-metric 0.9 --minimise size --latency 40%", {"min_metric": "0.9", "minimise": "size", "latency": "40%"}),
        ("--front 5", {"front": 5}),
    ],
)
def test_other_directions_need_no_budget(line: str, asked: dict[str, Any]) -> None:
    api = FakeApi()
    assert main(["search", "t.py", *line.split()], api=api) == 0
    [(_, _, options)] = api.calls
    assert asked.items() <= options.items()


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [((MET, MET), 0), ((MET, INFEASIBLE), 3), ((replace(MET, status="estimated"), MET), 4)],
)
def test_several_profiles_are_one_search_each(
    outcomes: tuple[Result, Result], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    api = FakeApi(dict(zip(("a", "b"), outcomes, strict=True)))
    assert main([*SEARCH, "--profile", "a", "--profile", "b", "--json"], api=api) == code
    [(name, args, options)] = api.calls
    assert (name, args) == ("compress_each", ("task.py", ["a", "b"]))
    assert "profile" not in options
    assert set(json.loads(capsys.readouterr().out)["devices"]) == {"a", "b"}


def test_rebudget_asks_a_run_for_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi()
    assert (
        main(["rebudget", "runs/x", "--latency", "30%", "--epochs", "1", "--timeout", "5m", "-o", "out", "-q"], api=api)
        == 0
    )
    [(name, args, options)] = api.calls
    assert (name, args) == ("rebudget", (Path("runs/x"), None))
    given = {key: value for key, value in options.items() if value is not None and key != "progress"}
    assert given == {"latency": "30%", "epochs": 1, "timeout": 300.0, "output": Path("out")}
    assert "met: " in capsys.readouterr().out


def test_rebudget_can_answer_with_a_plan_alone(capsys: pytest.CaptureFixture[str]) -> None:
    cost = Cost(latency_us=200.0, size_bytes=3e5, memory_bytes=2e6)
    whole = Cost(latency_us=800.0, size_bytes=1e6, memory_bytes=5e6)
    found = Foreseen(plan=Plan(width=0.5), cost=cost, one_shot=0.8, original=whole, budget={"latency": 240.0})
    line = ["rebudget", "runs/x", "task.py", "--latency", "30%", "--plan-only"]
    assert main(line, api=(api := FakeApi(found))) == 0
    assert api.calls[0][:2] == ("foreseen", (Path("runs/x"), "task.py"))
    told = capsys.readouterr().out
    assert "latency 200 us" in told
    assert "0.8000 without training" in told
    assert main([*line, "--json"], api=FakeApi(found)) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["width"] == 0.5
    assert main(line, api=FakeApi(InfeasibleError("nothing", nearest={"latency": 300.0}))) == 3
    assert main([*line, "-o", "runs/y"], api=FakeApi(found)) == 2
    assert "leave out -o" in capsys.readouterr().err


def test_defaults() -> None:
    api = FakeApi()
    main(SEARCH, api=api)
    [(_, _, options)] = api.calls
    assert isinstance(options.pop("progress"), Progress)
    given = {name: value for name, value in options.items() if value is not None}
    assert given == {
        "latency": "40%",
        "profile": "local",
        "device": "local",
        "space": "cnn",
        "seed": 0,
        "sampler": "budget",
        "max_failed": 0.5,
        "distillation": "soft+features",
        "baselines": "quick",
        "recovery": "fine-tune",
        "training": "",
    }


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (MET, 0),
        (INFEASIBLE, 3),
        (replace(MET, status="estimated"), 4),
        (Result(status="interrupted", budget={}, original=None), 130),
        (TrainingError("the loss is NaN"), 1),
        (TaskError("no such file"), 2),
        (InfeasibleError("too tight"), 3),
        (KeyboardInterrupt(), 130),
        (ValueError("a defect"), 1),
        (SystemExit(7), 1),
        (MemoryError(), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2),
    ],
)
def test_exit_codes(outcome: Any, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SEARCH, api=FakeApi(outcome)) == code
    captured = capsys.readouterr()
    speaks_itself = isinstance(outcome, Result) and outcome.status != "infeasible"
    assert len(captured.err.splitlines()) == (0 if speaks_itself else 1)
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("more", "name"), [(["--latency=50%"], "--latency"), (["-o", "a", "--output", "b"], "--output")]
)
def test_an_option_that_is_given_twice_is_refused(
    more: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    api = FakeApi()
    assert main([*SEARCH, *more], api=api) == 2
    assert capsys.readouterr().err == f"error: {name} is given twice: which of them holds? give it once\n"
    assert not api.calls


def test_an_option_for_several_values_may_be_given_twice() -> None:
    api = FakeApi()
    main([*SEARCH, "--profile", "a", "--profile", "b"], api=api)
    assert api.calls


def test_infeasible_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    main(SEARCH, api=FakeApi(replace(INFEASIBLE, notes=("the cheapest model needs more", "a remark"))))
    assert capsys.readouterr().err.startswith("error: the cheapest model needs more; nearest reachable: latency")


def test_infeasible_names_the_nearest_budget_and_what_binds(capsys: pytest.CaptureFixture[str]) -> None:
    error = InfeasibleError("nothing fits", nearest={"latency": 120.0}, binding=("conv1", "fc"))
    for outcome in (error, INFEASIBLE):
        main(SEARCH, api=FakeApi(outcome))
        assert "nearest reachable: latency 120 us; most of it is taken by conv1, fc" in capsys.readouterr().err


@pytest.mark.parametrize("latency", ["-5ms", "0", "0ms", "40 parsecs", "nonsense", "", "--size"])
def test_bad_budgets_are_one_line_before_anything_begins(latency: str, capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi()
    assert main(["search", "task.py", "--latency", latency], api=api) == 2
    assert not api.calls
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --latency {latency!r}")
    assert "0.8ms, 350us or 40%" in line


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "Missing command"),
        ("serach t.py", "serach"),
        ("search", "Missing argument"),
        ("search t.py --latncy 40%", "--latency"),
        ("search t.py --trials many", "--trials"),
        ("search t.py --trials 0", "--trials"),
        ("search t.py --latency", "requires an argument"),
        ("search t.py", "no budget given"),
        ("search t.py --minimise size --latency 40%", "--minimise is for"),
        ("search t.py --max-drop lots", "can't be read"),
        ("search t.py --max-drop 1% --min-metric 0.9", "one of them"),
        ("search t.py --min-metric 91%", "own units"),
        ("search t.py --front 1", "2 to 50"),
        ("search t.py --latency 40% --max-failed 2", "--max-failed"),
        ("worker t.py --latency 40% --storage sqlite:///x.db --profile a --profile b", "one device"),
        ("rebudget", "Missing argument"),
        ("rebudget runs/x", "no budget given"),
        ("rebudget runs/x --latency lots", "--latency 'lots'"),
        ("rebudget runs/x --latency 30% --timeout soon", "--timeout 'soon'"),
        ("search t.py --front 3 --max-drop 1%", "give one of them"),
        ("worker t.py --front 3 --storage sqlite:///x.db", "joins a search within budgets"),
        ("search t.py --latency 40% --timeout soon", "--timeout 'soon'"),
        ("worker t.py --latency 40%", "--storage"),
        ("search t.py --latency 40% --recovery slow", "'slow' is unknown; choose one of fine-tune, gradual"),
        ("search t.py --latency 40% --training optimizer=adam", "optimizer must be one of muon, sgd, adamw"),
        ("recover t.py p.json --training patience=soon", "patience must be a whole number, found 'soon'"),
        ("search t.py --latency 40% --distillation soft+sft", "'sft'; there are: soft, logit"),
        ("show", "Missing argument"),
        ("show /no/such/run", "no such run folder"),
    ],
)
def test_usage_errors_are_one_line(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split(), api=FakeApi()) == 2
    captured = capsys.readouterr()
    [told] = captured.err.splitlines()
    assert told.startswith("error: ")
    assert said in told
    assert captured.out == ""


def test_json_is_alone_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    def chatty() -> Result:
        print("printed by the task")
        os.write(1, b"written by a C library\n")
        return MET

    assert main([*SEARCH, "--json"], api=FakeApi(chatty)) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == json.loads(json.dumps(MET.to_json()))
    assert "printed by the task" in captured.err
    assert "written by a C library" in captured.err


def test_an_unexpected_error_leaves_its_traceback_in_the_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*SEARCH, "-o", str(tmp_path)]
    assert main(line, api=FakeApi(RuntimeError("two\nlines"))) == 1
    [told] = capsys.readouterr().err.splitlines()
    assert "unexpected RuntimeError: two lines" in told
    assert str(tmp_path / "error.log") in told
    assert "Traceback" in (tmp_path / "error.log").read_text()
    main([*line, "--debug"], api=FakeApi(RuntimeError("again")))
    assert "Traceback" in capsys.readouterr().err


def test_worker_prints_what_it_ran(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi({"complete": 3, "failed": 1})
    line = ["worker", "task.py", "--latency", "40%", "--storage", "journal.log"]
    assert main(line, api=api) == 0
    assert api.calls[0][0] == "work"
    assert api.calls[0][2]["storage"] == "journal.log"
    assert "3 complete, 1 failed" in capsys.readouterr().out
    main([*line, "--json"], api=api)
    assert json.loads(capsys.readouterr().out) == {"complete": 3, "failed": 1}


def test_replay_prints_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi(Path("runs/x/best.onnx"))
    assert main(["replay", "runs/x", "task.py", "-o", "again"], api=api) == 0
    [(name, args, options)] = api.calls
    assert (name, args, options["output"]) == ("replay", (Path("runs/x"), "task.py"), Path("again"))
    assert capsys.readouterr().out == f"{Path('runs/x/best.onnx')}\n"


def test_show_prints_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(json.dumps(MET.to_json()))
    assert main(["show", str(tmp_path)]) == 0
    assert "measured 290 us: met" in capsys.readouterr().out
    assert main(["show", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "met"


@pytest.mark.parametrize(
    "command",
    [
        "",
        "search",
        "worker",
        "show",
        "replay",
        "devices",
        *(f"devices {c}" for c in ["list", "show", "check", "diff", "merge"]),
    ],
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), flag]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Usage: automl-compress")
    assert captured.err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("automl-compress 0.")


def test_sigterm_ends_a_run_like_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(SEARCH, api=FakeApi(lambda: os.kill(os.getpid(), signal.SIGTERM))) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_standard_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(MET.to_json()))
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "automl_compress", "show", str(tmp_path)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "error: no space left on device\n")


def test_a_reader_that_goes_away_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(MET.to_json()))
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "automl_compress", "show", str(tmp_path)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172800), (" .5 m ", 30)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "-30m", "0s", "1e3s", "nan s", "3 weeks"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="90s, 30m or 2h"):
        parse_seconds(text)


PROFILED = Profiled(
    network="net", file="p.yaml", kernels=7, models=3, memories=1, known=9, requests=4, seconds=12.0,
    error=0.011, worst_error=0.04, checked=12, quick_error=0.008, memory_error=0.025, warnings=("hot",),
)  # fmt: skip


def test_profile_passes_its_options_on_and_says_what_was_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "b.py"):
        Path(name).touch()
    api = FakeApi([PROFILED])
    line = "profile a.py b.py:make --kernels standard --profile local --device ssh://h --space cnn --threads 2 --seed 3"
    assert main(line.split(), api=api) == 0
    ((_, (tasks,), options),) = api.calls
    assert tasks == ["a.py", "b.py:make"]
    expected = {"kernels": "standard", "profile": "local", "device": "ssh://h", "space": "cnn", "threads": 2, "seed": 3}
    assert {name: options[name] for name in expected} == expected
    out = capsys.readouterr().out
    for part in (
        "7 kernels",
        "off by 1.1%",
        "worst 4.0% of 12",
        "another 0.8%",
        "weighed: off by 2.5%",
        "warning: hot",
    ):
        assert part in out
    assert main([*line.split(), "--json"], api=api) == 0
    assert json.loads(capsys.readouterr().out)[0]["worst_error"] == 0.04


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", r"name a task, or kernels='standard' \(--kernels standard\)"),
        ("--kernels odd", "unknown kernels 'odd'"),
        ("no/such/task.py", "no/such/task.py: no such task file"),
        ("--kernels standard --weights none.pt", "--weights none.pt: no such file"),
        ("--kernels standard --space none", "no search space 'none'"),
        ("--kernels standard --profile none", "no device profile 'none'"),
        ("--kernels standard --device ssh://h --profile none", "no device profile 'none'"),
        ("--kernels standard --device ftp://h", "ftp://h"),
        ("--kernels standard --profile cortex-m7-400mhz", "nothing can be added to it here"),
    ],
)
def test_bad_arguments_of_profile_are_refused_before_anything_slow_is_loaded(
    line: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    api = FakeApi([PROFILED])
    assert main(["profile", *line.split()], api=api) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not api.calls
