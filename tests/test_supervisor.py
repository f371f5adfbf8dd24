"""Supervisors: their process outlives the program that started it, is started again, and ends when
asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from whole import CLONE, DEADLINE_S

from paramserver.fleet.supervisor import MARK, Files, State, _hold_off_sleep, died, follow, kept

WAITS = """
import signal, sys
print("here", flush=True)
signal.pause()
"""
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("here", flush=True)
while True: signal.pause()
"""
WITH_CHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"],
                         start_new_session=True)
print("here", flush=True)
child.wait()
"""


class Kept:
    """A supervisor's folder, and its commands."""

    def __init__(self, folder: Path, name: str = "worker") -> None:
        self.folder, self.name = folder, name
        self.files = Files(folder, name)
        self._end, self._pipe = os.pipe()  # an input that stays open

    def supervisor(self, *words: str, stdin: str = "") -> str:
        command = [sys.executable, "-m", "paramserver.fleet.supervisor", *words]
        done = subprocess.run(
            command, cwd=CLONE, input=stdin, capture_output=True, text=True, timeout=DEADLINE_S
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, program: str, **orders: Any) -> State:
        told = {"argv": [sys.executable, "-c", program], **orders}
        words = ("start", self.name, str(self.folder))
        return State(**json.loads(self.supervisor(*words, stdin=json.dumps(told))))

    def stop(self, patience_s: int = 20) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            self.supervisor("stop", self.name, str(self.folder), str(patience_s))
        )
        return answer

    def lines(self, offset: int | None = None) -> Iterator[str]:
        """The lines of the log, as they come."""
        rest = b""
        for data in follow(self.files, offset, until=self._end):
            *whole, rest = (rest + data).split(b"\n")
            yield from (line.decode() for line in whole)

    @property
    def end(self) -> int:
        """An input that stays open."""
        return self._end

    def state(self) -> State:
        state = self.files.read()
        assert state is not None
        return state

    def close(self) -> None:
        os.close(self._end)
        os.close(self._pipe)
        if self.files.alive:
            self.stop(1)
        for process in kept(self.files.mark):
            process.kill()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Kept]:
    folder = Kept(tmp_path)
    yield folder
    folder.close()


def test_it_runs_on_without_whoever_started_it_and_ends_in_order(here: Kept) -> None:
    state = here.start(WAITS, up="7")
    assert next(here.lines()) == "here"
    supervisor = psutil.Process(state.supervisor)
    assert os.getsid(state.supervisor) != os.getsid(0)
    assert supervisor.ppid() != os.getpid()
    now = here.state()
    assert (now.alive, now.phase, now.up, now.process) == (True, "running", "7", state.process)
    assert now.last == "here"

    answer = here.stop()
    assert answer["ran"] and not answer["killed"] and not answer["left"]
    now = here.state()
    assert (now.alive, now.phase, now.code) == (False, "stopped", -signal.SIGTERM)
    assert not psutil.pid_exists(state.process)
    assert here.stop() == {**answer, "ran": False, "ended": []}  # there is nothing more to do


def test_the_workers_of_a_machine_end_at_one_word(here: Kept) -> None:
    for name in ("worker-1", "worker-2"):
        orders = json.dumps({"argv": [sys.executable, "-c", WAITS], "folder": str(here.folder)})
        here.supervisor("start", name, str(here.folder), stdin=orders)
        assert next(follow(Files(here.folder, name), None, until=here.end)) == b"here\n"
    answer = here.stop()
    assert [state["name"] for state in answer["ended"]] == ["worker-1", "worker-2"]
    assert {state["phase"] for state in answer["ended"]} == {"stopped"} and answer["left"] == []
    assert here.stop()["ended"] == []


def test_one_that_is_killed_is_started_again_so_often(here: Kept) -> None:
    here.start(WAITS, restart=1)
    lines = here.lines()
    assert next(lines) == "here"
    os.kill(here.state().process, signal.SIGKILL)
    said = [next(lines), next(lines)]
    assert said == [
        "warning: the worker died (killed by SIGKILL): starting it again (1 of 1)",
        "here",
    ]
    os.kill(here.state().process, signal.SIGKILL)
    assert list(lines) == []
    assert (here.state().phase, here.state().restarts) == ("failed", 1)
    assert (here.state().last, here.state().warning) == ("here", said[0])


TELLS = """
import signal
from paramserver import notify
print("warning: only said", flush=True)
notify.warning("warning: told")
notify.ready("here")
print("here", flush=True)
signal.pause()
"""


def test_what_it_tells_is_known_and_what_it_only_says_is_not_parsed(here: Kept) -> None:
    started = here.start(TELLS, restart=1)
    lines = here.lines()
    assert not started.ready and list(islice(lines, 2)) == ["warning: only said", "here"]
    told = here.state()
    assert (told.ready, told.warning, told.last) == (True, "warning: told", "here")
    os.kill(told.process, signal.SIGKILL)
    died = next(lines)
    assert died.startswith("warning: the worker died") and here.state().warning == died
    assert list(islice(lines, 2)) == ["warning: only said", "here"]
    assert here.state().warning == "warning: told"  # the new one's, which is newer
    here.stop()
    assert not here.state().ready


SHOWS = """
import time
from paramserver import notify
notify.ready("here")
print("here", flush=True)
while True:
    time.sleep(0.05)
    if notify.is_watched():
        notify.show(b'{"step": 7}')
"""


def test_a_server_is_asked_for_the_status_of_its_run(tmp_path: Path) -> None:
    server = Kept(tmp_path, "server")
    try:
        server.start(SHOWS)
        assert next(server.lines()) == "here"
        told = json.loads(server.supervisor("status", str(server.folder)))
        assert [state["shown"] for state in told] == [""]
        told = json.loads(server.supervisor("status", str(server.folder), "shown"))
        assert [state["shown"] for state in told] == ['{"step": 7}']
    finally:
        server.close()


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (2, 1), (1, 2)])
def test_exit_codes_decide_whether_it_is_started_again(here: Kept, code: int, starts: int) -> None:
    here.start(f"print('ran'); raise SystemExit({code})", restart=1, again=[1])
    assert list(here.lines()).count("ran") == starts
    assert here.state().phase == ("failed" if code else "ended")
    assert here.state().code == code


def test_there_is_one_for_each_name(here: Kept) -> None:
    first = here.start(WAITS, up="first")
    again = here.start(WAITS, up="second")
    assert (again.up, again.process) == ("first", first.process)
    told = json.loads(here.supervisor("status", str(here.folder)))
    assert [(each["name"], each["alive"]) for each in told] == [("worker", True)]


def test_one_that_does_not_end_is_killed(here: Kept) -> None:
    here.start(STUBBORN)
    lines = here.lines()
    assert next(lines) == "here"
    assert here.stop(1)["left"] == []
    assert list(lines) == ["warning: the worker does not end: killed"]
    assert here.state().code == -signal.SIGKILL


def test_what_a_killed_supervisor_kept_is_found_and_ended(here: Kept) -> None:
    state = here.start(WITH_CHILD)
    assert next(here.lines()) == "here"
    os.kill(state.supervisor, signal.SIGKILL)
    psutil.wait_procs(
        [psutil.Process(state.supervisor)] if psutil.pid_exists(state.supervisor) else []
    )
    assert (here.state().alive, here.state().phase) == (False, "failed")
    assert len(kept(here.files.mark)) == 2
    answer = here.stop(1)
    assert not answer["ran"] and answer["left"] == []
    assert kept(here.files.mark) == []


def test_what_a_killed_supervisor_only_half_wrote_is_removed_by_the_next(here: Kept) -> None:
    here.files.make()
    half = [here.files.state.with_name(f"worker.{name}.1.tmp") for name in ("json", "notify")]
    for path in half:
        path.touch()
    here.start(WAITS)
    assert not any(path.exists() for path in half)


def test_children_of_what_is_kept_end_with_it(here: Kept) -> None:
    here.start(WITH_CHILD)
    assert next(here.lines()) == "here"
    here.stop(1)
    assert kept(here.files.mark) == []


def test_secrets_are_in_no_command_line_and_no_file(here: Kept) -> None:
    here.start("import os; print(len(os.environ['KEY']))" + WAITS, environment={"KEY": "s3cret"})
    assert next(here.lines()) == "6"
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) or process.pid == here.state().supervisor:
                assert "s3cret" not in " ".join(process.cmdline())
    for path in here.folder.rglob("*"):
        assert path.is_dir() or b"s3cret" not in path.read_bytes(), path
    assert (here.folder / "state").stat().st_mode & 0o077 == 0


def test_what_cannot_be_started_is_told(here: Kept) -> None:
    told = json.dumps({"argv": ["/no/such/program"]})
    command = [
        sys.executable,
        "-m",
        "paramserver.fleet.supervisor",
        "start",
        "worker",
        str(here.folder),
    ]
    done = subprocess.run(command, cwd=CLONE, input=told, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "cannot start the worker: No such file or directory: /no/such/program\n"
    deadline = time.monotonic() + DEADLINE_S
    while here.files.alive:  # who would have kept it ends a moment later
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_log_goes_on_from_where_it_was_read_to(here: Kept) -> None:
    here.start("print('one'); print('two')")
    assert list(here.lines()) == ["one", "two"]
    assert list(here.lines(offset=4)) == ["two"]
    here.start("print('three')")  # a new start begins at its own lines
    assert list(here.lines()) == ["three"]
    assert here.supervisor("log", "worker", str(here.folder), "1") == "three\n"


def test_following_ends_with_the_input(here: Kept) -> None:
    here.start(WAITS)
    command = [
        sys.executable,
        "-m",
        "paramserver.fleet.supervisor",
        "follow",
        "worker",
        str(here.folder),
    ]
    with subprocess.Popen(
        command, cwd=CLONE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as following:
        assert following.stdout is not None and following.stdin is not None
        assert following.stdout.readline() == "here\n"
        following.stdin.close()
        assert following.wait(DEADLINE_S) == 0
    assert here.files.alive


def test_on_a_mac_sleep_is_held_off_as_long_as_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "caffeinate").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "caffeinate").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    awake = _hold_off_sleep()
    assert awake is not None and awake.wait(DEADLINE_S) == 0
    assert (tmp_path / "asked").read_text() == f"-is -w {os.getpid()}\n"


def test_codes_in_words() -> None:
    assert died(-9) == "killed by SIGKILL"
    assert died(2) == "exit code 2"
