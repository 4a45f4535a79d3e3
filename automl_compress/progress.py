"""What a long run tells the person who waits for it.

A run calls `stage`, `advance`, `note` and `best`; where that goes is chosen once by `make_progress`: a live line on a
terminal, plain lines at intervals elsewhere, nothing at all for `SilentProgress`. Progress never decides anything.
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Clock = Callable[[], float]
Fact = str | int | float


class Progress(ABC):
    """Keeps what is going on and leaves showing it to a subclass.

    As a context manager it closes itself. `clock` returns seconds and never goes back.
    """

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._begun = self._entered = clock()
        self._stage = ""
        self._done = self._before = 0
        self._total: int | None = None
        self._deadline: float | None = None
        self._facts: dict[str, Fact] = {}
        self._best = ""

    def stage(self, name: str, total: int | None = None, *, seconds: float | None = None, done: int = 0) -> None:
        """Begin a stage of `total` units (None: not known) that ends after `seconds` at the latest (None: no limit).

        `done` of them were made before, in a time that nobody knows here.
        """
        self._stage, self._done, self._total, self._facts = name, done, total, {}
        self._before = done
        self._entered = self._clock()
        self._deadline = None if seconds is None else self._entered + seconds
        self._show(at_once=True)

    def advance(self, n: int = 1, **facts: Fact) -> None:
        """`n` more units of the stage are done. `facts` (`failed=1, infeasible=3`) replace those of the same name."""
        self._done += n
        self._facts.update(facts)
        self._show(at_once=False)

    def note(self, text: str) -> None:
        """Say something that should stay readable: a line of its own."""
        self._say(text)

    def best(self, metric: float, cost_text: str) -> None:
        """The best model so far: its validation metric, and its cost in words ('0.38 of the latency, predicted')."""
        self._best = f"best {metric:.4g} at {cost_text}"
        self._show(at_once=False)

    def another(self, text: str) -> None:
        """Another search begins, for what the text says: what was best in the one before says nothing about it."""
        self._best = ""
        self.note(text)

    @abstractmethod
    def close(self) -> None:
        """Show the last state and stop. Closing twice is harmless."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def seconds_left(self) -> float | None:
        """Until the stage ends, from its pace so far and its time limit; None while neither is known."""
        now = self._clock()
        limits = [] if self._deadline is None else [max(0.0, self._deadline - now)]
        if self._total and self._before < self._done < self._total:
            pace = (now - self._entered) / (self._done - self._before)
            limits.append(pace * (self._total - self._done))
        return min(limits, default=None)

    def describe(self) -> str:
        """The state in one line, without the time that has passed."""
        count = f"{self._done}/{self._total}" if self._total else (str(self._done) if self._done else "")
        facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self._facts.items())
        left = self.seconds_left
        parts = (
            f"{self._stage} {count}".strip(),
            "" if left is None else f"{format_seconds(left)} left",
            self._best,
            facts,
        )
        return "  ".join(part for part in parts if part)

    @abstractmethod
    def _show(self, *, at_once: bool) -> None:
        """Show the state; `at_once` when it must not wait for the next regular moment."""

    @abstractmethod
    def _say(self, text: str) -> None:
        """Print one line."""


@final
class SilentProgress(Progress):
    """Says nothing."""

    def close(self) -> None:
        pass

    def _show(self, *, at_once: bool) -> None:
        pass

    def _say(self, text: str) -> None:
        pass


@final
class PlainProgress(Progress):
    """Lines for logs and pipes: at every change of stage, else one at most every `every` seconds."""

    def __init__(self, stream: TextIO, *, every: float = 5.0, clock: Clock = time.monotonic) -> None:
        super().__init__(clock=clock)
        self._stream = stream
        self._every = every
        self._shown = ""
        self._shown_at = float("-inf")

    def close(self) -> None:
        if self._stage:
            self._show(at_once=True)

    def _show(self, *, at_once: bool) -> None:
        now = self._clock()
        if not at_once and now - self._shown_at < self._every:
            return
        line = self.describe()
        if line != self._shown:
            self._shown, self._shown_at = line, now
            self._say(line)

    def _say(self, text: str) -> None:
        print(f"[{format_seconds(self._clock() - self._begun)}] {text}", file=self._stream, flush=True)


@final
class RichProgress(Progress):
    """One live line at the bottom of a terminal; notes scroll above it."""

    def __init__(self, stream: TextIO, *, clock: Clock = time.monotonic) -> None:
        super().__init__(clock=clock)
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._console: Console = Console(file=stream, highlight=False)
        self._spinner = Spinner("dots")
        # Warnings are shown above the line; standard output stays what it is, for it may carry a result.
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=True,
        )
        self._running = False

    def close(self) -> None:
        if self._running:
            self._running = False
            self._live.stop()
            self._say(self.describe())

    def _render(self) -> Text:
        from rich.text import Text

        line = Text(
            f"{format_seconds(self._clock() - self._begun)}  {self.describe()}", no_wrap=True, overflow="ellipsis"
        )
        frame = self._spinner.render(self._clock())
        return Text.assemble(frame if isinstance(frame, Text) else "", " ", line, no_wrap=True, overflow="ellipsis")

    def _show(self, *, at_once: bool) -> None:
        if not self._running:
            self._live.start()
            self._running = True
        if at_once:
            self._live.refresh()

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def make_progress(stream: TextIO | None = None, *, clock: Clock = time.monotonic) -> Progress:
    """The display that suits `stream` (default: standard error): live on a terminal, plain lines elsewhere."""
    stream = stream or sys.stderr
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return RichProgress(stream, clock=clock)
    return PlainProgress(stream, clock=clock)


def format_seconds(seconds: float) -> str:
    """75 -> '1m15s'; 0.4 -> '0s'; 7260 -> '2h01m'."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"
