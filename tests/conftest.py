"""What all tests share. Nothing that a test does may depend on the user's own cache or on the machine's core count."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.sshd import Server
from tests.sshd import missing as missing_sshd

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

for variable, folder in (("AC_DATA_DIR", SHARED / "data"), ("AC_WEIGHTS_DIR", SHARED / "weights")):
    if folder.is_dir():
        os.environ.setdefault(variable, str(folder))
# Set before torch is imported anywhere: with more threads, sums (and so results) depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job that a shell put into the background ignores Ctrl-C, and so would every program that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs something that this machine doesn't have."""
    missing = {"needs_cifar": _missing_cifar(), "needs_database": _missing_database()}
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing_cifar() -> str:
    for variable, name in (("AC_DATA_DIR", "cifar10.npz"), ("AC_WEIGHTS_DIR", "resnet20_cifar10.pt")):
        folder = os.environ.get(variable)
        if folder is None:
            return f"{variable} is not set"
        if not (Path(folder) / name).is_file():
            return f"{variable} ({folder}) holds no {name}"
    return ""


def _missing_database() -> str:
    return "" if os.environ.get("AC_DATABASE_URL") else "AC_DATABASE_URL is not set"


@pytest.fixture(autouse=True, scope="session")
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Profiles that tests measure go to a folder of their own; nor do they wait for others who measure here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOML_COMPRESS_LOCK", str(tmp_path_factory.mktemp("lock") / "measuring.lock"))
        patch.setenv("AUTOML_COMPRESS_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def _sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if missing_sshd():
        pytest.skip(missing_sshd())
    server = Server(tmp_path_factory.mktemp("sshd"))
    server.start()
    refused = server.refusal()
    if refused:
        server.stop()
        pytest.skip(f"sshd doesn't let this user in: {refused}")
    yield server
    server.stop()


@pytest.fixture
def server(_sshd: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A device behind a real sshd; whatever a test does to it, the next one finds it as it was."""
    monkeypatch.setenv("PATH", _sshd.path)
    yield _sshd
    _sshd.configure()
    _sshd.trust("host")
    if not _sshd.is_running:
        _sshd.start()
    assert not _sshd.left_behind(), "the measuring program left files on the device"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with cifar10.npz; only for tests marked `needs_cifar`."""
    return Path(os.environ["AC_DATA_DIR"])


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """The folder with resnet20_cifar10.pt; only for tests marked `needs_cifar`."""
    return Path(os.environ["AC_WEIGHTS_DIR"])


@pytest.fixture(scope="session")
def database_url() -> str:
    """An Optuna storage URL of a database server; only for tests marked `needs_database`."""
    return os.environ["AC_DATABASE_URL"]
