"""A task is taken as it is or refused with one line that says what is wrong; foreign objects are never unpickled."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from automl_compress.errors import TaskError
from automl_compress.model.task import Task, accuracy, load_task, prepare, scarcity

IMAGES, CLASSES = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 4
SOURCE = """
import torch
from automl_compress.model.task import Task

def {name}():
    {body}
"""
GOOD = """x, y = torch.randn(10, 3), torch.arange(10) % 4
    return Task(model=torch.nn.Linear(3, 4), train=(x, y), validation=(x, y))"""


def task(**changes: Any) -> Task:
    parts = {"model": nn.Linear(3, 4), "train": (IMAGES, CLASSES), "validation": (IMAGES, CLASSES)}
    return Task(**{**parts, **changes})


def write(path: Path, body: str = GOOD, name: str = "task") -> Path:
    path.write_text(SOURCE.format(name=name, body=body), encoding="utf-8")
    return path


def refusal(make: Any) -> str:
    with pytest.raises(TaskError) as caught:
        make()
    message = str(caught.value)
    assert message
    assert "\n" not in message, "one line"
    return message


class TwoInputs(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.cat([left, right], dim=1)


def test_the_spec_names_a_file_and_optionally_its_function(tmp_path: Path) -> None:
    assert isinstance(load_task(str(write(tmp_path / "a.py"))), Task)
    assert isinstance(load_task(f"{write(tmp_path / 'b.py', name='mine')}:mine"), Task)


def test_the_spec_names_a_module_and_optionally_its_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "someones_package"
    package.mkdir()
    (package / "__init__.py").touch()
    write(package / "one.py")
    write(package / "two.py", name="mine")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(load_task("someones_package.one"), Task)
    assert isinstance(load_task("someones_package.two:mine"), Task)
    assert "no function task()" in refusal(lambda: load_task("someones_package.two"))


def test_a_task_file_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_the_task.py").write_text("WIDTH = 4\n", encoding="utf-8")
    body = "import beside_the_task\n    " + GOOD.replace("Linear(3, 4)", "Linear(3, beside_the_task.WIDTH)")
    assert load_task(str(write(tmp_path / "task.py", body))).model.out_features == 4
    sys.modules.pop("beside_the_task", None)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise RuntimeError('no data here')", ("raised RuntimeError", "no data here")),
        ("return 42", ("returned int", "Task")),
        ("return None", ("returned NoneType",)),
    ],
)
def test_a_function_that_gives_no_task_is_named(tmp_path: Path, body: str, words: tuple[str, ...]) -> None:
    message = refusal(lambda: load_task(str(write(tmp_path / "task.py", body))))
    assert all(word in message for word in (*words, "task.py"))


def test_files_that_are_none_or_fail_to_load_are_named(tmp_path: Path) -> None:
    missing, broken, empty = tmp_path / "missing.py", tmp_path / "broken.py", tmp_path / "empty.py"
    broken.write_text("def task(:\n", encoding="utf-8")
    empty.write_text("", encoding="utf-8")
    assert "missing.py" in refusal(lambda: load_task(str(missing)))
    assert "SyntaxError" in refusal(lambda: load_task(str(broken)))
    assert "no function task()" in refusal(lambda: load_task(str(empty)))
    (tmp_path / "quits.py").write_text("raise SystemExit(7)\n", encoding="utf-8")
    assert "SystemExit" in refusal(lambda: load_task(str(tmp_path / "quits.py")))
    assert "no_such_module_anywhere" in refusal(lambda: load_task("no_such_module_anywhere"))


@pytest.mark.parametrize("data", [(IMAGES, CLASSES), TensorDataset(IMAGES, CLASSES), [(IMAGES, CLASSES)]])
def test_data_can_be_read_again_and_again_and_completely(data: Any) -> None:
    ready = prepare(task(train=data, validation=data, test=data))
    for split in ("train", "validation", "test"):
        for _ in range(2):
            targets = torch.cat([target for _, target in ready.batches(split)])
            assert sorted(targets.tolist()) == sorted(CLASSES.tolist())


def test_a_loader_is_kept_as_it_is() -> None:
    loader = DataLoader(TensorDataset(IMAGES, CLASSES), batch_size=3, shuffle=True)
    assert prepare(task(train=loader)).train is loader


def test_validation_keeps_its_order() -> None:
    ready = prepare(task())
    assert torch.equal(next(ready.batches("validation"))[0][0], IMAGES)


def test_the_model_is_not_changed_by_the_checks() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prepare(task(model=model))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_several_inputs_travel_as_a_tuple() -> None:
    batches = [((IMAGES[:, :2], IMAGES[:, 1:]), CLASSES)]
    ready = prepare(task(model=TwoInputs(), train=batches, validation=batches))
    assert [tuple(part.shape) for part in ready.example_inputs] == [(10, 2), (10, 2)]
    (inputs, _), *_ = ready.batches("train")
    assert len(inputs) == 2


class Once(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise OSError("the disk is gone")


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("first line\nsecond line")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": 3}, ("model", "int")),
        ({"train": None}, ("train", "missing")),
        ({"train": []}, ("train", "empty")),
        ({"validation": (IMAGES[:0], CLASSES[:0])}, ("validation", "empty")),
        ({"validation": DataLoader(TensorDataset(IMAGES[:0], CLASSES[:0]))}, ("validation", "empty")),
        ({"train": iter([(IMAGES, CLASSES)])}, ("train", "only once")),
        ({"train": (batch for batch in [(IMAGES, CLASSES)])}, ("train", "only once")),
        ({"train": 5}, ("train", "int")),
        ({"train": (IMAGES, CLASSES[:4])}, ("train", "10 inputs", "4 targets")),
        ({"train": [IMAGES]}, ("train", "pair")),
        ({"train": [("text", CLASSES)]}, ("train", "str")),
        ({"train": [(IMAGES, [0, 1])]}, ("train", "targets", "list")),
        ({"train": DataLoader(Once())}, ("train", "OSError", "the disk is gone")),
        ({"train": (IMAGES, CLASSES + 1)}, ("train", "0 to 3", "4")),
        ({"validation": (IMAGES, CLASSES - 1)}, ("validation", "0 to 3", "-1")),
        ({"train": (IMAGES, CLASSES.float())}, ("train", "integers", "float32")),
        ({"model": Fails()}, ("forward", "(10, 3)", "ValueError", "first line")),
        ({"model": nn.Linear(5, 4)}, ("forward", "(10, 3)")),
        ({"example_inputs": torch.zeros(1, 9)}, ("forward", "(1, 9)")),
        ({"example_inputs": "text"}, ("example_inputs", "str")),
        ({"model": nn.Flatten(0)}, ("classification", "(30,)")),
    ],
)
def test_what_can_not_be_used_is_named(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    message = refusal(lambda: prepare(task(**changes)))
    assert all(word in message for word in words), message


def test_own_loss_and_metric_take_any_targets() -> None:
    values = torch.randn(10, 4)
    ready = prepare(
        task(train=(IMAGES, values), validation=(IMAGES, values), loss=nn.MSELoss(), metric=lambda o, t: -1.0)
    )
    assert not ready.classifies
    assert ready.metric_of(values, values) == -1.0
    assert float(ready.loss_of(values, values)) == 0.0


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_metric_that_is_no_finite_number_is_refused(value: str) -> None:
    ready = prepare(task(metric=lambda o, t: float(value)))
    assert f"is {value}: check" in refusal(lambda: ready.metric_of(IMAGES, CLASSES))


def test_answers_that_are_no_finite_numbers_are_refused_at_once() -> None:
    assert "the model answers the example input (10, 3) with NaN" in refusal(
        lambda: prepare(task(validation=(IMAGES * float("nan"), CLASSES)))
    )


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"), ("scalar", "(10,)")),
        (lambda o, t: 1.0, ("scalar", "float")),
        (lambda o, t: nn.functional.cross_entropy(o, t).detach(), ("no gradient", "detach")),
        (lambda o, t: nn.functional.cross_entropy(o, t).log().mul(float("nan")), ("loss is nan", "first train batch")),
        (lambda o, t: o["logits"].sum(), ("loss <lambda> on targets (10,) raised",)),
    ],
)
def test_a_loss_that_nothing_could_be_trained_with_is_refused_at_once(loss: Any, words: tuple[str, ...]) -> None:
    message = refusal(lambda: prepare(task(loss=loss, metric=accuracy)))
    assert all(word in message for word in words), message


def test_a_metric_that_raises_is_named() -> None:
    def share(outputs: Any, targets: Tensor) -> float:
        raise KeyError("logits")

    ready = prepare(task(metric=share))
    assert "metric share on targets (10,) raised KeyError" in refusal(lambda: ready.metric_of(IMAGES, CLASSES))


def test_validation_that_says_little_is_named_and_of_one_sample_refused() -> None:
    def few(samples: int, **changes: Any) -> Task:
        return task(validation=(IMAGES[:1].repeat(samples, 1), CLASSES[:1].repeat(samples)), **changes)

    assert "single sample" in refusal(lambda: prepare(few(1)))
    assert "only 50 samples, of which each makes 0.020" in scarcity(prepare(few(50)))
    assert scarcity(prepare(few(100))) == ""
    own = {"loss": nn.functional.cross_entropy, "metric": accuracy}
    assert "single sample" in scarcity(prepare(few(1, **own)))  # one long sequence may hold many decisions
    assert scarcity(prepare(few(2, **own))) == ""


def test_accuracy_counts_the_largest_outputs() -> None:
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


@pytest.mark.parametrize("suffix", ["pt", "wrapped.pt", "safetensors"])
def test_weights_replace_the_models(tmp_path: Path, suffix: str) -> None:
    state, path = nn.Linear(3, 4).state_dict(), tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if "wrapped" in suffix else state, path)
    ready = prepare(task(), weights=path)
    assert all(torch.equal(value, state[name]) for name, value in ready.model.state_dict().items())


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("it was unpickled",)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    plain, zipped = tmp_path / "plain.pt", tmp_path / "zipped.pt"
    plain.write_bytes(pickle.dumps(Bomb()))
    torch.save({"weight": Bomb()}, zipped)
    for path in (plain, zipped):
        message = refusal(lambda path=path: prepare(task(), weights=path))
        assert "only tensors are ever loaded" in message
        assert path.name in message


def test_weights_that_are_missing_or_not_the_models_are_named(tmp_path: Path) -> None:
    path, text = tmp_path / "other.pt", tmp_path / "text.safetensors"
    torch.save(nn.Linear(7, 2).state_dict(), path)
    text.write_text("not weights", encoding="utf-8")
    assert "no such file" in refusal(lambda: prepare(task(), weights=tmp_path / "none.pt"))
    assert "size mismatch" in refusal(lambda: prepare(task(), weights=path))
    assert "text.safetensors" in refusal(lambda: prepare(task(), weights=text))
