"""The examples run as they are written."""

from __future__ import annotations

import os
import pickletools
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(folder: Path, *command: str, timeout: float = 900, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_digits_search_and_its_independent_measurement(tmp_path: Path) -> None:
    folder, out = EXAMPLES / "digits", tmp_path / "run"
    search = "search task.py --size 30% --trials 8 --epochs 1 --json -q -o"
    run(folder, "-m", "automl_compress", *search.split(), str(out))
    save = "import sys, numpy; from task import splits; x, y = splits()[2]; numpy.savez(sys.argv[1], x=x, y=y)"
    run(folder, "-c", save, str(tmp_path / "test.npz"))
    again = run(EXAMPLES, "measure_again.py", str(out), str(tmp_path / "test.npz"))
    figures = dict(line.split() for line in again.splitlines())
    reported = run(folder, "-m", "automl_compress", "show", str(out), "--json")
    delivered = __import__("json").loads(reported)["delivered"]
    assert float(figures["accuracy"]) == pytest.approx(delivered["test_metric"], abs=1e-3)
    assert int(figures["size_bytes"]) == delivered["size_bytes"]


def test_the_transfer_example_learns_its_new_classes() -> None:
    check = (
        "import torch; from transfer import task; from automl_compress.model.task import prepare\n"
        "from automl_compress.recovery.transfer import transferred, validation_metric\n"
        "torch.set_num_threads(1); done, _ = transferred(prepare(task())); print(validation_metric(done)(done.model))"
    )
    assert float(run(EXAMPLES / "digits", "-c", check)) > 0.95


def test_the_student_example_answers_like_its_teacher_at_any_width() -> None:
    check = (
        "from automl_compress.model.task import load_task\n"
        "from automl_compress.recovery.own_student import make_student\n"
        "t = load_task('student.py')\n"
        "print(*(sum(p.numel() for p in make_student(t, width, 0).parameters()) for width in (1, .5)))"
    )
    wide, narrow = (int(count) for count in run(EXAMPLES / "digits", "-c", check).split())
    assert narrow < wide / 3


def batch_bytes(pixels: bytes, labels: list[int]) -> bytes:
    """A stream as in the standard CIFAR-10 files: a dictionary of a byte string and a list of numbers, protocol 2."""
    text = lambda value: b"U" + bytes([len(value)]) + value  # noqa: E731
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return (
        b"\x80\x02}("
        + text(b"data")
        + b"T"
        + struct.pack("<i", len(pixels))
        + pixels
        + text(b"labels")
        + numbers
        + b"u."
    )


def test_the_standard_cifar_folder_is_read_without_unpickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    stored = {}
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        pixels, labels = rng.integers(0, 256, (3, 3 * 32 * 32), np.uint8), rng.integers(0, 10, 3).tolist()
        stored[name] = (pixels, labels)
        (folder / name).write_bytes(batch_bytes(pixels.tobytes(), labels))
        assert list(pickletools.genops((folder / name).read_bytes()))
    monkeypatch.syspath_prepend(EXAMPLES / "cifar10_resnet20")
    import data

    (train, train_labels), (test, test_labels) = data.load_cifar10(tmp_path)
    assert train.shape == (6, 3, 32, 32)
    assert train_labels.tolist() == stored["data_batch_1"][1] + stored["data_batch_2"][1]
    assert test_labels.tolist() == stored["test_batch"][1]
    first = stored["test_batch"][0].reshape(-1, 3, 32, 32)[0, 1, 5, 7] / 255
    assert float(test[0, 1, 5, 7]) == pytest.approx((first - data.MEAN[1]) / data.STD[1], abs=1e-5)


@pytest.mark.needs_cifar
def test_the_pretrained_network_loads_and_is_as_good_as_published() -> None:
    check = (
        "from task import task; import torch; t = task(); x, y = t.test\n"
        "with torch.no_grad(): print(float((t.model(x[:500]).argmax(1) == y[:500]).float().mean()))"
    )
    assert float(run(EXAMPLES / "cifar10_resnet20", "-c", check)) > 0.88
