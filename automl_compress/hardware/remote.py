"""Devices that are not here: the measuring process at the far end of the system's own `ssh`.

ssh brings the user's configuration, keys and known hosts with it; it is told never to ask, so that nothing hangs.
Models are known by their digest and sent once; what the runtime made of them comes back. Nothing stays on the device.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from automl_compress.errors import DeviceError, InputError
from automl_compress.hardware.channel import ConnectionLost, ProcessChannel
from automl_compress.hardware.dialogue import LOCAL, Link

RECONNECTS = 2
START_S = 90.0
# How much of the models stays there for the next request.
KEPT_BYTES = 256 * 1024 * 1024
_FORM = "ssh://[user@]host[:port][?python=PATH&tmp=FOLDER]"
_NAME = re.compile(r"[A-Za-z0-9_.%:\[\]][A-Za-z0-9_.%:\[\]-]*")
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",
    "ClearAllForwardings": "yes",
    "RemoteCommand": "none",
}
_SSH_FAILED = 255
# The fields of a request that name a file to read, beside `models`.
READ = {"model", "reference"}


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a device is: `python` is the command or path of the Python that has onnxruntime, `tmp` the folder for
    temporary files (empty: the system's)."""

    host: str
    user: str = ""
    port: int | None = None
    python: str = "python3"
    tmp: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{self.user + '@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"

    @property
    def label(self) -> str:
        """Host and port as they can stand in a file's name."""
        port = f"-{self.port}" if self.port not in (None, 22) else ""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.host).strip("-") + port or "device"

    @property
    def words(self) -> list[str]:
        """How `ssh` and its kin are told where to go."""
        return [*(["-p", str(self.port)] if self.port else []), f"{self.user}@{self.host}" if self.user else self.host]

    @property
    def known_as(self) -> str:
        """The name under which its key is kept."""
        return self.host if self.port in (None, 22) else f"[{self.host}]:{self.port}"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs Python with these arguments over there."""
        options = [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]
        python = "~/" + shlex.quote(self.python[2:]) if self.python.startswith("~/") else shlex.quote(self.python)
        return ["ssh", "-T", "-a", "-x", *options, *self.words, f"{python} {shlex.join(arguments)}"]


def link_to(device: str) -> Link:
    """'local', or an address such as 'ssh://pi@192.168.1.7:2222?python=/opt/venv/bin/python'.

    Nothing is connected yet. Raises InputError for anything else.
    """
    if device == LOCAL.name:
        return LOCAL
    address = parse_address(device)
    launch = partial(SshChannel, address)
    return Link(name=str(address), host=address.label, launch=launch, reconnects=RECONNECTS)


def parse_address(text: str) -> Address:
    """The parts of an ssh:// address. Raises InputError that says which of them is wrong."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise _malformed(text, str(error)) from error
    if parts.scheme != "ssh":
        raise _malformed(text, "it is neither 'local' nor an ssh:// address")
    host, user = parts.hostname or "", unquote(parts.username or "")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    problems = {
        "there is no host in it": not host,
        f"{host!r} is not a host": bool(host) and not _NAME.fullmatch(host),
        f"{user!r} is not a user": bool(user) and not _NAME.fullmatch(user),
        "the port must be between 1 and 65535": port == 0,
        "a password can't be given; use a key": parts.password is not None,
        f"{parts.path!r} has no meaning here": parts.path not in ("", "/"),
        f"{parts.fragment!r} has no meaning here": bool(parts.fragment),
        f"{next(iter(query.keys() - {'python', 'tmp'}), '')!r} is unknown": bool(query.keys() - {"python", "tmp"}),
        "python= and tmp= need a value": not all(query.values()),
    }
    for problem, found in problems.items():
        if found:
            raise _malformed(text, problem)
    return Address(host=host, user=user, port=port, **query)


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
        super().__init__(settings, command=address.command, folder=address.tmp)
        if not self.wait_until_ready(START_S):
            raise DeviceError(explain(address, self.last_words(), self.exit_code))

    def send(self, request: Mapping[str, Any], payload: bytes | None = None) -> None:
        request = dict(request)
        models: dict[str, bytes] = {}
        for name in READ & request.keys():
            request[name] = self._shipped(request[name], models)
        if "models" in request:
            request["models"] = {name: self._shipped(path, models) for name, path in request["models"].items()}
        if "optimized" in request:
            self._fetched_to = Path(request["optimized"])
            request["optimized"] = request["fetch"] = f"{self.folder}/optimized.onnx"
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
            if self.exit_code != _SSH_FAILED:
                return None
            raise ConnectionLost(f"the connection to {self._address} was lost{_said(words)}")
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
        there = f"{self.folder}/{hashlib.sha256(content).hexdigest()[:32]}.onnx"
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


def explain(address: Address, words: str, exit_code: int) -> str:
    """One line that says why the measuring process doesn't run over there, and the way out.

    `words` is what ssh and the other side wrote to stderr, `exit_code` that of ssh: its own 255, or the command's.
    """
    where = shlex.join(["ssh", *address.words])
    if exit_code == _SSH_FAILED:
        for sign, text in _SSH_TROUBLES.items():
            if sign in words:
                told = text.format(words=shlex.join(address.words), host=address.known_as, port=address.port or 22)
                return f"{address}: {told}{_said(words)}"
        return f"{address}: ssh failed{_said(words)}; try {where}"
    if exit_code in (126, 127):
        return f"{address}: there is no {address.python} there; name its Python with ?python=PATH{_said(words)}"
    if "Python" in words and "or later is needed" in words:
        return f"{address}: {_last(words)} as {address.python}; name another with ?python=PATH"
    if "No space left" in words or "quota exceeded" in words:
        return f"{address}: its disk is full; free some space there, or name a folder elsewhere with ?tmp=FOLDER"
    if exit_code < 0:
        return f"{address}: no sign of life from {address.python} there within {START_S:g} s; try {where}"
    return f"{address}: the measuring program can't start there{_said(words)}"


# What ssh says -> what it means and what to do. The first that is found counts.
_SSH_TROUBLES = {
    "IDENTIFICATION HAS CHANGED": "its host key is not the one that is known, so it may be another machine; "
    "if it was set up anew: ssh-keygen -R '{host}'",
    "Host key verification failed": "its host key is not known yet; connect once by hand to check and accept it: "
    "ssh {words}",
    "Too many authentication failures": "it refused the keys that were offered; name the right one (IdentityFile) in "
    "~/.ssh/config",
    "Permission denied": "it refused your key; install it with ssh-copy-id {words}, or load it with ssh-add",
    "Could not resolve hostname": "there is no host of that name; check the address, or ~/.ssh/config",
    "Connection refused": "nothing answers at port {port}; start sshd there, or name its port",
    "timed out": "unreachable; check that it is switched on and connected",
    "No route to host": "unreachable; check that it is switched on and connected",
    "Network is unreachable": "unreachable; check this machine's network",
}


def _malformed(text: str, problem: str) -> InputError:
    return InputError(f"--device {text!r}: {problem}; write local or {_FORM}")


def _said(words: str) -> str:
    """' (the last line that was said)', or nothing."""
    return f" ({_last(words)})" if _last(words) else ""


def _last(words: str) -> str:
    lines = [" ".join(line.split()) for line in words.splitlines() if line.strip()]
    return lines[-1] if lines else ""
