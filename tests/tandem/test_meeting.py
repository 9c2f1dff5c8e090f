from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from queue import SimpleQueue

import pytest

from asyncscale.tandem.collective_errors import CollectiveError
from asyncscale.tandem.meeting import Meeting, close_meeting, open_meeting


def test_what_one_puts_the_others_get(tmp_path: Path) -> None:
    open_meeting(str(tmp_path), 3)
    here, there = Meeting(str(tmp_path), 3), Meeting(str(tmp_path), 3)
    values: SimpleQueue[bytes] = SimpleQueue()
    thread = threading.Thread(target=lambda: values.put(there.get("default/0//1")))
    thread.start()
    assert not here.has("default/0//1")
    here.put("default/0//1", b"\0value")
    assert values.get(timeout=60) == b"\0value"
    thread.join()
    assert here.has("default/0//1")
    assert there.get("default/0//1") == b"\0value"


def test_generations_are_apart(tmp_path: Path) -> None:
    for generation in (1, 2):
        open_meeting(str(tmp_path), generation)
    Meeting(str(tmp_path), 1).put("key", b"")
    assert not Meeting(str(tmp_path), 2).has("key")
    close_meeting(str(tmp_path), 1)
    Meeting(str(tmp_path), 2).put("key", b"")


def test_who_waits_in_a_meeting_that_closes_is_told(tmp_path: Path) -> None:
    open_meeting(str(tmp_path), 1)
    errors: SimpleQueue[CollectiveError] = SimpleQueue()

    def wait() -> None:
        try:
            Meeting(str(tmp_path), 1).get("key")
        except CollectiveError as error:
            errors.put(error)

    thread = threading.Thread(target=wait)
    thread.start()
    close_meeting(str(tmp_path), 1)
    assert str(errors.get(timeout=60)) == "generation 1 is over"
    thread.join()


def test_who_comes_after_its_end_is_told(tmp_path: Path) -> None:
    open_meeting(str(tmp_path), 1)
    meeting = Meeting(str(tmp_path), 1)
    meeting.put("key", b"")
    close_meeting(str(tmp_path), 1)
    for method in (lambda: meeting.put("other", b""), lambda: meeting.get("key"), lambda: meeting.has("key")):
        with pytest.raises(CollectiveError, match="generation 1 is over"):
            method()


def test_closing_leaves_nothing_and_may_be_repeated(tmp_path: Path) -> None:
    close_meeting(str(tmp_path), 1)
    open_meeting(str(tmp_path), 1)
    meeting = Meeting(str(tmp_path), 1)
    thread = threading.Thread(target=_put_until_it_ends, args=[meeting])
    thread.start()
    meeting.get("100")
    close_meeting(str(tmp_path), 1)
    thread.join()
    close_meeting(str(tmp_path), 1)
    assert list(tmp_path.iterdir()) == []


def _put_until_it_ends(meeting: Meeting) -> None:
    with contextlib.suppress(CollectiveError):
        for number in range(10**9):
            meeting.put(str(number), b"")


def test_waiting_has_an_end(tmp_path: Path) -> None:
    open_meeting(str(tmp_path), 1)
    with pytest.raises(CollectiveError, match=r"not complete within 0\.01 s: no 'key'"):
        Meeting(str(tmp_path), 1, timeout=0.01).get("key")
