"""The terminal of `make watch`, the trace that it saves, and the table of `make runs`."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from crew import Crew, Noise, perceptron
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from test_status import FULL
from whole import DEADLINE_S, Served

from paramserver import runs
from paramserver.output.runfolder import Record, RunFolder, StepLine
from paramserver.status import chrome
from paramserver.status.chrome import MINUTE_S, Recorder
from paramserver.status.value import (
    Cause,
    Diagnosis,
    Link,
    LogLine,
    Machine,
    RoundTimes,
    State,
    Status,
    Times,
)
from paramserver.watch.screen import View, drawn, gone_on, waiting

# ------------------------------------------------------------------------------ what is drawn


PLAIN = View()


def lines(
    status: Status, width: int, height: int = 30, view: View = PLAIN, utf8: bool = True
) -> list[str]:
    return [line.plain for line in drawn(status, view, width, height, utf8=utf8)]


@pytest.mark.parametrize("width", [60, 80, 140])
def test_what_matters_is_there_at_any_width(width: int) -> None:
    text = "\n".join(lines(FULL, width))
    for part in (
        "2026-11-22_14-05-09",
        "step 812/1,120",
        "72 %",
        "loss 0.2134",
        "worker 2 (mini2) is late",
        "1 mini1",
        "late 0.41 s",
        "round 812 closed with 1 of 2",
        " q  quit",
    ):
        assert part in text, part


@given(st.integers(20, 200), st.integers(4, 60), st.booleans(), st.booleans(), st.integers(0, 70))
def test_nothing_is_wider_or_higher_than_the_terminal(
    width: int, height: int, log: bool, utf8: bool, workers: int
) -> None:
    machines = tuple(
        Machine(id=i, host=f"machine{i}" * (i % 4), trouble="late" * (i % 3), minute=Times(1, 1))
        for i in range(1, workers + 1)
    )
    links = tuple(Link(machine=m.id, address=f"10.0.0.{m.id}") for m in machines)
    status = replace(
        FULL, machines=machines, links=links, losses=tuple((i, 1 / i) for i in range(1, 99))
    )
    shown = drawn(status, View(log=log), width, height, utf8=utf8)
    assert len(shown) <= height
    assert all(line.cell_len <= width for line in shown)
    assert " q " in shown[-1].plain


def test_a_bar_shows_where_the_time_went() -> None:
    halves = Machine(id=1, host="m", state=State.TRAINING, minute=Times(5, 0, 3, 2, 0))
    status = replace(FULL, machines=(halves,), links=())
    (bar,) = [line for line in lines(status, 80) if line.startswith("1 m")]
    counts = {mark: bar.count(mark) for mark in "█▓▒░×"}
    total = sum(counts.values())
    assert total > 30 and counts["▓"] == counts["×"] == 0
    assert abs(counts["█"] - total * 0.5) <= 1 and abs(counts["▒"] - total * 0.3) <= 1
    (plain,) = [line for line in lines(status, 80, utf8=False) if line.startswith("1 m")]
    assert "#" in plain and plain.isascii()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=99), st.integers(0, 30))
def test_any_loss_has_a_curve(losses: list[float], height: int) -> None:
    status = replace(FULL, losses=tuple(enumerate(losses)))
    assert len(drawn(status, PLAIN, 80, height)) <= height


def test_of_many_machines_those_in_trouble_are_shown() -> None:
    machines = tuple(
        Machine(id=i, host="m", trouble="late 2 s" if i == 60 else "") for i in range(1, 65)
    )
    text = "\n".join(lines(replace(FULL, machines=machines), 80, 24))
    assert "60 m" in text and "more workers" in text


def test_the_log_has_a_filter() -> None:
    told = tuple(LogLine(at=i, text=f"line {i}", warning=i % 2 == 0) for i in range(30))
    status = replace(FULL, lines=told, warnings=told[:10:2])
    log = lines(status, 80, 24, View(log=True))
    assert "line 29" in "\n".join(log) and "line 5" not in "\n".join(log)
    assert [line[9:] for line in lines(status, 80, 24, View(log=True, filter="LINE 5"))[4:5]] == [
        "line 5"
    ]
    only = "\n".join(lines(status, 80, 24, View(log=True, warnings=True)))
    assert "line 8" in only and "line 29" not in only
    assert "no such lines" in "\n".join(lines(status, 80, 24, View(log=True, filter="elephant")))


def test_the_log_is_kept_while_somebody_watches() -> None:
    told = [LogLine(at=i, text=f"line {i}", warning=i % 2 == 0) for i in range(30)]
    seen = gone_on((), told[:10])
    assert gone_on(seen, told[:10]) == seen
    seen = gone_on(gone_on(seen, told[5:15]), told[20:])
    assert [line.at for line in seen] == [*range(15), *range(20, 30)]
    status = replace(FULL, lines=tuple(told[28:]), warnings=tuple(told[28:29]))
    log = "\n".join(lines(status, 80, 60, View(log=True, lines=seen)))
    assert "line 0" in log and "line 29" in log
    log = "\n".join(lines(status, 80, 60, View(log=True, lines=seen, warnings=True)))
    assert "line 0" in log and "line 28" in log and "line 29" not in log


def test_it_says_what_is_wrong() -> None:
    assert "the server has been silent for 12 s" in lines(FULL, 80, view=View(silent_s=12))[0]
    over = replace(FULL, end="all epochs are done")
    assert "over: all epochs are done" in lines(over, 80)[0]
    assert "over: all epochs are done" in lines(over, 80, view=View(silent_s=12))[0]
    paused = replace(FULL, trains=False, phase="waiting for 2 workers")
    assert "waiting for 2 workers" in lines(paused, 80)[3]
    assert "waiting for a run at 127.0.0.1:1" in waiting("127.0.0.1:1", 80, 24)[0].plain
    long = replace(FULL, diagnosis=Diagnosis(cause=Cause.SLOW, sentence="it is slow " * 80))
    assert len([line for line in lines(long, 60) if "slow it is" in line]) == 3
    shared = replace(FULL, averaging="the server lets several average: 50 % itself, 50 % mini2")
    assert "50 % itself, 50 % mini2" in "\n".join(lines(shared, 80))


# ------------------------------------------------------------------------------ the program


class Watcher:
    """`python -m paramserver.watch` on a terminal of its own."""

    def __init__(self, *words: str, columns: int = 80, rows: int = 24, **variables: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paramserver.watch", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", **variables},
            start_new_session=True,
        )
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.text = ""

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self.slave)

    def until(self, sentence: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while sentence not in self.text and sentence not in re.sub(r"\x1b\[[\d;]*m", "", self.text):
            assert time.monotonic() < deadline, f"{sentence!r} is not in {self.text[-3000:]!r}"
            if select.select([self._master], [], [], 0.5)[0]:
                self.text += os.read(self._master, 2**16).decode(errors="replace")

    def press(self, keys: str) -> None:
        self.text = ""
        os.write(self._master, keys.encode())


def test_who_watches_sees_the_run_and_leaves_it_alone() -> None:
    with (
        Served(watched=True, num_workers=1, num_epochs=1) as served,
        Watcher(f"port={served.port}") as watcher,
    ):
        watcher.until("waiting for the first worker")
        assert watcher.text.startswith("\x1b[?1049h"), "another screen"
        crew = Crew(served, perceptron, Noise(32))
        served.wait(crew.start(1, 8))
        watcher.until("over: all epochs are done")
        watcher.until("step 4")
        watcher.press("/")
        watcher.until("filter: ")
        watcher.press("worker")
        watcher.until("filter: worker_")
        watcher.press("\x1b")
        watcher.until(" q ")
        watcher.press("q")
        assert watcher.process.wait(DEADLINE_S) == 0
        watcher.until("\x1b[?1049l")
        after = termios.tcgetattr(watcher.slave)
        assert after[3] == watcher.before[3], "keys are echoed again"
    assert "does not allow" not in served.text


def test_in_a_pipe_there_are_plain_lines() -> None:
    with Served(watched=True, num_workers=1, num_epochs=1) as served:
        words = [sys.executable, "-m", "paramserver.watch", f"port={served.port}"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = process.stdout.readline()
        crew = Crew(served, perceptron, Noise(32))
        served.wait(crew.start(1, 8), served.end)
        rest = process.stdout.read()
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 0
    assert "waiting for the first worker" in first
    assert "the run is over at step 4: all epochs are done" in rest and "\x1b" not in first + rest


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("join=psnonsense", "join token is"),
        ("host_ip=10.255.0.1", "watching it takes a token"),
        ("learning_rat=1", "learning_rate"),
    ],
)
def test_a_mistake_is_told(word: str, told: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "paramserver.watch", word], capture_output=True, text=True
    )
    assert ran.returncode == 2 and told in ran.stderr and "Traceback" not in ran.stderr


# ------------------------------------------------------------------------------ the trace


def with_rounds(at: float, *steps: int, seconds: float = 0.5) -> Status:
    part = Times(compute=0.3 * seconds, cable=0.2 * seconds, wait=0.5 * seconds)
    rounds = tuple(RoundTimes(step, seconds, {1: part, 2: Times(late=seconds)}) for step in steps)
    return replace(FULL, made_at=at, rounds=rounds, step=steps[-1])


def spans(recorder: Recorder, worker: int) -> list[dict[str, Any]]:
    events = json.loads(recorder.to_json())["traceEvents"]
    return [e for e in events if e["ph"] == "X" and e["tid"] == worker]


def test_a_trace_has_each_round_once_and_in_order() -> None:
    recorder = Recorder()
    recorder.add(with_rounds(100.0, 1, 2, 3))
    recorder.add(with_rounds(101.0, 2, 3, 4, 5))
    own = spans(recorder, 1)
    assert [e["args"]["step"] for e in own if e["name"] == "compute"] == [1, 2, 3, 4, 5]
    for before, after in pairwise(own):
        assert before["ts"] + before["dur"] <= after["ts"] + 0.2, "spans lie beside each other"
    assert {e["name"] for e in spans(recorder, 2)} == {"late"}
    names = [e["args"]["name"] for e in recorder.trace()["traceEvents"] if e["ph"] == "M"]
    assert names == ["worker 1 (mini1)", "worker 2 (mini2)"]


def test_a_trace_is_of_the_last_minute_and_of_one_run() -> None:
    recorder = Recorder()
    assert recorder.trace()["traceEvents"] == []
    for i in range(200):
        recorder.add(with_rounds(1000.0 + i, i + 1, seconds=1.0))
    computed = [e for e in spans(recorder, 1) if e["name"] == "compute"]
    assert len(computed) == MINUTE_S + 1
    recorder.add(with_rounds(2000.0, 1, 2))
    assert {e["args"]["step"] for e in spans(recorder, 1)} == {1, 2}


def test_a_trace_of_many_short_rounds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chrome, "TIMES_KEPT", 100)
    recorder = Recorder()
    for i in range(100):
        recorder.add(with_rounds(1000.0 + i / 100, 3 * i, 3 * i + 1, 3 * i + 2, seconds=0.001))
    steps = [e["args"]["step"] for e in spans(recorder, 1) if e["name"] == "compute"]
    assert steps == list(range(250, 300)), "of two workers, the newest fifty"


# ------------------------------------------------------------------------------ the table of runs


def a_run(parent: Path, name: str, number: int, **record: Any) -> RunFolder:
    folder = RunFolder(parent / name)
    folder.path.mkdir()
    settings = {"model": {"type": "SimpleNN"}, "dataset": {"name": "digits"}}
    told = Record("id", "host", 1, settings, number=number, **record)
    folder.record.write_bytes(msgspec.json.encode(told))
    return folder


def a_step(step: int) -> bytes:
    line = StepLine(step, 1.0, 0.5, 32, 0.1, (1,), (), 0, 0)
    return msgspec.json.encode(line) + b"\n"


def test_the_table_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = a_run(tmp_path, "2026-01-01_00-00-00", 1, ended=True)
    done.summary.write_text(
        json.dumps(
            {"steps": 938, "samples_per_s": 3218.4, "val_accuracy": 0.9441, "end": "\x1b[2J"}
        )
    )
    killed = a_run(tmp_path, "2026-01-02_00-00-00", 2)
    killed.metrics.write_bytes(a_step(6) + a_step(7) + b'{"step": 8, "sec')
    a_run(tmp_path, "2026-01-03_00-00-00", 3)
    broken = a_run(tmp_path, "2026-01-04_00-00-00", 4)
    broken.record.write_text("{")
    broken.summary.write_text("[]")
    (tmp_path / "notes").mkdir()

    sys_argv, sys.argv = sys.argv, ["runs", f"run_dir={tmp_path}"]
    try:
        runs.main()
        sys.argv = ["runs", f"run_dir={tmp_path / 'notes'}"]
        runs.main()
    finally:
        sys.argv = sys_argv
    head, fourth, first, second, third, none = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "model", "data", "steps"]
    assert first.split()[:6] == ["2026-01-01_00-00-00", "SimpleNN", "digits", "938", "94.4", "%"]
    assert "3,218" in first and "\x1b" not in first
    assert " 7 " in second and "loss 0.5000" in second and "not ended, last step" in second
    assert "not ended: no step yet" in third
    assert fourth.split()[0] == "2026-01-04_00-00-00"
    assert none == f"no runs in {tmp_path / 'notes'}: make demo makes one"


def test_a_run_that_is_removed_while_somebody_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_run(tmp_path, "2026-01-01_00-00-00", 1)
    folder.metrics.write_bytes(a_step(7))
    last_step = runs._last_step

    def the_last_time(path: Path) -> Any:
        found = last_step(path)
        shutil.rmtree(folder.path)
        return found

    monkeypatch.setattr(runs, "_last_step", the_last_time)
    assert runs.read(folder.path).steps == 7
    monkeypatch.undo()
    assert runs.read(folder.path) == runs.Summary(folder.path.name, end="no step was made")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.text(), inside, max_size=2),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("steps", "samples_per_s", "end", "val_accuracy", "metrics", "val_loss", "train_loss"),
            ANYTHING | st.dictionaries(st.text(), ANYTHING, max_size=2),
        ),
    ),
    ANYTHING,
    st.integers(),
)
def test_whatever_is_in_a_run_folder_it_has_a_row(
    tmp_path_factory: pytest.TempPathFactory, summary: dict[str, Any], name: Any, step: int
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "2026-01-01_00-00-00")
    folder.path.mkdir()
    settings = {"model": {"type": name}, "dataset": name}
    record = {"run": "r", "host": "h", "port": 1, "settings": settings}
    folder.record.write_text(json.dumps(record))
    for path, told in (
        (folder.metrics, {**json.loads(a_step(1)), "step": step}),
        (folder.summary, summary),
    ):
        path.write_text(json.dumps(told))
        found = runs.read(folder.path)
        assert len(runs.table([found])) == 2
        assert msgspec.json.encode(found), "the page has it, too"
