"""What a shard's port is to strangers, to somebody in the path and to insiders: a real shard, whose
server is the test."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from middle import COMMAND, LONG, UP, Middle, flipped
from test_strangers import ZMTP_GREETING
from whole import DEADLINE_S, LOOPBACK

from paramserver.protocol import messages as wire
from paramserver.shard.orders import Orders
from paramserver.shard.process import STRANGERS_MAX, Process
from paramserver.transport import sealing, sockets
from workers.link.channel import Channel

NONCE = "server"
SIZE = 1000
LAYOUT = wire.Layout((wire.Tensor("w", (SIZE,), "float32"),))
LARGEST, MARK = 2**20, 16
NUMBERS = np.ones(SIZE, np.float32).tobytes()


class Server:
    """The end of a shard's link."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger, self._socket.rcvtimeo = 0, int(1000 * DEADLINE_S)
        self.port = self._socket.bind_to_random_port(f"tcp://{LOOPBACK}")
        self._route = b""

    def close(self) -> None:
        self._socket.close()

    def say(self, message: wire.Message) -> None:
        self._socket.send_multipart([self._route, *wire.to_frames(message)])

    def hear(self, kind: type[Any]) -> Any:
        """The next message of this kind."""
        while True:
            self._route, *frames = self._socket.recv_multipart()
            message, _ = wire.from_frames(frames)
            if isinstance(message, kind):
                return message

    def meet(self, worker: int, costs: dict[str, float] | None = None) -> wire.Channel:
        """What the shard tells a peer of the channel that it has made for it."""
        costs = sealing.measured() if costs is None else costs
        self.say(wire.Meet(session=f"session {worker}", worker=worker, costs=costs))
        told = self.hear(wire.Met).channel
        assert isinstance(told, wire.Channel)
        return told

    def peer(self, worker: int, told: wire.Channel, port: int = 0) -> closing[Channel]:
        """That worker's end of it; it may lead through another port."""
        told = msgspec.structs.replace(told, port=port or told.port)
        return closing(Channel(self._context, LOOPBACK, told, NONCE, worker, LARGEST, MARK, 0.0))


@contextmanager
def shard() -> Iterator[tuple[Process, Server]]:
    """A shard of a run that has keys; in a thread of this process."""
    with zmq.Context() as context, closing(Server(context)) as server:
        process = Process(
            Orders(
                host=LOOPBACK,
                port=server.port,
                address=LOOPBACK,
                server_key="",
                secret_key="",
                session="session 9",
                secret="secret",
                codec="float32",
                codec_down="float32",
                topk_ratio=0.01,
                bucket_mb=1.0,
                min_bucket_mb=1.0,
                history_mb=4.0,
                heartbeat_timeout=5.0,
                guarded=True,
                shared_memory=False,
            )
        )
        thread = threading.Thread(target=process.run)
        thread.start()
        try:
            server.hear(wire.Offer)
            server.say(wire.Employ(shard=1, nonce=NONCE, layout=LAYOUT))
            yield process, server
        finally:
            process._end_at = 0.0
            thread.join(DEADLINE_S)
            process.close()


def comes_up(channel: Channel) -> None:
    while not channel.come_up(0.0):
        assert channel.socket.poll(int(1000 * DEADLINE_S)), "nothing comes"


def push(channel: Channel, number: int) -> None:
    """A gradient for the round of its number."""
    message = wire.Push(round=number, bucket=0, samples=1, sealed=number, shard=1)
    channel.push(message, wire.to_frames(message, NUMBERS))


def unopened(process: Process) -> int:
    assert process._channels is not None
    return process._channels.unopened


FIRST, TAMPERED = 1, 4
"""Of the records of a worker that sends three gradients: one binds the channel, and each gradient
has two, its header and its numbers."""


@pytest.mark.parametrize("kind", ["flip", "drop", "repeat", "replay", "noise", "foreign"])
def test_somebody_in_the_path_to_a_shard_adds_nothing(kind: str) -> None:
    """What does not open is dropped and counted; what was sent arrives once, and as it was sent."""
    before: list[bytes] = []

    def tamper(way: str, number: int, frame: bytes) -> Iterable[bytes]:
        if way != UP:
            return [frame]
        before.append(frame)
        if number != TAMPERED:
            return [frame]
        return {
            "flip": [flipped(frame)],
            "drop": [],
            "repeat": [frame, frame],
            "replay": [before[FIRST], frame],
            "noise": [b"", bytes(len(frame)), frame],
            "foreign": [foreign, frame],
        }[kind]

    with shard() as (process, server), Middle() as middle:
        told, others = server.meet(1), server.meet(2)
        middle.to = told.port
        with server.peer(2, others, middle.port) as other:  # a record of an insider
            comes_up(other)
            push(other, 1)
            assert server.hear(wire.Arrived).session == "session 2"
            foreign = middle.seen[UP][-1]
        middle.seen[UP].clear(), before.clear()
        middle.tamper = tamper
        with server.peer(1, told, middle.port) as channel:
            comes_up(channel)
            for number in (1, 2, 3):
                push(channel, number)
            arrived = [server.hear(wire.Arrived)]
            while arrived[-1].number < 3:
                arrived.append(server.hear(wire.Arrived))
    assert {a.session for a in arrived} == {"session 1"}
    assert [a.number for a in arrived] == ([1, 3] if kind in ("flip", "drop") else [1, 2, 3])
    assert all(a.norm == pytest.approx(SIZE**0.5) and not a.bad for a in arrived)
    wrong = {"drop": 0, "noise": 2}.get(kind, 1)
    assert unopened(process) == wrong


def test_a_password_of_a_shard_lets_in_once() -> None:
    """Whoever reads it in the path comes too late."""
    with shard() as (process, server):
        told = server.meet(1)
        with server.peer(1, told) as channel:
            comes_up(channel)
            with zmq.Context() as context, context.socket(zmq.DEALER) as thief:
                thief.linger = 0
                thief.plain_username = told.id.encode()
                thief.plain_password = told.password.encode()
                watch = thief.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
                thief.connect(f"tcp://{LOOPBACK}:{told.port}")
                assert watch.poll(int(1000 * DEADLINE_S)), "it was let in"
                sockets.end_monitor(thief, watch)
            push(channel, 1)
            assert server.hear(wire.Arrived).number == 1
        assert unopened(process) == 0


def test_a_crowd_at_a_shards_port_keeps_nobody_out() -> None:
    begun = ZMTP_GREETING.replace(b"NULL\0", b"PLAIN") + bytes([COMMAND | LONG])
    begun += (sealing.RECORD_BYTES - 1).to_bytes(8) + bytes(1000)
    with shard() as (process, server), ExitStack() as stack:
        told = server.meet(1)
        for number in range(STRANGERS_MAX + 20):
            s = socket.create_connection((LOOPBACK, told.port), DEADLINE_S)
            stack.enter_context(s)
            with suppress(OSError):  # it may have been ended
                s.sendall(begun if number % 2 else b"")
        with server.peer(1, told) as channel:
            comes_up(channel)
            push(channel, 1)
            assert server.hear(wire.Arrived).number == 1
        assert process._strangers is not None
        assert process._strangers.ended >= 20 and len(process._strangers) <= STRANGERS_MAX


def test_without_a_password_nothing_comes_out_of_a_shards_port() -> None:
    with shard() as (process, server):
        told = server.meet(1)
        with (
            socket.create_connection((LOOPBACK, told.port), DEADLINE_S) as s,
            suppress(OSError),  # it may hang up in the middle
        ):
            s.sendall(ZMTP_GREETING)  # of the mechanism NULL
            while s.recv(100):
                pass
        assert unopened(process) == 0


def test_a_shard_of_a_run_with_keys_seals_for_everybody() -> None:
    """Also where the server said nothing of ciphers, or somebody said it in its name."""
    with shard() as (_, server):
        for costs in ({}, {sealing.PLAIN: 0.0}):
            told = server.meet(1, costs)
            assert (told.port, told.up, told.down) == (0, "", "")
            assert told.reason == "this server has none of your ciphers"
