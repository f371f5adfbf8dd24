"""What is printed for people may be lost, and nothing with it: no process, no run, no exit code."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from whole import CLONE, Monitor, Run

CLOSED_PIPE = "r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.dup2(w, 2); os.close(w)"
FULL = "w = os.open('/dev/full', os.O_WRONLY); os.dup2(w, 1); os.dup2(w, 2); os.close(w)"
GONE = "os.close(1); os.close(2)"
HUNG_UP = "m, s = pty.openpty(); os.close(m); os.dup2(s, 1); os.dup2(s, 2); os.close(s)"
NO_OUTPUT = [
    pytest.param(CLOSED_PIPE, id="a closed pipe"),
    pytest.param(
        FULL,
        id="a full disk",
        marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full"),
    ),
    pytest.param(GONE, id="none"),
    pytest.param(HUNG_UP, id="a terminal that hung up"),
]


def without_output(how: str, *words: str) -> list[str]:
    """What follows `python`: a program whose standard output and error take nothing."""
    code = f"import os, pty, sys; {how}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return ["-c", code, *words]


@pytest.mark.parametrize("how", NO_OUTPUT)
def test_a_line_that_nobody_takes_is_lost_and_nothing_else(how: str) -> None:
    program = """
import os
from paramserver import terminal
from paramserver.program import exit_on_user_error
with exit_on_user_error():
    for _ in range(2000):  # more than any buffer holds
        terminal.say("a line")
        terminal.say("another one", error=True)
os.environ["STILL_HERE"]  # else exit code 1
"""
    done = subprocess.run(
        [sys.executable, *without_output(how, "-c", program)],
        env={**os.environ, "PYTHONPATH": str(CLONE), "STILL_HERE": "1"},
        check=False,
    )
    assert done.returncode == 0


def test_what_others_left_in_the_buffer_does_not_change_the_exit_code_of_our_programs() -> None:
    program = """
from paramserver.program import exit_on_user_error
with exit_on_user_error():
    print("a library's line, which waits in Python's buffer")
"""
    done = subprocess.run(
        [sys.executable, *without_output(CLOSED_PIPE, "-c", program)],
        env={**os.environ, "PYTHONPATH": str(CLONE), "PYTHONUNBUFFERED": ""},
        check=False,
    )
    assert done.returncode == 0


def test_a_line_comes_after_what_was_printed_before(capfd: pytest.CaptureFixture[str]) -> None:
    program = """
from paramserver import terminal
print("first")
terminal.say("second \\u263a")
print("third")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(CLONE), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "first\nsecond ?\nthird\n"


def test_what_a_command_is_run_for_is_not_lost_in_silence() -> None:
    """`python -m paramserver --help > file-on-a-full-disk`."""
    words = without_output("w = os.open('/dev/full', os.O_WRONLY); os.dup2(w, 1)")
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = subprocess.run(
        [sys.executable, *words, "-m", "paramserver", "--help"],
        env={**os.environ, "PYTHONPATH": str(CLONE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: standard output cannot be written: No space left on device"
    ]


def test_a_closed_terminal_ends_programs_in_order_unless_nohup_started_them() -> None:
    program = "from paramserver import terminal; print(*terminal.ending_signals())"
    env = {**os.environ, "PYTHONPATH": str(CLONE)}
    told = []
    for ignoring in ("", "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); "):
        words = ["-c", f"import os, sys; {ignoring}os.execv(sys.argv[1], sys.argv[1:])"]
        done = subprocess.run(
            [sys.executable, *words, sys.executable, "-c", program],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        told.append([int(number) for number in done.stdout.split()])
    usual = [signal.SIGINT, signal.SIGTERM]
    assert told == [[*usual, signal.SIGHUP], usual]


def test_a_run_whose_lines_nobody_takes_ends_in_order_when_its_terminals_are_closed(
    tmp_path: Path,
) -> None:
    silent = FULL if os.path.exists("/dev/full") else HUNG_UP
    with Run(tmp_path) as run, Monitor(run.port) as monitor:
        ours = [f"port={run.port}", "num_workers=2"]
        server = run.start(
            "the server",
            *without_output(
                silent, "-m", "paramserver", *ours, "run_dir=runs", "dataset.name=digits",
                "model.hidden=16", "wandb.mode=disabled", "num_epochs=10000", "checkpoint_steps=0",
            ),
            PYTHONUNBUFFERED="",
        )  # fmt: skip
        workers = [
            run.start(
                f"worker {number}",
                *without_output(how, "-m", "workers", f"id={number}", ours[0]),
                PYTHONUNBUFFERED="",
            )
            for number, how in ((1, CLOSED_PIPE), (2, HUNG_UP))
        ]
        monitor.step_with(1, 2)
        workers[1].send(signal.SIGHUP)
        assert workers[1].end() == 0
        monitor.step_with(1)
        server.send(signal.SIGHUP)
        assert server.end() == 0
        assert workers[0].end() == 0
        summary = run.summary()
        assert summary["end"] == "stopped: its terminal was closed (SIGHUP)"
        checkpoints = list((run.runs[-1] / "checkpoints").iterdir())
        assert [c.name for c in checkpoints] == [f"step-{summary['steps']:08d}.safetensors"]


def demo_at_a_terminal(run: Run, monitor: Monitor, folder: Path) -> tuple[int, int]:
    """The process of a demo that makes steps, and its terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.update(PYTHONPATH=str(CLONE), TERM="xterm")
        words = ["demo", f"port={run.port}", "num_epochs=10000", "wandb.mode=disabled"]
        os.execv(
            sys.executable, [sys.executable, "-m", "paramserver.launch", *words, "run_dir=runs"]
        )
    monitor.step_with(1, 2)
    return pid, terminal


def test_a_demo_whose_terminal_is_closed_leaves_nothing_running(tmp_path: Path) -> None:
    with Run(tmp_path) as run, Monitor(run.port) as monitor:
        pid, terminal = demo_at_a_terminal(run, monitor, tmp_path)
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert run.summary()["end"] in (
            "stopped: its terminal was closed (SIGHUP)",
            "stopped from outside (SIGTERM)",
        )
        assert list((run.runs[-1] / "checkpoints").iterdir())


def test_a_demo_that_is_stopped_by_ctrl_c_says_so(tmp_path: Path) -> None:
    """The terminal sends it to the server, too, beside which the demo would send SIGTERM."""
    with Run(tmp_path) as run, Monitor(run.port) as monitor:
        pid, terminal = demo_at_a_terminal(run, monitor, tmp_path)
        os.write(terminal, b"\x03")
        with suppress(OSError):  # Linux reports its end as an error
            while os.read(terminal, 4096):
                pass
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(status) == 0
        assert run.summary()["end"] == "stopped by Ctrl-C"


def test_a_run_that_is_nearly_the_one_is_asked_about_where_somebody_answers(
    tmp_path: Path,
) -> None:
    def started(*words: str) -> tuple[int, int]:
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(tmp_path)
            os.environ.update(PYTHONPATH=str(CLONE), TERM="xterm", COLUMNS="500")
            os.environ.pop("CI", None)
            words = ("dataset.name=digits", "wandb.mode=disabled", "run_dir=runs", *words)
            os.execv(sys.executable, [sys.executable, "-m", "paramserver", *words])
        return pid, terminal

    def until(terminal: int, sentence: str) -> str:
        shown = ""
        while sentence not in shown:
            shown += os.read(terminal, 4096).decode(errors="replace").replace("\r\n", "\n")
        return shown

    with Run(tmp_path) as run:
        left = run.server("num_epochs=7", "model.hidden=128", "track_gradients=true")
        left.wait_for("run folder")
        left.send(signal.SIGKILL)
        left.end()
        pid, terminal = started(f"port={run.port}", "num_epochs=8")
        assert "num_epochs is 7 there, 8 here" in until(terminal, "(30 s)? ")
        os.write(terminal, b"y\n")
        until(terminal, "this run has not ended: waiting for its replicas")
        os.kill(pid, signal.SIGTERM)
        until(terminal, "its workers wait, start the server again")
        os.waitpid(pid, 0)
        os.close(terminal)
        assert len(run.runs) == 1

        again = run.server("num_epochs=8", "model.hidden=128", "track_gradients=true")
        said = again.wait_for(
            "warning: .* has not ended, and differs from this run: num_epochs is 7 there"
        )
        assert said.endswith(" now a new run begins")  # there is no checkpoint to resume
        again.wait_for("run folder")
        again.send(signal.SIGTERM)
        assert again.end() == 0
        assert len(run.runs) == 2
