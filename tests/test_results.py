"""What a run leaves at its end is looked at: by whole runs whose observer dies, or cannot write.

The moments are held by the model and the metric of the tests: their code runs in the observer, and
waits there for the test.
"""

from __future__ import annotations

import os
import select
import signal
from datetime import datetime
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from whole import (
    DEADLINE_S,
    ENDLESS,
    LOOPBACK,
    Gate,
    Monitor,
    Program,
    Run,
    children,
    free_port,
)

from paramserver.config.loading import to_wire
from paramserver.output import stored
from paramserver.output.runfolder import RunFolder
from paramserver.protocol import messages as wire
from paramserver.server.observer_process import OBSERVER_RESTARTS
from paramserver.server.program import missing_results, summarize
from paramserver.server.server import Server
from paramserver.server.show import Show
from paramserver.settings import Settings
from workers.replica import checkpoint

HELD = '''
"""A model and a metric that hold the observer, once, where the test asks for it; workers stand at
their gate until then."""
import os
import signal
import sys
from pathlib import Path

import gated
import torch

HERE = Path(__file__).parent


def hold(where: str) -> None:
    try:
        (HERE / where).rename(HERE / "taken")
    except FileNotFoundError:
        return
    (HERE / "taken").write_text("held")  # a pipe: until the test reads it
    signal.pause()


class Net(gated.Net):
    def state_dict(self, *args, **kwargs):
        if "observe" in sys.argv[0]:
            hold("keeping")
        return super().state_dict(*args, **kwargs)


def right(outputs, targets) -> torch.Tensor:
    if "observe" in sys.argv[0]:
        hold("evaluating")
    return (outputs.argmax(1) == targets).float().mean()
'''
ONE_EPOCH = ("batch_size=16", "num_epochs=1", "heartbeat_timeout=2")
SETTINGS = ("model.type=held.net:Net", "eval_steps=0", *ONE_EPOCH)
STEPS = 125


class Held:
    """A run whose observer can be held; as the folder in which its programs are started."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "held"
        self.package.mkdir()
        (self.package / "__init__.py").touch()
        (self.package / "net.py").write_text(HELD)

    def ask(self, where: str) -> None:
        os.mkfifo(self.package / ".pipe")
        (self.package / ".pipe").rename(self.package / where)

    def wait(self, where: str, server: Program) -> None:
        """Wait until the observer is there. The first of the two opens the pipe."""
        pipe = self.package / where
        fd = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.set_blocking(fd, True)
            assert select.select([fd], [], [], DEADLINE_S)[0], server.output
            assert os.read(fd, 10) == b"held"
        finally:
            os.close(fd)


def observer_of(server: Program) -> psutil.Process:
    (observer,) = children(server)
    return observer


def test_an_observer_that_dies_while_it_keeps_the_last_step_is_followed_by_another(
    tmp_path: Path,
) -> None:
    held = Held(tmp_path)
    with Run(tmp_path) as run, Gate(tmp_path, at=3) as gate:
        server = run.server(*SETTINGS)
        crew = [run.worker(1), run.worker(2)]
        gate.wait(*crew)
        held.ask("keeping")
        gate.open()
        held.wait("keeping", server)
        assert len(run.steps()) == STEPS, "held before the end"
        assert not (run.runs[-1] / "model.safetensors").exists()
        observer_of(server).kill()
        codes = [program.end() for program in (server, *crew)]
        assert codes == [0, 0, 0], server.output
        assert "the observer ended (exit code -9: SIGKILL" in server.output
        folder, summary = run.runs[-1], run.summary()
        last = checkpoint.load(folder / "checkpoints" / checkpoint.name(STEPS))
        model = load_file(folder / "model.safetensors")
        assert all(torch.equal(model[name], value) for name, value in last.state["model"].items())
        assert summary["steps"] == last.step == STEPS
        assert summary["replicas_equal"] is True and len(summary["digests"]) == 3
        assert summary["val_accuracy"] is not None


def test_an_observer_that_is_stopped_does_not_keep_the_last_step_from_being_kept(
    tmp_path: Path,
) -> None:
    with Run(tmp_path) as run, Gate(tmp_path, at=3) as gate:
        server = run.server(*Gate.settings, *ONE_EPOCH)
        crew = [run.worker(1), run.worker(2)]
        gate.wait(*crew)
        observer_of(server).send_signal(signal.SIGSTOP)
        gate.open()
        codes = [program.end() for program in (server, *crew)]
        assert codes == [0, 0, 0], server.output
        assert "the observer does not answer: it is ended" in server.output
        assert "the observer ended (it did not answer): starting it again" in server.output
        assert (run.runs[-1] / "model.safetensors").exists()
        assert run.summary()["last_evaluation"]["step"] == run.summary()["steps"] == STEPS


def test_a_run_whose_observer_cannot_be_kept_running_ends_with_its_last_step_kept(
    tmp_path: Path,
) -> None:
    with Run(tmp_path) as run, Monitor(run.port) as monitor:
        server = run.server(*ONE_EPOCH, "eval_steps=0", f"num_epochs={ENDLESS}")
        crew = [run.worker(1), run.worker(2)]
        monitor.until(lambda close: close.step >= 3)
        observer, killed = observer_of(server), set()
        for _ in range(OBSERVER_RESTARTS + 1):
            observer.kill()
            killed.add(observer.pid)
            monitor.until(lambda close: alive(server, but=killed))
            (observer,) = alive(server, but=killed)
        assert [program.end() for program in (server, *crew)] == [1, 2, 2], server.output
        summary = run.summary()
        assert summary["end"] == "the observer cannot be kept running"
        assert "ended 4 times in a row, the last time exit code -9" in summary["problems"][0]
        model = stored.step(run.runs[-1] / "model.safetensors", stored.MODEL_FORMAT)
        assert model == summary["steps"]
        assert stored.step(run.runs[-1] / "checkpoints" / stored.name(model)) == model


def alive(server: Program, but: set[int]) -> list[psutil.Process]:
    """Observers that run, but those that were killed."""
    return [child for child in children(server) if child.pid not in but]


def test_an_evaluation_that_is_missing_is_told(tmp_path: Path) -> None:
    held = Held(tmp_path)
    with Run(tmp_path) as run, Gate(tmp_path, at=3) as gate:
        server = run.server(*SETTINGS, "metric=held.net:right")
        crew = [run.worker(1), run.worker(2)]
        gate.wait(*crew)
        held.ask("evaluating")
        gate.open()
        held.wait("evaluating", server)
        for worker in crew:
            worker.wait_for(f"the run is over at step {STEPS}")
        observer_of(server).kill()
        assert [program.end() for program in (server, *crew)] == [3, 0, 0], server.output
        summary = run.summary()
        assert summary["val_loss"] is None and summary["metrics"] == {}
        assert summary["last_evaluation"] is None
        missing = "the run ended, but a result of it is missing: the last evaluation"
        assert summary["problems"] == [missing]
        assert f"warning: {missing}" in server.output
        assert (run.runs[-1] / "model.safetensors").exists()


def test_a_figure_is_never_shown_under_another_step_than_its_own(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, datetime.now())
    settings = Settings(port=free_port(), plain=True)
    show = Show(settings, folder)
    server = Server(
        settings, to_wire(settings), show, hosts=[LOOPBACK], run="run", observer_key="key"
    )
    try:
        show.reported(
            server.control, wire.Report(step=200, values={"val_accuracy": 0.9, "val_mood": 1.0})
        )
        for step, accuracy in ((200, 0.9), (313, None)):
            end = wire.End(nonce="", step=step, lineage="", reason="over")
            summary = summarize(server.control, show, end)
            assert summary["val_accuracy"] == accuracy
            assert summary["metrics"] == ({"mood": 1.0} if accuracy else {})
            assert summary["last_evaluation"] == {"step": 200, **show.val}
        assert "the last evaluation (the newest is of step 200)" in missing_results(show, end.step)
    finally:
        server.close()
        folder.close()


@pytest.mark.parametrize("name", ["checkpoints", "model.safetensors"])
def test_a_result_that_cannot_be_written_is_told_everywhere(tmp_path: Path, name: str) -> None:
    """A folder lies in its place, which cannot be written to; as good as a full disk."""
    with Run(tmp_path) as run:
        server = run.server("batch_size=16", "num_epochs=1", "checkpoint_steps=50")
        server.wait_for("server at")
        if name == "checkpoints":
            (run.runs[-1] / name).touch()
        else:
            (run.runs[-1] / name).mkdir()
        crew = [run.worker(1), run.worker(2)]
        assert [program.end() for program in (server, *crew)] == [3, 0, 0], server.output
        summary = run.summary()
    assert summary["samples_done"] == 4000 and summary["val_accuracy"] is not None
    what = {"checkpoints": "the last checkpoint", "model.safetensors": "model.safetensors"}[name]
    last = summary["problems"][-1]
    assert last == f"the run ended, but a result of it is missing: {what}"
    assert any("was not written" in problem for problem in summary["problems"])
    assert f"warning: {last}" in server.output and "problems" in server.output


def test_a_run_folder_that_cannot_be_written_is_an_error_for_people(tmp_path: Path) -> None:
    program = """
import resource, signal, sys
from paramserver.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
sys.argv[0] = "server"
main()
"""
    with Run(tmp_path) as run:
        words = ("wandb.mode=disabled", f"port={run.port}", "run_dir=runs", "plain=true")
        server = run.start("the server", "-c", program, *words)
        assert server.end() == 2, server.output
        assert "config.yaml cannot be written: File too large" in server.output
        assert "Traceback" not in server.output and run.runs == []
