"""A real sshd on the loopback, run by the current user with keys and settings of its own.

The `ssh` that the program finds first in PATH is the system's with a configuration of the test's, in which the server
is called `device`; nothing of the user's is read or written.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import psutil

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
SSH = shutil.which("ssh")


def missing() -> str:
    """Why there can be no such server here, or nothing."""
    if not os.path.exists(SSHD):
        return "sshd is not installed (apt-get install openssh-server)"
    return "" if SSH else "ssh is not installed (apt-get install openssh-client)"


class Server:
    """Keys and settings in `folder`; `start` and `stop` as often as needed, on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmp = folder / "tmp"
        self.lock = folder / "measuring.lock"
        self.tmp.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name in ("host", "user", "stranger"):
            self.key(name)
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        self.trust("host")
        self.configure()
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
            f"StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nSetEnv AUTOML_COMPRESS_LOCK={self.lock}\n"
        )
        wrapper = folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        self.script(wrapper, f'exec {SSH} -F {folder}/ssh_config "$@"')
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None

    @property
    def path(self) -> str:
        """PATH with this server's `ssh` first."""
        return f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def url(self, python: str = sys.executable) -> str:
        return f"ssh://device?python={quote(python)}&tmp={quote(str(self.tmp))}"

    def key(self, name: str) -> None:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(self.folder / name)]
        subprocess.run(command, check=True)

    def trust(self, key: str) -> None:
        """Know the server by this key."""
        public = " ".join((self.folder / f"{key}.pub").read_text().split()[:2])
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}\n")

    def configure(self, identity: str = "user") -> None:
        (self.folder / "ssh_config").write_text(
            f"Host device\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f"Host *\n  IdentityFile {self.folder}/{identity}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
        )

    def script(self, path: Path, *lines: str) -> Path:
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(0o755)
        return path

    def start(self) -> None:
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # where root's sshd wants to be confined
        log = self.folder / "sshd.log"
        command = [SSHD, "-D", "-f", str(self.folder / "sshd_config"), "-E", str(log)]
        self._process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"sshd doesn't start: {log.read_text() if log.exists() else 'no log'}")

    def refusal(self) -> str:
        """Why this user can't log in (an account that is locked, say), or nothing."""
        command = [str(self.folder / "bin" / "ssh"), "-o", "BatchMode=yes", "device", "true"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""

    def drop_connections(self) -> None:
        """Kill what serves the connections; the server itself goes on."""
        assert self._process is not None
        for session in psutil.Process(self._process.pid).children():
            session.send_signal(signal.SIGKILL)

    def processes(self) -> list[psutil.Process]:
        """The measuring processes that run over there."""
        assert self._process is not None
        below = psutil.Process(self._process.pid).children(recursive=True)
        return [process for process in below if str(self.tmp) in process.cmdline()]

    def stop(self) -> None:
        if self._process is not None:
            self.drop_connections()
            self._process.kill()
            self._process.wait()
            self._process = None

    def left_behind(self) -> list[Path]:
        """Files in the device's folder for temporary files, after a while for them to go."""
        deadline = time.monotonic() + 30
        while list(self.tmp.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return list(self.tmp.iterdir())
