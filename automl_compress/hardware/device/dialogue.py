"""Asking a measuring process: every request gets its answer, or the person one line that says why there is none.

A device that is reached over a network is reached again where the connection breaks; the request is then repeated, so
that a measurement is either whole or not there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from automl_compress.errors import DeviceError
from automl_compress.hardware.device.channel import Channel, ConnectionLost, Launcher, ProcessChannel
from automl_compress.hardware.profile.host import HostFacts, host_facts

# Without any answer or sign of progress for so long, the process counts as hung.
SILENCE_S = 300.0
PAUSE_S = 3.0
# Each of many requests may have to wait for another process; a person needs to hear of it now and then.
NOTICE_AGAIN_S = 300.0

Notice = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Link:
    """How a device is reached.

    name        what reports call it: "local", or an ssh:// address
    host        what profiles of it are called; empty for this machine
    launch      starts the measuring process there
    reconnects  how often a lost connection is made anew before the request is given up
    pause_s     before each of these; twice as long before the second, and so on
    """

    name: str
    launch: Launcher
    host: str = ""
    reconnects: int = 0
    pause_s: float = PAUSE_S

    @property
    def is_local(self) -> bool:
        return self.name == LOCAL.name

    def facts(self) -> HostFacts:
        """What the machine there is. Raises DeviceError, in one line, if it can't be reached or lacks the runtime."""
        if self.is_local:
            return host_facts()
        dialogue = Dialogue(self, {})
        try:
            return HostFacts.from_answer(dialogue.ask("facts", {"do": "facts"}, *HostFacts.REQUIRED))
        finally:
            dialogue.end()


LOCAL = Link(name="local", launch=ProcessChannel)


@dataclass
class Dialogue:
    """The requests to one measuring process, which is started by the first of them.

    `notice` gets what the person who waits should know, e.g. that another process holds the device.
    """

    link: Link
    settings: Mapping[str, Any]
    notice: Notice = lambda text: None
    silence_s: float = SILENCE_S
    clock: Callable[[], float] = time.monotonic
    _channel: Channel | None = field(default=None, init=False)
    _told: dict[str, float] = field(default_factory=dict, init=False)

    def ask(self, what: str, request: Mapping[str, Any], *fields: str) -> dict[str, Any]:
        """One request and its answer, which has these fields. Raises DeviceError where there is none."""
        answer = self._answer(what, request)
        where = "" if self.link.is_local else f"{self.link.name}: "
        if answer is None:
            raise DeviceError(f"{where}the measuring process ended during {what!r}: {self.end()}")
        if not answer.get("ok"):
            raise DeviceError(f"{where}{what} failed: {answer.get('error', 'no reason given')}")
        missing = [name for name in fields if name not in answer]
        if missing:
            self.end()
            raise DeviceError(
                f"{where}the measuring process answered {what!r} without {missing[0]!r}; install the program anew"
            )
        return answer

    def end(self) -> str:
        """End the process; returns its last words. The next request starts another."""
        channel, self._channel = self._channel, None
        return channel.close() if channel is not None else ""

    def _answer(self, what: str, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer, over as many connections as it takes; None where the process ended by itself."""
        lost: DeviceError | None = None
        for attempt in range(self.link.reconnects + 1):
            if lost is not None:
                self.notice(f"{lost}; connecting again")
                time.sleep(self.link.pause_s * attempt)
            try:
                if self._channel is None:
                    self._channel = self.link.launch(self.settings)
            except DeviceError as error:
                if lost is None:
                    raise
                lost = error
                continue
            try:
                return self._exchange(self._channel, what, request)
            except ConnectionLost as error:
                lost = error
                self.end()
        raise DeviceError(
            f"{lost}; given up during {what!r} after {self.link.reconnects + 1} attempts. What was measured is kept: "
            "the same command goes on from there"
        ) from lost

    def _tell(self, text: str) -> None:
        now = self.clock()
        if text not in self._told or now - self._told[text] >= NOTICE_AGAIN_S:
            self._told[text] = now
            self.notice(text)

    def _exchange(self, channel: Channel, what: str, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """One request over one connection; whatever goes wrong in between ends the process."""
        try:
            channel.send(request)
            answer = channel.receive(self.silence_s)
            while answer is not None and ("progress" in answer or "notice" in answer):
                if "notice" in answer:
                    self._tell(str(answer["notice"]))
                answer = channel.receive(self.silence_s)
            return answer
        except TimeoutError as error:
            self.end()
            silence = f"{self.silence_s:g} s"
            raise DeviceError(f"the measuring process hung: no sign of life for {silence} during {what!r}") from error
        except ValueError as error:
            raise DeviceError(f"the measuring process gave an unreadable answer ({error}): {self.end()}") from error
        except BaseException:
            # After Ctrl-C in here the answer would be taken for that of the next request.
            self.end()
            raise
