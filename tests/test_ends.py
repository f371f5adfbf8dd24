"""How a run's end reaches the workers: exceptions, exit codes, and `cluster.end`."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crew import Noise, loss, perceptron
from whole import DEADLINE_S, ENDLESS, PATIENCE_S, Program, Run, Served, free_port

import workers
from paramserver.protocol import messages as wire
from workers.cluster import Cluster

ON_TIME = "all epochs are done"


class Loop:
    """A user's loop in a thread; what came of it."""

    def __init__(
        self, served: Served, number: int, hold: Callable[[int], Any] = id, samples: int = 4000
    ) -> None:
        self.hold, self.samples = hold, samples
        self.cluster: Cluster | None = None
        self.raised: workers.RunLost | None = None
        self.in_step: int | None = None  # step() was called there, and has not returned
        self.done = served.start(self._run, served, number)

    def _run(self, served: Served, number: int) -> None:
        setup = perceptron(number)
        self.cluster = cluster = served.join(number, served.say)
        try:
            model, optimizer = cluster.attach(setup.model, setup.optimizer)
            for x, y, _ in cluster.batches(Noise(self.samples), batch_size=4):
                self.hold(cluster.step)
                optimizer.zero_grad()
                loss(model, x, y).backward()
                self.in_step = cluster.step
                optimizer.step()
                self.in_step = None
        except workers.RunLost as e:
            self.raised = e
        finally:
            cluster.leave()

    @property
    def end(self) -> wire.End:
        assert self.cluster is not None and self.cluster.end is not None
        return self.cluster.end


def test_an_end_by_an_error_is_raised_and_told_afterwards() -> None:
    with Served(num_workers=2, num_epochs=ENDLESS) as served:
        loops = [Loop(served, n) for n in (1, 2)]
        served.until(lambda: len(served.closes) > 5)
        served.server.stop("the disk is on fire", error=True)
        served.wait(served.end, *(one.done for one in loops))
        ended = served.end.result()
        for one in loops:
            assert "the run ended early" in str(one.raised) and "disk is on fire" in str(one.raised)
            assert one.end == ended and one.end.error and one.end.step == ended.step
            assert isinstance(one.raised, workers.UserError)


def test_a_stop_in_order_raises_nothing() -> None:
    with Served(num_workers=2, num_epochs=ENDLESS) as served:
        loops = [Loop(served, n) for n in (1, 2)]
        served.until(lambda: len(served.closes) > 5)
        served.server.stop("stopped by Ctrl-C")
        served.wait(served.end, *(one.done for one in loops))
        for one in loops:
            assert one.raised is None and one.end.reason == "stopped by Ctrl-C"
            assert not one.end.error and one.end.step == served.end.result().step


@pytest.mark.parametrize("error", [True, False])
def test_an_end_that_comes_while_step_waits(error: bool) -> None:
    """Worker 2 keeps the round from being closed. The end comes in step, or right behind it."""
    go_on = threading.Event()
    with Served(num_workers=2) as served:
        waits = Loop(served, 1)
        keeps = Loop(served, 2, lambda step: step == 3 and go_on.wait(DEADLINE_S))
        served.until(lambda: waits.in_step == 3)
        served.server.stop("enough", error=error)
        served.wait(waits.done)
        assert (waits.raised is not None) == error
        go_on.set()
        served.wait(keeps.done, served.end)
        assert (keeps.raised is not None) == error


@pytest.mark.parametrize(("stopped", "gone"), [(False, False), (False, True), (True, False)])
def test_a_worker_that_was_left_behind(stopped: bool, gone: bool) -> None:
    """It computes until the server is gone, and has not received the last updates: it has not
    finished. Where a person stopped the run no worker has finished, and that is no error. One that
    the server took for `gone` meanwhile has heard the end as well as any."""
    go_on = threading.Event()
    stood: list[int] = []
    closed: list[int] = []  # rounds by then, of which some may be on their way to it

    def hold(step: int) -> None:
        if step >= 3 and not stood:  # on a busy machine it may have missed a round before
            stood.append(step)
            assert behind.cluster is not None
            sub = behind.cluster.client.connection.sub
            assert sub is not None
            # ZeroMQ counts, and where a snapshot was given up it has subscribed once more.
            for kind in (wire.Close, wire.Average, *[wire.Shared] * 5):
                sub.unsubscribe(wire.topic(kind))
            closed.append(len(served.closes))
            go_on.wait(DEADLINE_S)
            if gone:  # as its thread of heartbeats is told
                behind.cluster.client.connection.must_greet = True

    epochs = ENDLESS if stopped else 1
    with Served(num_workers=2, num_epochs=epochs, timeout=0.05, heartbeat_timeout=0.5) as served:
        other, behind = Loop(served, 1), Loop(served, 2, hold)
        if stopped:
            served.until(lambda: bool(closed) and len(served.closes) > closed[0] + 10)
            served.server.stop("stopped by Ctrl-C")
        served.wait(other.done, served.end)
        assert other.raised is None
        assert other.end.reason == ("stopped by Ctrl-C" if stopped else ON_TIME)
        go_on.set()
        served.wait(behind.done)
        left = re.search(r"this worker was left behind at step (\d+)$", behind.end.reason)
        # What it had asked for before may have come since.
        assert left is not None and stood[0] <= int(left[1]) < behind.end.step == other.end.step
        assert behind.end.error == (behind.raised is not None) == (not stopped)
        assert stopped or behind.end.reason in str(behind.raised)


def test_a_server_that_falls_silent_for_good() -> None:
    def impatient(step: int) -> None:
        for one in loops:
            assert one.cluster is not None
            one.cluster.client.connection.give_up_s = 1.0

    with Served(num_workers=2, num_epochs=ENDLESS, heartbeat_timeout=0.5) as served:
        loops = [Loop(served, n) for n in (1, 2)]
        for one in loops:
            one.hold = impatient
        served.until(lambda: len(served.closes) > 5)
        served.server.rounds.put_off = True  # it ends, without an End
        served.wait(*(one.done for one in loops))
        for one in loops:
            assert re.search("silent for|no server answered", str(one.raised))
            assert one.end.error and one.end.step >= 5 and one.end.reason in str(one.raised)


def test_an_end_before_a_newcomer_stands_is_told_to_it() -> None:
    """The last round is closed while it waits for a snapshot: it has not taken part."""
    go_on = threading.Event()

    def hold(step: int) -> None:
        if step == 19:
            assert go_on.wait(DEADLINE_S)

    with Served(num_workers=1, num_epochs=1) as served:
        one = Loop(served, 1, hold, samples=80)
        served.until(lambda: len(served.closes) == 19)
        late = Loop(served, 2, samples=80)
        served.until_waits(2)
        go_on.set()
        served.wait(one.done, late.done, served.end)
    assert one.raised is None and one.end.step == 20 and one.end.reason == ON_TIME
    assert late.raised is not None and not any(2 in c.contributors for c in served.closes)
    assert f"the run ended before this replica could join: {ON_TIME}" in str(late.raised)


def test_who_greets_when_the_run_is_over_hears_how_it_ended() -> None:
    with Served(num_workers=1) as served:
        server = served.server
        refused = threading.Event()
        one = Loop(served, 1, lambda step: step == 1 and refused.wait(DEADLINE_S))
        served.until(lambda: one.cluster is not None and one.cluster.step == 1)
        server.stop("stopped by Ctrl-C")
        served.until(lambda: server.rounds.ended)
        with pytest.raises(workers.RunLost, match="the run has ended: stopped by Ctrl-C"):
            served.join(2, served.say)
        refused.set()
        served.wait(one.done, served.end)


# --------------------------------------------------------------------------------------- alone


def alone(**settings: Any) -> Cluster:
    return workers.join(port=free_port(), say=lambda line: None, alone=settings)


def test_alone_the_end_is_told_too() -> None:
    def train(batches: Any) -> None:
        for x, y, *_ in batches:
            loss(model, x, y).backward()
            optimizer.step()

    data, setup = Noise(12), perceptron(1)
    with alone(num_epochs=1) as cluster:
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        assert cluster.end is None
        train(cluster.batches(data, batch_size=4))
    assert cluster.end is not None and not cluster.end.error
    assert (cluster.end.reason, cluster.end.step) == (ON_TIME, 3)

    setup = perceptron(1)
    with alone() as cluster:
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        train(cluster.own_batches([(data.x, data.y)]))
        assert cluster.end is None
    assert cluster.end is not None and not cluster.end.error
    assert (cluster.end.reason, cluster.end.step) == ("every worker has finished", 1)

    setup = perceptron(1)
    cluster = alone(num_epochs=5)
    cluster.attach(setup.model, setup.optimizer)
    next(cluster.batches(data, batch_size=4))
    cluster.leave("LookupError: enough", LookupError("enough"))
    assert cluster.end is not None and cluster.end.error
    assert cluster.end.reason == "left before all samples were done: LookupError: enough"


# ------------------------------------------------------------------------------- whole programs


SCRIPT = """
import os, sys, time, torch, workers
from torch import nn
from torch.utils.data import TensorDataset
torch.manual_seed(0)
data = TensorDataset(torch.randn(400, 8), torch.randint(0, 3, (400,)))
model = nn.Linear(8, 3)
cluster = workers.join()
model, optimizer = cluster.attach(model, torch.optim.SGD(model.parameters(), lr=0.05))
def batches():
    if "own" in sys.argv:
        x, y = data.tensors
        for _ in range(2):
            yield from cluster.own_batches(list(zip(x.split(40), y.split(40))))
    else:
        yield from cluster.batches(data, batch_size=10)
told = False
try:
    for x, y in batches():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if cluster.step >= 5 and not told:
            told = True
            print("five steps", flush=True)
            if "fails" in sys.argv:
                raise ValueError("of its own")
            if "quits" in sys.argv:
                sys.exit()
            if "stays" in sys.argv and cluster.worker_id == 1:
                time.sleep(1000)
finally:
    print("end", cluster.end and (cluster.end.error, cluster.end.reason), flush=True)
print("all of it is done", flush=True)
"""


def scripts(run: Run, count: int, *words: str) -> list[Program]:
    """Processes of the script, which forgets to leave."""
    path = run.folder / "script.py"
    path.write_text(SCRIPT)
    place = {"PARAMSERVER_HOST": "127.0.0.1", "PARAMSERVER_PORT": str(run.port)}
    return [
        run.start(f"script {n}", str(path), *words, PARAMSERVER_ID=str(n), **place)
        for n in range(1, count + 1)
    ]


OF_SCRIPTS = (
    "observer=false", "num_workers=2", "heartbeat_timeout=2", f"timeout={PATIENCE_S}",
    f"num_epochs={ENDLESS}",
)  # fmt: skip


def test_who_forgets_to_leave_ends_a_run_of_samples_of_their_own(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server(*OF_SCRIPTS)
        crew = scripts(run, 2, "own")
        assert [one.end() for one in (*crew, server)] == [0, 0, 0]
        assert "all of it is done" in crew[0].output
        assert run.summary()["end"] == "every worker has left"
        assert run.summary()["samples_done"] == 2 * 2 * 400


def test_a_shared_set_is_not_done_where_all_programs_end(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server(*OF_SCRIPTS)
        crew = scripts(run, 2, "quits")
        assert [one.end() for one in (*crew, server)] == [0, 0, 1]
        assert "(the run ends in " in server.output and "observer" not in server.output
        end = run.summary()["end"]
        assert end.startswith("every worker has left before all samples were done: worker 1 ")
        assert "left: its program ended" in end


def test_an_exception_that_ends_a_program_is_told_as_one(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server(*OF_SCRIPTS)
        crew = scripts(run, 2, "fails")
        assert [one.end() for one in (*crew, server)] == [1, 1, 1]
        end = run.summary()["end"]
        assert end.startswith("every worker has failed: ")
        assert end.count("failed: ValueError: of its own") == 2


def test_a_program_that_is_interrupted_leaves_in_order(tmp_path: Path) -> None:
    """One of them in its own code, the other while it waits for the first."""
    with Run(tmp_path) as run:
        server = run.server(*OF_SCRIPTS)
        crew = scripts(run, 2, "stays")
        crew[0].wait_for("five steps")
        for one in crew:
            one.send(signal.SIGINT)
        assert all(one.end() != 0 for one in crew)
        assert server.end() == 1
        assert run.summary()["end"].count("left: stopped by Ctrl-C") == 2


def test_a_script_whose_run_is_stopped_goes_on_behind_its_loop(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server(*OF_SCRIPTS)
        crew = scripts(run, 2)
        crew[0].wait_for("five steps")
        server.send(signal.SIGTERM)
        assert [one.end() for one in (*crew, server)] == [0, 0, 0]
        assert "end (False, 'stopped from outside (SIGTERM)')" in crew[0].output
        assert "all of it is done" in crew[0].output
