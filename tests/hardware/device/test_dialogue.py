"""What becomes of a request when the way to the device breaks; no process, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from automl_compress.errors import DeviceError
from automl_compress.hardware.device.channel import ConnectionLost
from automl_compress.hardware.device.dialogue import LOCAL, NOTICE_AGAIN_S, Dialogue, Link
from automl_compress.hardware.profile.host import host_facts

LOST = ConnectionLost("the connection to ssh://board was lost")
GONE = DeviceError("ssh://board: unreachable")
FINE = {"ok": True, "value": 1}


class Line:
    """A connection on which each `receive` gives the next of `answers`; an exception in it is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.sent: list[Mapping[str, Any]] = []
        self.closed = False

    def send(self, request: Mapping[str, Any]) -> None:
        self.sent.append(request)

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[no-any-return]

    def close(self) -> str:
        self.closed = True
        return "last words"


def dialogue(*connections: Line | DeviceError, said: list[str] | None = None, reconnects: int = 2) -> Dialogue:
    """Over a link whose connections are these, one after the other; an error is what connecting ends with."""
    waiting = list(connections)

    def launch(settings: Mapping[str, Any]) -> Line:
        connection = waiting.pop(0)
        if isinstance(connection, DeviceError):
            raise connection
        return connection

    link = Link(name="ssh://board", host="board", launch=launch, reconnects=reconnects, pause_s=0.0)
    return Dialogue(link, {}, notice=(said if said is not None else []).append)


def test_a_request_is_repeated_over_a_new_connection() -> None:
    said: list[str] = []
    first, second = Line({"progress": "half"}, LOST), Line(FINE, FINE)
    asking = dialogue(first, second, said=said)
    assert asking.ask("compare", {"do": "compare"}, "value") == FINE
    assert asking.ask("compare", {"do": "compare"}) == FINE
    assert first.sent == [{"do": "compare"}]
    assert first.closed
    assert second.sent == [{"do": "compare"}] * 2
    assert said == ["the connection to ssh://board was lost; connecting again"]


def test_connecting_may_fail_for_a_while_after_a_loss() -> None:
    said: list[str] = []
    assert dialogue(Line(LOST), GONE, Line(FINE), said=said).ask("facts", {"do": "facts"}) == FINE
    assert said == [f"{LOST}; connecting again", f"{GONE}; connecting again"]


@pytest.mark.parametrize("last", [Line(LOST), GONE])
def test_it_is_given_up_in_the_end_and_says_what_remains(last: Line | DeviceError) -> None:
    with pytest.raises(DeviceError, match=r"after 3 attempts\. What was measured is kept") as caught:
        dialogue(Line(LOST), Line(LOST), last).ask("trace", {"do": "trace"})
    assert "\n" not in str(caught.value)


def test_what_fails_at_the_first_attempt_fails_at_once() -> None:
    said: list[str] = []
    with pytest.raises(DeviceError, match=r"^ssh://board: unreachable$"):
        dialogue(GONE, Line(FINE), said=said).ask("facts", {"do": "facts"})
    assert said == []


def test_every_request_has_its_own_attempts() -> None:
    lines = [Line(LOST), Line(LOST), Line(FINE, LOST), Line(LOST), Line(FINE)]
    asking = dialogue(*lines)
    assert [asking.ask("a", {}), asking.ask("b", {})] == [FINE, FINE]


def test_a_process_that_ends_by_itself_is_not_started_again() -> None:
    with pytest.raises(DeviceError, match=r"^ssh://board: the measuring process ended during 'trace': last words$"):
        dialogue(Line(None), Line(FINE)).ask("trace", {"do": "trace"})


def test_what_a_device_could_not_do_names_it() -> None:
    with pytest.raises(DeviceError, match=r"^ssh://board: trace failed: the disk is full$"):
        dialogue(Line({"ok": False, "error": "the disk is full"})).ask("trace", {"do": "trace"})


def test_this_machine_says_what_it_is_without_a_process() -> None:
    def launch(settings: Mapping[str, Any]) -> Line:
        raise AssertionError("nothing to start")

    assert Link(name=LOCAL.name, launch=launch).facts() == host_facts()


def test_waiting_is_said_once_and_then_rarely() -> None:
    said: list[str] = []
    waiting = {"notice": "another process is measuring"}
    times = iter([0.0, 1.0, NOTICE_AGAIN_S])
    asking = dialogue(Line(waiting, FINE, waiting, FINE, waiting, FINE), said=said)
    asking.clock = lambda: next(times)
    for _ in range(3):
        asking.ask("trace", {"do": "trace"})
    assert said == ["another process is measuring"] * 2
