"""Ctrl-C between two steps: the one in flight is finished, so that its state can be written and nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from automl_compress.errors import StorageError


@contextmanager
def between_steps(*, defer: bool = True) -> Iterator[Callable[[], bool]]:
    """Within, the first interruption is only noted, and the function that is handed out tells of it; the second raises
    at once. Raises KeyboardInterrupt at the end where there was one, unless the state can't be written (StorageError).

    Meant are the signals that would raise KeyboardInterrupt: Ctrl-C, and SIGTERM on the command line. Handlers of the
    caller's own stay, and so does everything in other threads, which get no signals. Without `defer` nothing changes:
    processes that train together may get the signal in different steps, and would wait for each other.
    """
    asked = False
    deferred = [number for number in (signal.SIGINT, signal.SIGTERM) if defer and _raises(number)]

    def raise_from_now_on() -> None:
        for number in deferred:
            signal.signal(number, signal.default_int_handler)

    def note(*_: object) -> None:
        nonlocal asked
        asked = True
        raise_from_now_on()

    for number in deferred:
        signal.signal(number, note)
    try:
        yield lambda: asked
    except StorageError:
        raise
    except Exception as error:
        if asked:  # Ctrl-C reaches a loader's workers, too, without which the step can't be finished
            raise KeyboardInterrupt from error
        raise
    finally:
        raise_from_now_on()  # as before: no other handler was deferred
    if asked:
        raise KeyboardInterrupt


def _raises(number: int) -> bool:
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.getsignal(number) is signal.default_int_handler
