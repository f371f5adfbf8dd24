"""Sealed payloads: runs whose pushes and averages travel through channels, and those who attack
them. What opens and what does not is tried in tests/test_sealing.py."""

from __future__ import annotations

import itertools
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import zmq
from crew import Crew, Noise, perceptron
from middle import COMMAND, DOWN, LONG, UP, Middle, More, flipped, framed
from test_handshake import stranger
from test_strangers import HELLO, ZMTP_GREETING, answer, dealer
from whole import DEADLINE_S, LOOPBACK, Served, free_port
from zmq.utils.monitor import recv_monitor_message

import workers
from paramserver.errors import RunLost, UserError
from paramserver.keys import Keys
from paramserver.net.address import keys_of
from paramserver.net.jointoken import decode
from paramserver.protocol import messages as wire
from paramserver.server.channels import UNCLAIMED_BYTES
from paramserver.server.ports import STRANGERS_MAX
from paramserver.settings import Settings
from paramserver.transport import sealing, sockets
from paramserver.transport.passwords import VALID_S, Passwords
from paramserver.transport.sealing import CLEAR
from workers.link import payloads
from workers.link.channel import Channel
from workers.link.client import Client

KEYS = Keys.new()
EPOCHS = 2
SMALL_MB = 0.0003
"""Buckets of this size make several pushes of a round."""


@pytest.fixture(scope="module", autouse=True)
def garbage_collector_of_pyzmq() -> None:
    """It starts with the first message that is not copied, and stays: a context of its own."""
    zmq.Frame(bytes(2**17), copy=False)


@pytest.fixture(autouse=True)
def as_from_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers of this host use no ipc."""
    monkeypatch.setattr(sockets, "ipc_usable", lambda folder: False)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is given up soon. Where a machine is so busy that something was only slow,
    the run is right all the same."""
    monkeypatch.setattr(sealing, "PATIENCE", 0.05)


def until_sealed(crew: Crew, number: int) -> None:
    """In this worker's thread: until its channel has come up."""
    client = crew.clusters[number].client
    assert isinstance(client, Client)
    payloads = client.connection.payloads
    assert client.wait(lambda: payloads.sealed, "", DEADLINE_S)


@contextmanager
def a_run_through(
    middle: Middle | None = None,
    until: Callable[[Crew], Any] | None = None,
    **settings: Any,
) -> Iterator[tuple[Served, Crew]]:
    """A run of two workers, to its end, which must be that of one process; or until this is so.
    `middle` is in the path of its channels: the first round waits until these have come up."""
    settings = {
        "num_epochs": EPOCHS if until is None else 100_000,
        "heartbeat_timeout": 6.0,
        **settings,
    }
    with Served(keys=KEYS, num_workers=2, **settings) as served:
        channels = served.server.channels
        assert channels is not None
        if middle is not None:
            middle.to, channels._port = channels._port, middle.port

        def hold(number: int, step: int) -> None:
            if middle is not None and step == 0:
                until_sealed(crew, number)

        crew = Crew(served, perceptron, Noise(96), hold)
        yield served, crew
        futures = [crew.start(number, 8) for number in (1, 2)]
        if until is not None:
            served.until(lambda: until(crew))
            served.stop()
        served.wait(*futures, served.end)
    crew.check()
    if until is None:
        assert crew.applied() == dict.fromkeys(range(96), EPOCHS)


ENDLESS_FRAMES = 2**15
"""Of 64 KiB: a connection that takes so many takes any number."""


def ids(frames: list[bytes]) -> set[bytes]:
    """Of the keys that these records are sealed with."""
    return {CLEAR.unpack(frame[: CLEAR.size])[6] for frame in frames}


def test_payloads_of_a_run_with_keys_travel_sealed() -> None:
    with Middle() as middle, a_run_through(middle) as (served, _):
        pass
    channels = served.server.channels
    assert channels is not None and channels.unopened == 0
    rounds = len(served.closes)
    for way in (UP, DOWN):  # both workers, each round's one bucket
        assert len(middle.seen[way]) == 2 * (1 + rounds)
    assert len(ids(list(middle.seen[UP]))) == 2, "each peer has keys of its own"
    assert served.samples == (96 * EPOCHS, 0, 0)


class Attack:
    """What somebody in the path does from the third frame on, each third one."""

    def __init__(self, kind: str, way: str) -> None:
        self.kind, self.way, self.done = kind, way, 0
        self._before: list[bytes] = []
        self._held: bytes | None = None

    def __call__(self, way: str, number: int, frame: bytes) -> list[bytes]:
        if way != self.way:
            return [frame]
        before, self._before = self._before, [*self._before[-3:], frame]
        if self._held is not None:
            held, self._held = self._held, None
            return [frame, held]
        if number < 4 or number % 3:
            return [frame]
        self.done += 1
        match self.kind:
            case "flip":
                return [flipped(frame)]
            case "drop":
                return []
            case "repeat":
                return [frame, frame]
            case "replay":
                return [before[0], frame]
            case "noise":
                return [b"", bytes(len(frame)), frame]
            case "swap" | "delay":
                self._held = frame
                return []
        raise AssertionError(self.kind)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("way", [UP, DOWN])
@pytest.mark.parametrize("kind", ["flip", "swap", "repeat", "delay", "drop", "replay", "noise"])
def test_somebody_in_the_path_spoils_nothing(kind: str, way: str) -> None:
    """The run ends as it would without: what is wrong is dropped, what is missing is fetched or
    computed again, and after some tries peers do without a channel."""
    attack = Attack(kind, way)
    with Middle() as middle:
        middle.tamper = attack
        with a_run_through(middle) as (served, _):
            pass
    assert attack.done > 0
    channels = served.server.channels
    assert channels is not None
    if way == UP and kind in ("flip", "repeat", "replay", "noise"):
        assert channels.unopened > 0
        assert "a record on a channel's connection from 127.0.0.1 was dropped" in served.text


@pytest.mark.usefixtures("impatient")
def test_an_insider_in_the_path_cannot_pose_as_the_server() -> None:
    """One worker gets what was sealed for the other one, in place of its own."""
    last: dict[bytes, bytes] = {}
    foreign = itertools.count()

    def tamper(way: str, number: int, frame: bytes) -> list[bytes]:
        if way != DOWN:
            return [frame]
        id = CLEAR.unpack(frame[: CLEAR.size])[6]
        last[id] = frame
        others = [f for other, f in last.items() if other != id]
        if not others or number % 4:
            return [frame]
        next(foreign)
        return others

    with Middle() as middle:
        middle.tamper = tamper
        with a_run_through(middle):
            pass
    assert next(foreign) > 0


def test_what_was_recorded_is_worth_nothing_in_the_next_run() -> None:
    with Middle() as middle, a_run_through(middle):
        pass
    recorded = list(middle.seen[UP])
    with Middle() as middle:
        middle.tamper = lambda way, number, frame: (
            [*recorded, frame] if (way, number) == (UP, 2) else [frame]
        )
        with a_run_through(middle) as (served, _):
            pass
    assert served.server.channels is not None
    assert served.server.channels.unopened == len(recorded)


@pytest.mark.usefixtures("impatient")
def test_a_channel_that_is_cut_is_made_anew_with_other_keys() -> None:
    with Middle() as middle:

        def tamper(way: str, number: int, frame: bytes) -> list[bytes]:
            if (way, number) == (UP, 6):
                middle.cut()
            return [frame]

        middle.tamper = tamper
        with a_run_through(middle, lambda crew: len(ids(list(middle.seen[UP]))) == 4):
            pass


@pytest.mark.usefixtures("impatient")
def test_one_record_that_is_lost_costs_one_channel() -> None:
    """The other pushes that its sender has under way go with it, and are not counted as further
    losses: else one would be enough to make a peer do without."""
    with Middle() as middle:
        middle.tamper = lambda way, number, frame: [] if (way, number) == (UP, 8) else [frame]
        losses: list[int] = []

        def dialed_again(crew: Crew) -> bool:
            channels = crew.served.server.channels
            assert channels is not None
            losses[:] = channels._losses.values()
            return len(ids(list(middle.seen[UP]))) > 2

        with a_run_through(middle, dialed_again, bucket_mb=SMALL_MB):
            pass
    assert losses == [1]


def test_late_news_of_a_channel_that_was_given_up_end_no_other() -> None:
    """Both ends may notice that a connection was cut; then the peer has dialed again."""
    found = list[bool]()

    def hold(number: int, step: int) -> None:
        if step == 0:
            until_sealed(crew, number)
        elif step == 1:
            client = crew.clusters[number].client
            assert isinstance(client, Client)
            payloads = client.connection.payloads
            assert payloads._current is not None
            for id in ("00" * 16, payloads._current.id):
                payloads.told(wire.Channel(id=id, reason="it is closed"), 0.0)
                found.append(payloads.sealed)

    with Served(keys=KEYS, num_workers=1, num_epochs=1, heartbeat_timeout=1.0) as served:
        crew = Crew(served, perceptron, Noise(96), hold)
        served.wait(crew.start(1, 8), served.end)
    crew.check()
    assert found == [True, False]


def test_noise_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody in the path sends a peer what does not open, before its channel is bound: it reads
    some of it, and does something else in between."""
    sent, dropped = threading.Event(), list[int]()
    come_up = Channel.come_up

    def counted(self: Channel, now: float) -> bool:
        assert sent.wait(DEADLINE_S)
        before = self.unopened
        bound = come_up(self, now)
        dropped.append(self.unopened - before)
        return bound

    def tamper(way: str, number: int, frame: bytes) -> Iterable[bytes]:
        if (way, number) == (DOWN, 0):
            yield from [bytes(sealing.OVERHEAD_BYTES)] * 300
        yield frame
        if way == DOWN:
            sent.set()

    monkeypatch.setattr("workers.link.channel.READS_MAX", 50)
    monkeypatch.setattr(Channel, "come_up", counted)
    with Middle() as middle, Served(keys=KEYS, num_workers=1, num_epochs=1) as served:
        middle.tamper = tamper
        channels = served.server.channels
        assert channels is not None
        middle.to, channels._port = channels._port, middle.port
        crew = Crew(served, perceptron, Noise(96), lambda number, step: until_sealed(crew, number))
        served.wait(crew.start(1, 8), served.end)
    crew.check()
    assert sum(dropped) == 300 and max(dropped) <= 50


@pytest.mark.parametrize("way", [UP, DOWN])
def test_a_message_without_end_ends_its_connection(way: str) -> None:
    """ZeroMQ bounds the size of frames, and not their number. The peer is in the middle of a long
    step when it comes."""
    sent, over = itertools.count(), threading.Event()

    def tamper(tampered: str, number: int, frame: bytes) -> Iterable[bytes]:
        yield frame
        if (tampered, number) == (way, 3):
            try:
                for _ in range(ENDLESS_FRAMES):
                    next(sent)
                    yield More(2**16)
            finally:
                over.set()

    def hold(number: int, step: int) -> None:
        if step == 0:
            until_sealed(crew, number)
        if step == 3:
            assert over.wait(DEADLINE_S)

    with (
        Middle() as middle,
        Served(keys=KEYS, num_workers=1, num_epochs=10_000, heartbeat_timeout=2.0) as served,
    ):
        middle.tamper = tamper
        channels = served.server.channels
        assert channels is not None
        middle.to, channels._port = channels._port, middle.port
        crew = Crew(served, perceptron, Noise(96), hold)
        future = crew.start(1, 8)
        served.until(lambda: len(ids(list(middle.seen[UP]))) > 1)
        served.stop()
        served.wait(future, served.end)
    crew.check()
    assert next(sent) < ENDLESS_FRAMES
    assert way == DOWN or "127.0.0.1 was ended: it sent a message without end" in served.text


def test_where_the_port_is_closed_payloads_go_through_curve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(payloads, "CONNECT_S", 0.1)
    with Middle() as middle:
        port = middle.port
    said = f"nothing comes through port {port}"

    def goes_on(crew: Crew) -> bool:
        return said in "".join(crew.said) and bool(crew.served.closes)

    with a_run_through(until=goes_on) as (served, _):
        channels = served.server.channels
        assert channels is not None
        channels._port = port
    assert channels._number == 0 and served.closes


def test_keys_are_replaced_when_they_are_worn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a run, of which nothing is lost."""
    monkeypatch.setattr(sealing, "RECORDS_MAX", 3)
    with Middle() as middle:
        with a_run_through(middle, lambda crew: len(ids(list(middle.seen[UP]))) > 5) as (served, _):
            pass
        records: dict[tuple[bytes, str], list[int]] = {}
        for way in (UP, DOWN):
            for frame in middle.seen[way]:
                clear = CLEAR.unpack(frame[: CLEAR.size])
                records.setdefault((clear[6], way), []).append(int.from_bytes(clear[-1]))
    assert served.server.channels is not None and served.server.channels.unopened == 0
    for counters in records.values():
        assert counters == list(range(len(counters))), "no nonce twice"
    assert not any(close.late for close in served.closes)


def test_new_keys_end_all_sessions_of_the_old_token() -> None:
    """While the server runs; who has the new token comes in."""
    new, made = Keys.new(), threading.Event()

    def fresh() -> sockets.ServerKeys | None:
        if not made.is_set():
            return None
        made.clear()
        return new.for_server()

    with Served(keys=KEYS, num_workers=1, min_workers=1, num_epochs=10_000) as served:
        served.server._fresh_keys = fresh
        crew = Crew(served, perceptron, Noise(96))
        old = crew.start(1, 8)
        served.until_contributes(1)
        made.set()
        served.until_said("the keys were made anew")
        with pytest.raises(UserError, match="your join token is worthless"):
            old.result(DEADLINE_S)
        with pytest.raises(UserError, match="has other keys"):
            served.join(1, crew.said.append)
        before = served.server.channels
        assert before is not None and before._number == 0
        served._keys = keys_of(decode(new.token(LOOPBACK, served.port)))
        again = crew.start(2, 8)
        served.until(lambda: before.live)  # nobody is left who holds the run's state
        served.stop()
        with pytest.raises(RunLost, match="ended before this replica could join"):
            again.result(DEADLINE_S)


# --------------------------------------------------------------------------------- strangers


@contextmanager
def knocking(port: int, user: str, password: str) -> Iterator[tuple[Any, Any]]:
    """A DEALER that shows this password, and the events of its handshake."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as s:
        s.linger = 0
        s.plain_username, s.plain_password = user.encode(), password.encode()
        events = s.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        s.connect(f"tcp://{LOOPBACK}:{port}")
        yield s, events
        s.disable_monitor()
        events.close()


def gets_in(port: int, user: str, password: str) -> bool:
    with knocking(port, user, password) as (_, events):
        assert events.poll(int(1000 * DEADLINE_S))
        return bool(recv_monitor_message(events)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)


def test_a_password_opens_one_connection_and_the_right_one_only() -> None:
    with Served(keys=KEYS, num_workers=1) as served:
        channels = served.server.channels
        assert channels is not None
        passwords, port = channels._passwords, channels._port
        handed = passwords.hand_out("user", 0.0)
        passwords._handed["user"] = passwords._handed["user"].__class__(handed, float("inf"))
        assert not gets_in(port, "user", "another")
        assert not gets_in(port, "other", handed)
        assert gets_in(port, "user", handed)
        assert not gets_in(port, "user", handed), "it was read on the wire, and is used again"


def test_a_password_is_good_for_a_while_only() -> None:
    with zmq.Context() as context:
        passwords = Passwords(context)
        handed = passwords.hand_out("user", 10.0)
        assert not passwords.spend("user", handed, 10.0 + VALID_S)
        assert passwords.spend("user", handed, 9.9 + VALID_S)
        assert not passwords.spend("user", handed, 10.0)
        first, second = passwords.hand_out("user", 0.0), passwords.hand_out("user", 0.0)
        assert not passwords.spend("user", first, 1.0) and passwords.spend("user", second, 1.0)
        passwords.close()


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address on Linux only")
def test_keys_leave_over_curve_only() -> None:
    """Who greets at loopback without keys gets neither a channel nor a seat, where others come with
    a join token."""
    with (
        Served(keys=KEYS, guarded="127.0.0.2", num_workers=1, heartbeat_timeout=1.0) as served,
        dealer(served.port) as door,
        dealer(served.port) as link,
        dealer(served.port) as silent,
    ):
        channels, peers = served.server.channels, served.server.rounds.peers
        assert channels is not None
        door.send_multipart(wire.to_frames(HELLO))
        session = answer(door, wire.Welcome).session
        link.send_multipart(wire.to_frames(wire.Probe(session=session)))
        reject = answer(link, wire.Reject)
        assert "only its own user takes part" in reject.reason and "join token" in reject.hint
        served.until(lambda: not peers)
        link.send_multipart(wire.to_frames(wire.Dial(costs=sealing.measured())))
        link.send_multipart(wire.to_frames(wire.Ready(samples=1, batch_size=1)))
        assert not answer(link, wire.Greet).join
        silent.send_multipart(wire.to_frames(HELLO))
        own = answer(silent, wire.Welcome).session
        while own in peers:  # it beats, and shows no link
            silent.send_multipart(wire.to_frames(wire.Beat(session=own)))
            silent.poll(50)
        assert not channels._channels


def test_a_dial_over_a_link_without_keys_is_no_dial() -> None:
    """A server without guarded addresses has no channels, and a peer that dials all the same breaks
    the protocol."""
    with Served(num_workers=1) as served, dealer(served.port) as door, dealer(served.port) as link:
        door.send_multipart(wire.to_frames(HELLO))
        welcome = answer(door, wire.Welcome)
        assert not welcome.channels
        link.send_multipart(wire.to_frames(wire.Probe(session=welcome.session)))
        answer(link, wire.Pulse)
        link.send_multipart(wire.to_frames(wire.Dial(costs=sealing.measured())))
        assert "a channel is for those" in answer(link, wire.Reject).reason


def test_who_dials_where_there_are_no_channels_does_without() -> None:
    """Another program has the port; a peer that dials all the same keeps its place."""
    port = free_port()
    with (
        socket.create_server((LOOPBACK, replace(Settings(), port=port).port_of_channels)),
        Served(keys=KEYS, num_workers=1, port=port, heartbeat_timeout=1.0) as served,
        stranger(zmq.DEALER, port, keys_of(decode(KEYS.token(LOOPBACK, port)))) as s,
    ):
        assert "gradients of other machines go through CURVE" in served.text
        s.rcvtimeo = int(1000 * DEADLINE_S)
        s.send_multipart(wire.to_frames(HELLO))
        welcome = answer(s, wire.Welcome)
        assert not welcome.channels
        s.send_multipart(wire.to_frames(wire.Probe(session=welcome.session)))
        s.send_multipart(wire.to_frames(wire.Dial(costs=sealing.measured())))
        told = answer(s, wire.Channel)
        assert not told.port and told.reason == "this server has no port for it"
        assert list(served.server.rounds.peers) == [welcome.session]


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address on Linux only")
def test_the_join_token_lets_in_who_cannot_come_over_ipc(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the server's own machine, as another user, or in a container: the worker dials loopback,
    where it gets no seat, and then the token's address."""
    with Served(
        keys=KEYS, guarded="127.0.0.2", num_workers=1, num_epochs=EPOCHS, heartbeat_timeout=1.0
    ) as served:
        token = KEYS.token("127.0.0.2", served.port)

        def join(number: int, say: Callable[[str], None]) -> workers.Cluster:
            return workers.join(worker_id=number, token=token, say=say)

        monkeypatch.setattr(served, "join", join)
        crew = Crew(served, perceptron, Noise(96))
        served.wait(crew.start(1, 8), served.end)
    crew.check()
    assert crew.clusters[1].client.host == "127.0.0.2"


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address on Linux only")
def test_who_has_a_token_takes_nobody_at_loopback_for_its_server() -> None:
    """Another user may listen at loopback while the server is not there."""
    with Served(num_workers=1) as false:
        token = KEYS.token("127.0.0.2", false.port)
        with pytest.raises(UserError, match=rf"no server answered at 127\.0\.0\.2:{false.port}"):
            workers.join(worker_id=1, token=token, timeout_s=1.0, say=print)
        assert not false.server.rounds.peers or not false.server.control.links


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address on Linux only")
def test_who_has_no_keys_hears_nothing_at_loopback() -> None:
    """Where others come with a join token, nothing is published at loopback."""
    with Served(keys=KEYS, guarded="127.0.0.2", num_workers=1) as served:
        pub = served.port + 1
        with socket.create_connection(("127.0.0.2", pub), DEADLINE_S):
            pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, pub), DEADLINE_S)


def test_strangers_hold_few_connections_and_keep_nobody_out() -> None:
    """A crowd that connects and says nothing, or begins a frame of the largest size, loses its
    oldest connections; peers come in meanwhile."""
    begun = ZMTP_GREETING.replace(b"NULL\0", b"PLAIN") + bytes([COMMAND | LONG])
    begun += (sealing.RECORD_BYTES - 1).to_bytes(8) + bytes(1000)
    with Served(keys=KEYS, num_workers=2, num_epochs=EPOCHS) as served, ExitStack() as stack:
        channels = served.server.channels
        assert channels is not None
        crew = Crew(served, perceptron, Noise(96))
        crowd = [
            stack.enter_context(socket.create_connection((LOOPBACK, channels._port), DEADLINE_S))
            for _ in range(STRANGERS_MAX + 20)
        ]
        for number, s in enumerate(crowd):
            with suppress(OSError):  # it may have been ended
                s.sendall(begun if number % 2 else b"")
        served.until(lambda: channels._strangers.ended >= 20)
        assert len(channels._strangers) <= STRANGERS_MAX
        for s in crowd[:20]:
            with suppress(OSError):
                while s.recv(100):
                    pass
        served.wait(*[crew.start(number, 8) for number in (1, 2)], served.end)
        assert channels._number > 0, "averages went through channels"
    crew.check()


def prop(name: bytes, value: bytes) -> bytes:
    """A property in a handshake of ZMTP 3."""
    return bytes([len(name)]) + name + len(value).to_bytes(4) + value


def ready(*more: bytes) -> bytes:
    """The command that ends a handshake without security."""
    body = b"\x05READY" + prop(b"Socket-Type", b"DEALER") + b"".join(more)
    return bytes([COMMAND, len(body)]) + body


@pytest.mark.parametrize(
    "greeting",
    [
        b"\x01\x00",
        b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00",
        ZMTP_GREETING,
        ZMTP_GREETING.replace(b"NULL\0", b"CURVE"),
    ],
    ids=["ZMTP 1", "ZMTP 2", "NULL", "CURVE"],
)
def test_no_other_handshake_leads_to_a_channel(greeting: bytes) -> None:
    """In old versions of ZMTP there is none at all."""
    with Served(keys=KEYS, num_workers=1) as served:
        channels = served.server.channels
        assert channels is not None
        with (
            socket.create_connection((LOOPBACK, channels._port), DEADLINE_S) as s,
            suppress(OSError),  # it may hang up in the middle
        ):
            for part in (greeting, ready(), framed(bytes(sealing.OVERHEAD_BYTES))):
                s.sendall(part)
            while s.recv(100):
                pass
    assert channels.unopened == 0, "no frame has come out"


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address on Linux only")
def test_nobody_chooses_as_whom_it_is_let_in() -> None:
    """ZeroMQ attaches the properties of a handshake to all messages, beside those that it knows
    itself; a peer that sends one of these names is not believed."""
    with (
        Served(keys=KEYS, guarded="127.0.0.2", num_workers=1, heartbeat_timeout=3.0) as served,
        dealer(served.port) as door,
    ):
        key = served.server._peers_key.encode()
        door.send_multipart(wire.to_frames(HELLO))
        session = answer(door, wire.Welcome).session
        properties = prop(b"User-Id", key), prop(b"Peer-Address", b"localhost:0:0:1")
        probe = framed(wire.to_frames(wire.Probe(session=session))[0])
        with socket.create_connection((LOOPBACK, served.port), DEADLINE_S) as s:
            received = b""

            def until(words: bytes) -> None:
                """ZeroMQ takes nothing of the next part of a handshake before this one is over."""
                nonlocal received
                while words not in received:
                    more = s.recv(1000)
                    assert more, received
                    received += more

            s.sendall(ZMTP_GREETING)
            until(b"NULL" + bytes(48))
            s.sendall(ready(*properties))
            until(b"READY")
            s.sendall(probe)
            until(b"only its own user takes part")


def test_a_shard_gets_to_know_which_ciphers_a_peer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who came over ipc has those of this machine; others have said it, and may do without a
    channel to the server since."""
    keys = keys_of(decode(KEYS.token(LOOPBACK, 1)))
    own, told = {"aes-256-gcm": 1.0}, {"chacha20-poly1305": 1.0}
    with (
        Served(keys=KEYS, num_workers=1, heartbeat_timeout=3.0) as served,
        stranger(zmq.DEALER, served.port, keys) as s,
    ):
        server, channels = served.server, served.server.channels
        assert channels is not None
        s.rcvtimeo = int(1000 * DEADLINE_S)
        s.send_multipart(wire.to_frames(HELLO))
        session = answer(s, wire.Welcome).session
        s.send_multipart(wire.to_frames(wire.Probe(session=session)))
        s.send_multipart(wire.to_frames(wire.Dial(costs=told)))
        assert answer(s, wire.Channel).port
        s.send_multipart(wire.to_frames(wire.Dial()))
        served.until(lambda: not channels._channels)
        monkeypatch.setattr(sealing, "measured", lambda: own)
        assert server.costs("over ipc") == own and server.costs(session) == told


def test_payloads_without_headers_take_little_memory() -> None:
    """An insider seals some and says nothing of them."""
    keys = keys_of(decode(KEYS.token(LOOPBACK, 1)))
    with (
        Served(keys=KEYS, num_workers=1, heartbeat_timeout=3.0) as served,
        stranger(zmq.DEALER, served.port, keys) as s,
        zmq.Context() as context,
    ):
        s.rcvtimeo = int(1000 * DEADLINE_S)
        s.send_multipart(wire.to_frames(HELLO))
        welcome = answer(s, wire.Welcome)
        s.send_multipart(wire.to_frames(wire.Probe(session=welcome.session)))
        s.send_multipart(wire.to_frames(wire.Dial(costs=sealing.measured())))
        told = answer(s, wire.Channel)
        channel = Channel(
            context, LOOPBACK, told, welcome.nonce, welcome.id, UNCLAIMED_BYTES, 16, 0.0
        )
        buffer = bytes(4 * 2**20)
        for number in range(1, 7):  # of 16 MiB each
            push = wire.Push(round=0, bucket=0, samples=1, sealed=number)
            channel.push(push, [buffer] * 4)
        closed = answer(s, wire.Channel)
        assert (closed.port, closed.id) == (0, told.id)
        assert closed.reason == "its payloads have no headers"
        channel.close()


def test_a_frame_larger_than_a_record_ends_its_connection() -> None:
    with Served(keys=KEYS, num_workers=1) as served:
        channels = served.server.channels
        assert channels is not None
        large = ZMTP_GREETING.replace(b"NULL\0", b"PLAIN") + bytes([COMMAND | LONG])
        with (
            socket.create_connection((LOOPBACK, channels._port), DEADLINE_S) as s,
            suppress(OSError),  # it may hang up in the middle
        ):
            s.sendall(large + (2 * sealing.RECORD_BYTES).to_bytes(8))
            while s.recv(100):
                pass
