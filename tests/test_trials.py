"""Several runs of one server, one after another: a search over settings in one script."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Noise, loss, perceptron
from scripts import Run as Script
from test_control import Run as Controlled
from whole import DEADLINE_S, LOOPBACK, PATIENCE_S, Gate, Program, Run, Served, free_port

import workers
from paramserver.config.loading import to_wire
from paramserver.errors import UserError
from paramserver.protocol import messages as wire
from paramserver.server.ports import EARLIER_MAX, Ports
from paramserver.server.server import Server
from paramserver.settings import Settings
from workers.cluster import Cluster
from workers.link.connection import Connection, RunOver

RUNS = 3
FIRST_RUN = 4000 // 32  # steps of one worker in an epoch of digits


class Search:
    """A script's loop over the trials, in a thread. `hold(number, cluster)` is called before each
    batch; what the script has seen is in `seen`, by trial."""

    def __init__(self, port: int, number: int, hold: Callable[[int, Cluster], Any]) -> None:
        self.port, self.number, self.hold = port, number, hold
        self.seen: dict[int, str] = {}
        self.said: list[str] = []
        self.raised: BaseException | None = None
        self.thread = threading.Thread(target=self._search, name=f"script {number}")
        self.thread.start()

    def _search(self) -> None:
        try:
            for cluster in workers.trials(
                RUNS, LOOPBACK, self.number, port=self.port, say=self.said.append
            ):
                try:
                    self._train(cluster)
                except workers.RunLost as e:
                    self.seen[cluster.trial] = f"lost: {e.problem}"
        except BaseException as e:
            self.raised = e

    def _train(self, cluster: Cluster) -> None:
        setup = perceptron(self.number)
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        for x, y, _ in cluster.batches(Noise(96), batch_size=8):
            self.hold(self.number, cluster)
            optimizer.zero_grad()
            wrong = torch.nan if cluster.trial == 2 else 1.0
            (wrong * loss(model, x, y)).backward()
            optimizer.step()
        assert cluster.end is not None
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        self.seen[cluster.trial] = f"{cluster.step} steps, weights {weights.sum().item()!r}"

    def end(self) -> None:
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive(), self.said
        if self.raised is not None:
            raise self.raised


def say_hello(port: int, run: str) -> wire.End:
    """What a peer of an earlier run, which it has state of, is told when it comes late."""
    late = Connection(LOOPBACK, port)
    late.run = run
    late.hello = wire.Hello(
        protocol=wire.PROTOCOL, role="worker", id=9, nonce="late", host="", pid=1, run=run
    )
    try:
        with pytest.raises(RunOver) as told:
            late.connect(DEADLINE_S)
    finally:
        late.close()
    return told.value.end


def test_a_search_in_one_script(tmp_path: Path) -> None:
    """The server is killed in the first run and goes on with it; the second one ends by an error,
    which is no reason not to make the third; there a peer comes late that belongs to the first."""
    with Run(tmp_path) as run:
        settings = [f"runs={RUNS}", "observer=false", "num_epochs=2", "max_bad_rounds=2"]
        settings += ["heartbeat_timeout=2", f"timeout={PATIENCE_S}", f"seed={free_port()}"]
        servers: list[Program] = [run.server(*settings)]
        servers[0].wait_for("server at")
        late: list[wire.End] = []

        def hold(number: int, cluster: Cluster) -> None:
            if number == 1 and cluster.trial == 1 and cluster.step == 4 and len(servers) == 1:
                servers[0].kill()
                servers.append(run.server(*settings))
            if number == 1 and cluster.trial == 3 and not late:
                first = json.loads((run.runs[0] / "run.json").read_text())["run"]
                late.append(say_hello(run.port, first))

        watcher = run.start(
            "the watcher", "-m", "paramserver.watch", f"port={run.port}", "plain=true"
        )
        searches = [Search(run.port, number, hold) for number in (1, 2)]
        for search in searches:
            search.end()
        killed, server = servers
        assert server.end() == 1, server.output
        assert "run 1 of 3" in killed.output
        for trial in (1, 2, 3):
            assert f"run {trial} of 3" in server.output
        assert watcher.end() == 0
        ends = [json.loads((path / "summary.json").read_text()) for path in run.runs]
        records = [json.loads((path / "run.json").read_text()) for path in run.runs]
    one, two = searches  # in the first run one of them may have come back too late
    assert sorted(one.seen) == sorted(two.seen) == [1, 2, 3]
    assert "weights" in one.seen[1] or "weights" in two.seen[1]
    assert one.seen[2] == two.seen[2] and "lost: the run ended early" in one.seen[2]
    assert one.seen[3] == two.seen[3] and "12 steps, weights" in one.seen[3]
    assert [end["samples_done"] for end in ends] == [192, 0, 192]
    assert len({record["run"] for record in records}) == 3
    assert [record["trial"] for record in records] == [1, 2, 3]
    assert all(record["ended"] for record in records)
    assert late[0].run == records[0]["run"] and late[0].reason == "all epochs are done"
    told = re.findall(r"run (\d) of 3: the run is over at step", watcher.output)
    assert told == ["1", "2", "3"]


def test_built_in_workers_train_again_until_a_person_ends_the_server(tmp_path: Path) -> None:
    """The second run stands in its middle until then."""
    with Run(tmp_path) as run, Gate(tmp_path, at=FIRST_RUN + 3) as gate:
        server = run.server(
            "runs=3", "num_workers=1", "observer=false", "num_epochs=1", *Gate.settings
        )
        worker = run.worker(1)
        gate.wait(worker)
        server.send(signal.SIGTERM)
        gate.open()
        assert (server.end(), worker.end()) == (0, 0), server.output
        assert "run 1 of 3 is over, the next one follows" in worker.output
        assert worker.output.count("the run is over at step") == 2
        assert "run 3 of 3" not in server.output and len(run.runs) == 2


def train_in_vain(cluster: Cluster) -> None:
    setup = perceptron(1)
    model, optimizer = cluster.attach(setup.model, setup.optimizer)
    for x, y, _ in cluster.batches(Noise(64), batch_size=8):
        optimizer.zero_grad()
        (torch.nan * loss(model, x, y)).backward()
        optimizer.step()


def test_a_run_that_nobody_joins_after_one_that_failed_ends_the_server(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server(
            "runs=3", "num_workers=1", "observer=false", "max_bad_rounds=1", "join_timeout=0.5"
        )
        server.wait_for("server at")
        with workers.join(LOOPBACK, port=run.port, say=lambda line: None) as cluster:
            with pytest.raises(workers.RunLost):
                train_in_vain(cluster)
            assert cluster.end is not None and cluster.end.error and cluster.end.more
        server.wait_for("the run is over at step 0: no worker has joined this run in 0.5 s")
        assert server.end() == 1 and "run 3 of 3" not in server.output


def test_a_checkpoint_belongs_to_one_run(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server("runs=2", "resume=latest")
        assert server.end() == 2
        assert "resume=latest with runs=2: a checkpoint belongs to one run" in server.output


# ------------------------------------------------------------------------------ the loop


def test_a_loop_over_another_number_of_runs_is_told() -> None:
    with Served(num_workers=1, runs=2) as served:
        search = workers.trials(RUNS, LOOPBACK, port=served.port, say=served.say)
        with pytest.raises(UserError, match="takes part in 3 runs, its server serves 2") as told:
            next(search)
        assert told.value.hint == "start the server with runs=3"


def test_alone_there_are_as_many_trials() -> None:
    alone = {"num_epochs": 1}
    port = free_port()
    steps = []
    for cluster in workers.trials(3, port=port, alone=alone, say=lambda line: None):
        setup = perceptron(cluster.trial)
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        for x, y, _ in cluster.batches(Noise(32), batch_size=8):
            loss(model, x, y).backward()
            optimizer.step()
        steps.append((cluster.trial, cluster.runs, cluster.step))
        if cluster.trial == 2:
            break
    cluster.leave()
    assert steps == [(1, 3, 4), (2, 3, 4)]
    assert cluster.end is not None and cluster.end.reason == "all epochs are done"


# ------------------------------------------------------------------------------ the door


def hello(**given: Any) -> wire.Hello:
    told = {"id": 3, "nonce": "process 3", "host": "here", "pid": 3, **given}
    return wire.Hello(protocol=wire.PROTOCOL, role="worker", **told)


def in_series(trial: int, runs: int) -> Controlled:
    run = Controlled()
    control = run.control
    control._welcome = wire.Welcome(
        protocol=wire.PROTOCOL, run="run", nonce="nonce", session="", id=0, settings={},
        pub_port=1, trial=trial, runs=runs,
    )  # fmt: skip
    control._earlier = {"before": wire.End("old", 7, "", "done", run="before")}
    control.rounds._ending.more = trial < runs
    return run


def answers(run: Controlled, message: wire.Message) -> Any:
    run.told.sent.clear()
    run.control.receive(b"new", message, [], run.now)
    return run.told.sent[-1][1]


def test_who_comes_to_a_run_of_several() -> None:
    run = in_series(2, 5)
    welcome = answers(run, hello())
    assert isinstance(welcome, wire.Welcome) and (welcome.trial, welcome.runs) == (2, 5)
    assert answers(run, hello(after="run")) == wire.Later(
        "still in run 2 of 5, which this process has left; the next one follows"
    )
    over = answers(run, hello(run="before"))
    assert isinstance(over, wire.Reject) and over.end is not None and over.end.step == 7
    other = answers(run, hello(run="another"))
    assert isinstance(other, wire.Reject) and other.end is None
    run.control.stop("somebody")  # the server ends: there is no next one
    run.control.tick(run.now)
    assert run.rounds.ended is not None and not run.rounds.ended.more
    assert isinstance(answers(run, hello()), wire.Reject)


def test_who_was_in_the_run_before_gives_the_first_weights_of_the_next_one() -> None:
    """A script may go on with what it has trained: one that came back has fresh weights."""
    run = in_series(2, 5)
    assert isinstance(answers(run, hello(after="before")), wire.Welcome)
    assert {p.id: p.trained for p in run.rounds.peers.values()} == {1: False, 2: False, 3: True}
    later = Script(observer=False, num_workers=3)
    later.hello(1), later.hello(2, trained=True), later.hello(3, trained=True)
    for number in (1, 3):
        later.join(number)
    assert "w2 <- origin at step 0" in later.join(2)


def test_who_comes_when_the_last_run_goes_on_without_it() -> None:
    run = in_series(5, 5)
    told = answers(run, hello(after="run"))
    assert isinstance(told, wire.Reject)
    assert told.reason == "this process has left run 5 of 5, which is the last one"
    assert isinstance(answers(in_series(1, 1), hello(after="run")), wire.Welcome)


def test_who_comes_when_a_run_has_ended_waits_for_the_next_one() -> None:
    run = in_series(2, 5)
    for number in (1, 2):
        run.push(number, 1.0, 2.0, 3.0)
    for number in (1, 2):
        run.hear(number, wire.Goodbye(wire.FINISHED, finished=True))
    assert run.rounds.ended is not None and run.rounds.ended.more
    assert answers(run, hello()) == wire.Later("ending run 2 of 5, the next one follows")
    own = answers(run, hello(run="run"))
    assert isinstance(own, wire.Reject) and own.end == run.rounds.ended


def test_between_two_runs_peers_are_answered_and_the_next_server_has_the_ports() -> None:
    settings = Settings(port=free_port(), observer=False, num_workers=1, runs=2)
    ports = Ports(settings, hosts=[LOOPBACK])
    for n in range(2 * EARLIER_MAX):
        ports.answer(wire.End("", n, "", f"reason {n}", run=f"run {n}", more=True))
        ports.resume()
    assert len(ports.earlier) == EARLIER_MAX
    ports.answer(wire.End("", 5, "", "all epochs are done", run="first", more=True))
    assert say_hello(settings.port, "first").step == 5
    said = threading.Event()
    heard: list[str] = []

    def say(line: str) -> None:
        heard.append(line)
        if "writing the results" in line:
            said.set()

    joined: list[Cluster] = []
    thread = threading.Thread(
        target=lambda: joined.append(workers.join(LOOPBACK, 1, port=settings.port, say=say))
    )
    thread.start()
    assert said.wait(DEADLINE_S), heard

    class Quiet:
        def __getattr__(self, name: str) -> Any:
            return lambda *words, **more: None

    server = Server(
        settings, to_wire(settings), Quiet(), hosts=[], run="second", observer_key="key",
        ports=ports, trial=2,
    )  # fmt: skip
    serving = threading.Thread(target=server.run)
    serving.start()
    thread.join(DEADLINE_S)
    try:
        [cluster] = joined
        assert (cluster.run, cluster.trial, cluster.runs) == ("second", 2, 2)
        cluster.leave()
    finally:
        server.stop("over")
        serving.join(DEADLINE_S)
        server.close()
        ports.close()
    assert not serving.is_alive()
