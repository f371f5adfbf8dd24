"""The server's log and the events in the run folder: a server that goes on has those before it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from paramserver.net.jointoken import JoinToken, encode
from paramserver.output import serverlog
from paramserver.output.runfolder import RunFolder
from paramserver.output.serverlog import ServerLog
from paramserver.server.overview import Overview
from paramserver.server.show import Show
from paramserver.settings import Settings
from paramserver.status.value import EVENTS_MAX, LINES_KEPT, Event, EventKind, LogLine

WORD = encode(JoinToken("10.10.0.1", 65432, bytes(range(32)), bytes(range(32, 64))))


def line(number: int, *, warning: bool = False) -> LogLine:
    return LogLine(at=float(number), text=f"line {number}", warning=warning)


def event(step: int) -> Event:
    return Event(kind=EventKind.JOINED, step=step, at=float(step), text="pi is here", machine=1)


def test_lines_and_events_come_back_in_their_order(tmp_path: Path) -> None:
    told = [line(1), event(2), line(3, warning=True), event(4)]
    assert ServerLog(tmp_path / "server.jsonl").take_up() == []
    assert list(tmp_path.iterdir()) == []
    log = ServerLog(tmp_path / "server.jsonl")
    for entry in told:
        log.add(entry)
    again = ServerLog(tmp_path / "server.jsonl")
    assert again.take_up() == told
    again.add(line(5))
    assert ServerLog(tmp_path / "server.jsonl").take_up() == [*told, line(5)]


def test_many_are_thinned_to_the_newest(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "server.jsonl")
    for number in range(LINES_KEPT + 3):
        log.add(line(number))
    for step in range(EVENTS_MAX + 3):
        log.add(event(step))
    found = ServerLog(tmp_path / "server.jsonl").take_up()
    assert found[0] == line(3) and found[LINES_KEPT] == event(3)
    assert len(found) == LINES_KEPT + EVENTS_MAX


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serverlog, "FILE_BYTES", 4000)
    monkeypatch.setattr(serverlog, "LINES_KEPT", 10)
    path, sizes = tmp_path / "server.jsonl", []
    log = ServerLog(path)
    log.add(event(1))
    for number in range(1000):
        log.add(line(number))
        sizes.append(path.stat().st_size)
    assert max(sizes) <= 4000
    found = log.take_up()
    assert found[0] == event(1) and found[-1] == line(999)


@pytest.mark.parametrize(
    "spoilt", [b'{"line":{"at":7.0,"te', b"\xff\xfe\x00", b"[[[", b'{"line":{"at":-1,"text":"x"}}']
)
def test_a_torn_or_spoilt_line_costs_no_other_one(tmp_path: Path, spoilt: bytes) -> None:
    path = tmp_path / "server.jsonl"
    ServerLog(path).add(line(1))
    with path.open("ab") as file:
        file.write(spoilt)
    log = ServerLog(path)
    assert log.take_up() == [line(1)]
    log.add(line(2))
    assert ServerLog(path).take_up() == [line(1), line(2)]


def test_what_moves_a_cursor_is_made_harmless(tmp_path: Path) -> None:
    path = tmp_path / "server.jsonl"
    path.write_text('{"line":{"at":1.0,"text":"\\u001b[2J"}}\n')
    (found,) = ServerLog(path).take_up()
    assert isinstance(found, LogLine) and found.text.isprintable()


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "gone" / "server.jsonl")
    log.add(line(1))
    assert log.take_up() == []
    (tmp_path / "gone").mkdir()
    log.add(line(2))
    assert log.take_up() == [line(2)]


def test_no_token_is_in_it(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "server.jsonl")
    overview = Overview(Settings(), "run-1", "runs/run-1", "here", keep=log.add)
    overview.said(f"make worker ID=2 JOIN={WORD}", 1.0, warning=True)
    overview.event(EventKind.GONE, 2, 2.0, "worker 3 is gone", 3)
    assert len(log.take_up()) == 2
    assert WORD[2:20] not in (tmp_path / "server.jsonl").read_text()


@pytest.fixture
def logger() -> Iterator[None]:
    """That of the server is afterwards as it was."""
    log = logging.getLogger("paramserver")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


@pytest.mark.usefixtures("logger")
def test_a_server_that_goes_on_has_the_lines_and_events_before_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, datetime.now())
    try:
        first = Show(Settings(plain=True), folder)
        first.say("worker 2 is gone", warning=True)
        first.overview.event(EventKind.GONE, 7, 1.0, "worker 2 is gone", 2)
        second = Show(Settings(plain=True), folder)
        second.say("the run goes on")
        assert [kept.text for kept in second.overview.lines] == [
            "worker 2 is gone",
            "the run goes on",
        ]
        assert [kept.text for kept in second.overview._warnings] == ["worker 2 is gone"]
        assert [kept.step for kept in second.overview._events] == [7]
    finally:
        folder.close()


@pytest.mark.usefixtures("logger")
def test_a_server_that_goes_on_marks_no_checkpoint_twice(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, datetime.now())
    try:
        folder.checkpoints.mkdir(exist_ok=True)
        for step in (500, 1000):
            (folder.checkpoints / f"step-{step:08}.safetensors").touch()
            show = Show(Settings(plain=True), folder)  # of a server that was started again
            show._look_around(0.0)
        assert [(kept.kind, kept.step) for kept in show.overview._events] == [
            (EventKind.CHECKPOINT, 500),
            (EventKind.CHECKPOINT, 1000),
        ]
    finally:
        folder.close()
