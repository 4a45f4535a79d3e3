"""Where a study is kept, and how it survives: opening, recognising a foreign one, cleaning up after workers that died.

By default a study is a journal file in the run folder. Databases keep heartbeats, so that trials of dead workers on any
host are recognised; with a journal, trials of workers on this host are recognised by their process.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from automl_compress.errors import InputError, RunFolderError

JOURNAL = "study.journal"
INTERRUPTED = "interrupted"
_FINGERPRINT = "fingerprint:"
_HEARTBEAT_S = 30
_GRACE_S = 120
_UNCLAIMED = timedelta(seconds=60)


def open_study(
    location: str | Path,
    name: str,
    sampler: BaseSampler,
    *,
    directions: Sequence[str] = ("maximize",),
    fingerprint: Mapping[str, str] | None = None,
) -> Study:
    """Create a study or go on with it.

    location     run folder (the journal `study.journal` in it), path of a journal file, or a storage URL:
                 `journal:///shared/study.journal`, `sqlite:///study.db`, `postgresql://...`, `mysql://...`
    fingerprint  what the study depends on -> its digest ('task', 'graph', 'space', 'profile', 'budget'). Raises
                 RunFolderError if the stored study was made for another one.
    """
    _silence()
    storage = open_storage(location)
    wanted = [StudyDirection[d.upper()] for d in directions]
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, sampler=sampler, directions=wanted, load_if_exists=True,
            pruner=optuna.pruners.NopPruner(),
        )  # fmt: skip
        stored = study.user_attrs
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise RunFolderError(f"the study in {location} is damaged ({error}): start in another run folder") from error
    if study.directions != wanted:
        raise RunFolderError(f"{location} holds a study that {study.directions[0].name.lower()}s: choose another name")
    for key, value in (fingerprint or {}).items():
        found = stored.get(_FINGERPRINT + key)
        if found is None and not study.get_trials(deepcopy=False):
            study.set_user_attr(_FINGERPRINT + key, value)
        elif found != value:
            raise RunFolderError(
                f"{location} belongs to another {key} ({found}, this one is {value}): choose another run folder, or go "
                f"on with the {key} that it was started with"
            )
    return study


def join_study(location: str, name: str, sampler: BaseSampler) -> Study:
    """Open a study that another process started, for a worker. RunFolderError if there is none of that name."""
    storage = open_storage(location)
    known = optuna.get_all_study_names(storage)
    if name not in known:
        raise RunFolderError(f"{location} has no study {name!r}; it has: {', '.join(known) or 'none'}")
    return optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=optuna.pruners.NopPruner())


def known_study(location: str | Path, name: str) -> Study | None:
    """A study as it is, to look at; None if there is none of that name."""
    path = Path(location)
    if "://" not in str(location) and not (path / JOURNAL if path.is_dir() else path).exists():
        return None
    storage = open_storage(location)
    if name not in optuna.get_all_study_names(storage):
        return None
    return optuna.load_study(study_name=name, storage=storage)


def open_storage(location: str | Path) -> BaseStorage:
    """The storage behind a folder, a journal path or a URL. InputError if it can't be opened."""
    text = str(location)
    if "://" not in text or text.startswith("journal://"):
        path = Path(text.removeprefix("journal://"))
        return _journal(path / JOURNAL if path.is_dir() else path)
    try:
        with warnings.catch_warnings():
            # The heartbeat is marked experimental there; nothing else finds dead workers on other hosts.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return RDBStorage(
                text, heartbeat_interval=_HEARTBEAT_S, grace_period=_GRACE_S, heartbeat_stale_trial_callback=_stale
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"storage {_without_password(text)} can't be opened: {reason}") from error


def this_worker() -> str:
    """Identifies this process among all that ever ran: host, process id, start time."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def worker_is_dead(worker: str) -> bool:
    """Whether a worker of this host has ended; False for workers of other hosts, of which nothing is known."""
    host, pid, started = worker.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        return bool(abs(psutil.Process(int(pid)).create_time() - float(started)) > 1.0)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def requeue_dead(
    study: Study, *, is_dead: Callable[[str], bool] = worker_is_dead, now: Callable[[], datetime] = datetime.now
) -> int:
    """Fail the running trials of dead workers and put their parameters back into the queue. Returns how many.

    A running trial that no worker has put its name on after a minute was abandoned between the two.
    """
    count = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get("worker")
        started = trial.datetime_start or now()
        if is_dead(worker) if worker else now() - started > _UNCLAIMED:
            count += _fail_and_requeue(study, trial, "its worker ended")
    return count


def interrupted(trials: Iterable[FrozenTrial]) -> set[int]:
    """The numbers of failed trials that were cut short rather than failing: they say so, or are queued again."""
    trials = list(trials)
    again = {t.user_attrs["requeued_from"] for t in trials if "requeued_from" in t.user_attrs}
    failed = (t for t in trials if t.state == TrialState.FAIL)
    return {t.number for t in failed if INTERRUPTED in t.user_attrs or t.number in again}


def requeue(study: Study, trial: FrozenTrial) -> None:
    """Put the parameters of an interrupted trial back into the queue, once."""
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    trials = study.get_trials(deepcopy=False)
    if not params or any(t.user_attrs.get("requeued_from") == trial.number for t in trials):
        return
    label = {"label": trial.user_attrs["label"]} if "label" in trial.user_attrs else {}
    study.enqueue_trial(params, user_attrs={**label, "requeued_from": trial.number})


def _fail_and_requeue(study: Study, trial: FrozenTrial, reason: str) -> int:
    # Queued before it is failed: a worker that dies in between leaves nothing behind that the next one can't finish.
    requeue(study, trial)
    with suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
        _mark(study, trial, reason)
        study.tell(trial.number, state=TrialState.FAIL)
        return 1
    return 0


def _stale(study: Study, trial: FrozenTrial) -> None:
    """Called by Optuna for a trial that it has failed because its heartbeat stopped."""
    requeue(study, trial)


def _mark(study: Study, trial: FrozenTrial, reason: str) -> None:
    live = optuna.trial.Trial(study, trial._trial_id)
    live.set_user_attr(INTERRUPTED, True)
    live.set_user_attr("reason", reason)


def _journal(path: Path) -> JournalStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = JournalFileSymlinkLock(str(path))
        if path.exists():
            _cut_torn_line(path, lock)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except OSError as error:
        raise RunFolderError(f"study {path} can't be opened: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise RunFolderError(f"study {path} is damaged ({error}): start in another run folder") from error


def _cut_torn_line(path: Path, lock: JournalFileSymlinkLock) -> None:
    """Remove an unfinished last line, left by a process that was killed: nobody could read the journal with it."""
    with path.open("rb+") as file:
        if not _torn(file):
            return
        lock.acquire()
        try:
            if _torn(file):
                file.seek(0)
                data = file.read()
                file.truncate(data.rfind(b"\n") + 1)
        finally:
            lock.release()


def _torn(file: Any) -> bool:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return False
    file.seek(size - 1)
    return bool(file.read(1) != b"\n")


def _silence() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
