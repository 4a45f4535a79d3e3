"""A whole search on a device behind ssh, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from automl_compress import cli
from tests.search.campaigns import RULES
from tests.sshd import Server
from tests.test_api import hasty

TASK = str(Path(__file__).with_name("tiny.py"))


def search(folder: Path, device: str, **options: str) -> list[str]:
    words = {"device": device, "size": "50%", "trials": "5", "epochs": "0", **options}
    return ["search", TASK, "-o", str(folder), "-q", *(w for k, v in words.items() for w in (f"--{k}", v))]


def test_a_search_measures_on_the_device_and_says_so(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOML_COMPRESS_HOME", str(tmp_path / "home"))
    space, folder = tmp_path / "space.yaml", tmp_path / "run"
    space.write_text(yaml.safe_dump(RULES), encoding="utf-8")
    command = search(folder, server.url(), space=str(space), profile=hasty(tmp_path / "hasty.yaml"))
    assert cli.main(command) == 0, capsys.readouterr().err
    result = json.loads((folder / "result.json").read_text())
    assert result["device"]["address"] == "ssh://device"
    assert Path(result["device"]["file"]).name.startswith("device-")
    assert result["delivered"]["size_bytes"] <= result["budget"]["size"]
    assert result["delivered"]["memory_bytes"] > 0
    assert "ssh://device" in (folder / "report.html").read_text()
    assert "on ssh://device" in capsys.readouterr().out


def test_a_device_that_is_not_there_ends_a_search_before_anything_is_loaded(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.stop()
    for device, code in ((server.url(), 1), ("ssh://board:no-port", 2)):
        assert cli.main(search(tmp_path / "run", device)) == code
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
