"""Watching a run: who watches sees it, and can do nothing else."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
import zmq
from crew import Crew, Noise, perceptron
from test_handshake import KEYS, OTHERS, as_peer, refusals, stranger
from test_strangers import a_run_in_its_middle
from whole import DEADLINE_S, ENDLESS, LOOPBACK, Served

from paramserver.errors import UserError
from paramserver.keys import Keys
from paramserver.net.address import Address, free_port, keys_of, to_watch
from paramserver.net.jointoken import decode
from paramserver.protocol import messages as wire
from paramserver.server.watching import READ_PER_TICK, WATCHERS_MAX, WatchSocket
from paramserver.status.value import (
    ASK,
    OBSERVER,
    SERVER,
    STATUS_BYTES_MAX,
    Cause,
    EventKind,
    State,
    Status,
    from_json,
    to_json,
)
from paramserver.transport import sockets
from paramserver.transport.sockets import PeerKeys
from paramserver.watch.connection import Connection
from workers.link.client import Client


def as_watcher(keys: Keys) -> PeerKeys:
    return keys_of(decode(keys.watch_token("host", 1), to_watch=True))


def until(watcher: Connection, wanted: Callable[[Status], object]) -> Status:
    """The first status of that kind."""
    for _ in range(int(10 * DEADLINE_S)):
        found = watcher.poll(0.1)
        if found is not None and wanted(found):
            return found
    raise AssertionError("no such status came")


# ------------------------------------------------------------------------------ what it sees


@pytest.mark.parametrize("token", [None, "watch", "join"])
def test_a_watcher_sees_the_run(token: str | None) -> None:
    """Without keys on loopback, with a watch token, with a join token."""
    keys = {None: None, "watch": as_watcher(KEYS), "join": as_peer(KEYS)}[token]
    with a_run_in_its_middle(watched=True, keys=KEYS if token else None) as served:
        with Connection(Address(LOOPBACK, served.watched_at, keys)) as watcher:
            status = until(watcher, lambda s: s.step == len(served.closes) and s.samples.leased)
        names = [machine.name for machine in status.machines]
        host = socket.gethostname()
        assert names == ["the server", f"worker 1 ({host})", f"worker 2 ({host})"]
        assert all(machine.state == State.TRAINING for machine in status.machines)
        assert status.trains and status.run == "test" and status.settings["observer"] == "false"
        assert status.settings.keys() == {"observer", "timeout"}
        assert status.samples.total == 192 and status.samples.done > 0
        assert {link.kind for link in status.links} == {"this machine"}
        for took in status.rounds:
            assert sorted(took.workers) == [1, 2]
        assert all(machine.minute.compute > 0 for machine in status.workers)
        assert all(machine.sent_bytes > 0 < machine.received_bytes for machine in status.workers)
        joined = [event.machine for event in status.events if event.kind == EventKind.JOINED]
        assert sorted(joined, key=str) == [1, 2]
    assert refusals(served) == []


def test_the_last_status_tells_the_end() -> None:
    with (
        Served(watched=True, num_workers=1, num_epochs=1) as served,
        Connection(Address(LOOPBACK, served.watched_at)) as watcher,
    ):
        until(watcher, lambda s: True)
        crew = Crew(served, perceptron, Noise(32))
        served.wait(crew.start(1, 8), served.end)
        status = until(watcher, lambda s: s.end)
    assert status.end == "all epochs are done" and status.step == 4 and not status.error
    assert status.events[-1].kind == EventKind.ENDED


def test_a_slow_worker_is_named() -> None:
    """All wait for worker 2, which takes its time with each batch."""

    def hold(number: int, step: int) -> None:
        if number == 2:
            time.sleep(0.05)

    with Served(watched=True, num_workers=2, num_epochs=ENDLESS) as served:
        crew = Crew(served, perceptron, Noise(96), hold)
        futures = [crew.start(number, 8) for number in (1, 2)]
        with Connection(Address(LOOPBACK, served.watched_at)) as watcher:
            status = until(watcher, lambda s: s.diagnosis.cause == Cause.SLOW)
        served.stop()
        served.wait(*futures)
    assert status.diagnosis.machine == 2
    one, two = status.workers
    assert two.minute.compute / two.minute_rounds > 0.05 > one.minute.compute / one.minute_rounds
    assert one.minute.wait > 0.5 * one.minute.total > two.minute.wait


def test_a_worker_that_left_stays_in_the_list_for_a_while() -> None:
    with a_run_in_its_middle(watched=True) as served:
        with Connection(Address(LOOPBACK, served.watched_at)) as watcher:
            client = Client(LOOPBACK, served.port, id=7)
            client.connect(DEADLINE_S)
            until(watcher, lambda s: (m := s.machine(7)) and m.state == State.JOINING)
            client.goodbye(wire.Goodbye("it goes home"))
            client.close()
            status = until(watcher, lambda s: (m := s.machine(7)) and m.state == State.GONE)
        assert [m.id for m in status.workers] == [1, 2]
        assert status.events[-1].kind == EventKind.GONE and status.events[-1].machine == 7


# ------------------------------------------------------------------------------ what it cannot


def test_a_watcher_cannot_take_part() -> None:
    """Its key opens neither the server's ROUTER nor PUB."""
    with a_run_in_its_middle(watched=True, keys=KEYS) as served:
        client = Client(LOOPBACK, served.port, id=3, keys=as_watcher(KEYS))
        try:
            with pytest.raises(UserError, match="refuses the key"):
                client.connect(DEADLINE_S)
        finally:
            client.close()
        with stranger(zmq.SUB, served.port + 1, as_watcher(KEYS)) as s:
            served.until_said("its key is not the one of the join token")
            assert not s.poll(0)
        assert len(served.server.rounds.peers) == 2


def test_what_a_watcher_says_is_not_looked_at() -> None:
    """It says whatever a worker may say, and more, while a run goes on to its end: nobody hears it,
    and it hears nothing but statuses, none of which holds a gradient or an average."""
    hello = wire.Hello(
        protocol=wire.PROTOCOL, role="worker", id=None, nonce="watcher", host="here", pid=1
    )
    goodbye = wire.Goodbye("stop it", error=True)
    with a_run_in_its_middle(watched=True, keys=KEYS) as served:
        keys = as_watcher(KEYS)
        with stranger(zmq.DEALER, served.watched_at, keys) as s:
            s.send(ASK)
            from_json(s.recv())
            session = next(iter(served.server.rounds.peers))
            push = wire.Push(round=served.server.rounds.round.number, bucket=0, samples=8)
            lies = [
                *([message] for message in (hello, goodbye, push, wire.Probe(session=session))),
                [push, bytes(100)],
            ]
            for _ in range(50):
                for message, *buffers in lies:
                    with suppress(zmq.Again):
                        s.send_multipart(wire.to_frames(message, *buffers), zmq.NOBLOCK)
                    s.send(ASK)
            for _ in range(3):
                s.send(ASK)
                frames = s.recv_multipart()
                assert len(frames) == 1 and len(frames[0]) < 16_000
                assert len(from_json(frames[0]).machines) == 3
        with stranger(zmq.DEALER, served.watched_at, keys) as s:
            s.send(bytes(10_000))  # a frame that long ends the connection
            s.send(ASK)
        with stranger(zmq.SUB, served.watched_at, keys) as s:
            assert not s.poll(100)
        assert sorted(peer.id for peer in served.server.rounds.peers.values()) == [1, 2]
    assert "does not allow" not in served.text


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (as_watcher(OTHERS), "has other keys than this token"),
        (PeerKeys(as_peer(KEYS).server, as_watcher(OTHERS).secret), "refuses the key of this to"),
        (None, "wants a join token"),
    ],
)
def test_a_watcher_without_the_right_token_is_told(keys: PeerKeys | None, told: str) -> None:
    with (
        Served(watched=True, keys=KEYS) as served,
        Connection(Address(LOOPBACK, served.watched_at, keys)) as watcher,
        pytest.raises(UserError, match=told),
    ):
        until(watcher, lambda s: False)


def watch_socket(context: zmq.Context[zmq.Socket[bytes]], port: int) -> WatchSocket:
    return WatchSocket(context, port, [LOOPBACK], [], None, None)


def flood(s: zmq.Socket[bytes]) -> None:
    for _ in range(1_000_000):
        s.send(bytes(200), zmq.NOBLOCK)


def test_who_floods_the_server_is_held_back() -> None:
    """The server reads a few messages at a time, and keeps a few: then nothing more is taken."""
    with Served() as served, zmq.Context() as context:
        watching = watch_socket(context, served.watched_at)
        with stranger(zmq.DEALER, served.watched_at) as s:
            s.sndhwm = 100
            s.sndbuf = 2**14
            s.send(ASK)
            assert watching._socket.poll(int(1000 * DEADLINE_S))
            with pytest.raises(zmq.Again):
                flood(s)
            taken = 0

            def receive(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
                nonlocal taken
                taken += 1
                return received(socket)

            received = sockets.receive
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sockets, "receive", receive)
                watching.due(0.0)
            assert 0 < taken <= READ_PER_TICK
            assert watching._socket.poll(int(1000 * DEADLINE_S)), "the rest waits"
        watching.close()


def test_no_more_watchers_than_it_can_serve() -> None:
    with Served() as served, zmq.Context() as context:
        watching = watch_socket(context, served.watched_at)
        with zmq.Context() as others:
            dealers = [others.socket(zmq.DEALER) for _ in range(WATCHERS_MAX + 5)]
            for s in dealers:
                s.linger = 0
                s.connect(f"tcp://{LOOPBACK}:{served.watched_at}")
                s.send(ASK)
                assert watching._socket.poll(int(1000 * DEADLINE_S))
                watching.due(0.0)
            assert len(watching._asked) == WATCHERS_MAX
            watching.send(b"a status", 0.0)
            assert dealers[0].recv() == b"a status"
            watching.send(b"", 100.0)
            assert not watching._asked, "who does not ask again is forgotten"
            for s in dealers:
                s.close()
        watching.close()


def test_a_run_whose_port_for_watching_is_taken_goes_on_without() -> None:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        s.listen()
        port = s.getsockname()[1]
        with Served(watched=True, watch_port=port, num_workers=1, num_epochs=1) as served:
            crew = Crew(served, perceptron, Noise(32))
            served.wait(crew.start(1, 8), served.end)
    assert f"this run cannot be watched: port {port} is taken" in served.text
    assert "watch_port=PORT chooses another port" in served.text


def test_two_servers_whose_ports_are_two_apart_can_both_be_watched() -> None:
    """As people number them, who know that a server takes its port and the next one."""
    with Served(watched=True) as one, Served(watched=True, port=one.port + 2) as other:
        for served in (one, other):
            with Connection(Address(LOOPBACK, served.watched_at)) as watcher:
                until(watcher, lambda s: s.run == "test")


# ------------------------------------------------------------------------------ where it looks


def test_where_a_run_is_watched() -> None:
    keys = Keys.new()
    watch, join = keys.watch_token("10.1.2.3", 7000), keys.token("10.1.2.3", 65000)
    several = keys.watch_token("10.1.2.3,10.1.3.3", 7000)
    assert to_watch(None, 65432, None, None) == [Address(LOOPBACK, 64930)]
    assert to_watch(None, 65432, 7001, None) == [Address(LOOPBACK, 7001)]
    assert to_watch(None, 65432, None, watch) == [Address("10.1.2.3", 7000, as_watcher(keys))]
    assert to_watch(None, 65432, None, join) == [Address("10.1.2.3", 64498, as_peer(keys))]
    hosts = [there.host for there in to_watch(None, 65432, None, several)]
    assert hosts == ["10.1.2.3", "10.1.3.3"]
    (there,) = to_watch("10.9.9.9", 65432, None, several)
    assert there.host == "10.9.9.9"
    for given in (LOOPBACK, None):  # this is the server's machine
        here = keys.watch_token(f"10.1.2.3,{LOOPBACK}", 7000)
        assert to_watch(given, 65432, None, here) == [Address(LOOPBACK, 7000)]
    assert to_watch("10.1.2.3", 65432, None, None, security="none")[0].keys is None
    with pytest.raises(UserError, match="watching it takes a token"):
        to_watch("10.1.2.3", 65432, None, None)
    with pytest.raises(UserError, match="it lets you watch, not take part"):
        decode(watch)
    assert as_watcher(keys) != as_watcher(Keys.new())
    assert (SERVER, OBSERVER) == (0, -1) and STATUS_BYTES_MAX >= 2**16


def test_of_several_addresses_one_that_answers_is_taken() -> None:
    """At the first nobody listens, at the second a server with other keys."""
    with Served(watched=True, keys=KEYS) as served, Served(watched=True, keys=OTHERS) as other:
        ports = [free_port(), other.watched_at, served.watched_at]
        ways = [Address(LOOPBACK, port, as_watcher(KEYS)) for port in ports]
        with Connection(*ways) as watcher:
            until(watcher, lambda s: True)
            assert list(watcher._open) == ways[2:], "the others are left alone from now on"
            assert all(str(port) in str(watcher) for port in ports)
        with Connection(*ways[:2]) as watcher:
            while len(watcher._open) > 1:
                assert watcher.poll(0.1) is None
            assert list(watcher._open) == ways[:1], "there may be a server later"


def test_another_address_is_taken_where_the_server_does_not_answer_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paramserver.watch.connection.SILENT_S", 0.2)
    port = free_port()
    with Served(watched=True) as served:
        watcher = Connection(Address(LOOPBACK, served.watched_at), Address(LOOPBACK, port))
        until(watcher, lambda s: True)
    with watcher, zmq.Context() as context:
        watching = watch_socket(context, port)
        for _ in range(int(20 * DEADLINE_S)):
            if watching.due(0.0):
                break
            watcher.poll(0.05)
        watching.send(to_json(Status(run="here", made_at=1.0)), 0.0)
        until(watcher, lambda s: s.run == "here")
        watching.close()
