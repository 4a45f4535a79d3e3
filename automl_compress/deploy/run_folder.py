"""The run folder: everything a run leaves behind and everything it needs to go on after it was stopped.

Files are replaced as a whole (written beside, then renamed), so a kill leaves the old or the new one, never half.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from automl_compress.errors import RunFolderError, StorageError

_IDENTITY = "run.json"
# What a run is recognised by without a reader being able to: said in words, and after what can be read.
_DIGESTS = {"task": "model (weights, or validation data)", "graph": "model's structure", "space": "search space"}


class RunFolder:
    """An opened run folder; hold it as a context manager. Only one run at a time may use it.

    `identity` says what run this is (model, space, profile, budget …). A folder with another identity is refused with
    one thing that differs; the same one is resumed.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"run folder {path}: can't be made ({error.strerror}); choose another with -o"
            ) from error
        if not os.access(path, os.W_OK):
            raise RunFolderError(f"run folder {path}: no permission to write; choose another with -o")
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunFolderError(
                f"run folder {path} is in use by another run; wait for it or choose another with -o"
            ) from error
        except OSError as error:
            raise RunFolderError(
                f"run folder {path}: can't be written ({error.strerror}); choose another with -o"
            ) from error
        try:
            self._check(identity)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def file(self, *names: str) -> Path:
        """A path inside the folder; its parents exist."""
        if not self.path.is_dir():
            raise StorageError(f"run folder {self.path} is gone: what it held is lost, the same command starts anew")
        path = self.path.joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Replace a file as a whole."""
        path = self.file(*name.split("/"))
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError as error:
            Path(temporary).unlink(missing_ok=True)
            raise StorageError(
                f"{path}: can't be written ({error.strerror}); free some space and run the same "
                "command again, it goes on where it stopped"
            ) from error
        return path

    def write_json(self, name: str, data: Any) -> Path:
        return self.write_bytes(name, (json.dumps(data, indent=1, sort_keys=False) + "\n").encode())

    def write_yaml(self, name: str, data: Any) -> Path:
        return self.write_bytes(name, yaml.safe_dump(data, sort_keys=False).encode())

    def read_json(self, name: str) -> Any | None:
        """A JSON file's content, None if there is no such file. RunFolderError if it is damaged."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(f"{path}: damaged ({error}); delete it and run the same command again") from error

    def _check(self, identity: Mapping[str, str]) -> None:
        found = self.read_json(_IDENTITY)
        if found is None:
            if any(child.name != ".lock" for child in self.path.iterdir()):
                raise RunFolderError(f"run folder {self.path} is not empty and is not a run's; choose another with -o")
            self.write_json(_IDENTITY, dict(identity))
            return
        if not isinstance(found, dict):
            raise RunFolderError(f"{self.path / _IDENTITY}: damaged; choose another folder with -o")
        differing = sorted((name for name in identity if found.get(name) != identity[name]), key=_DIGESTS.__contains__)
        if differing:
            name = differing[0]
            what = f"its {name} is {found.get(name)!r}, this one's is {identity[name]!r}"
            if name in _DIGESTS:
                what = f"its {_DIGESTS[name]} is not this one's"
            raise RunFolderError(f"run folder {self.path} belongs to another run: {what}; choose another with -o")
