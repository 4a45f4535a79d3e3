"""A run folder: files are whole or absent, one run at a time, and another run's folder is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from automl_compress.deploy.run_folder import RunFolder
from automl_compress.errors import RunFolderError

IDENTITY = {"task": "abc", "budget": "latency 40%"}


def test_a_new_folder_is_made_with_its_parents_and_reopened(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one"
    with RunFolder(path, IDENTITY) as folder:
        folder.write_json("result.json", {"a": [1, 2.5, None, "é"]})
    with RunFolder(path, IDENTITY) as folder:
        assert folder.read_json("result.json") == {"a": [1, 2.5, None, "é"]}
        assert folder.read_json("nothing.json") is None


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY) as folder:
        path = folder.write_bytes("candidates/deep/model.onnx", b"\x00\xff" * 1000)
        assert path == tmp_path / "candidates" / "deep" / "model.onnx"
        assert path.read_bytes() == b"\x00\xff" * 1000
        written = folder.write_yaml("config.yaml", {"b": 1, "a": [2]})
        assert yaml.safe_load(written.read_text()) == {"b": 1, "a": [2]}
        assert written.stat().st_mode & 0o444 == 0o444


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.write_json("result.json", {"old": True})
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(RunFolderError, match=r"result.json.*No space left.*free some space"):
            folder.write_json("result.json", {"new": True})
        monkeypatch.undo()
        assert folder.read_json("result.json") == {"old": True}
        assert not [child for child in tmp_path.iterdir() if child.name.startswith(".writing")]


def test_a_kill_before_the_renaming_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.write_json("result.json", {"old": True})
        monkeypatch.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            folder.write_json("result.json", {"new": True})
        monkeypatch.undo()
    with RunFolder(tmp_path, IDENTITY) as folder:
        assert folder.read_json("result.json") == {"old": True}


def test_a_second_opener_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY), pytest.raises(RunFolderError, match="in use by another run"):
        RunFolder(tmp_path, IDENTITY)
    with RunFolder(tmp_path, IDENTITY):
        pass


def test_a_refused_folder_is_not_left_locked(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY):
        pass
    with pytest.raises(RunFolderError, match=r"budget.*latency 40%.*latency 30%.*-o"):
        RunFolder(tmp_path, {**IDENTITY, "budget": "latency 30%"})
    with RunFolder(tmp_path, IDENTITY):
        pass


def test_another_runs_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY):
        before = (tmp_path / "run.json").read_bytes()
    for identity in ({**IDENTITY, "task": "xyz"}, {**IDENTITY, "space": "cnn"}):
        with pytest.raises(RunFolderError, match="belongs to another run"):
            RunFolder(tmp_path, identity)
    assert (tmp_path / "run.json").read_bytes() == before
    with pytest.raises(RunFolderError, match="its model \\(weights, or validation data\\) is not this one's"):
        RunFolder(tmp_path, {**IDENTITY, "task": "xyz"})
    with pytest.raises(RunFolderError, match="its budget is"):  # what can be read comes first
        RunFolder(tmp_path, {"task": "xyz", "budget": "latency 30%"})


def test_a_folder_that_was_removed_is_not_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunFolder(path, IDENTITY) as folder:
        shutil.rmtree(path)
        with pytest.raises(RunFolderError, match="is gone"):
            folder.write_json("result.json", {})
    assert not path.exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="not empty"):
        RunFolder(tmp_path, IDENTITY)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "run.json").exists()


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="-o"):
        RunFolder(tmp_path / "file", IDENTITY)
    with pytest.raises(RunFolderError, match="-o"):
        RunFolder(tmp_path / "file" / "below", IDENTITY)


def test_a_folder_that_can_not_be_written_is_refused(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    for path in (locked, locked / "below"):
        with pytest.raises(RunFolderError, match="-o"):
            RunFolder(path, IDENTITY)


@pytest.mark.parametrize("damage", [b"", b'{"task": "ab', b"\xff\xfe\x00"])
def test_damaged_files_are_named_with_the_way_out(tmp_path: Path, damage: bytes) -> None:
    with RunFolder(tmp_path, IDENTITY) as folder:
        folder.write_bytes("original.json", damage)
        with pytest.raises(RunFolderError, match=r"original.json.*damaged.*delete it"):
            folder.read_json("original.json")


@pytest.mark.parametrize("damage", ["", "{", '{"task"'])
def test_a_damaged_identity_is_named(tmp_path: Path, damage: str) -> None:
    with RunFolder(tmp_path, IDENTITY):
        pass
    (tmp_path / "run.json").write_text(damage)
    with pytest.raises(RunFolderError, match=r"run.json.*damaged"):
        RunFolder(tmp_path, IDENTITY)


def test_the_identity_is_plain_json(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY):
        assert json.loads((tmp_path / "run.json").read_text()) == IDENTITY
