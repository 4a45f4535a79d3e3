"""Where a device is, how ssh is asked to go there, and what its complaints mean."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from automl_compress.errors import DeviceError, InputError
from automl_compress.hardware.device.address import Address, explain, parse_address
from automl_compress.hardware.device.channel import BOOTSTRAP
from automl_compress.hardware.device.dialogue import LOCAL
from automl_compress.hardware.device.remote import link_to


def test_addresses_are_taken_apart() -> None:
    assert parse_address("ssh://board") == Address(host="board")
    assert parse_address("ssh://Pi@MyBoard:22") == Address(host="MyBoard", user="Pi", port=22)
    full = parse_address("ssh://pi@10.0.0.7:2222?python=/opt/venv/bin/python&tmp=/data")
    assert full == Address(host="10.0.0.7", user="pi", port=2222, python="/opt/venv/bin/python", tmp="/data")
    assert str(full) == "ssh://pi@10.0.0.7:2222"
    assert (full.label, full.known_as) == ("10-0-0-7-2222", "[10.0.0.7]:2222")
    six = parse_address("ssh://[fe80::1]/")
    assert (six.host, str(six), six.label) == ("fe80::1", "ssh://[fe80::1]", "fe80-1")


MALFORMED = {
    "board": "neither 'local' nor an ssh:// address",
    "http://board": "neither 'local' nor an ssh:// address",
    "ssh://": "there is no host",
    "ssh://@:22": "there is no host",
    "ssh://board:99999": "from 1 to 65535",
    "ssh://board:0": "from 1 to 65535",
    "ssh://board:x": "from 1 to 65535",
    "ssh://[fe80::1": "IPv6",
    "ssh://pi:secret@board": "a password can't be given",
    "ssh://board/home": "'/home' has no meaning",
    "ssh://board#x": "'x' has no meaning",
    "ssh://board?pyhton=python3": "'pyhton' is unknown",
    "ssh://board?python=": "need a value",
    "ssh://-oProxyCommand=touch%20x": "is not a host",
    "ssh://-oProxyCommand=x@board": "is not a user",
    "ssh://a b": "is not a host",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_address_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match="write local or ssh://") as caught:
        link_to(text)
    assert MALFORMED[text] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_link_connects_to_nothing_yet() -> None:
    assert link_to("local") is LOCAL
    link = link_to("ssh://no-such-host.invalid:2222?python=python3.12")
    assert (link.name, link.host) == ("ssh://no-such-host.invalid:2222", "no-such-host-invalid-2222")
    assert link.reconnects > 0


def test_without_ssh_the_way_out_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DeviceError, match="install OpenSSH's client"):
        link_to("ssh://board").facts()


def test_ssh_never_asks_and_never_waits_for_ever() -> None:
    words = Address(host="board", user="pi", port=2222).command(["-c", "print('a b')"])
    assert words[0] == "ssh"
    assert {"BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15"} < set(words)
    assert words[-4:-1] == ["-p", "2222", "pi@board"]
    assert shlex.split(words[-1]) == ["python3", "-c", "print('a b')"]


def test_only_a_leading_tilde_is_left_to_the_other_shell() -> None:
    assert Address(host="b", python="~/my env/bin/python").command([])[-1].startswith("~/'my env/bin/python'")
    assert Address(host="b", python="python3; rm -rf x").command([])[-1].startswith("'python3; rm -rf x'")


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("ssh: connect to host board port 22: Connection timed out", 255, "unreachable; check that it is switched on"),
        ("ssh: connect to host board port 22: No route to host", 255, "unreachable; check that it is switched on"),
        ("ssh: connect to host board port 2222: Connection refused", 255, "nothing answers at port 2222; start sshd"),
        ("Received disconnect: Too many authentication failures", 255, "name the right one"),
        ("pi@board: Permission denied (publickey).", 255, "ssh-copy-id -p 2222 pi@board"),
        ("@@@ REMOTE HOST IDENTIFICATION HAS CHANGED! @@@\nHost key verification failed.", 255, "'[board]:2222'"),
        ("kex_exchange_identification: closed", 255, "ssh failed (kex_exchange_identification: closed); try ssh -p"),
        ("Traceback\nOSError: [Errno 28] No space left on device", 1, "its disk is full; free some space there"),
        ("Traceback\nOSError: [Errno 122] Disk quota exceeded: 'x'", 1, "its disk is full"),
        ("", -9, "no sign of life"),
        ("Segmentation fault", 139, "can't start there (Segmentation fault)"),
    ],
)
def test_what_ssh_says_becomes_a_line_with_a_way_out(words: str, code: int, expected: str) -> None:
    line = explain(Address(host="board", user="pi", port=2222), words, code)
    assert line.startswith("ssh://pi@board:2222: ")
    assert expected in line
    assert "\n" not in line


def test_the_bootstrap_passes_through_shells_and_stops_in_an_old_python() -> None:
    assert not set("'\n!`\\") & set(BOOTSTRAP)
    old = f"import sys; sys.version_info = (2, 7, 18); sys.version = '2.7.18 (x)'; exec({json.dumps(BOOTSTRAP)})"
    done = subprocess.run([sys.executable, "-c", old, "1"], input=b"", capture_output=True)
    assert done.returncode == 1
    assert done.stderr.decode().strip() == "Python 3.9 or later is needed, found 2.7.18"
