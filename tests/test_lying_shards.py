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
from cryptography.exceptions import UnsupportedAlgorithm
from middle import DOWN, Middle, More
from whole import DEADLINE_S, LOOPBACK

from paramserver.protocol import messages as wire
from paramserver.tensors.bucket import plan
from paramserver.transport import sealing, sockets
from paramserver.transport.inflow import Inflow
from paramserver.transport.passwords import PASSWORD_BYTES
from paramserver.transport.sealing import Ends, Kind, Payload, Sealer
from workers.link.channel import Channel, Lost
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


def told(**changed: Any) -> wire.Channel:
    """What an honest shard tells of a channel with keys, but for this."""
    right = wire.Channel(
        port=1,
        cipher="aes-256-gcm",
        id=secrets.token_hex(sealing.ID_BYTES),
        password=secrets.token_hex(PASSWORD_BYTES),
        up=secrets.token_hex(sealing.KEY_BYTES),
        down=secrets.token_hex(sealing.KEY_BYTES),
        shard=1,
        host=LOOPBACK,
    )
    return msgspec.structs.replace(right, **changed)


TEXTS = ["", "é" * 128, "0" * 128, "\0", "a\0b", " " * 128, "\ud800", "0" * 31 + "O", "A" * 32]
RUBBISH = [
    *(("port", port) for port in (-1, 2**16, 2**40)),
    *(
        (name, text)
        for name in ("cipher", "id", "password", "up", "down")
        for text in [*TEXTS, " " + "0" * 31, "0 " * 32, "0" * 32 + "\n" + "0" * 31]
        if (name, text) not in {("up", "0" * 64), ("down", "0" * 64)}
    ),
    ("cipher", sealing.PLAIN),
    *(("host", host) for host in ("x" * 255, " ", "a b", "é" * 255, "[", "]:1", "a" * 64 + ".b")),
]


@pytest.mark.parametrize(("field", "value"), RUBBISH)
def test_a_channel_that_cannot_be_costs_only_its_shard(
    monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    """A peer says that it does not reach the shard, and is served by others."""
    said: list[wire.Message] = []
    monkeypatch.setattr(Connection, "send", lambda self, message, *buffers: said.append(message))
    with peers("worker") as [worker]:
        worker.shards.told(told(**{field: value}), 0.0)
        if field == "host":
            worker.shards.tick(6.0)  # a name may only turn out to be none when it is looked up
        [reached] = said
        assert isinstance(reached, wire.Reached) and reached.problem and reached.shard == 1
        worker.shards.told(told(), 0.0)
        assert len(said) == 1 and worker.shards._coming


@pytest.mark.parametrize("text", [*TEXTS, "/", "/dev/null", "x" * 1024, "/dev/shm/paramserver-x"])
def test_memory_that_cannot_be_shared_is_not(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(Connection, "send", lambda self, message, *buffers: None)
    with peers("worker") as [worker]:
        worker.share_memory = True
        for host in (LOOPBACK, "\0", "a" * 64 + ".b", "x" * 255):
            worker.shards.told(told(shared=text, host=host, reason=text), 0.0)
        assert worker.shards.outbox(1) is None


def test_a_cipher_that_this_machine_lacks_is_a_shard_that_it_does_not_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lacks(key: bytes) -> Any:
        raise UnsupportedAlgorithm("not in this OpenSSL")

    said: list[wire.Message] = []
    monkeypatch.setattr(Connection, "send", lambda self, message, *buffers: said.append(message))
    monkeypatch.setitem(sealing.CIPHERS, "chacha20-poly1305", lacks)  # type: ignore[arg-type]
    with peers("worker") as [worker]:
        worker.shards.told(told(cipher="chacha20-poly1305"), 0.0)
    assert said == [wire.Reached(shard=1, problem="this machine has no chacha20-poly1305")]


def test_what_is_below_the_awaited_average_is_neither_kept_nor_a_sign_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a shard could fill a peer's memory with it, and let it wait without end."""
    said: list[wire.Message] = []
    monkeypatch.setattr(Connection, "send", lambda self, message, *buffers: said.append(message))
    with (
        zmq.Context() as context,
        closing(Shard(context, 1)) as lies,
        peers("worker") as [worker],
    ):
        worker.heartbeat_timeout = 4.0
        worker.shards.told(lies.told, 0.0)
        lies.bind()
        while not worker.shards.sockets(1):
            worker.shards.tick(0.0)
        [channel] = worker.shards._sources(1)
        awaited = msgspec.structs.replace(sharded(1), number=1000)
        assert worker.shards.payload(awaited, 0.0) is None
        for at in (1.0, 2.0):
            for number in range(1, 20):
                lies.average(b"lies", number=number)
            lies.bind()
            while channel._opener.opened < 1 + 20 * at:
                assert channel.socket.poll(int(1000 * DEADLINE_S))
                assert worker.shards.payload(awaited, at) is None
                assert not channel._payloads
            assert channel.heard_at == 0.0
        lies.average(b"true", number=1000)
        assert channel.socket.poll(int(1000 * DEADLINE_S))
        found = worker.shards.payload(awaited, 2.0)
        assert isinstance(found, list) and [bytes(b) for b in found] == [b"true"]
        assert channel.heard_at == 2.0
        later = msgspec.structs.replace(awaited, number=1001)
        assert worker.shards.payload(later, 3.0) is None
        lies.average(b"lies", number=20)
        assert channel.socket.poll(int(1000 * DEADLINE_S))
        with pytest.raises(Lost):
            worker.shards.payload(later, 5.1)
        assert said[-1] == wire.Reached(shard=1, problem="nothing comes through it")
