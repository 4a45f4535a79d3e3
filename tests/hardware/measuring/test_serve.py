"""The serving side: one measurement at a time, requests in order, nothing left behind."""

from __future__ import annotations

import errno
import io
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automl_compress.hardware.measuring.probe import answer
from automl_compress.hardware.measuring.serve import fetched, in_one_line, lock_path, run_again, store, turn
from automl_compress.hardware.measuring.wire import read_message, write_message

JSON = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.floats(allow_nan=False)))


@given(st.lists(st.tuples(JSON, st.none() | st.binary()), max_size=4))
def test_messages_arrive_as_they_were_sent(sent: list[tuple[dict[str, Any], bytes | None]]) -> None:
    sent = [
        ({k: v for k, v in message.items() if k not in ("bytes", "deflated")}, payload) for message, payload in sent
    ]
    stream = io.BytesIO()
    for message, payload in sent:
        write_message(stream, message, payload)
    stream.seek(0)
    assert [read_message(stream) for _ in sent] == sent
    assert read_message(stream) is None


def test_only_what_shrinks_is_deflated() -> None:
    for payload, smaller in ((b"weights " * 1000, True), (random.Random(0).randbytes(8000), False)):
        stream = io.BytesIO()
        write_message(stream, {}, payload)
        assert (len(stream.getvalue()) < len(payload)) is smaller
        stream.seek(0)
        assert read_message(stream) == ({}, payload)


@given(st.binary(min_size=1), st.integers(min_value=1))
def test_a_message_that_was_cut_off_is_none(payload: bytes, missing: int) -> None:
    stream = io.BytesIO()
    write_message(stream, {"put": "x"}, payload)
    whole = stream.getvalue()
    assert read_message(io.BytesIO(whole[: -min(missing, len(whole))])) is None


def test_what_is_no_message_is_refused() -> None:
    for line in (b"Welcome!\n", b"[1]\n", b'{"bytes": 3, "deflated": true}\nabc'):
        with pytest.raises(ValueError, match=r"Expecting|expected|unpacked"):
            read_message(io.BytesIO(line))


def test_only_one_measures_at_a_time_and_who_waits_is_told(tmp_path: Path) -> None:
    path, waiting, inside = str(tmp_path / "lock"), threading.Event(), threading.Event()
    said: list[dict[str, Any]] = []

    def say(message: dict[str, Any]) -> None:
        said.append(message)
        waiting.set()

    def second() -> None:
        with turn(say, path):
            inside.set()

    thread = threading.Thread(target=second)
    with turn(said.append, path):
        thread.start()
        assert waiting.wait(30)
        assert not inside.is_set()
    thread.join(30)
    assert inside.is_set()
    assert [list(message) for message in said] == [["notice"]]
    with turn(said.append, path):
        pass
    assert len(said) == 1


def test_all_measuring_processes_of_a_machine_share_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOML_COMPRESS_LOCK")
    assert Path(lock_path()).name == "automl-compress-measuring.lock"
    monkeypatch.setenv("AUTOML_COMPRESS_LOCK", "/shared/lock")
    assert lock_path() == "/shared/lock"


def test_a_model_is_kept_and_a_result_handed_over(tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    assert store(path, b"content") == ""
    assert fetched(path, {"ok": True}) == ({"ok": True}, b"content")
    assert not Path(path).exists()
    lacking, _ = fetched(path, {"ok": True})
    assert not lacking["ok"]


def test_a_full_disk_is_called_one() -> None:
    text = in_one_line(OSError(errno.ENOSPC, "No space left on device", "/tmp/x/model.onnx"))
    assert text == "the disk is full, /tmp/x/model.onnx can't be written; free some space there"


def test_a_model_that_cannot_be_stored_is_an_answer(tmp_path: Path) -> None:
    assert "FileNotFoundError" in store(str(tmp_path / "none" / "x"), b"")


def test_a_process_that_fails_is_reported_with_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys; print('chatter'); sys.exit('the device is out of memory')")
    with pytest.raises(RuntimeError, match="out of memory"):
        run_again(["peak"], {"program": str(program)}, lambda message: None)
    program.write_text("print('chatter'); print('{\"peak_bytes\": 5}')")
    assert run_again(["peak"], {"program": str(program)}, lambda message: None) == {"peak_bytes": 5}


def test_an_unknown_request_is_answered_too() -> None:
    assert answer({"do": "dance"}, {}, lambda message: None)["ok"] is False
