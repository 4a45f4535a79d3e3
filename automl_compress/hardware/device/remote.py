"""Devices that are not here: the measuring process at the far end of the system's own `ssh`.

ssh brings the user's configuration, keys and known hosts with it; it is told never to ask, so that nothing hangs.
Models are known by their digest and sent once; what the runtime made of them comes back. Nothing stays on the device.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from automl_compress.errors import DeviceError
from automl_compress.hardware.device.address import SSH_FAILED, Address, explain, parse_address, said
from automl_compress.hardware.device.channel import ConnectionLost, ProcessChannel
from automl_compress.hardware.device.dialogue import LOCAL, Link

RECONNECTS = 2
START_S = 90.0
# How much of the models stays there for the next request.
KEPT_BYTES = 256 * 1024 * 1024
# The fields of a request that name a file to read (beside `models`), and those that name one to write.
READ = ("model", "reference", "inputs", "empty")
WRITTEN = ("optimized", "outputs")


def link_to(device: str) -> Link:
    """'local', or an address such as 'ssh://pi@192.168.1.7:2222?python=/opt/venv/bin/python'.

    Nothing is connected yet. Raises InputError for anything else.
    """
    if device == LOCAL.name:
        return LOCAL
    address = parse_address(device)
    launch = partial(SshChannel, address)
    return Link(name=str(address), host=address.label, launch=launch, reconnects=RECONNECTS)


class SshChannel(ProcessChannel):
    """The measuring process on another machine.

    Requests and answers name files of this machine: those that a request reads are sent, the one that it writes is
    brought back. Raises DeviceError, in one line with the way out, if the process can't be started there; `receive`
    raises ConnectionLost where the connection breaks later.
    """

    def __init__(self, address: Address, settings: Mapping[str, Any]) -> None:
        self._address = address
        self._kept: OrderedDict[str, int] = OrderedDict()
        self._doubted = False
        self._fetched_to = Path()
        if shutil.which("ssh") is None:
            raise DeviceError(f"{address}: there is no ssh on this machine; install OpenSSH's client")
        super().__init__(settings, command=address.command, folder=address.tmp)
        try:
            ready = self.wait_until_ready(START_S)
        except BaseException:
            self.close()
            raise
        if not ready:
            raise DeviceError(explain(address, self.last_words(), self.exit_code))

    def send(self, request: Mapping[str, Any], payload: bytes | None = None) -> None:
        request = dict(request)
        models: dict[str, bytes] = {}
        for name in READ:
            if name in request:
                request[name] = self._shipped(request[name], models)
        if "models" in request:
            request["models"] = {name: self._shipped(path, models) for name, path in request["models"].items()}
        for name in WRITTEN:
            if name in request:
                self._fetched_to = Path(request[name])
                request[name] = request["fetch"] = f"{self.folder}/{self._fetched_to.name}"
        self._make_room(models)
        for path, content in models.items():
            if path not in self._kept:
                super().send({"put": path}, content)
                self._kept[path] = len(content)
            self._kept.move_to_end(path)
        super().send(request, payload)

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        received = self.receive_all(timeout_s)
        if received is None:
            words = self.last_words()
            if self.exit_code != SSH_FAILED:
                return None
            raise ConnectionLost(f"the connection to {self._address} was lost{said(words)}")
        message, payload = received
        if payload is not None:
            self._fetched_to.write_bytes(payload)
        self._doubted = message.get("ok") is False
        return message

    def _shipped(self, path: str, models: dict[str, bytes]) -> str:
        """Where a model of this machine lies over there; its content is added to `models`."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DeviceError(f"{path}: can't be read ({error.strerror})") from error
        there = f"{self.folder}/{hashlib.sha256(content).hexdigest()[:32]}{Path(path).suffix}"
        models[there] = content
        return there

    def _make_room(self, needed: Mapping[str, bytes]) -> None:
        """Remove what was used longest ago; after a failure everything, as it isn't known what arrived."""
        room = KEPT_BYTES - sum(len(content) for path, content in needed.items() if path not in self._kept)
        surplus = []
        for path in list(self._kept):
            if self._doubted or (sum(self._kept.values()) > room and path not in needed):
                surplus.append(path)
                del self._kept[path]
        if surplus:
            super().send({"remove": surplus})
