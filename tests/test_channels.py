"""Sealed payloads: runs whose pushes and averages travel through channels, and those who attack
them. What opens and what does not is tried in tests/test_sealing.py."""

from __future__ import annotations

import itertools
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import zmq
from crew import Crew, Noise, perceptron
from middle import COMMAND, DOWN, LONG, UP, Middle
from test_strangers import HELLO, ZMTP_GREETING, answer, dealer
from whole import DEADLINE_S, LOOPBACK, Served
from zmq.utils.monitor import recv_monitor_message

from paramserver.errors import RunLost, UserError
from paramserver.keys import Keys
from paramserver.net.address import keys_of
from paramserver.net.jointoken import decode
from paramserver.protocol import messages as wire
from paramserver.server.ports import STRANGERS_MAX
from paramserver.transport import sealing, sockets
from paramserver.transport.passwords import VALID_S, Passwords
from paramserver.transport.sealing import CLEAR
from workers.link import payloads

KEYS = Keys.new()
EPOCHS = 2


@pytest.fixture(autouse=True)
def as_from_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers of this host use no ipc."""
    monkeypatch.setattr(sockets, "ipc_usable", lambda folder: False)


@contextmanager
def a_run_through(
    middle: Middle | None = None,
    until: Callable[[Crew], Any] | None = None,
    **settings: Any,
) -> Iterator[tuple[Served, Crew]]:
    """A run of two workers, to its end, which must be that of one process; or until this is so.
    `middle` is in the path of its channels."""
    settings = {
        "num_epochs": EPOCHS if until is None else 100_000,
        "heartbeat_timeout": 2.0,
        **settings,
    }
    with Served(keys=KEYS, num_workers=2, **settings) as served:
        channels = served.server.channels
        assert channels is not None
        if middle is not None:
            middle.to, channels._port = channels._port, middle.port
        crew = Crew(served, perceptron, Noise(96))
        yield served, crew
        futures = [crew.start(number, 8) for number in (1, 2)]
        if until is not None:
            served.until(lambda: until(crew))
            served.stop()
        served.wait(*futures, served.end)
    crew.check()
    if until is None:
        assert crew.applied() == dict.fromkeys(range(96), EPOCHS)


def test_payloads_of_a_run_with_keys_travel_sealed() -> None:
    with Middle() as middle, a_run_through(middle) as (served, _):
        pass
    channels = served.server.channels
    assert channels is not None and channels.unopened == 0
    rounds = len(served.closes)
    for way, bind in ((UP, 1), (DOWN, 1)):
        # Both workers, each round's one bucket; the first rounds may be over before a channel is.
        assert rounds < len(middle.seen[way]) <= 2 * (rounds + bind)
    ids = {CLEAR.unpack(frame[: CLEAR.size])[6] for frame in middle.seen[UP]}
    assert len(ids) == 2, "each peer has keys of its own"
    assert served.samples == (96 * EPOCHS, 0, 0)


def flipped(frame: bytes) -> bytes:
    return frame[:-20] + bytes([frame[-20] ^ 1]) + frame[-19:]


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


def test_a_channel_that_is_cut_is_made_anew_with_other_keys() -> None:
    with Middle() as middle:
        cut = itertools.count()

        def tamper(way: str, number: int, frame: bytes) -> list[bytes]:
            if (way, number) == (UP, 6):
                next(cut)
                middle.cut()
            return [frame]

        middle.tamper = tamper
        with a_run_through(middle):
            pass
    assert next(cut) == 1
    ids = {CLEAR.unpack(frame[: CLEAR.size])[6] for frame in middle.seen[UP]}
    assert len(ids) > 2


def test_where_the_port_is_closed_payloads_go_through_curve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(payloads, "CONNECT_S", 0.1)
    with Middle() as middle:
        port = middle.port
    said = f"nothing comes through port {port}"
    with a_run_through(until=lambda crew: said in "".join(crew.said)) as (served, _):
        channels = served.server.channels
        assert channels is not None
        channels._port = port
    assert channels._number == 0 and served.closes


def ids(frames: list[bytes]) -> set[bytes]:
    """Of the keys that these records are sealed with."""
    return {CLEAR.unpack(frame[: CLEAR.size])[6] for frame in frames}


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
        assert "only its own user takes part" in answer(link, wire.Reject).reason
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
