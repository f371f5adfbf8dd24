"""How programs report to the programs that started them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from whole import Run

from paramserver import drafts, notify
from paramserver.errors import UserError
from paramserver.notify import Notice, read
from paramserver.program import exit_on_user_error


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for reports; earlier reports of this process are forgotten."""
    monkeypatch.setattr(notify, "_told", Notice())
    monkeypatch.setenv(notify.VARIABLE, str(tmp_path / "notify"))
    return tmp_path / "notify"


def test_it_tells_all_that_was_told_and_the_newest_warning(place: Path) -> None:
    assert read(place) == Notice()
    notify.ready("10.10.0.1:65432")
    notify.warning("12:00:09  warning: worker 3 is gone")
    first = read(place)
    assert (first.ready, first.warning) == (
        "10.10.0.1:65432",
        "12:00:09  warning: worker 3 is gone",
    )
    notify.warning("12:00:10  warning: worker 2 is gone")
    assert read(place).warning == "12:00:10  warning: worker 2 is gone"
    assert read(place).warned_at >= first.warned_at > 0
    assert os.listdir(place.parent) == ["notify"]  # no draft is left


def test_a_status_is_written_as_long_as_somebody_watches(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not notify.is_watched()
    assert notify.watch(place) == b"" and notify.is_watched()
    notify.show(b'{"phase":"training"}')
    assert notify.watch(place) == b'{"phase":"training"}'
    touched = os.stat(f"{place}{notify.WATCHED}").st_mtime
    monkeypatch.setattr(notify.time, "time", lambda: touched + notify.WATCHED_S)
    assert not notify.is_watched()
    monkeypatch.delenv(notify.VARIABLE)
    assert not notify.is_watched()


def test_what_is_shown_now_is_waited_for_and_what_is_old_is_not_taken(place: Path) -> None:
    notify.show(b"of yesterday")
    os.utime(f"{place}{notify.SHOWN}", (1e9, 1e9))
    assert notify.newest(place, 0.1) == b"", "nobody answers"

    def answers() -> None:
        while not notify.is_watched():
            pass
        notify.show(b"of today")

    os.utime(f"{place}{notify.WATCHED}", (1e9, 1e9))
    program = threading.Thread(target=answers)
    program.start()
    assert notify.newest(place, 60.0) == b"of today"
    program.join()


def test_progress_is_marked_where_a_supervisor_keeps_the_log(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place and notify.PROGRESS.match(f"[worker 12] {notify.mark()}step 7")
    assert not notify.PROGRESS.match("[worker 12] stands at step 7")
    monkeypatch.delenv(notify.VARIABLE)
    assert notify.mark() == ""


@pytest.mark.usefixtures("place")
def test_the_error_that_ends_a_program_is_told_and_is_its_newest_warning(place: Path) -> None:
    with pytest.raises(SystemExit), exit_on_user_error():
        raise UserError("port 1 is taken\nby root", "another one: port=...")
    told = read(place)
    assert (told.problem, told.hint) == ("port 1 is taken\nby root", "another one: port=...")
    assert told.warning == "error: port 1 is taken"


def test_nothing_is_told_where_nobody_asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notify.VARIABLE)
    notify.warning("unheard")
    assert not place.exists()


def test_where_it_cannot_be_told_the_program_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(notify.VARIABLE, str(place / "no folder"))
    notify.warning("unheard")


def test_telling_does_not_wait_for_a_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        raise AssertionError

    monkeypatch.setattr(drafts.os, "fsync", fsync)
    notify.ready("10.10.0.1:65432")
    assert read(place).ready == "10.10.0.1:65432"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"what comes later": 1}', '"\\ud800"'])
def test_a_file_that_cannot_be_read_tells_nothing(place: Path, text: str) -> None:
    place.write_text(text)
    assert read(place) == Notice()


BROKEN = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, **sizes):
        super().__init__(nope)
"""


def test_a_server_is_ready_and_tells_the_error_of_its_observer_as_its_own(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        place = tmp_path / "notify"
        (tmp_path / "broken.py").write_text(BROKEN)
        server = run.server("model.type=broken:Net", **{notify.VARIABLE: str(place)})
        server.wait_for("the observer could not start")
        assert read(place).ready == f"127.0.0.1:{run.port}"
        assert server.end() == 2
        told = read(place)
        assert "broken" in told.problem and f"error: {told.problem}" in server.output
        assert not run.runs  # a run that never began leaves no folder
