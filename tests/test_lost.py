"""Whole runs on a machine that loses what programs count on: the run folder, a home, a /tmp."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from whole import CLONE, Monitor, Run

from paramserver.launch.local import Started, _log_folder


def test_a_run_whose_folder_vanishes_goes_on_and_keeps_what_comes(tmp_path: Path) -> None:
    with Run(tmp_path) as run, Monitor(run.port) as monitor:
        server = run.server("num_workers=1", "num_epochs=10000", "eval_steps=0")
        worker = run.worker(1)
        monitor.step_with(1)
        (tmp_path / "runs").rename(tmp_path / "gone")  # at once, in the midst of writing
        server.wait_for("warning: .* has vanished with what was in it")
        with Monitor(run.port) as later:  # what the other one has not read yet may be older
            later.step_with(1)
        server.send(signal.SIGTERM)
        server.end()
        assert worker.end() == 0
        summary = run.summary()
        assert any("has vanished" in problem for problem in summary["problems"])
        left = {path.name for path in run.runs[-1].iterdir()}
        assert {"config.yaml", "run.json", "metrics.jsonl", "model.safetensors"} <= left
        checkpoints = [path.name for path in (run.runs[-1] / "checkpoints").iterdir()]
        assert f"step-{summary['steps']:08d}.safetensors" in checkpoints


@pytest.mark.root
def test_a_user_without_name_and_home_is_told_where_keys_could_be() -> None:
    """As in a container that was started with `--user 12345`."""
    program = """
import os, sys
from paramserver.net import machine  # an interpreter may lie where that user cannot read
from paramserver.keys import main
from workers.observer.loggers import wandb_login_exists
os.setgroups([]), os.setgid(12345), os.setuid(12345)
for name in ("HOME", "XDG_CONFIG_HOME"):
    os.environ.pop(name, None)
sys.argv = ["keys", "host_ip=10.10.0.1"]
os.environ.pop("NETRC"), os.environ.pop("WANDB_CONFIG_DIR")
assert wandb_login_exists() is False
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(CLONE)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "error: this user has no home folder" in done.stderr
    assert "XDG_CONFIG_HOME=FOLDER" in done.stderr


def test_logs_of_a_demo_have_a_place_without_temporary_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    folder = _log_folder(tmp_path / "runs")
    assert folder.parent == tmp_path / "runs" and folder.is_dir()


def test_a_log_that_is_gone_is_told(tmp_path: Path) -> None:
    started = Started(None, [], tmp_path)  # type: ignore[arg-type]
    (tmp_path / "worker-1.log").write_text("hello\n")
    assert started.words(1) == "hello"
    assert "worker-2.log cannot be read: No such file" in started.words(2)


NO_PYTHON = """
import sys
from paramserver.__main__ import main
from paramserver.server import observer_process

sys.executable, observer_process.OBSERVER_PAUSE_S = "/nowhere/python", 0.2
main(sys.argv[1:])
"""


def test_an_observer_whose_process_cannot_be_made_is_told(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.start("the server", "-c", NO_PYTHON, f"port={run.port}", "plain=true")
        assert server.end() == 2, server.output
    assert server.output.count("trying again") == 3, server.output
    assert "error: the observer cannot be started: No such file or directory" in server.output
    assert "Traceback" not in server.output
