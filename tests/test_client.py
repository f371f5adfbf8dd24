"""A client and a server that forgets it, answers late, or is behind a wall: scripted by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import zmq
from whole import LOOPBACK, free_port

from paramserver import logs
from paramserver.config.loading import to_wire
from paramserver.errors import UserError
from paramserver.protocol import messages as wire
from paramserver.settings import Settings
from workers.link.client import Client

Answer = Callable[[bytes, Any], None]
"""Answers a message of a peer."""


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

    def probed(self, to: bytes, probe: wire.Probe) -> None:
        """Both ways work."""
        self._pub.send_multipart(wire.to_frames(probe))
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


def connect(script: Script, answer: Answer, deadline_s: float = 20.0) -> list[str]:
    """What a client says while it connects to a server that answers like this."""
    said: list[str] = []
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        client = Client(LOOPBACK, script.port, log=logs.to(said.append, "workers"))
        playing = pool.submit(script.play, answer, over)
        try:
            client.connect(deadline_s)
            assert client.greetings == 1
        finally:
            client.close()
            over.set()
        playing.result()
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
