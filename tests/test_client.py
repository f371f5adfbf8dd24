"""A client and a server that forgets it, answers late, or is behind a wall: scripted by hand."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch
import zmq
from whole import LOOPBACK, free_port

from paramserver import logs
from paramserver.config.loading import to_wire
from paramserver.errors import RunLost, UserError
from paramserver.protocol import messages as wire
from paramserver.settings import Settings
from workers.link.client import Client
from workers.link.connection import RunOver
from workers.replica.replica import Replica

Answer = Callable[[bytes, Any], None]
"""Answers a message of a peer."""


def small_replica() -> Replica:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Replica(model, optimizer, bucket_mb=1, codec="float32")


class Script:
    """A ROUTER and a PUB that do what a test says."""

    def __init__(self) -> None:
        self.port = free_port()
        self.settings = to_wire(Settings(heartbeat_timeout=0.5))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router, self._pub = self._context.socket(zmq.ROUTER), self._context.socket(zmq.PUB)
        self._router.bind(f"tcp://{LOOPBACK}:{self.port}")
        self._pub.bind(f"tcp://{LOOPBACK}:{self.port + 1}")

    def close(self) -> None:
        self._context.destroy(linger=0)

    def send(self, to: bytes, message: wire.Message) -> None:
        self._router.send_multipart([to, *wire.to_frames(message)])

    def welcome(self, to: bytes, session: str) -> None:
        self.send(
            to,
            wire.Welcome(
                protocol=wire.PROTOCOL,
                run="run",
                nonce="server",
                session=session,
                id=1,
                settings=self.settings,
                pub_port=self.port + 1,
            ),
        )

    def publish(self, frames: list[Any]) -> None:
        self._pub.send_multipart(frames)

    def probed(self, to: bytes, probe: wire.Probe) -> None:
        """Both ways work."""
        self.publish(wire.to_frames(probe))
        self.send(to, wire.Pulse(nonce="server", step=0, lineage="", phase="waiting"))

    def play(self, answer: Answer, over: threading.Event) -> None:
        while not over.is_set():
            if self._router.poll(20):
                sender, *frames = self._router.recv_multipart()
                answer(sender, wire.from_frames(frames)[0])


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.close()


@contextmanager
def played(script: Script, answer: Answer, **more: Any) -> Iterator[Client]:
    """A client of a server that answers like this, in another thread; `more` is for the client."""
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        client = Client(LOOPBACK, script.port, **more)
        playing = pool.submit(script.play, answer, over)
        try:
            yield client
        finally:
            client.close()
            over.set()
        playing.result()


def connect(
    script: Script, answer: Answer, deadline_s: float = 20.0, last_step: int | None = None
) -> list[str]:
    """What a client says while it connects to a server that answers like this; with a `last_step`
    again."""
    said: list[str] = []
    with played(script, answer, log=logs.to(said.append, "workers")) as client:
        client.connection.connect(deadline_s, last_step)
        assert client.greetings == 1
    return said


def test_a_session_that_is_forgotten_while_it_is_probed_is_asked_for_once_more(
    script: Script,
) -> None:
    """As by a server that was killed and started again in this very moment."""
    hellos = 0

    def answer(sender: bytes, message: Any) -> None:
        nonlocal hellos
        if isinstance(message, wire.Hello):
            hellos += 1
            script.welcome(sender, f"session {hellos}")
        elif isinstance(message, wire.Probe) and message.session == "session 1":
            script.send(sender, wire.Greet(session_known=False))
        elif isinstance(message, wire.Probe):
            script.probed(sender, message)

    connect(script, answer)
    assert hellos == 2


def test_a_server_that_does_not_let_in_yet_is_waited_for_and_told(script: Script) -> None:
    waits = 2

    def answer(sender: bytes, message: Any) -> None:
        nonlocal waits
        if isinstance(message, wire.Hello) and waits:
            waits -= 1
            phase = "waiting for the replicas of this run to come back: nobody here"
            script.send(sender, wire.Later(phase))
        elif isinstance(message, wire.Hello):
            script.welcome(sender, "session")
        elif isinstance(message, wire.Probe):
            script.probed(sender, message)

    said = connect(script, answer, deadline_s=3.0)  # less than both waits together
    assert said == ["the server is waiting for the replicas of this run to come back: nobody here"]


def test_a_port_through_which_nothing_comes_is_told(script: Script) -> None:
    """The door answers, and again when asked once more: the server is there, SUB hears nothing."""
    hellos = 0

    def answer(sender: bytes, message: Any) -> None:
        nonlocal hellos
        if isinstance(message, wire.Hello):
            hellos += 1
            script.welcome(sender, "session")
        elif isinstance(message, wire.Probe):
            pulse = wire.Pulse(nonce="server", step=0, lineage="", phase="waiting")
            script.send(sender, pulse)

    with pytest.raises(UserError, match=r"nothing comes through at port \d+ \(SUB\)"):
        connect(script, answer)


def test_who_was_let_in_before_tries_on_where_nothing_comes_through_a_port(script: Script) -> None:
    """Its cable comes and goes, or the server is busy: no firewall came up in the middle."""
    script.settings = to_wire(Settings(heartbeat_timeout=0.5))
    hellos = 0

    def answer(sender: bytes, message: Any) -> None:
        nonlocal hellos
        if isinstance(message, wire.Hello):
            hellos += 1
            script.welcome(sender, "session")
        elif isinstance(message, wire.Probe) and hellos > 3:
            script.probed(sender, message)

    connect(script, answer, deadline_s=60.0, last_step=5)
    assert hellos > 3


def test_a_server_that_moves_while_a_session_is_probed_is_found() -> None:
    """It welcomes, is killed, and is started again on another port: it waits there for one
    heartbeat timeout, and a worker that only waited for its probe would come too late."""
    first, second = Script(), Script()
    first.settings = to_wire(Settings(heartbeat_timeout=20.0))

    def answer(sender: bytes, message: Any) -> None:
        if isinstance(message, wire.Hello):
            first.welcome(sender, "session")

    def answer_there(sender: bytes, message: Any) -> None:
        if isinstance(message, wire.Hello):
            second.welcome(sender, "session there")
        elif isinstance(message, wire.Probe):
            second.probed(sender, message)

    class Found:
        host, port, keys = LOOPBACK, second.port, None

        def look(self, now: float) -> Found:
            return self

        def close(self) -> None: ...

    over = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        client = Client(LOOPBACK, first.port, search=lambda **_: Found())
        playing = [
            pool.submit(first.play, answer, over),
            pool.submit(second.play, answer_there, over),
        ]
        try:
            client.connect(15.0)
            assert client.port == second.port
        finally:
            over.set()
            client.close()
            for played in playing:
                played.result()
            first.close()
            second.close()


def spoil(port: int) -> int:
    """What no peer sends comes to all who have connected to this port of this process: ZeroMQ gives
    such a connection up, and says nothing. Returns how many there were."""
    ours = psutil.Process().net_connections(kind="tcp4")
    found = [c.fd for c in ours if c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED]
    for descriptor in found:
        with socket.socket(fileno=os.dup(descriptor)) as s:
            s.send(b"\xff" * 64)
    return len(found)


def test_a_peer_whose_connections_were_given_up_in_silence_must_greet_again(
    script: Script,
) -> None:
    """Nobody hears it any more, and it would wait for ever."""
    script.settings = to_wire(Settings(heartbeat_timeout=2.5))

    def answer(sender: bytes, message: Any) -> None:
        if isinstance(message, wire.Hello):
            script.welcome(sender, "session")
        elif isinstance(message, wire.Probe):
            script.probed(sender, message)

    with played(script, answer) as client:
        client.connect(20.0)
        connection = client.connection
        assert connection.link is not None
        assert spoil(script.port) == 2  # door and link
        while not connection.must_greet:  # the thread that beats says so
            time.sleep(0.01)
        connection.must_greet = False
        while not connection.must_greet:  # until ZeroMQ has read it there, too
            connection.probe()


def test_an_end_at_the_door_is_read_while_a_session_is_probed(script: Script) -> None:
    """The server has nothing else by which it could say it, and is gone a moment later."""
    script.settings = to_wire(Settings(heartbeat_timeout=1.0))
    end = wire.End(nonce="server", step=0, lineage="the first", reason="all epochs are done")

    def answer(sender: bytes, message: Any) -> None:
        if isinstance(message, wire.Hello):
            script.welcome(sender, "session")
            script.send(sender, end)

    with pytest.raises(RunOver, match="all epochs are done"):
        connect(script, answer)


def test_the_end_is_found_behind_the_averages_of_many_buckets(script: Script) -> None:
    """They come as one message, of more frames than a message of its own may have."""
    buckets = wire.BUFFERS_MAX
    end = wire.End(nonce="server", step=0, lineage="the first", reason="all epochs are done")
    peer: list[bytes] = []

    def answer(sender: bytes, message: Any) -> None:
        if isinstance(message, wire.Hello):
            script.welcome(sender, "session")
        elif isinstance(message, wire.Probe):
            script.probed(sender, message)
        elif isinstance(message, wire.Join):
            peer.append(sender)
            script.send(sender, wire.Admit(action="follow", step=0, lineage="the first"))

    averages = [
        wire.to_frames(wire.Average(nonce="server", round=1, step=1, bucket=b, absent=()), b"1234")
        for b in range(buckets)
    ]
    replica = small_replica()
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        client = Client(LOOPBACK, script.port)
        playing = pool.submit(script.play, answer, over)
        try:
            client.connect(20.0)
            client.join(replica)
            over.set()
            playing.result()
            sub, link = client.connection.sub, client.connection.link
            assert sub is not None and link is not None
            script.publish(wire.join(averages))
            while not sub.poll(20) or len(sub.recv_multipart()) == 1:  # subscribed to averages yet?
                script.publish(wire.join(averages))
            script.publish(wire.join(averages))
            script.send(peer[0], end)
            assert sub.poll(20_000) and link.poll(20_000)
            client.connection.must_greet = True  # as its thread of heartbeats is told
            assert client.wait(lambda: client.ended, "for the end", timeout_s=20.0)
        finally:
            over.set()
            client.close()


@pytest.mark.parametrize("fetched", [False, True])
def test_an_average_that_does_not_fit_ends_nobody(script: Script, fetched: bool) -> None:
    """A shard may have made it, or handed it over to the server, which keeps it."""
    joins: list[wire.Join] = []
    lies = wire.Average(nonce="server", round=1, step=1, bucket=0)

    def lie(to: bytes) -> None:
        script._router.send_multipart([to, *wire.to_frames(lies, b"1234")])

    def answer(sender: bytes, message: Any) -> None:
        if isinstance(message, wire.Hello):
            script.welcome(sender, "session")
        elif isinstance(message, wire.Probe):
            script.probed(sender, message)
        elif isinstance(message, wire.Join):
            joins.append(message)
            step = int(fetched and len(joins) == 1)
            script.send(sender, wire.Admit(action="follow", step=step, lineage=message.lineage))
            if not fetched:
                lie(sender)
                script.send(sender, wire.Greet(session_known=True, join=len(joins) == 1))
        elif isinstance(message, wire.Fetch):
            lie(sender)

    with played(script, answer) as client:
        client.connect(20.0)
        client.join(small_replica())
        assert client.wait(lambda: len(joins) == 2 and client.follows, "", timeout_s=20.0)
        assert client.follow is not None and client.follow.wants(lies), "it is lacking"
    assert (joins[0].lineage == joins[1].lineage) is not fetched


@pytest.mark.parametrize(("moves", "taken"), [(False, False), (True, False), (True, True)])
def test_who_greets_again_hears_why_its_server_does_not_let_it_in(moves: bool, taken: bool) -> None:
    """How the run ended, or that its id is `taken`. Also where the server has been found at another
    address only: it is no other run's."""
    end = wire.End(nonce="server", step=0, lineage="the first", reason="all epochs are done")
    first, second = Script(), Script()
    lively = threading.Event()
    lively.set()

    def answer(sender: bytes, message: Any) -> None:
        if isinstance(message, wire.Hello) and message.run is None:
            first.welcome(sender, "session")
        elif isinstance(message, wire.Hello):
            first.send(sender, wire.Reject(f"the run has ended: {end.reason}", end=end))
        elif isinstance(message, wire.Probe) and (lively.is_set() or not moves):
            first.probed(sender, message)
        elif isinstance(message, wire.Join):
            first.send(sender, wire.Admit(action="follow", step=0, lineage="the first"))
        elif isinstance(message, wire.Beat) and not (moves or lively.is_set()):
            first.send(sender, wire.Greet(session_known=False))

    def answer_there(sender: bytes, message: Any) -> None:
        if isinstance(message, wire.Hello) and taken:
            second.send(sender, wire.Reject("worker id 1 is taken", run=message.run or ""))
        elif isinstance(message, wire.Hello):
            second.send(sender, wire.Reject(f"the run has ended: {end.reason}", end=end))

    class Found:
        host, port, keys = LOOPBACK, second.port, None

        def look(self, now: float) -> Found | None:
            return self if moves and not lively.is_set() else None

        def close(self) -> None: ...

    replica = small_replica()
    over = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        client = Client(LOOPBACK, first.port, search=lambda **_: Found())
        playing = [
            pool.submit(first.play, answer, over),
            pool.submit(second.play, answer_there, over),
        ]
        try:
            client.connect(20.0)
            client.join(replica)
            lively.clear()
            if taken:
                with pytest.raises(RunLost, match="worker id 1 is taken"):
                    client.wait(lambda: client.ended, "for the end", timeout_s=20.0)
                return
            assert client.wait(lambda: client.ended, "for the end", timeout_s=20.0)
            assert client.ended == end and (client.port == second.port) == moves
            client.ready(wire.Ready(samples=1, batch_size=1))  # another pass: nobody is there
        finally:
            over.set()
            client.close()
            for played in playing:
                played.result()
            first.close()
            second.close()


def test_a_goodbye_comes_with_a_probe_which_tells_whose_it_is(script: Script) -> None:
    """A link that was made anew without a word is one that the server does not know."""
    heard: list[Any] = []
    over = threading.Event()

    def answer(sender: bytes, message: Any) -> None:
        if isinstance(message, wire.Hello):
            script.welcome(sender, "session")
        elif isinstance(message, wire.Probe):
            script.probed(sender, message)
        if not isinstance(message, wire.Hello | wire.Beat):
            heard.append(message)
        if isinstance(message, wire.Goodbye):
            over.set()

    with ThreadPoolExecutor(1) as pool:
        client = Client(LOOPBACK, script.port)
        playing = pool.submit(script.play, answer, over)
        try:
            client.connect(20.0)
            client.connection.send(wire.Unready())
            client.goodbye(wire.Goodbye("it was stopped"))
            playing.result(20.0)
        finally:
            over.set()
            client.close()
    unready = heard.index(wire.Unready())
    probe, goodbye = heard[unready + 1 :]
    assert isinstance(probe, wire.Probe) and probe.session == "session"
    assert isinstance(goodbye, wire.Goodbye)
