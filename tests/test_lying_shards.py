"""What a shard that lies can do to the peers to which it has channels."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import msgspec
import pytest
import zmq
from middle import DOWN, Middle, More
from whole import DEADLINE_S, LOOPBACK

from paramserver.protocol import messages as wire
from paramserver.tensors.bucket import plan
from paramserver.transport import sealing, sockets
from paramserver.transport.inflow import Inflow
from paramserver.transport.sealing import Ends, Kind, Payload, Sealer
from workers.link.channel import Channel
from workers.link.connection import Connection
from workers.link.relays import Relays

CUT = plan(wire.Layout((wire.Tensor("w", (4,), "float32"),)), 1.0)
NONCE = "server"


class Shard:
    """A shard's end of its channel to a peer; it sends what a test says."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], number: int) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger, self._socket.rcvtimeo = 0, int(1000 * DEADLINE_S)
        id, down = secrets.token_bytes(sealing.ID_BYTES), secrets.token_bytes(sealing.KEY_BYTES)
        self.told = wire.Channel(
            port=self._socket.bind_to_random_port(f"tcp://{LOOPBACK}"),
            cipher=sealing.PLAIN,
            id=id.hex(),
            up=secrets.token_hex(sealing.KEY_BYTES),
            down=down.hex(),
            shard=number,
            host=LOOPBACK,
        )
        self.sealer = Sealer(Ends(sealing.PLAIN, down, id, NONCE, number, 0))

    def close(self) -> None:
        self._socket.close()

    def send(self, record: Any) -> None:
        self._socket.send(record)

    def bind(self) -> None:
        self.send(self.sealer.bind())

    def average(self, content: bytes, *, number: int = 1, round: int = 1, bucket: int = 0) -> None:
        for record in self.sealer.seal(Kind.AVERAGE, round, bucket, number, [content]):
            self.send(record)


@contextmanager
def peers(*names: str) -> Iterator[list[Connection]]:
    """Connections of peers that a server has welcomed; nothing goes over their links."""
    made = []
    for session in names:
        peer = Connection(LOOPBACK, 1, shared_memory=False)
        peer.welcome = wire.Welcome(
            protocol=wire.PROTOCOL,
            run="run",
            nonce=NONCE,
            session=session,
            id=1,
            settings={},
            pub_port=1,
        )
        peer.relays.plan = CUT
        made.append(peer)
    try:
        yield made
    finally:
        for peer in made:
            peer.relays.close()
            peer.close()


def reads(channel: Channel) -> None:
    """Read the next record."""
    assert channel.socket.poll(int(1000 * DEADLINE_S))
    assert channel.read(0.0)


def sharded(shard: int) -> wire.Sharded:
    return wire.Sharded(nonce=NONCE, round=1, step=1, bucket=0, shard=shard, number=1)


def listens_to(listener: Relays, relay: Relays, told: list[wire.Message]) -> None:
    """Until one hears the other."""
    relay.hand_on(wire.HandOn())
    [hands_on] = [m for m in told if isinstance(m, wire.HandsOn)]
    listener.listen(wire.Listen(folder=hands_on.folder, server=True))
    source = listener._coming
    assert source is not None
    while not listener.sockets:
        relay.tick()
        source.socket.poll(10)
        listener.tick()


def brought(listener: Relays, average: wire.Average) -> Any:
    """What the relay has brought of an average that is on its way."""
    source = listener._source
    assert source is not None
    while (found := listener.payload(average)) is None:
        assert source.socket.poll(int(1000 * DEADLINE_S))
    return [bytes(buffer) for buffer in found]


def test_a_shard_cannot_say_through_a_relay_what_another_one_averages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shard 1 sends the bucket that shard 2 averages, and does so first."""
    told: list[wire.Message] = []
    monkeypatch.setattr(Connection, "send", lambda self, message, *buffers: told.append(message))
    with (
        zmq.Context() as context,
        closing(Shard(context, 1)) as lies,
        closing(Shard(context, 2)) as honest,
        peers("relay", "listener") as (relay, listener),
    ):
        listens_to(listener.relays, relay.relays, told)
        for shard, content in ((lies, b"lies"), (honest, b"true")):
            with closing(relay.channel(shard.told, 0.0)) as channel:
                shard.bind(), shard.average(content)
                reads(channel), reads(channel)
        own = wire.Average(nonce=NONCE, round=1, step=1, bucket=0)
        relay.relays.published(own, [b"mine"])
        assert brought(listener.relays, sharded(2)) == [b"true"]
        sealed = wire.Sealed(nonce=NONCE, round=1, step=1, bucket=0)
        assert brought(listener.relays, sealed) == [b"mine"]
        assert brought(listener.relays, sharded(1)) == [b"lies"], "of what is its own it may"


@pytest.mark.parametrize("given_up", [False, True])
def test_what_a_shard_sends_is_bounded_in_the_midst_of_a_long_step(
    monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    """A message without end, while the main thread does nothing for the channel; also where ZeroMQ
    has given the connection to the server up meanwhile."""
    ended, end = threading.Event(), Inflow.end

    def ends(self: Inflow) -> bool:
        ended.set()
        return end(self)

    def endless(way: str, number: int, frame: bytes) -> Iterable[bytes]:
        yield frame
        if way == DOWN:
            yield from [More(2**16)] * 2**9  # 32 MiB, where 16 may wait

    monkeypatch.setattr(Inflow, "end", ends)
    monkeypatch.setattr(sockets, "channel_marks", lambda *sizes: (4, 4))
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as server,
        closing(Shard(context, 1)) as lies,
        Middle() as middle,
        peers("worker") as [worker],
    ):
        server.linger = 0
        middle.to, middle.tamper = lies.told.port, endless
        worker.shards.told(msgspec.structs.replace(lies.told, port=middle.port), 0.0)
        worker._door, worker.heartbeat_timeout = sockets.dealer(worker.ctx), 0.1
        if not given_up:
            port = server.bind_to_random_port(f"tcp://{LOOPBACK}")
            sockets.connect(worker._door, sockets.tcp(LOOPBACK, port))
        worker._start_beating("session")
        if not given_up:
            assert server.poll(int(1000 * DEADLINE_S))
        while worker.must_greet is not given_up:
            time.sleep(0.01)
        lies.bind()  # after the first beat
        assert ended.wait(DEADLINE_S)


def test_averages_that_come_before_a_channel_is_bound_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody asks for them, so they would pile up."""
    handed_on: list[int] = []

    def opened(self: Relays, shard: int, payload: Payload) -> None:
        handed_on.append(payload.number)

    monkeypatch.setattr(Relays, "opened", opened)
    with (
        zmq.Context() as context,
        closing(Shard(context, 1)) as lies,
        peers("worker") as [worker],
        closing(worker.channel(lies.told, 0.0)) as channel,
    ):
        for number in (1, 2):
            lies.average(b"lies", number=number)
        lies.bind(), lies.average(b"true", number=3)
        for bound in (False, False, True):
            reads(channel)
            assert channel.bound is bound and not channel._payloads
        reads(channel)
        assert list(channel._payloads) == handed_on == [3]
