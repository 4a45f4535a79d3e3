"""Where another device is: its address, how ssh is asked to go there, and what ssh's complaints mean."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from automl_compress.errors import InputError

_FORM = "ssh://[user@]host[:port][?python=PATH&tmp=FOLDER]"
_NAME = re.compile(r"[A-Za-z0-9_.%:\[\]][A-Za-z0-9_.%:\[\]-]*")
# Nothing may ask for a password or wait for ever; a dead connection is noticed within a minute.
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",
    "ClearAllForwardings": "yes",
    "RemoteCommand": "none",
}
SSH_FAILED = 255
_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


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


def parse_address(text: str) -> Address:
    """The parts of an ssh:// address. Raises InputError that says which of them is wrong."""
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise _malformed(text, str(error)) from error
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme != "ssh":
        raise _malformed(text, "it is neither 'local' nor an ssh:// address")
    host, user = parts.hostname or "", unquote(parts.username or "")
    # As it was written: in ~/.ssh/config case counts.
    start = parts.netloc.lower().rfind(host)
    host = parts.netloc[start : start + len(host)]
    query = dict(parse_qsl(parts.query.replace("+", "%2B"), keep_blank_values=True))
    problems = {
        "there is no host in it": not host,
        f"{host!r} is not a host": bool(host) and not _NAME.fullmatch(host),
        f"{user!r} is not a user": bool(user) and not _NAME.fullmatch(user),
        "the port must be a number from 1 to 65535": port == 0,
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


def explain(address: Address, words: str, exit_code: int) -> str:
    """One line that says why the measuring process doesn't run over there, and the way out.

    `words` is what ssh and the other side wrote to stderr, `exit_code` that of ssh: its own 255, or the command's,
    negative if it had to be killed.
    """
    where = shlex.join(["ssh", *address.words])
    if exit_code == SSH_FAILED:
        for sign, text in _SSH_TROUBLES.items():
            if sign in words:
                port = f"port {address.port}" if address.port else "its ssh port"
                told = text.format(words=shlex.join(address.words), host=address.known_as, port=port)
                return f"{address}: {told}{said(words)}"
        return f"{address}: ssh failed{said(words)}; try {where}"
    if exit_code in (126, 127):
        return f"{address}: there is no {address.python} there; name its Python with ?python=PATH{said(words)}"
    if "Python" in words and "or later is needed" in words:
        return f"{address}: {_last(words)} as {address.python}; name another with ?python=PATH"
    if any(sign in words for sign in _FULL):
        return f"{address}: its disk is full; free some space there, or name a folder elsewhere with ?tmp=FOLDER"
    if exit_code < 0:
        return f"{address}: no sign of life from {address.python} there; try {where}"
    return f"{address}: the measuring program can't start there{said(words)}"


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
    "Connection refused": "nothing answers at {port}; start sshd there, or name its port",
    "timed out": "unreachable; check that it is switched on and connected",
    "No route to host": "unreachable; check that it is switched on and connected",
    "Network is unreachable": "unreachable; check this machine's network",
}


def _malformed(text: str, problem: str) -> InputError:
    return InputError(f"--device {text!r}: {problem}; write local or {_FORM}")


def said(words: str) -> str:
    """' (the last line that was said)', or nothing."""
    return f" ({_last(words)})" if _last(words) else ""


def _last(words: str) -> str:
    lines = [" ".join(line.split()) for line in words.splitlines() if line.strip()]
    return lines[-1] if lines else ""
